"""Auto-PGD (Croce & Hein 2020, section 3): momentum, and a step size that each image finds for itself."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from manifold_defense.attacks.contract import attack
from manifold_defense.attacks.norms import column, geometry
from manifold_defense.attacks.objective import (
    Objective,
    attack_loss,
    clearly,
    likely_wrong,
    logits_and_gradient,
    margins,
    towards,
)
from manifold_defense.modes import evaluation_mode
from manifold_defense.types import Classifier, Norm

# Weight of the new step against the last move, and the share of steps that must raise the loss for the
# step size to stay. The paper has 0.75 for both; with a momentum of 0.9 the DLR loss left 77.1 % of the
# hardened digits and 21.7 % of the others, with 0.75 78.7 and 21.5 % (benchmarks/attacks.py, 256 images).
_MOMENTUM, _RAISED = 0.9, 0.75
_BOX = (0.0, 1.0)


@attack
def apgd(
    model: Classifier,
    x: Tensor,
    y: Tensor,
    *,
    norm: Norm = "linf",
    eps: float = 0.3,
    steps: int = 40,
    restarts: int = 1,
    random_start: bool = True,
    loss: str = "ce",
    target_classes: int = 0,
    targeted: bool = False,
    stop_early: bool = True,
    seed: int = 0,
) -> Tensor:
    """APGD from images (N, C, H, W) with labels y (N,), the targets if `targeted`.

    With `target_classes` every restart is one for each of so many of the wrong classes that are most
    likely at x, on the targeted ratio of logits instead of `loss` (APGD-T). Returns, of all iterates
    and the clean image, the one with the highest margin; otherwise as `pgd`.
    """
    if steps < 1 or restarts < 1:
        raise ValueError(f"expected steps ≥ 1, restarts ≥ 1, got {steps}, {restarts}")
    if target_classes and targeted:
        raise ValueError("target_classes: expected 0 for an attack that is targeted already")
    shape = geometry(norm)
    rng = torch.Generator().manual_seed(seed)
    x = x.detach()
    best = x.clone()
    with evaluation_mode(model):
        with torch.no_grad():
            logits = model(x)
        best_margin = margins(logits, y, targeted).to(x.dtype)
        found = clearly(best_margin, logits)
        runs: Sequence[Tensor | None] = likely_wrong(logits, y, target_classes) or [None]
        for _ in range(restarts):
            for target in runs:
                start = x + shape.sample(x, eps, rng) if random_start else x
                start = shape.place(x, start, eps, _BOX)
                active = (~found if stop_early else torch.ones_like(found)).nonzero().squeeze(1)
                climb = _Climb(model, norm, eps, steps, loss, targeted, stop_early)
                to = None if target is None else target[active]
                after, margin, over = climb.run(x[active], y[active], start[active], to)
                better = margin > best_margin[active]
                best[active[better]] = after[better]
                best_margin[active[better]] = margin[better]
                found[active] |= over
    return best


def _checkpoints(steps: int) -> set[int]:
    """After which steps the step size is looked at: 22 %, then ever closer, at least 6 % apart."""
    shares, gap = [0.0, 0.22], 0.22
    while shares[-1] < 1:
        gap = max(gap - 0.03, 0.06)
        shares.append(shares[-1] + gap)
    return {math.ceil(round(share * steps, 6)) for share in shares[1:]}


class _Climb:
    """One run from one start, on all images at once; an image leaves it when it is clearly fooled."""

    def __init__(
        self,
        model: Classifier,
        norm: Norm,
        eps: float,
        steps: int,
        loss: str,
        targeted: bool,
        stop_early: bool,
    ) -> None:
        self.model, self.shape, self.eps, self.steps = model, geometry(norm), eps, steps
        self.loss, self.targeted, self.stop_early = loss, targeted, stop_early

    def run(
        self, x: Tensor, y: Tensor, start: Tensor, target: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Images (M, C, H, W) of the highest margin, those margins, and which are clearly fooled, (M,)."""
        shape, checkpoints, since = self.shape, _checkpoints(self.steps), 0
        best = x.clone()
        best_margin = torch.full((len(x),), -torch.inf).to(x)
        over = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        active = torch.arange(len(x), device=x.device)
        # One row an active image: where it is and was, the point of the highest loss so far and what is
        # known of it, the step size, how often the loss rose since the last look, what that look found.
        at, before, peak = start, start, start
        slope = torch.zeros_like(x)
        highest, last = (torch.full_like(best_margin, -torch.inf) for _ in range(2))
        size = torch.full_like(best_margin, 2 * self.eps)
        rises = torch.zeros_like(best_margin)
        kept, seen = torch.zeros_like(best_margin), torch.full_like(best_margin, -torch.inf)
        for step in range(self.steps + 1):
            if len(active) == 0:
                break
            label, goal = y[active], None if target is None else target[active]
            logits, value, gradient = self._look(at, label, goal, last=step == self.steps)
            margin = margins(logits, label, self.targeted).to(x.dtype)
            better = margin > best_margin[active]
            best[active[better]], best_margin[active[better]] = at[better], margin[better]
            over[active] |= clearly(margin, logits)
            if step == self.steps:
                break
            if step:
                rises = rises + (value > last)
            last = value
            new_peak = value > highest
            highest = torch.where(new_peak, value, highest)
            wide = column(new_peak, at)
            peak, slope = torch.where(wide, at, peak), torch.where(wide, gradient, slope)
            if step in checkpoints:
                # Halve where the loss rose too rarely, or where neither it nor the step size has
                # changed since the last look, and go back to the best point (eqs. 4 and 5).
                halve = (rises < _RAISED * (step - since)) | ((kept == size) & (seen == highest))
                kept, seen = size, highest
                size = torch.where(halve, size / 2, size)
                wide = column(halve, at)
                at, gradient = torch.where(wide, peak, at), torch.where(wide, slope, gradient)
                before = torch.where(wide, at, before)
                rises, since = torch.zeros_like(rises), step
            clean = x[active]
            reached = shape.step(clean, at, gradient, column(size, at), self.eps, _BOX)
            weight = _MOMENTUM if step else 1.0
            moved = at + weight * (reached - at) + (1 - weight) * (at - before)
            before, at = at, shape.place(clean, moved, self.eps, _BOX)
            if self.stop_early and bool(over[active].any()):
                on = ~over[active]
                active = active[on]
                at, before, peak, slope = at[on], before[on], peak[on], slope[on]
                highest, last, size, rises = highest[on], last[on], size[on], rises[on]
                kept, seen = kept[on], seen[on]
        return best, best_margin, over

    def _look(
        self, at: Tensor, y: Tensor, target: Tensor | None, *, last: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Logits (M, K) at the images, what is climbed (M,), and its gradient (not at the last step)."""
        objective = self._objective(y, target)
        if last:
            with torch.no_grad():
                logits = self.model(at)
            gradient = torch.zeros_like(at)
        else:
            logits, gradient = logits_and_gradient(self.model, at, y, objective, self.targeted)
        # A loss that is not a number is none.
        value = objective(logits).to(at.dtype).nan_to_num(-torch.inf, torch.inf, -torch.inf)
        return logits, value, gradient.nan_to_num(0, 0, 0)

    def _objective(self, y: Tensor, target: Tensor | None) -> Objective:
        if target is not None:
            return lambda logits: towards(logits, y, target)
        return lambda logits: attack_loss(logits, y, self.loss, self.targeted)
