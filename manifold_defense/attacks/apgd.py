"""Auto-PGD (Croce & Hein 2020, section 3): momentum, and a step size that each image finds for itself."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from manifold_defense.attacks.contract import attack
from manifold_defense.attacks.highest import Highest
from manifold_defense.attacks.norms import Geometry, column, geometry
from manifold_defense.attacks.objective import (
    Objective,
    goals,
    logits_and_gradient,
    objective,
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
    shape = geometry(norm)
    rng = torch.Generator().manual_seed(seed)
    climb = _Climb(model, shape, eps, steps, loss, targeted)
    x = x.detach()
    with evaluation_mode(model):
        with torch.no_grad():
            logits = model(x)
        best = Highest(x, y, logits, targeted=targeted, stop_early=stop_early)
        runs = goals(logits, y, target_classes, targeted)
        for _ in range(restarts):
            for goal in runs:
                start = x + shape.sample(x, eps, rng) if random_start else x
                climb.run(best, x, y, shape.place(x, start, eps, _BOX), goal)
    return best.image


def _checkpoints(steps: int) -> set[int]:
    """After which steps the step size is looked at: 22 %, then ever closer, at least 6 % apart."""
    shares, gap = [0.0, 0.22], 0.22
    while shares[-1] < 1:
        gap = max(gap - 0.03, 0.06)
        shares.append(shares[-1] + gap)
    return {math.ceil(round(share * steps, 6)) for share in shares[1:]}


class _State(NamedTuple):
    """Of M images that are climbed: one row each."""

    at: Tensor  # (M, C, H, W) where it is
    before: Tensor  # and was
    peak: Tensor  # the point of the highest loss so far
    slope: Tensor  # the gradient there
    highest: Tensor  # (M,) the loss there
    last: Tensor  # the loss of the step before
    size: Tensor  # of the next step
    rises: Tensor  # how often the loss rose since the last look at the step size
    kept: Tensor  # the step size and the highest loss that this look found
    seen: Tensor


class _Climb(NamedTuple):
    """One run from one start, on all images at once."""

    model: Classifier
    shape: Geometry
    eps: float
    steps: int
    loss: str
    targeted: bool

    def run(self, best: Highest, x: Tensor, y: Tensor, start: Tensor, goal: Tensor | None) -> None:
        """Climb from images (N, C, H, W), towards classes (N,) if given, what `best` still seeks."""
        checkpoints, since, rows = _checkpoints(self.steps), 0, best.sought()
        at, none = start[rows], x.new_zeros(len(rows))
        least, size = none - torch.inf, none + 2 * self.eps
        state = _State(at, at, at, torch.zeros_like(at), least, least, size, none, none, least)
        for step in range(self.steps + 1):
            if len(rows) == 0:
                break
            climbed = objective(y[rows], self.loss, self.targeted, None if goal is None else goal[rows])
            logits, value, gradient = self._look(state.at, y[rows], climbed, last=step == self.steps)
            best.keep(rows, state.at, logits)
            if step == self.steps:
                break
            looks = step in checkpoints
            state = self._step(state, x[rows], value, gradient, step, step - since if looks else 0)
            since = step if looks else since
            going = best.going(rows)
            if not bool(going.all()):
                rows, state = rows[going], _State(*(entry[going] for entry in state))

    def _step(
        self, s: _State, clean: Tensor, value: Tensor, gradient: Tensor, step: int, looked_over: int
    ) -> _State:
        """After a step from where the loss is `value` (M,); before it the last `looked_over` are judged."""
        at, before, size, kept, seen = s.at, s.before, s.size, s.kept, s.seen
        rises = s.rises + (value > s.last) if step else s.rises
        new_peak = value > s.highest
        highest = torch.where(new_peak, value, s.highest)
        wide = column(new_peak, at)
        peak, slope = torch.where(wide, at, s.peak), torch.where(wide, gradient, s.slope)
        if looked_over:
            # Halve where the loss rose too rarely, or where neither it nor the step size has
            # changed since the last look, and go back to the best point (eqs. 4 and 5).
            halve = (rises < _RAISED * looked_over) | ((kept == size) & (seen == highest))
            kept, seen = size, highest
            size = torch.where(halve, size / 2, size)
            wide = column(halve, at)
            at, gradient = torch.where(wide, peak, at), torch.where(wide, slope, gradient)
            before = torch.where(wide, at, before)
            rises = torch.zeros_like(rises)
        reached = self.shape.step(clean, at, gradient, column(size, at), self.eps, _BOX)
        weight = _MOMENTUM if step else 1.0
        moved = at + weight * (reached - at) + (1 - weight) * (at - before)
        after = self.shape.place(clean, moved, self.eps, _BOX)
        return _State(after, at, peak, slope, highest, value, size, rises, kept, seen)

    def _look(
        self, at: Tensor, y: Tensor, climbed: Objective, *, last: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Logits (M, K) at the images, what is climbed (M,), and its gradient (not at the last step)."""
        if last:
            with torch.no_grad():
                logits = self.model(at)
            gradient = torch.zeros_like(at)
        else:
            logits, gradient = logits_and_gradient(self.model, at, y, climbed, self.targeted)
        # A loss that is not a number is none.
        value = climbed(logits).to(at.dtype).nan_to_num(-torch.inf, torch.inf, -torch.inf)
        return logits, value, gradient.nan_to_num(0, 0, 0)
