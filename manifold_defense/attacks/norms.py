"""The geometry of a threat: what an attack needs to know of a norm, in three small functions.

Perturbations δ are (N, C, H, W); eps and step are in pixel units.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Geometry(NamedTuple):
    size: Callable[[Tensor], Tensor]  # ‖δ‖ of each image, (N,)
    steepest: Callable[[Tensor], Tensor]  # the δ with ‖δ‖ = 1 that gains most along a gradient
    project: Callable[[Tensor, float], Tensor]  # the nearest δ with ‖δ‖ ≤ eps
    sample: Callable[[Tensor, float, torch.Generator], Tensor]  # δ uniform in the ball of radius eps


def _l2(delta: Tensor) -> Tensor:
    size: Tensor = torch.linalg.vector_norm(delta.flatten(1), dim=1)
    return size


def _column(values: Tensor, like: Tensor) -> Tensor:
    return values.view(-1, *[1] * (like.dim() - 1))


def _l2_steepest(gradient: Tensor) -> Tensor:
    # Scaled first: the gradient of a confident model is tiny, and no less a direction. Zero stays zero.
    largest = gradient.flatten(1).abs().amax(1) if gradient.numel() else gradient.new_ones(len(gradient))
    scaled = gradient / _column(torch.where(largest > 0, largest, 1.0), gradient)
    return scaled / _column(_l2(scaled).clamp(min=1e-12), gradient)


def _l2_project(delta: Tensor, eps: float) -> Tensor:
    # A hair inside the ball, so that rounding never leaves it.
    scale = eps * (1 - 1e-6) / _l2(delta).clamp(min=1e-12)
    return delta * _column(scale.clamp(max=1.0), delta)


def _l2_sample(like: Tensor, eps: float, rng: torch.Generator) -> Tensor:
    direction = torch.randn(like.shape, generator=rng).to(like)
    radius = torch.rand(len(like), generator=rng).to(like) ** (1 / max(like.shape[1:].numel(), 1))
    return _l2_project(direction / _column(_l2(direction).clamp(min=1e-12), like) * eps, eps) * _column(
        radius, like
    )


GEOMETRIES = {
    "linf": Geometry(
        size=lambda delta: delta.flatten(1).abs().amax(1),
        steepest=torch.sign,
        project=lambda delta, eps: delta.clamp(-eps, eps),
        sample=lambda like, eps, rng: eps * (2 * torch.rand(like.shape, generator=rng).to(like) - 1),
    ),
    "l2": Geometry(
        size=_l2,
        steepest=_l2_steepest,
        project=_l2_project,
        sample=_l2_sample,
    ),
}


def _changed(delta: Tensor) -> Tensor:
    """Whether each pixel of δ (N, C, H, W) is changed in any channel, (N, H, W)."""
    return (delta != 0).any(1)


def _patch_side(delta: Tensor) -> Tensor:
    """Side of the smallest square that holds every changed pixel, (N,); 0 if none is."""
    changed = _changed(delta)

    def extent(line: Tensor) -> Tensor:
        """From the first to the last True of each row of (N, L)."""
        places = torch.arange(1, line.shape[1] + 1, device=line.device) * line
        first = torch.where(line, places, line.shape[1] + 1).amin(1)
        return torch.where(line.any(1), places.amax(1) - first + 1, 0)

    return torch.maximum(extent(changed.any(2)), extent(changed.any(1))).to(delta.dtype)


def sizes(norm: str, delta: Tensor) -> Tensor:
    """How large each perturbation (N, C, H, W) is in the unit of a threat's `eps`, (N,).

    A corruption has no size of this kind: 0.
    """
    if norm in GEOMETRIES:
        return GEOMETRIES[norm].size(delta)
    if norm == "l0":
        return _changed(delta).flatten(1).sum(1).to(delta.dtype)
    if norm == "patch":
        return _patch_side(delta)
    if norm == "corruption":
        return delta.new_zeros(len(delta))
    raise ValueError(f"norm: expected linf, l2, l1, l0, patch or corruption, got {norm!r}")


def geometry(norm: str) -> Geometry:
    """The geometry named `norm`, or a ValueError that names the known ones."""
    if norm not in GEOMETRIES:
        raise ValueError(f"norm: expected one of {', '.join(GEOMETRIES)}, got {norm!r}")
    return GEOMETRIES[norm]
