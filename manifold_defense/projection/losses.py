"""How far an image is from the input, in the eyes of a projection.

Each loss takes the residual r = G(z) − x as (M, P) and a radius in pixel units, and returns (M,): a
sum over pixels, never a mean over images. All are convex and have the one minimum value 0.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Loss = Callable[[Tensor, float], Tensor]


def squared(r: Tensor, radius: float) -> Tensor:
    """`‖r‖²`; the radius has no part in it."""
    return r.square().sum(1)


def huber(r: Tensor, radius: float) -> Tensor:
    """`r²` up to `radius`, and its tangent beyond (Huber 1964): a few wrong pixels pull less."""
    size = r.abs()
    return torch.where(size <= radius, r.square(), radius * (2 * size - radius)).sum(1)


def dead_zone_linf(r: Tensor, radius: float) -> Tensor:
    """`Σ max(0, |r| − radius)²`: the squared distance of G(z) to the L∞ ball around the input.

    Every point of the range within `radius` explains the input equally well, if the attacker may
    have moved each pixel as far.
    """
    return (r.abs() - radius).clamp(min=0).square().sum(1)


def dead_zone_l2(r: Tensor, radius: float) -> Tensor:
    """`max(0, ‖r‖ − radius)²`: the same for the L2 ball."""
    # The constant keeps the root differentiable at r = 0, where the loss is flat anyway.
    size = (r.square().sum(1) + 1e-24).sqrt()
    return (size - radius).clamp(min=0).square()


LOSSES: dict[str, Loss] = {
    "squared": squared,
    "huber": huber,
    "dead_zone_linf": dead_zone_linf,
    "dead_zone_l2": dead_zone_l2,
}
