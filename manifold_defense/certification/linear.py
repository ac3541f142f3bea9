"""A linear classifier, of which everything is known: the oracle of attacks and of other proofs."""

from __future__ import annotations

import torch
from torch import Tensor

from manifold_defense.certification.certificates import Certificates, nearest_boundary
from manifold_defense.types import Ball

_DUAL: dict[Ball, float] = {"linf": 1.0, "l2": 2.0, "l1": torch.inf}
_BISECTIONS = 100


def linear_worst_margin(
    weight: Tensor,
    bias: Tensor,
    x: Tensor,
    y: Tensor,
    *,
    norm: Ball = "linf",
    eps: float = 0.3,
    bounds: tuple[float, float] = (0.0, 1.0),
) -> Tensor:
    """Least `Z_y − max_{i≠y} Z_i` (N,) of `Z = W x + b` within eps of images (N, …) and inside `bounds`.

    Exact: no attack goes lower, and one that is good enough gets there. W (K, P), b (K,), y (N,);
    without bounds it is `min_j m_j − eps ‖w_y − w_j‖` in the dual norm. Computed in float64.
    """
    if norm not in _DUAL:
        raise ValueError(f"norm: expected one of {', '.join(_DUAL)}, got {norm!r}")
    if not eps >= 0:
        raise ValueError(f"eps: expected at least 0, got {eps}")
    weight, bias, flat = weight.double(), bias.double(), x.flatten(1).double()
    lowest, highest = (bounds[0] - flat).clamp(max=0), (bounds[1] - flat).clamp(min=0)
    logits = flat @ weight.T + bias
    worst = flat.new_full((len(flat),), torch.inf)
    for other in range(len(weight)):
        slope = weight[y] - weight[other]
        margin = logits.gather(1, y.unsqueeze(1)).squeeze(1) - logits[:, other]
        fall = _steepest_fall(slope, lowest, highest, norm, eps)
        worst = torch.where(y == other, worst, torch.minimum(worst, margin + fall))
    return worst


def _steepest_fall(slope: Tensor, lowest: Tensor, highest: Tensor, norm: Ball, eps: float) -> Tensor:
    """`min ⟨slope, δ⟩` (N,) over `‖δ‖ ≤ eps` and lowest ≤ δ ≤ highest, all (N, P), lowest ≤ 0 ≤ highest."""
    if norm == "linf":
        down, up = lowest.clamp(min=-eps), highest.clamp(max=eps)
        return torch.where(slope > 0, slope * down, slope * up).sum(1)
    if norm == "l1":
        # Steepest pixel first, as far as it goes: the fractional knapsack.
        room = torch.where(slope > 0, -lowest, highest)
        rate, order = slope.abs().sort(1, descending=True)
        room = room.gather(1, order)
        before = room.cumsum(1) - room
        return -(rate * torch.minimum(room, (eps - before).clamp(min=0))).sum(1)
    # δ = clip(−t slope) for the one t at which it is as long as eps, or as far as the box lets it go.
    short = slope.new_zeros(len(slope), 1)
    # No pixel can go further than this along its slope; where the slope is 0 it need not.
    reach = torch.where(slope > 0, -lowest, highest) / slope.abs().clamp(min=1e-300)
    long = torch.where(slope == 0, 0, reach).amax(1, keepdim=True).clamp(max=1e300)
    for _ in range(_BISECTIONS):
        middle = (short + long) / 2
        inside = torch.clamp(-middle * slope, lowest, highest).norm(dim=1, keepdim=True) <= eps
        short, long = torch.where(inside, middle, short), torch.where(inside, long, middle)
    return (slope * torch.clamp(-long * slope, lowest, highest)).sum(1)


def linear_certificates(weight: Tensor, bias: Tensor, x: Tensor, *, norm: Ball = "l2") -> Certificates:
    """`min_j m_j / ‖w_y − w_j‖` in the dual norm: how far the boundary is, bounds of pixels left aside."""
    weight, bias, flat = weight.double(), bias.double(), x.flatten(1).double()
    slopes = torch.linalg.vector_norm(weight[:, None] - weight[None], ord=_DUAL[norm], dim=2)
    return nearest_boundary(flat @ weight.T + bias, slopes)
