"""Ascent along the gradient, from several starts, in whatever geometry: what PGD in all norms shares."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from manifold_defense.attacks.highest import Highest
from manifold_defense.attacks.norms import geometry
from manifold_defense.attacks.objective import goals, logits_and_gradient, objective
from manifold_defense.modes import evaluation_mode
from manifold_defense.types import Classifier, Norm


class Climb(NamedTuple):
    """How long is climbed, what, and when it ends.

    The loss `both` is `ce` and `margin` by turns, a restart each. With `stop_early` an image leaves the batch
    once it clearly fools the model. With `target_classes` a restart is a run towards each of so many of the
    wrong classes that are most likely at x, on the targeted ratio of logits instead of the loss.
    """

    steps: int
    restarts: int
    loss: str
    targeted: bool
    stop_early: bool
    target_classes: int = 0


def ascend(
    model: Classifier,
    x: Tensor,
    y: Tensor,
    start: Callable[[Tensor], Tensor],
    move: Callable[[Tensor, Tensor, Tensor, float], Tensor],
    climb: Climb,
) -> Tensor:
    """From images (N, C, H, W) with labels y (N,), the iterate of the highest margin, the clean one included.

    `start(rows)` gives the images (M, C, H, W) where a restart begins for these rows, and
    `move(clean, at, gradient, left)` the next ones of those that are still climbing, inside the threat;
    `left` falls linearly from 1 to 0 over the steps.
    """
    steps, restarts, loss, targeted, stop_early, target_classes = climb
    if steps < 1 or restarts < 1:
        raise ValueError(f"expected steps ≥ 1, restarts ≥ 1, got {steps}, {restarts}")
    losses = ("ce", "margin") if loss == "both" else (loss,)
    x = x.detach()
    with evaluation_mode(model):
        with torch.no_grad():
            clean = model(x)
        best = Highest(x, y, clean, targeted=targeted, stop_early=stop_early)
        runs = goals(clean, y, target_classes, targeted)
        for restart, goal in product(range(restarts), runs):
            active = best.sought()
            if len(active) == 0:
                break
            current = x.clone()
            current[active] = start(active)
            for step in range(steps + 1):
                if len(active) == 0:
                    break
                at = current[active]
                if step < steps:
                    loss = losses[restart % len(losses)]
                    climbed = objective(y[active], loss, targeted, None if goal is None else goal[active])
                    logits, gradient = logits_and_gradient(model, at, y[active], climbed, targeted)
                    # Where the gradient is not finite there is no direction; the next restart may differ.
                    up = gradient.nan_to_num(0, 0, 0)
                    current[active] = move(x[active], at, up, 1 - step / steps)
                else:
                    with torch.no_grad():
                        logits = model(at)
                best.keep(active, at, logits)
                active = active[best.going(active)]
    return best.image


def ascend_in_ball(
    model: Classifier,
    x: Tensor,
    y: Tensor,
    start: Callable[[Tensor], Tensor],
    climb: Climb,
    *,
    norm: Norm,
    eps: float,
    longest: float,
    bounds: tuple[float, float] = (0.0, 1.0),
) -> Tensor:
    """`ascend` in the ball of radius eps around x and in `bounds`, the steps falling from `longest` to 0."""
    shape = geometry(norm)

    def move(clean: Tensor, at: Tensor, gradient: Tensor, left: float) -> Tensor:
        return shape.step(clean, at, gradient, longest * left, eps, bounds)

    return ascend(model, x, y, start, move, climb)
