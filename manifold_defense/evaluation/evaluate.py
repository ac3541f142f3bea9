"""Attack defences, keep every image's outcome, and report the worst over attacks, views and threats.

N images, M of them met by a job. What counts are the predictions of the deployed model on the
images that an attack returned; an image is robust to a threat only if it is classified correctly
when clean and after every attack of that threat in every view, its images for other defences
included.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from manifold_defense.attacks.norms import sizes
from manifold_defense.attacks.objective import correct, evaluation_mode
from manifold_defense.evaluation.meter import COSTS, Meter
from manifold_defense.evaluation.statistics import wilson
from manifold_defense.evaluation.suite import NO_GRADIENT, AttackConfig, Defence, Job, jobs
from manifold_defense.randomised import seeded
from manifold_defense.rejection import defended
from manifold_defense.types import Threat

WORST, UNION = "worst", "union"
# standard: each attack meets the images that all before it left; full: every attack meets all images.
Mode = Literal["standard", "full"]


class Outcome(NamedTuple):
    """What became of the images that a job met."""

    met: Tensor  # (M,) int64, which images
    prediction: Tensor  # (M,) int64
    score: Tensor  # (M,) share of the draws in which the deployed model was right: 0 or 1 unless it draws
    size: Tensor  # (M,) of the perturbation, in the unit of the threat (0 if clean)
    cost: Tensor  # (M, 3) of the attack: images passed forward, backward, and drawn by the generator
    adversarial: Tensor  # (B, C, H, W), the images of score 0, in order

    @property
    def broken(self) -> Tensor:
        """(B,) int64, which images `adversarial` belong to."""
        return self.met[self.score == 0]


@dataclass(frozen=True)
class Row:
    """One line of the results table; `attack`, `view` and `norm` as named by the job.

    robust_accuracy  share of all n images: in mode standard what this attack and all before it
                     left, in mode full what it alone left
    trained          whether the defence was trained for this threat
    masked           whether a check found that the figure is no robustness figure
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
    forward: float = 0.0
    backward: float = 0.0
    generator: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Evaluation:
    """All that an evaluation found; `outcomes` are in the order in which the jobs were run."""

    mode: Mode
    n: int
    outcomes: list[tuple[Job, Outcome]]
    rows: list[Row]
    worst: Mapping[tuple[str, Threat], Tensor] = field(default_factory=dict)  # (N,) scores
    broken: Mapping[tuple[str, Threat], Tensor] = field(default_factory=dict)  # (B, C, H, W), what fooled it

    def transfers(self) -> list[dict[str, Any]]:
        """Who fools whom: of the images that broke `source`, the share that fools `target`."""
        return [
            {
                "source": job.source,
                "target": job.defence.name,
                "norm": job.threat.norm,
                "eps": job.threat.eps,
                "images": len(outcome.score),
                "fooled": float(1 - outcome.score.mean()),
            }
            for job, outcome in self.outcomes
            if job.source is not None and job.threat is not None and len(outcome.score)
        ]

    def marked(self, masked: set[str]) -> Evaluation:
        """The same, the rows of the named defences marked as no robustness figures."""
        return replace(self, rows=[replace(r, masked=r.defence in masked) for r in self.rows])


class Store(Protocol):
    """Where finished jobs are kept, so that an interrupted evaluation goes on."""

    def get(self, job: Job, met: Tensor) -> Outcome | None: ...

    def put(self, job: Job, outcome: Outcome) -> None: ...


Compute = Callable[[Callable[[int, slice], tuple[Tensor, ...]], int], tuple[Tensor, ...]]


def in_batches(size: int) -> Compute:
    """Run `work(chunk, images)` on chunks of `size`, in this process; a sharding one fits as well."""

    def compute(work: Callable[[int, slice], tuple[Tensor, ...]], n: int) -> tuple[Tensor, ...]:
        parts = [work(i, slice(first, first + size)) for i, first in enumerate(range(0, n, size))]
        return tuple(torch.cat(column) for column in zip(*parts, strict=True))

    return compute


def attack_images(job: Job, x: Tensor, y: Tensor, seed: int, meter: Meter | None = None) -> Tensor:
    """The images (N, C, H, W) that the job's attack makes of x; clean jobs return x.

    Raises RuntimeError if an attack left its threat or [0, 1]: such a figure would be void.
    """
    if job.attack is None or job.threat is None or job.view is None:
        return x
    attacked = job.defence.model if job.view == NO_GRADIENT else job.defence.attacked[job.view]
    attack = job.attack.bind(job.threat, seed=seed, transfer=job.view == "unaware", model=attacked)
    with seeded(attacked, 2 * seed):
        x_adv = attack(meter.counted(attacked) if meter else attacked, x, y)
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
            prediction = defence.predict(x)
            return prediction, defended(prediction, y, attacked=attacked).float()
        logits = model(x)
        score = correct(logits, y).float()
        for _ in range(defence.draws - 1):
            score = score + correct(model(x), y).float()
    return logits.argmax(1), score / defence.draws


@torch.no_grad()
def run_job(job: Job, x: Tensor, y: Tensor, seed: int) -> Outcome:
    """Attack images (N, C, H, W) with labels (N,) and judge the result by the deployed model."""
    meter = Meter(job.defence.model)
    with meter:
        x_adv = attack_images(job, x, y, seed, meter)
    prediction, score = judge(job.defence, x_adv, y, attacked=job.threat is not None, seed=seed)
    size = sizes(job.threat.norm if job.threat else "l2", x_adv - x)
    cost = torch.tensor(meter.counts).div(max(len(x), 1)).expand(len(x), len(COSTS))
    parts = (torch.arange(len(x)), prediction, score, size, cost, x_adv[score == 0])
    return Outcome(*(part.detach().cpu().clone() for part in parts))


def evaluate(
    defences: Sequence[Defence],
    attacks: Sequence[AttackConfig],
    threats: Sequence[Threat],
    x: Tensor,
    y: Tensor,
    *,
    mode: Mode = "standard",
    seed: int = 0,
    compute: Compute | None = None,
    store: Store | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Evaluation:
    """Every attack on every defence for every threat: images (N, C, H, W), labels (N,).

    Cheap attacks come before dear ones, so that in mode `standard` few images are left for the
    latter. At the end every defence meets the images that broke the others. Names of defences must
    differ.
    """
    names = [defence.name for defence in defences]
    if len(set(names)) < len(names):
        raise ValueError(f"defences: expected different names, got {', '.join(names)}")
    compute = compute or in_batches(max(len(x), 1))
    clean: dict[str, Tensor] = {}
    worst: dict[tuple[str, Threat], Tensor] = {}
    found: dict[tuple[str, Threat], dict[int, Tensor]] = {}  # image -> what broke it first
    outcomes: list[tuple[Job, Outcome]] = []
    rows: list[Row] = []
    todo = list(jobs(defences, attacks, threats))
    pairs = _transfers(defences, threats)
    total = len(todo) + len(pairs)

    def meet(job: Job, met: Tensor, work: Callable[[Tensor, int], Outcome]) -> Outcome:
        """The outcome of the images `met` (M,), from the store if it is there."""
        outcome = store.get(job, met) if store is not None else None
        if outcome is None:

            def part(chunk: int, images: slice) -> tuple[Tensor, ...]:
                return tuple(work(met[images], chunk))

            outcome = Outcome(*compute(part, len(met))) if len(met) else _empty(x)
            outcome = outcome._replace(met=met)
            if store is not None:
                store.put(job, outcome)
        outcomes.append((job, outcome))
        on_progress(len(outcomes), total)
        return outcome

    def settle(job: Job, outcome: Outcome) -> None:
        """Enter what a job found into the worst of its threat, and add its row."""
        assert job.threat is not None
        key = (job.defence.name, job.threat)
        left = worst[key].clone()
        left[outcome.met] = torch.minimum(left[outcome.met], outcome.score)
        alone = clean[job.defence.name].clone()
        alone[outcome.met] = torch.minimum(alone[outcome.met], outcome.score)
        for i, image in zip(outcome.broken.tolist(), outcome.adversarial, strict=True):
            found[key].setdefault(i, image)
        worst[key] = left
        rows.append(_row(job, left if mode == "standard" else alone, outcome.cost.sum(0)))

    for job in todo:
        name = job.defence.name

        def attacked(at: Tensor, chunk: int, job: Job = job) -> Outcome:
            return run_job(job, x[at], y[at], seed + chunk)

        if job.threat is None:
            clean[name] = meet(job, torch.arange(len(x)), attacked).score
            rows.append(_row(job, clean[name]))
            continue
        key = (name, job.threat)
        worst.setdefault(key, clean[name])
        found.setdefault(key, {})
        met = (worst[key] if mode == "standard" else clean[name]).nonzero().squeeze(1)
        settle(job, meet(job, met, attacked))
    for job in pairs:
        assert job.source is not None
        assert job.threat is not None
        pool = found.get((job.source, job.threat), {})
        met = torch.tensor([i for i in sorted(pool) if clean[job.defence.name][i] > 0], dtype=torch.long)

        def try_on(at: Tensor, chunk: int, job: Job = job, pool: Mapping[int, Tensor] = pool) -> Outcome:
            x_adv = torch.stack([pool[i] for i in at.tolist()]).to(x)
            return _transferred(job, x[at], y[at], x_adv, seed + chunk)

        settle(job, meet(job, met, try_on))
    rows += list(_worst_rows(defences, worst))
    broken = {key: torch.stack(list(images.values())) for key, images in found.items() if images}
    return Evaluation(mode, len(x), outcomes, rows, worst, broken)


def _transferred(job: Job, x: Tensor, y: Tensor, x_adv: Tensor, seed: int) -> Outcome:
    """The verdict of the job's defence on images (N, C, H, W) that were made for another."""
    assert job.threat is not None
    prediction, score = judge(job.defence, x_adv, y, attacked=True, seed=seed)
    size = sizes(job.threat.norm, x_adv - x)
    cost = torch.zeros(len(x), len(COSTS))
    parts = (torch.arange(len(x)), prediction, score, size, cost, x_adv[score == 0])
    return Outcome(*(part.detach().cpu().clone() for part in parts))


def _transfers(defences: Sequence[Defence], threats: Sequence[Threat]) -> list[Job]:
    return [
        Job(target, None, "transfer", threat, source.name)
        for target in defences
        for threat in threats
        for source in defences
        if source is not target
    ]


def _empty(x: Tensor) -> Outcome:
    none = torch.zeros(0, dtype=torch.long)
    return Outcome(none, none, none.float(), none.float(), torch.zeros(0, len(COSTS)), x[:0].detach().cpu())


def _row(job: Job, score: Tensor, cost: Tensor | None = None) -> Row:
    made = _scored(job.defence.name, job.label, job.view, score)
    if job.threat is not None:
        made = replace(
            made, norm=job.threat.norm, eps=job.threat.eps, trained=job.threat in job.defence.trained
        )
    return replace(made, **dict(zip(COSTS, cost.tolist(), strict=True))) if cost is not None else made


def _scored(defence: str, attack: str, view: str | None, score: Tensor) -> Row:
    n, robust = len(score), float(score.sum())
    interval = wilson(round(robust), n)
    accuracy = robust / n if n else float("nan")
    return Row(defence, attack, view, None, 0.0, n, accuracy, interval.low, interval.high)


def _worst_rows(defences: Sequence[Defence], worst: Mapping[tuple[str, Threat], Tensor]) -> Iterator[Row]:
    """Per defence: the share of images that survive everything of each threat, and of all threats."""
    for defence in defences:
        own = {threat: score for (name, threat), score in worst.items() if name == defence.name}
        for threat, score in own.items():
            yield replace(
                _scored(defence.name, WORST, "all", score),
                norm=threat.norm,
                eps=threat.eps,
                trained=threat in defence.trained,
            )
        if len(own) > 1:
            yield replace(
                _scored(defence.name, WORST, "all", torch.stack(list(own.values())).amin(0)), norm=UNION
            )
