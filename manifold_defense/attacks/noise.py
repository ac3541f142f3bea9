"""Random perturbations: the control that every gradient attack must beat."""

from __future__ import annotations

import torch
from torch import Tensor

from manifold_defense.attacks.norms import geometry
from manifold_defense.attacks.objective import attack_loss, evaluation_mode, fooled
from manifold_defense.types import Classifier, Norm


@torch.no_grad()
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
    """The worst of `draws` perturbations of full size: signs of eps (L∞), random directions (L2)."""
    shape = geometry(norm)
    rng = torch.Generator().manual_seed(seed)
    best = x.detach().clone()
    best_loss = torch.full((len(x),), -torch.inf, device=x.device)
    found = torch.zeros(len(x), dtype=torch.bool, device=x.device)
    with evaluation_mode(model):
        for _ in range(draws):
            direction = shape.steepest(torch.randn(x.shape, generator=rng).to(x))
            tried = (x + shape.project(eps * direction, eps)).clamp(0, 1)
            logits = model(tried)
            success, value = fooled(logits, y, targeted), attack_loss(logits, y, "margin", targeted)
            better = (success & ~found) | ((success == found) & (value > best_loss))
            best[better], best_loss[better] = tried[better], value[better]
            found |= success
    return best
