"""Towards the features of an image of another class (Sabour, Cao, Faghri & Fleet 2016)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from manifold_defense.attacks.contract import attack
from manifold_defense.attacks.highest import Highest
from manifold_defense.attacks.norms import geometry
from manifold_defense.attacks.objective import input_gradient
from manifold_defense.modes import evaluation_mode
from manifold_defense.types import Classifier, Norm

_BOX = (0.0, 1.0)


@attack
def feature_matching(
    model: Classifier,
    x: Tensor,
    y: Tensor,
    *,
    features: Callable[[Tensor], Tensor],
    candidates: Tensor | tuple[Tensor, Tensor] | None = None,
    norm: Norm = "linf",
    eps: float = 0.3,
    step_size: float | None = None,
    steps: int = 40,
    restarts: int = 1,
    random_start: bool = True,
    targeted: bool = False,
    stop_early: bool = True,
    seed: int = 0,
) -> Tensor:
    """`min ‖φ(x') − φ(c)‖²` in the ball around images (N, C, H, W), c an image of another class than y (N,).

    `features` φ takes images to (N, ...) and is all that is differentiated: the filter's G(z*), say,
    where the classifier behind it, or the choice between them, masks its own gradient. `candidates` are
    images (M, C, H, W), and their labels (M,) or else as the model classifies them; by default the batch
    itself, and then an image's result depends on its neighbours. Restart r aims at the candidate that is r-th
    nearest in φ; targets take candidates of their class alone, and an image that has none comes back as
    it was. Of all iterates that with the highest margin of `model` is kept. Steps as in `pgd`.
    """
    shape = geometry(norm)
    if steps < 1 or restarts < 1:
        raise ValueError(f"expected steps ≥ 1, restarts ≥ 1, got {steps}, {restarts}")
    step_size = eps if step_size is None else step_size
    rng = torch.Generator().manual_seed(seed)
    x = x.detach()
    with evaluation_mode(model, features):
        with torch.no_grad():
            logits = model(x)
            mine = features(x).flatten(1)
            if candidates is None:
                goals, allowed = mine, _allowed(logits.argmax(1), y, targeted)
                allowed.fill_diagonal_(False)
            else:
                drawn = candidates if isinstance(candidates, Tensor) else candidates[0]
                # Not all at once: they may be far more than the images attacked.
                parts = drawn.split(max(len(x), 1))
                goals = torch.cat([features(part).flatten(1) for part in parts])
                if isinstance(candidates, Tensor):
                    labels = torch.cat([model(part).argmax(1) for part in parts])
                else:
                    labels = candidates[1]
                allowed = _allowed(labels, y, targeted)
        order, available = _nearest(mine, goals, allowed)
        best = Highest(x, y, logits, targeted=targeted, stop_early=stop_early)
        hopeful = (available > 0).nonzero().squeeze(1)
        for restart in range(restarts):
            start = shape.sample(x, eps, rng) if random_start else torch.zeros_like(x)
            current = (x + shape.project(start, eps)).clamp(0, 1)
            active = hopeful[best.going(hopeful)]
            for step in range(steps + 1):
                if len(active) == 0:
                    break
                at = current[active]
                with torch.no_grad():
                    best.keep(active, at, model(at))
                if step < steps:
                    aim = order[active, restart % available[active]]
                    pull = -_gradient(features, at, goals[aim]).nan_to_num(0, 0, 0)
                    length = step_size * (1 - step / steps)
                    current[active] = shape.step(x[active], at, pull, length, eps, _BOX)
                active = active[best.going(active)]
    return best.image


def _allowed(labels: Tensor, y: Tensor, targeted: bool) -> Tensor:
    """Which candidates, labelled (M,), each image may aim at, (N, M)."""
    same = labels.unsqueeze(0) == y.unsqueeze(1)
    return same if targeted else ~same


def _nearest(mine: Tensor, goals: Tensor, allowed: Tensor) -> tuple[Tensor, Tensor]:
    """Indices (N, M) of the goals (M, F), the nearest allowed one first, and how many are allowed, (N,)."""
    distance = torch.cdist(mine, goals, compute_mode="donot_use_mm_for_euclid_dist")
    distance = torch.where(allowed, distance.nan_to_num(torch.inf), torch.inf)
    return distance.argsort(dim=1, stable=True), allowed.sum(1)


def _gradient(features: Callable[[Tensor], Tensor], at: Tensor, goal: Tensor) -> Tensor:
    """Gradient in the images (N, C, H, W) of their squared distance to goals (N, F)."""
    with torch.enable_grad():
        at = at.detach().requires_grad_(True)
        distance = (features(at).flatten(1) - goal).square().sum()
        gradient = input_gradient(distance, at)
    return gradient
