"""PGD that fools the classifier and passes the detector (Bryniarski et al., ICLR 2022)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor

from manifold_defense.attacks.contract import attack
from manifold_defense.attacks.lagrange import raised, unit
from manifold_defense.attacks.norms import column, geometry
from manifold_defense.attacks.objective import (
    clearly,
    fooled,
    input_gradient,
    logits_and_gradient,
    margins,
)
from manifold_defense.attacks.window import best_drawn, draw_windows, pieces_for
from manifold_defense.modes import evaluation_mode
from manifold_defense.types import Classifier, Norm

Method = Literal["lagrangian", "orthogonal", "selective"]
# How far below the threshold, as a share of it, an image must be: rounding does not bring it back.
_INSIDE = 1e-4
_BOX = (0.0, 1.0)
# Dual ascent, and the weight of the violation itself: on linear problems they end at the optimum.
_ASCENT, _AUGMENTED = 1.0, 5.0


@attack
def detector_aware(
    model: Classifier,
    x: Tensor,
    y: Tensor,
    *,
    residual: Callable[[Tensor], Tensor],
    threshold: float,
    norm: Norm = "linf",
    eps: float = 0.3,
    step_size: float | None = None,
    steps: int = 100,
    restarts: int = 1,
    tries: int = 20,
    loss: str = "margin",
    method: Method = "lagrangian",
    targeted: bool = False,
    stop_early: bool = True,
    pieces: Tensor | None = None,
    seed: int = 0,
) -> Tensor:
    """`max margin` in the ball around images (N, C, H, W) with labels y (N,), s.t. `residual ≤ threshold`.

    `residual` takes images to (N,) and is differentiated; what it gives above `threshold` is refused.
    Returned is, of all iterates that both fool the model and pass, that of the highest margin; the clean
    image where there is none. The first restart starts at the image, which should pass, the further
    ones by turns at a random point of the ball, at the worst of `tries` windows and at that of as many
    pieces of other images, `pieces` as in `window_pgd`: at L2 these break what the others leave. Each step
    takes a gradient of `loss` and one of `residual`, both scaled to length 1, and combines them by `method`:

    lagrangian  g − w r, with a weight w ≥ 0 for each image, by dual ascent
    selective   g until the model is fooled, then −r until the image passes, then g again
    orthogonal  the same, each less its part along the other, so that no step undoes the last
    """
    shape = geometry(norm)
    if steps < 1 or restarts < 1:
        raise ValueError(f"expected steps ≥ 1, restarts ≥ 1, got {steps}, {restarts}")
    if tries < 1:
        raise ValueError(f"tries: expected at least 1, got {tries}")
    if method not in get_args(Method):
        raise ValueError(f"method: expected one of {', '.join(get_args(Method))}, got {method!r}")
    step_size = 5 * eps / steps if step_size is None else step_size
    limit = threshold - _INSIDE * abs(threshold) if math.isfinite(threshold) else threshold
    rng = torch.Generator().manual_seed(seed)
    x = x.detach()
    best, draw_piece = x.clone(), pieces_for(x, pieces, draw_windows)

    def place(clean: Tensor, drawn: Tensor) -> Tensor:
        return shape.place(clean, drawn, eps, (0.0, 1.0))

    with evaluation_mode(model, residual):
        best_margin = x.new_full((len(x),), -torch.inf)
        found = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        for restart in range(restarts):
            multiplier = torch.zeros_like(best_margin)
            active = (~found).nonzero().squeeze(1)
            if len(active) == 0:
                break
            current = x.clone()
            if restart % 3 == 1:
                current = (x + shape.project(shape.sample(x, eps, rng), eps)).clamp(0, 1)
            elif restart:
                draw = draw_windows if restart % 3 == 2 else draw_piece
                current[active] = best_drawn(model, draw, place, x, y, active, tries, targeted, rng)
            for step in range(steps + 1):
                if len(active) == 0:
                    break
                at, clean, label = current[active], x[active], y[active]
                logits, climb = logits_and_gradient(model, at, label, loss, targeted)
                value, leak = _value_and_gradient(residual, at)
                margin = margins(logits, label, targeted)
                wrong, passes = fooled(logits, label, targeted), value <= limit
                better = wrong & passes & (margin > best_margin[active])
                best[active[better]] = at[better]
                best_margin[active[better]] = margin[better].to(best_margin.dtype)
                # In balls: how much of the largest change that eps allows would bring it to the limit.
                reach = (leak * shape.steepest(leak)).flatten(1).sum(1) * eps
                violation = (value - limit) / reach.clamp(min=1e-30)
                weight = raised(multiplier[active], violation, _AUGMENTED)
                multiplier[active] = raised(multiplier[active], violation, _ASCENT)
                direction = _combined(method, unit(climb), unit(leak), weight, wrong & ~passes)
                length = step_size * (1 - step / steps)
                current[active] = shape.step(clean, at, direction, length, eps, _BOX)
                if stop_early:
                    found[active] |= clearly(margin, logits) & passes
                    active = active[~found[active]]
    return best


def _combined(method: str, climb: Tensor, leak: Tensor, weight: Tensor, seen: Tensor) -> Tensor:
    """The direction to go from unit gradients of loss and residual (N, C, H, W); `seen` (N,) is fooled but
    refused."""
    if method == "lagrangian":
        return climb - column(weight, climb) * leak
    if method == "orthogonal":
        along = column((climb * leak).flatten(1).sum(1), climb)
        climb, leak = unit(climb - along * leak), unit(leak - along * climb)
    return torch.where(column(seen, climb), -leak, climb)


def _value_and_gradient(residual: Callable[[Tensor], Tensor], at: Tensor) -> tuple[Tensor, Tensor]:
    """The residual (N,) and its gradient in the images (N, C, H, W)."""
    with torch.enable_grad():
        at = at.detach().requires_grad_(True)
        value = residual(at)
        gradient = input_gradient(value, at)
    return value.detach(), gradient.nan_to_num(0, 0, 0)
