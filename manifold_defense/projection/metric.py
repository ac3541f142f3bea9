"""The shape of the range, averaged over it: coordinates in which a projection is well conditioned.

M latents drawn from the prior   D latent size   P pixels   J = ∂G/∂z (P, D).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from manifold_defense.projection.jacobian import Jacobian
from manifold_defense.types import Generator


class Metric(NamedTuple):
    """Coordinates w with `‖J z‖² ≈ ‖w‖²` on average: `w = z @ factor`, `z = w @ inverse`; both (D, D)."""

    factor: Tensor
    inverse: Tensor


def mean_metric(generator: Generator, like: Tensor, *, samples: int = 32, seed: int = 0) -> Metric:
    """The Cholesky factor of the mean of `JᵀJ` over the prior, on the device and in the type of `like`.

    In these coordinates the Gauss-Newton matrix of the squared error is 2·I on average, so that a
    solver needs no search for the length of its steps. Costs `samples · D` forward passes, once for
    a generator.
    """
    dim, rng = generator.latent_dim, torch.Generator().manual_seed(seed)
    with torch.inference_mode(False), torch.no_grad():  # kept, and used in other modes than this caller's
        z = torch.randn(samples, dim, generator=rng).to(like.device, like.dtype)
        wide = torch.promote_types(z.dtype, torch.float32)  # the least that factors are found in
        mean, identity = torch.zeros(dim, dim).to(z.device, wide), torch.eye(dim).to(z)
        for part in z.split(16):
            products = Jacobian(generator, part)
            columns = [products.along(axis.expand_as(part)).flatten(1) for axis in identity]
            jacobian = torch.stack(columns, 2).to(wide)  # (m, P, D)
            mean += (jacobian.mT @ jacobian).sum(0) / samples
        # Directions that the generator ignores have no scale of their own: a hundredth of the average.
        ridge = 0.01 * mean.diagonal().mean().clamp(min=1e-12)
        factor, failed = torch.linalg.cholesky_ex(mean + ridge * identity)
        if failed or not factor.isfinite().all():
            raise ValueError("generator: expected a finite Jacobian at latents of the prior")
        inverse = torch.linalg.solve_triangular(factor, identity.to(wide), upper=False)
    return Metric(factor.to(z), inverse.to(z))
