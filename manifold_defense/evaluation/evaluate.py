"""Attack defences, keep every image's outcome, and report the worst over attacks and views.

N images. The predictions of a job are those of the deployed model on the images that the attack
returned; an image counts as robust to a threat only if it is classified correctly when clean and
under every attack of that threat in every view.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from manifold_defense.attacks import geometry
from manifold_defense.attacks.objective import correct, evaluation_mode
from manifold_defense.evaluation.statistics import wilson
from manifold_defense.evaluation.suite import AttackConfig, Defence, Job, jobs
from manifold_defense.types import Threat

WORST = "worst"


class Outcome(NamedTuple):
    """What became of each image under one job."""

    prediction: Tensor  # (N,) int64
    correct: Tensor  # (N,) bool
    size: Tensor  # (N,) norm of the perturbation, in the threat's norm (0 if clean)


@dataclass(frozen=True)
class Row:
    """One line of the results table; `attack`, `view` and `norm` as named by the job."""

    defence: str
    attack: str
    view: str | None
    norm: str | None
    eps: float
    n: int
    robust_accuracy: float
    ci_low: float
    ci_high: float

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def attack_images(job: Job, x: Tensor, y: Tensor, seed: int) -> Tensor:
    """The images (N, C, H, W) that the job's attack makes of x; clean jobs return x.

    Raises RuntimeError if an attack left its ball or [0, 1]: such a figure would be void.
    """
    if job.attack is None or job.threat is None or job.view is None:
        return x
    attack = job.attack.bind(job.threat, seed=seed, transfer=job.view == "unaware")
    x_adv = attack(job.defence.attacked[job.view], x, y)
    size = geometry(job.threat.norm).size(x_adv - x)
    rounding = 1e-4 * job.threat.eps + 1e-7 * x.shape[1:].numel() ** 0.5
    inside = (x_adv >= 0).all() and (x_adv <= 1).all() and (size <= job.threat.eps + rounding).all()
    if not inside:
        raise RuntimeError(f"{job.name}: the attack left [0, 1] or its ball of {job.threat.eps:g}")
    return x_adv


@torch.no_grad()
def run_job(job: Job, x: Tensor, y: Tensor, seed: int) -> Outcome:
    """Attack images (N, C, H, W) with labels (N,) and classify the result with the deployed model."""
    x_adv = attack_images(job, x, y, seed)
    with evaluation_mode(job.defence.model):
        logits = job.defence.model(x_adv)
    size = geometry(job.threat.norm if job.threat else "l2").size(x_adv - x)
    return Outcome(logits.argmax(1).cpu(), correct(logits, y).cpu(), size.cpu())


def row(job: Job, outcome: Outcome) -> Row:
    return _row(
        job.defence.name,
        job.attack.label if job.attack else "clean",
        job.view,
        job.threat,
        outcome.correct,
    )


def _row(defence: str, attack: str, view: str | None, threat: Threat | None, robust_images: Tensor) -> Row:
    n, robust = len(robust_images), int(robust_images.sum())
    interval = wilson(robust, n)
    norm, eps = (threat.norm, threat.eps) if threat else (None, 0.0)
    accuracy = robust / n if n else float("nan")
    return Row(defence, attack, view, norm, eps, n, accuracy, interval.low, interval.high)


def worst_rows(outcomes: Iterable[tuple[Job, Outcome]]) -> list[Row]:
    """Per defence and threat, the share of images that survive everything, clean images included."""
    clean: dict[str, Tensor] = {}
    survivors: dict[tuple[str, Threat], Tensor] = {}
    for job, outcome in outcomes:
        if job.threat is None:
            clean[job.defence.name] = outcome.correct
            continue
        key = (job.defence.name, job.threat)
        survivors[key] = survivors.get(key, torch.ones_like(outcome.correct)) & outcome.correct
    return [
        _row(defence, WORST, "all", threat, alive & clean.get(defence, torch.ones_like(alive)))
        for (defence, threat), alive in survivors.items()
    ]


def evaluate(
    defences: Sequence[Defence],
    attacks: Sequence[AttackConfig],
    threats: Sequence[Threat],
    x: Tensor,
    y: Tensor,
    *,
    seed: int = 0,
) -> list[Row]:
    """Everything on everything, in one process and one batch: images (N, C, H, W), labels (N,)."""
    outcomes = [(job, run_job(job, x, y, seed)) for job in jobs(defences, attacks, threats)]
    return [row(job, outcome) for job, outcome in outcomes] + worst_rows(outcomes)
