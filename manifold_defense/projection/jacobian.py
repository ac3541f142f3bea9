"""Products with the generator's Jacobian J = ∂G/∂z, for a batch of latents at once."""

from __future__ import annotations

import torch
from torch import Tensor

from manifold_defense.types import Generator


class Jacobian:
    """J at latents z (N, D), as two products; the forward pass is shared by all of them.

    Both are reverse-mode: `J d` is the derivative of `Jᵀ w` in w, so that a generator needs second
    derivatives and no forward-mode ones.
    """

    def __init__(self, generator: Generator, z: Tensor) -> None:
        with torch.inference_mode(False), torch.enable_grad():
            self.z = z.detach().clone().requires_grad_(True)
            self.image = generator(self.z)  # (N, C, H, W), with its graph
            self._cotangent = torch.zeros_like(self.image, requires_grad=True)
            (self._pulled,) = torch.autograd.grad(self.image, self.z, self._cotangent, create_graph=True)

    def transposed(self, w: Tensor) -> Tensor:
        """`Jᵀ w` for w (N, C, H, W): (N, D)."""
        product: Tensor = torch.autograd.grad(self.image, self.z, w, retain_graph=True)[0]
        return product

    def along(self, d: Tensor) -> Tensor:
        """`J d` for d (N, D): (N, C, H, W)."""
        product: Tensor = torch.autograd.grad(self._pulled, self._cotangent, d, retain_graph=True)[0]
        return product

    def stretch(self, directions: int = 4) -> Tensor:
        """An estimate of the mean of diag(JᵀJ), (N, 1), from so many fixed random directions."""
        rng = torch.Generator().manual_seed(0)
        total = self.z.new_zeros(len(self.z), 1)
        for _ in range(directions):
            d = torch.randn(self.z.shape[1], generator=rng).to(self.z)
            d = d / torch.linalg.vector_norm(d)
            total += self.along(d.expand_as(self.z)).flatten(1).square().sum(1, keepdim=True) / directions
        return total
