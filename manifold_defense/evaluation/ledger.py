"""What an evaluation knows of each image so far, and the rows of the results table that say so."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from manifold_defense.evaluation.defence import CHECKED, Defence
from manifold_defense.evaluation.meter import COSTS
from manifold_defense.evaluation.outcome import Outcome
from manifold_defense.evaluation.plan import Job
from manifold_defense.evaluation.statistics import wilson
from manifold_defense.types import Threat

WORST, UNION = "worst", "union"
# standard: each attack meets the images that all before it left; full: every attack meets all images.
Mode = Literal["standard", "full"]


@dataclass(frozen=True)
class Row:
    """One line of the results table; `attack`, `view` and `norm` as named by the job.

    robust_accuracy  share of all n images: in mode standard what this attack and all before it
                     left, in mode full what it alone left
    trained          whether the defence was trained for this threat, or for a larger one of its norm
    masked           whether a check found that the figure is no robustness figure
    settled          whether nothing was still found at the end: by the last two of an attack's rounds, or by
                     the checks; more of the same may lower a figure that has not
    forward …        cost of the attack for all images together
    """

    defence: str
    attack: str
    view: str | None
    norm: str | None
    eps: float
    n: int
    robust_accuracy: float
    ci_low: float
    ci_high: float
    trained: bool = False
    masked: bool = False
    settled: bool = True
    forward: float = 0.0
    backward: float = 0.0
    generator: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class Ledger:
    """What is known so far of every defence's images, and the rows that say so."""

    def __init__(self, mode: Mode) -> None:
        self.mode = mode
        self.clean: dict[str, Tensor] = {}  # (N,) scores
        self.worst: dict[tuple[str, Threat], Tensor] = {}  # (N,) scores
        self.broken: dict[tuple[str, Threat], dict[int, Tensor]] = {}  # image -> what broke it first
        self.rows: list[Row] = []
        self._unsettled = set[tuple[str, Threat]]()

    def left(self, job: Job) -> Tensor:
        """Which images (M,) the job is to meet: those right when clean, or still right."""
        return self._before(job).nonzero()[:, 0]

    def standing(self, job: Job) -> list[int]:
        """Which images the job's defence still gets right under its threat."""
        return [int(i) for i in self._scores(job).nonzero()[:, 0]]

    def pool(self, job: Job) -> dict[int, Tensor]:
        """What broke the source of a transfer, of the images that its target gets right when clean."""
        assert job.source is not None
        assert job.threat is not None
        own, found = job.source == job.defence.name, dict[int, Tensor]()
        for (name, threat), images in self.broken.items():
            if name == job.source and (job.threat.holds(threat) if own else threat == job.threat):
                found |= images
        right = self.clean[job.defence.name] > 0
        return {i: found[i] for i in sorted(found) if right[i]}

    def enter(self, job: Job, outcome: Outcome) -> None:
        name = job.defence.name
        if job.threat is None:
            self.clean[name] = outcome.score
            self._add(job, outcome.score, outcome)
            return
        given, before = self._before(job), self._scores(job)
        alone = _lowered(given, outcome)
        if not _settled(job, outcome, before):
            self._unsettled.add((name, job.threat))
        self.worst[name, job.threat] = _lowered(before, outcome)
        known = self.broken.setdefault((name, job.threat), {})
        for i, image in zip(outcome.broken.tolist(), outcome.adversarial, strict=True):
            known.setdefault(i, image)
        self._add(job, alone, outcome, _settled(job, outcome, given))

    def worst_rows(self, defences: Sequence[Defence]) -> Iterator[Row]:
        """Of each defence: what survives everything of each threat, and of all threats."""
        for defence in defences:
            own = {threat: score for (name, threat), score in self.worst.items() if name == defence.name}
            for threat, score in own.items():
                yield replace(
                    _row(defence, WORST, "all", score, threat), settled=self._settled(defence, score, threat)
                )
            if len(own) > 1:
                union = torch.stack(list(own.values())).amin(0)
                settled = self._settled(defence, union, *own)
                yield replace(_row(defence, WORST, "all", union), norm=UNION, settled=settled)

    def _settled(self, defence: Defence, score: Tensor, *threats: Threat) -> bool:
        """Whether nothing was found at the end that lowered scores (N,), or nothing is left to be found."""
        return not score.any() or not any((defence.name, threat) in self._unsettled for threat in threats)

    def _add(self, job: Job, score: Tensor, outcome: Outcome, settled: bool = True) -> None:
        cost = dict(zip(COSTS, outcome.cost.sum(0).tolist(), strict=True))
        row = _row(job.defence, job.label, job.view, score, job.threat)
        self.rows.append(replace(row, settled=settled, **cost))

    def _before(self, job: Job) -> Tensor:
        """Scores (N,) that the job is to lower."""
        return self._scores(job) if self.mode == "standard" else self.clean[job.defence.name]

    def _scores(self, job: Job) -> Tensor:
        assert job.threat is not None
        return self.worst.get((job.defence.name, job.threat), self.clean[job.defence.name])


def _settled(job: Job, outcome: Outcome, before: Tensor) -> bool:
    """Whether nothing was found at the end that lowers scores `before` (N,), or nothing is left of them."""
    if job.attack and job.rounds < job.attack.rounds:
        return not _lowered(before, outcome).any()
    known = before[outcome.met]
    at_the_end = outcome.late | (outcome.score < known) & (job.view == CHECKED)
    return not (at_the_end & (known > 0)).any()


def _lowered(scores: Tensor, outcome: Outcome) -> Tensor:
    """The scores (N,), no higher than what the images that were met came to."""
    lowered = scores.clone()
    lowered[outcome.met] = torch.minimum(lowered[outcome.met], outcome.score)
    return lowered


def _row(defence: Defence, attack: str, view: str | None, score: Tensor, threat: Threat | None = None) -> Row:
    """Of scores (N,)."""
    n, robust = len(score), float(score.sum())
    interval = wilson(round(robust), n)
    accuracy = robust / n if n else float("nan")
    norm, eps = (threat.norm, threat.eps) if threat else (None, 0.0)
    trained = threat is not None and any(known == threat or known.holds(threat) for known in defence.trained)
    return Row(
        defence.name, attack, view, norm, eps, n, accuracy, interval.low, interval.high, trained=trained
    )
