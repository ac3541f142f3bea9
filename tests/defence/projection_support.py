"""What tests of the projection project: images far from any range, and a smooth generator."""

from typing import Any

import torch
from torch import Tensor, nn


def images(n: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """(N, 1, 8, 8), uniform and so far from any range."""
    return torch.rand(n, 1, 8, 8, generator=torch.Generator().manual_seed(seed), dtype=dtype)


class Curved(nn.Module):
    """A smooth generator in float64, and with `invert` an encoder that needs no training."""

    def __init__(self, latent_dim: int = 3) -> None:
        super().__init__()
        self.latent_dim, self.image_shape = latent_dim, (1, 8, 8)
        rng = torch.Generator().manual_seed(3)
        self.inner = torch.randn(latent_dim, 12, generator=rng, dtype=torch.float64)
        self.outer = torch.randn(12, 64, generator=rng, dtype=torch.float64) / 2

    def forward(self, z: Tensor) -> Tensor:
        return torch.sigmoid(torch.tanh(z @ self.inner) @ self.outer).unflatten(1, self.image_shape)

    def invert(self, x: Tensor) -> Tensor:
        return torch.sin(x.flatten(1) @ self.outer.T @ self.inner.T / 8)


def projector(linear: Any) -> Tensor:
    """`A (AᵀA)⁻¹ Aᵀ` (P, P)."""
    a = linear.matrix.detach()
    return a @ torch.linalg.solve(a.T @ a, a.T)


def input_gradient(model: nn.Module, x: Tensor) -> Tensor:
    """Of the first logit of each image, in the images."""
    x = x.detach().requires_grad_(True)
    return torch.autograd.grad(model(x)[:, 0].sum(), x)[0]
