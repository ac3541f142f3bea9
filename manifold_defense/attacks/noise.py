"""Random perturbations: the control that every gradient attack must beat."""

from __future__ import annotations

import torch
from torch import Tensor

from manifold_defense.attacks.contract import attack
from manifold_defense.attacks.norms import geometry
from manifold_defense.attacks.objective import margins
from manifold_defense.modes import evaluation_mode
from manifold_defense.types import Classifier, Norm


@torch.no_grad()
@attack
def noise(
    model: Classifier,
    x: Tensor,
    y: Tensor,
    *,
    norm: Norm = "linf",
    eps: float = 0.3,
    draws: int = 10,
    targeted: bool = False,
    seed: int = 0,
) -> Tensor:
    """The worst of `draws` perturbations: signs of eps (L∞), directions of length eps (L2), then clipped."""
    if draws < 1:
        raise ValueError(f"expected draws ≥ 1, got {draws}")
    shape = geometry(norm)
    rng = torch.Generator().manual_seed(seed)
    x = x.detach()
    with evaluation_mode(model):
        best, best_margin = x.clone(), margins(model(x), y, targeted)
        for _ in range(draws):
            direction = shape.steepest(torch.randn(x.shape, generator=rng).to(x))
            tried = (x + shape.project(eps * direction, eps)).clamp(0, 1)
            margin = margins(model(tried), y, targeted)
            better = margin > best_margin
            best[better], best_margin[better] = tried[better], margin[better]
    return best
