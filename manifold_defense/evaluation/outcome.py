"""Run one job of an evaluation: attack images, let the deployed model judge them, say what it cost."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from manifold_defense.attacks.norms import sizes
from manifold_defense.attacks.objective import correct
from manifold_defense.evaluation.defence import NO_GRADIENT, Defence
from manifold_defense.evaluation.meter import COSTS, Meter
from manifold_defense.evaluation.plan import Job
from manifold_defense.modes import evaluation_mode
from manifold_defense.randomised import seeded
from manifold_defense.rejection import credited


class Outcome(NamedTuple):
    """What became of the images that a job met."""

    met: Tensor  # (M,) int64, which images
    prediction: Tensor  # (M,) int64
    score: Tensor  # (M,) share of the draws in which the deployed model was right: 0 or 1 unless it draws
    size: Tensor  # (M,) of the perturbation, in the unit of the threat (0 if clean)
    cost: Tensor  # (M, 3) of the attack: images passed forward, backward, and drawn by the generator
    late: Tensor  # (M,) bool, broken in the last two of several rounds: the attack has not settled
    adversarial: Tensor  # (B, C, H, W), the images of score 0, in order

    @property
    def broken(self) -> Tensor:
        """(B,) int64, which images `adversarial` belong to."""
        return self.met[self.score == 0]

    @classmethod
    def empty(cls, x: Tensor) -> Outcome:
        """Of a job that met none of the images (N, C, H, W)."""
        none = torch.zeros(0, dtype=torch.long)
        cost = torch.zeros(0, len(COSTS))
        return cls(none, none, none.float(), none.float(), cost, none.bool(), x[:0].detach().cpu())


Compute = Callable[[Callable[[int, slice], tuple[Tensor, ...]], int], tuple[Tensor, ...]]


def in_batches(size: int) -> Compute:
    """Run `work(chunk, images)` on chunks of `size`, in this process; a sharding one fits as well."""

    def compute(work: Callable[[int, slice], tuple[Tensor, ...]], n: int) -> tuple[Tensor, ...]:
        parts = [work(i, slice(first, first + size)) for i, first in enumerate(range(0, n, size))]
        return tuple(torch.cat(column) for column in zip(*parts, strict=True))

    return compute


def attack_images(
    job: Job, x: Tensor, y: Tensor, seed: int, meter: Meter | None = None, others: Tensor | None = None
) -> Tensor:
    """The images (N, C, H, W) that the job's attack makes of x; clean jobs return x.

    `others` (M, C, H, W) are images for attacks that borrow from some, by default those attacked. Raises
    RuntimeError if an attack left its threat or [0, 1]: such a figure would be void.
    """
    if job.attack is None or job.threat is None or job.view is None:
        return x
    attacked = job.defence.answering if job.view == NO_GRADIENT else job.defence.attacked[job.view]
    press = job.defence.presses(job.view)
    counted = meter.counted if meter else None
    attack = job.attack.bind(
        job.threat, seed=seed, press=press, model=attacked, counted=counted, others=others
    )
    with seeded(attacked, 2 * seed):
        x_adv = attack(counted(attacked) if counted else attacked, x, y)
    return held(job, x, x_adv)


def held(job: Job, x: Tensor, x_adv: Tensor) -> Tensor:
    """`x_adv` (N, C, H, W), what the job made of x; RuntimeError if it lies outside [0, 1] or the threat."""
    assert job.threat is not None
    size = sizes(job.threat.norm, x_adv - x)
    rounding = 1e-4 * job.threat.eps + 1e-7 * x.shape[1:].numel() ** 0.5
    inside = (x_adv >= 0).all() and (x_adv <= 1).all() and (size <= job.threat.eps + rounding).all()
    if not inside:
        raise RuntimeError(f"{job.name}: the attack left [0, 1] or its threat of {job.threat.eps:g}")
    return x_adv


@torch.no_grad()
def judge(defence: Defence, x: Tensor, y: Tensor, *, attacked: bool, seed: int) -> tuple[Tensor, Tensor]:
    """Predictions (N,) of the deployed model, −1 for a refusal, and scores (N,).

    A score is the share of the model's draws in which it is right; refusing is, if `attacked`.
    """
    model = defence.model
    with evaluation_mode(model), seeded(model, 2 * seed + 1):  # not the draws that the attack has seen
        if defence.predict is not None:
            drawn = [defence.predict(x) for _ in range(defence.draws)]
            score = torch.stack([credited(labels, y, attacked=attacked) for labels in drawn]).float().mean(0)
            return drawn[0], score
        logits = defence.asked(model, x)
        score = correct(logits, y).float()
        for _ in range(defence.draws - 1):
            score = score + correct(model(x), y).float()
    return logits.argmax(1), score / defence.draws


@torch.no_grad()
def run_job(job: Job, x: Tensor, y: Tensor, seed: int, others: Tensor | None = None) -> Outcome:
    """Attack images (N, C, H, W) with labels (N,) once and judge the result by the deployed model.

    `others` (M, C, H, W) are images for attacks that borrow from some.
    """
    meter = Meter(job.defence)
    with meter:
        x_adv = attack_images(job, x, y, seed, meter, others)
    return _outcome(job, x, x_adv, *_verdict(job, x_adv, y, seed), meter.counts)


def in_rounds(rounds: int, met: Tensor, attacked: Callable[[Tensor, int], Outcome]) -> Outcome:
    """What becomes of images `met` (M,) that are attacked up to so many times, until two in a row break none.

    `attacked` takes those that are left and the number of the round.
    """
    found = attacked(met, 0)
    when = torch.zeros(len(met), dtype=torch.long)
    broke = [int((found.score == 0).sum())]
    for turn in range(1, rounds):
        left = (found.score > 0).nonzero()[:, 0]
        if len(left) == 0 or broke[-2:] == [0, 0]:
            break
        again = attacked(met[left], turn)
        found = _lowered(found, left, again)
        when[left[again.score == 0]] = turn
        broke.append(int((again.score == 0).sum()))
    open_still = rounds > 1 and bool(found.score.any()) and broke[-2:] != [0, 0]
    return found._replace(late=open_still & (found.score == 0) & (when >= len(broke) - 2))


def _lowered(found: Outcome, at: Tensor, again: Outcome) -> Outcome:
    """What is known of images once those `at` (L,) of them were attacked `again`: of each the lower score."""
    lower = again.score < found.score[at]
    images = dict(zip(found.broken.tolist(), found.adversarial, strict=True))
    images |= dict(zip(again.broken.tolist(), again.adversarial, strict=True))
    changed = {
        name: getattr(found, name).index_put((at[lower],), getattr(again, name)[lower])
        for name in ("prediction", "score", "size")
    }
    cost = found.cost.index_put((at,), again.cost, accumulate=True)
    merged = found._replace(**changed, cost=cost)
    ordered = [images[i] for i in merged.broken.tolist()]
    return merged._replace(adversarial=torch.stack(ordered) if ordered else found.adversarial)


def judged(job: Job, x: Tensor, y: Tensor, x_adv: Tensor, seed: int) -> Outcome:
    """The verdict of the job's defence on `x_adv` (N, C, H, W), which were made of x elsewhere."""
    return _outcome(job, x, x_adv, *_verdict(job, x_adv, y, seed), (0.0,) * len(COSTS))


def _verdict(job: Job, x_adv: Tensor, y: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    return judge(job.defence, x_adv, y, attacked=job.threat is not None, seed=seed)


def _outcome(
    job: Job,
    x: Tensor,
    x_adv: Tensor,
    prediction: Tensor,
    score: Tensor,
    costs: tuple[float, ...],
) -> Outcome:
    size = sizes(job.threat.norm if job.threat else "l2", x_adv - x)
    cost = torch.tensor(costs).div(max(len(x), 1)).expand(len(x), len(COSTS))
    late = torch.zeros(len(x), dtype=torch.bool)
    parts = (torch.arange(len(x)), prediction, score, size, cost, late, x_adv[score == 0])
    return Outcome(*(part.detach().cpu().clone() for part in parts))
