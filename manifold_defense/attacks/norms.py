"""The geometry of a threat: what an attack needs to know of a norm, in a few small functions.

Perturbations δ are (N, C, H, W); eps is in pixel units. `bounds` is the box of all pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

Bounds = tuple[float, float]
Length = float | Tensor  # in pixels, of all steps or of each, (N, 1, 1, 1)
Radius = float | Tensor  # of all balls, or of each image's, (N,)


class Geometry(NamedTuple):
    size: Callable[[Tensor], Tensor]  # ‖δ‖ of each image, (N,)
    steepest: Callable[[Tensor], Tensor]  # the δ with ‖δ‖ = 1 that gains most along a gradient
    project: Callable[[Tensor, Radius], Tensor]  # the nearest δ with ‖δ‖ ≤ eps
    sample: Callable[[Tensor, float, torch.Generator], Tensor]  # δ uniform in the ball of radius eps
    # (clean, moved, eps, bounds): an image in the box and in the ball around `clean`, near `moved`
    place: Callable[[Tensor, Tensor, float, Bounds], Tensor]
    # (clean, at, gradient, length, eps, bounds): where a step of `length` up the gradient leads from
    # images `at` in the box and the ball: into both
    step: Callable[[Tensor, Tensor, Tensor, Length, float, Bounds], Tensor]


def _l2(delta: Tensor) -> Tensor:
    size: Tensor = torch.linalg.vector_norm(delta.flatten(1), dim=1)
    return size


def column(values: Tensor, like: Tensor) -> Tensor:
    return values.view(-1, *[1] * (like.dim() - 1))


def _l2_steepest(gradient: Tensor) -> Tensor:
    # Scaled first: the gradient of a confident model is tiny, and no less a direction. Zero stays zero.
    largest = gradient.flatten(1).abs().amax(1) if gradient.numel() else gradient.new_ones(len(gradient))
    scaled = gradient / column(torch.where(largest > 0, largest, 1.0), gradient)
    return scaled / column(_l2(scaled).clamp(min=1e-12), gradient)


def _l2_project(delta: Tensor, eps: Radius) -> Tensor:
    # A hair inside the ball, so that rounding never leaves it.
    scale = eps * (1 - 1e-6) / _l2(delta).clamp(min=1e-12)
    return delta * column(scale.clamp(max=1.0), delta)


def _l2_sample(like: Tensor, eps: float, rng: torch.Generator) -> Tensor:
    direction = torch.randn(like.shape, generator=rng).to(like)
    radius = torch.rand(len(like), generator=rng).to(like) ** (1 / max(like.shape[1:].numel(), 1))
    return _l2_project(direction / column(_l2(direction).clamp(min=1e-12), like) * eps, eps) * column(
        radius, like
    )


def _l1(delta: Tensor) -> Tensor:
    return delta.flatten(1).abs().sum(1)


def _l1_steepest(gradient: Tensor) -> Tensor:
    flat = gradient.flatten(1)
    if flat.numel() == 0:
        return gradient
    largest = flat.abs().argmax(1, keepdim=True)
    return torch.zeros_like(flat).scatter(1, largest, flat.gather(1, largest).sign()).view_as(gradient)


def _l1_project(delta: Tensor, eps: Radius) -> Tensor:
    """Soft threshold at the λ for which `Σ max(|δᵢ| − λ, 0) = eps` (Duchi et al. 2008, figure 1)."""
    flat = delta.flatten(1)
    if flat.numel() == 0:
        return delta
    sorted_sizes = flat.abs().sort(dim=1, descending=True).values
    excess = sorted_sizes.cumsum(1) - (eps.unsqueeze(1) if isinstance(eps, Tensor) else eps)
    ranks = torch.arange(1, flat.shape[1] + 1, dtype=flat.dtype, device=flat.device)
    kept = (sorted_sizes * ranks > excess).sum(1, keepdim=True).clamp(min=1)
    threshold = excess.gather(1, kept - 1) / kept
    # The sum of what is left is eps up to rounding: a hair inside, so that rounding never leaves the ball.
    inside = flat.sign() * (flat.abs() - threshold).clamp(min=0)
    inside = inside * (eps * (1 - 1e-6) / _l1(inside).clamp(min=1e-12)).clamp(max=1.0).unsqueeze(1)
    return torch.where(excess[:, -1:] > 0, inside, flat).view_as(delta)


def _l1_sample(like: Tensor, eps: float, rng: torch.Generator) -> Tensor:
    """Of P + 1 exponential variables that sum to 1, P are uniform under the simplex; signs are fair."""
    n, pixels = len(like), like.shape[1:].numel()
    lengths = -torch.log1p(-torch.rand((n, pixels + 1), generator=rng).to(like)).clamp(max=-1e-12)
    signs = torch.randint(0, 2, (n, pixels), generator=rng).to(like) * 2 - 1
    share = lengths[:, :pixels] / lengths.sum(1, keepdim=True)
    return (eps * (1 - 1e-6) * signs * share).view_as(like)


def free(gradient: Tensor, at: Tensor, bounds: Bounds) -> Tensor:
    """The gradient without the pixels that sit at a bound and would leave the box."""
    low, high = bounds
    blocked = ((at <= low) & (gradient < 0)) | ((at >= high) & (gradient > 0))
    return gradient.masked_fill(blocked, 0)


def _box_then_ball(project: Callable[[Tensor, Radius], Tensor]) -> Callable[..., Tensor]:
    """Placing in the box first: a projection that only shrinks δ cannot leave it, and spends all of eps."""

    def place(clean: Tensor, moved: Tensor, eps: float, bounds: Bounds) -> Tensor:
        return (clean + project(moved.clamp(*bounds) - clean, eps)).clamp(*bounds)

    return place


def _l1_corner(clean: Tensor, gradient: Tensor, eps: float, bounds: Bounds) -> Tensor:
    """The image of the ball and the box that gains most along a gradient.

    The pixels of the largest gradient go to their bound, one after the other, until eps is spent.
    """
    flat, low, high = gradient.flatten(1), *bounds
    room = torch.where(gradient > 0, high - clean, clean - low).flatten(1) * (flat != 0)
    order = flat.abs().argsort(dim=1, descending=True)
    sorted_room = room.gather(1, order)
    left = (eps * (1 - 1e-6) - (sorted_room.cumsum(1) - sorted_room)).clamp(min=0)
    taken = torch.zeros_like(flat).scatter(1, order, torch.minimum(sorted_room, left))
    return clean + (flat.sign() * taken).view_as(clean)


def _l1_step(
    clean: Tensor, at: Tensor, gradient: Tensor, length: Length, eps: float, bounds: Bounds
) -> Tensor:
    """Frank-Wolfe (Jaggi 2013, algorithm 1): the share `length / 2 eps` of the way to the best corner.

    A step along a set number of pixels (SLIDE) ends in perturbations of about that many. This one
    changes as many as the box asks for, and takes back what earlier steps spent badly.
    """
    share = (length * at.new_tensor(0.5 / max(eps, 1e-12))).clamp(max=1)
    # Without a gradient there is no corner, and no reason to turn back.
    known = column((gradient != 0).flatten(1).any(1), at)
    corner = _l1_corner(clean, gradient, eps, bounds)
    return torch.where(known, at + share * (corner - at), at).clamp(*bounds)


def _linf_step(
    clean: Tensor, at: Tensor, gradient: Tensor, length: Length, eps: float, bounds: Bounds
) -> Tensor:
    return _linf_place(clean, at + length * gradient.sign(), eps, bounds)


def _linf_project(delta: Tensor, eps: Radius) -> Tensor:
    most = column(eps, delta) if isinstance(eps, Tensor) else delta.new_tensor(eps)
    return torch.minimum(torch.maximum(delta, -most), most)


def _linf_place(clean: Tensor, moved: Tensor, eps: float, bounds: Bounds) -> Tensor:
    return (clean + (moved - clean).clamp(-eps, eps)).clamp(*bounds)


def _l2_step(
    clean: Tensor, at: Tensor, gradient: Tensor, length: Length, eps: float, bounds: Bounds
) -> Tensor:
    return _l2_place(clean, at + length * _l2_steepest(free(gradient, at, bounds)), eps, bounds)


_l2_place = _box_then_ball(_l2_project)


GEOMETRIES = {
    "linf": Geometry(
        size=lambda delta: delta.flatten(1).abs().amax(1),
        steepest=torch.sign,
        project=_linf_project,
        sample=lambda like, eps, rng: eps * (2 * torch.rand(like.shape, generator=rng).to(like) - 1),
        place=_linf_place,
        step=_linf_step,
    ),
    "l2": Geometry(
        size=_l2,
        steepest=_l2_steepest,
        project=_l2_project,
        sample=_l2_sample,
        place=_l2_place,
        step=_l2_step,
    ),
    "l1": Geometry(
        size=_l1,
        steepest=_l1_steepest,
        project=_l1_project,
        sample=_l1_sample,
        place=_box_then_ball(_l1_project),
        step=_l1_step,
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
