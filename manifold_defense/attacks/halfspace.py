"""The nearest point of a linearised boundary: where the minimum-norm attacks step to.

`nearest_in_halfspace` is the projection of the clean image onto a half-space and the box [0, 1] together,
in closed form in each norm (up to the order of the pixels). DeepFool (Moosavi-Dezfooli et al. 2016)
leaves the box out and clips; FAB (Croce and Hein 2020) solves the same problem.
"""

from __future__ import annotations

import torch
from torch import Tensor

NORMS = ("l0", "l1", "l2", "linf")


def nearest_in_halfspace(x: Tensor, gradient: Tensor, gap: Tensor, norm: str) -> Tensor:
    """The smallest δ in `norm` with `gradient · δ ≥ gap` and x + δ in [0, 1], all (N, C, H, W), gap (N,).

    Where no δ in the box gains as much, the δ that gains most; where gap ≤ 0 or nothing has a slope, 0.
    """
    slope = gradient.abs()
    room = torch.where(gradient > 0, 1 - x, x)  # how far each pixel can go the way that gains
    if norm in ("l2", "linf"):
        moved = _together(slope, room, gap, norm)
    else:
        moved = _one_after_the_other(slope, room, gap, norm)
    return gradient.sign() * moved


def _together(slope: Tensor, room: Tensor, gap: Tensor, norm: str) -> Tensor:
    """Pixel i moves by `min(t·speedᵢ, roomᵢ)`, speed the slope (L2) or 1 (L∞); t by the gain wanted.

    The gain is concave and piecewise linear in t, with a corner where each pixel meets the box.
    """
    flat_slope, flat_room = slope.flatten(1), room.flatten(1)
    speed = flat_slope if norm == "l2" else torch.ones_like(flat_slope)
    # What has no slope gains nothing: it counts as at the box from the start.
    corner = torch.where(flat_slope > 0, flat_room / speed.clamp(min=torch.finfo(slope.dtype).tiny), 0)
    corner, order = corner.sort(1)
    rate = (flat_slope * speed).gather(1, order)
    # Rates of the pixels still free after each corner, from the far end so that the last is exactly zero.
    free = rate.flip(1).cumsum(1).flip(1) - rate
    gain = (rate * corner).cumsum(1) + free.clamp(min=0) * corner
    wanted = gap.unsqueeze(1)
    passed = (gain < wanted).sum(1, keepdim=True)  # corners met before the gain is reached
    padded = [torch.cat([torch.zeros_like(wanted), values], 1) for values in (corner, gain)]
    corner_before, gain_before = (values.gather(1, passed) for values in padded)
    onwards = torch.cat([rate.sum(1, keepdim=True), free], 1).gather(1, passed)
    beyond = (wanted - gain_before).clamp(min=0) / onwards.clamp(min=torch.finfo(slope.dtype).tiny)
    reach = torch.where(onwards > 0, corner_before + beyond, torch.inf)
    moved = torch.minimum(torch.where(flat_slope > 0, reach * speed, 0), flat_room)
    return torch.where(wanted > 0, moved, 0).view_as(slope)


def _one_after_the_other(slope: Tensor, room: Tensor, gap: Tensor, norm: str) -> Tensor:
    """The steepest go first and all the way, the last as far as is needed (L1) or all the way too (L0).

    L0 counts pixels over channels: there the pixel goes first that gains most with all its channels.
    """
    wanted = gap.unsqueeze(1)
    gain = (slope * room).sum(1).flatten(1) if norm == "l0" else (slope * room).flatten(1)
    rank = gain if norm == "l0" else slope.flatten(1)
    order = rank.argsort(dim=1, descending=True, stable=True)
    ranked = gain.gather(1, order)
    before = ranked.cumsum(1) - ranked
    share = ((wanted - before).clamp(min=0) / ranked.clamp(min=torch.finfo(slope.dtype).tiny)).clamp(max=1)
    share = torch.where(ranked > 0, share, 0)
    if norm == "l0":
        share = share.ceil()
    share = torch.zeros_like(share).scatter(1, order, share)
    # (N, H·W) shares of pixels are spread over the channels, (N, C·H·W) ones are not.
    shaped = share.view(len(room), 1, *room.shape[2:]) if norm == "l0" else share.view_as(room)
    return room * shaped
