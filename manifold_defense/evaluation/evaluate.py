"""Attack defences, keep every image's outcome, and report the worst over attacks, views and threats.

N images, M of them met by a job. What counts are the predictions of the deployed model on the
images that an attack returned; an image is robust to a threat only if it is classified correctly
when clean and after every attack of that threat in every view, its images for other defences
included.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import Any, Literal, NamedTuple, Protocol, get_args

import torch
from torch import Tensor

from manifold_defense.attacks.norms import sizes
from manifold_defense.attacks.objective import correct, evaluation_mode
from manifold_defense.evaluation.checks import BALLS, CHECKS, OF_THREAT, Check, convergence, examine
from manifold_defense.evaluation.meter import COSTS, Meter
from manifold_defense.evaluation.statistics import paired, wilson
from manifold_defense.evaluation.suite import NO_GRADIENT, SPECS, AttackConfig, Defence, Job, jobs
from manifold_defense.projection import check_images
from manifold_defense.randomised import seeded
from manifold_defense.rejection import defended
from manifold_defense.types import Classifier, Threat

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
    """All that an evaluation found.

    `outcomes` are in the order in which the jobs were run; `checks` are those for masked gradients.
    """

    mode: Mode
    n: int
    outcomes: list[tuple[Job, Outcome]]
    rows: list[Row]
    checks: list[Check]
    worst: Mapping[tuple[str, Threat], Tensor]  # (N,) scores
    broken: Mapping[tuple[str, Threat], Tensor]  # (B, C, H, W), what first fooled it

    def comparisons(self, before: str, after: str) -> list[dict[str, Any]]:
        """What the defence `after` gained and lost on `before`, for each threat and their union."""
        threats = [threat for name, threat in self.worst if name == before]
        found = []
        for together in ([t] for t in threats) if len(threats) == 1 else (*([t] for t in threats), threats):
            scores = [
                torch.stack([self.worst[name, t] for t in together]).amin(0) for name in (before, after)
            ]
            norm, eps = (together[0].norm, together[0].eps) if len(together) == 1 else (UNION, 0.0)
            line = {"before": before, "after": after, "norm": norm, "eps": eps}
            found.append({**line, **paired(*scores)._asdict()})
        return found

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
    attacked = job.defence.answering if job.view == NO_GRADIENT else job.defence.attacked[job.view]
    # Fooling the attacked model is not the end where another judges, or the same on other draws.
    press = job.view == "unaware" or job.defence.draws > 1
    attack = job.attack.bind(job.threat, seed=seed, press=press, model=attacked)
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
    return _judged(job, x, y, x_adv, seed, meter.counts)


def _judged(job: Job, x: Tensor, y: Tensor, x_adv: Tensor, seed: int, costs: tuple[float, ...]) -> Outcome:
    """The verdict of the job's defence on `x_adv` (N, C, H, W), which cost `costs` to make of x."""
    prediction, score = judge(job.defence, x_adv, y, attacked=job.threat is not None, seed=seed)
    size = sizes(job.threat.norm if job.threat else "l2", x_adv - x)
    cost = torch.tensor(costs).div(max(len(x), 1)).expand(len(x), len(COSTS))
    parts = (torch.arange(len(x)), prediction, score, size, cost, x_adv[score == 0])
    return Outcome(*(part.detach().cpu().clone() for part in parts))


class _Ledger:
    """What is known so far of every defence's images, and the rows that say so."""

    def __init__(self, mode: Mode) -> None:
        self.mode = mode
        self.clean: dict[str, Tensor] = {}  # (N,) scores
        self.worst: dict[tuple[str, Threat], Tensor] = {}  # (N,) scores
        self.broken: dict[tuple[str, Threat], dict[int, Tensor]] = {}  # image -> what broke it first
        self.rows: list[Row] = []

    def left(self, job: Job) -> Tensor:
        """Which images (M,) the job is to meet: those right when clean, or still right."""
        return (self._scores(job) if self.mode == "standard" else self.clean[job.defence.name]).nonzero()[
            :, 0
        ]

    def pool(self, job: Job) -> dict[int, Tensor]:
        """What broke the source of a transfer, of the images that its target gets right when clean."""
        assert job.source is not None
        assert job.threat is not None
        found, right = self.broken.get((job.source, job.threat), {}), self.clean[job.defence.name] > 0
        return {i: found[i] for i in sorted(found) if right[i]}

    def enter(self, job: Job, outcome: Outcome) -> None:
        name = job.defence.name
        if job.threat is None:
            self.clean[name] = outcome.score
            self.rows.append(_row(job, outcome.score, outcome.cost.sum(0)))
            return
        scores = self._scores(job) if self.mode == "standard" else self.clean[name]
        alone = _lowered(scores, outcome)
        self.worst[name, job.threat] = _lowered(self._scores(job), outcome)
        known = self.broken.setdefault((name, job.threat), {})
        for i, image in zip(outcome.broken.tolist(), outcome.adversarial, strict=True):
            known.setdefault(i, image)
        self.rows.append(_row(job, alone, outcome.cost.sum(0)))

    def _scores(self, job: Job) -> Tensor:
        assert job.threat is not None
        return self.worst.get((job.defence.name, job.threat), self.clean[job.defence.name])


def _lowered(scores: Tensor, outcome: Outcome) -> Tensor:
    """The scores (N,), no higher than what the images that were met came to."""
    lowered = scores.clone()
    lowered[outcome.met] = torch.minimum(lowered[outcome.met], outcome.score)
    return lowered


def _check(
    defences: Sequence[Defence],
    attacks: Sequence[AttackConfig],
    threats: Sequence[Threat],
    x: Tensor,
    y: Tensor,
    mode: str,
) -> None:
    """Raise ValueError for what `evaluate` cannot take."""
    names, labels = [defence.name for defence in defences], [attack.label for attack in attacks]
    for what, found in (("defences", names), ("attacks", labels)):
        if len(set(found)) < len(found):
            raise ValueError(f"{what}: expected different names, got {', '.join(found)}")
    if not threats:
        raise ValueError("threats: expected at least one, got none")
    for defence, threat in product(defences, threats):
        meeting = [job.attack for job in jobs([defence], attacks, [threat]) if job.attack]
        if all(SPECS[attack.name].control for attack in meeting):
            cell = f"{threat.norm} {threat.eps:g} on {defence.name}"
            raise ValueError(f"attacks: expected one that is no noise for {cell}, got none")
    if mode not in get_args(Mode):
        raise ValueError(f"mode: expected one of {', '.join(get_args(Mode))}, got {mode!r}")
    if x.dim() != 4:
        raise ValueError(f"images: expected shape (N, C, H, W), got {tuple(x.shape)}")
    _, channels, height, width = x.shape
    check_images(x, (channels, height, width))
    if y.dtype != torch.int64 or y.shape != x.shape[:1]:
        raise ValueError(f"labels: expected {len(x)} of int64, got {y.dtype} of shape {tuple(y.shape)}")


def evaluate(
    defences: Sequence[Defence],
    attacks: Sequence[AttackConfig],
    threats: Sequence[Threat],
    x: Tensor,
    y: Tensor,
    *,
    mode: Mode = "standard",
    checks: int = 30,
    seed: int = 0,
    compute: Compute | None = None,
    store: Store | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Evaluation:
    """Every attack on every defence for every threat: images (N, C, H, W), labels (N,).

    Cheap attacks come before dear ones, so that in mode `standard` few images are left for the
    latter. Then every defence meets the images that broke the others. At the end each is examined
    for masked gradients on the first `checks` images that it gets right, and for a stronger attack on as
    many of those that were left (0: none is): under every L∞ and L2 threat by all checks, under others for
    the stronger attack alone. The rows of a threat under which it fails are marked, and those of threats
    that are no such ball if it fails under one. Raises ValueError for images outside [0, 1], labels
    that are not int64, defences or attacks of the same name, a threat that no attack applies to, and a model
    that returns no logits or changes the images that it is given.
    """
    _check(defences, attacks, threats, x, y, mode)
    compute = compute or in_batches(max(len(x), 1))
    todo, pairs = list(jobs(defences, attacks, threats)), _transfers(defences, threats)
    first = next((threat for threat in threats if threat.norm in BALLS), threats[0])
    examined = list(product(defences, threats)) if checks and len(x) else []
    unused = {defence.name: _copied(defence.model) for defence in defences} if examined else {}
    for defence in defences if len(x) else ():
        _ask(defence, x, y)
    ledger, outcomes = _Ledger(mode), list[tuple[Job, Outcome]]()
    total = len(todo) + len(pairs) + len(examined)

    def meet(job: Job, met: Tensor, work: Callable[[Tensor, int], Outcome]) -> None:
        """Let the job meet the images `met` (M,), unless the store knows what comes of it."""
        outcome = store.get(job, met) if store is not None else None
        if outcome is None:

            def part(chunk: int, images: slice) -> tuple[Tensor, ...]:
                return tuple(work(met[images], seed + chunk))

            outcome = Outcome(*compute(part, len(met))) if len(met) else _empty(x)
            outcome = outcome._replace(met=met)
            if store is not None:
                store.put(job, outcome)
        ledger.enter(job, outcome)
        outcomes.append((job, outcome))
        on_progress(len(outcomes), total)

    for job in todo:

        def attacked(at: Tensor, seed: int, job: Job = job) -> Outcome:
            return run_job(job, x[at], y[at], seed)

        meet(job, ledger.left(job) if job.threat else torch.arange(len(x)), attacked)
    for job in pairs:
        pool = ledger.pool(job)

        def tried(at: Tensor, seed: int, job: Job = job, pool: Mapping[int, Tensor] = pool) -> Outcome:
            x_adv = torch.stack([pool[i] for i in at.tolist()]).to(x)
            return _judged(job, x[at], y[at], x_adv, seed, (0.0,) * len(COSTS))

        meet(job, torch.tensor(list(pool), dtype=torch.long), tried)

    found: list[Check] = []
    for done, (defence, threat) in enumerate(examined, 1):
        clean = ledger.clean[defence.name]
        score = ledger.worst.get((defence.name, threat), clean)
        # Of a model that draws, the images that it gets right in most of its draws.
        right, at = ((of > 0.5).nonzero()[:checks, 0] for of in (clean, score))
        found += examine(
            defence,
            threat,
            x[right],
            y[right],
            left=(x[at], y[at], score[at]),
            left_share=float(score.mean()),
            seed=seed,
            unused=unused[defence.name],
            checks=CHECKS if threat is first else OF_THREAT if threat.norm in BALLS else (convergence,),
        )
        on_progress(len(outcomes) + done, total)
    rows = [*ledger.rows, *_worst_rows(defences, ledger.worst)]
    return Evaluation(
        mode,
        len(x),
        outcomes,
        [replace(r, masked=_masked(r, found)) for r in rows],
        found,
        ledger.worst,
        {key: torch.stack(list(images.values())) for key, images in ledger.broken.items() if images},
    )


@torch.no_grad()
def _ask(defence: Defence, x: Tensor, y: Tensor) -> None:
    """Raise ValueError for a model that cannot be evaluated on images x (N, C, H, W), labels y (N,)."""
    given, known = x[:2].clone(), int(y.max()) + 1
    with evaluation_mode(defence.model), seeded(defence.model, 0):
        logits = defence.model(given)
    expected = f"{defence.name}: expected float logits (N, K) of {len(given)} images, got"
    if not isinstance(logits, Tensor):
        raise ValueError(f"{expected} {type(logits).__name__}")
    if logits.dim() != 2 or len(logits) != len(given) or not logits.is_floating_point():
        raise ValueError(f"{expected} {logits.dtype} of shape {tuple(logits.shape)}")
    if logits.shape[1] < known:
        raise ValueError(
            f"labels: expected below {logits.shape[1]}, the classes of {defence.name}, got {known - 1}"
        )
    if not torch.equal(given, x[:2]):
        raise ValueError(
            f"{defence.name}: expected a model that leaves its images alone, it changed them in place"
        )


def _copied(model: Classifier) -> Classifier | None:
    """The model as it is now, or None of one that cannot be copied."""
    try:
        return copy.deepcopy(model)
    except Exception:  # whatever a class of the user's raises
        return None


def _masked(row: Row, checks: Sequence[Check]) -> bool:
    """Whether a failed check speaks of this row.

    One of the model does, one of its threat, of any ball if its own threat is none, and any of the union.
    """

    def speaks(check: Check) -> bool:
        if check.norm is None or (check.norm, check.eps) == (row.norm, row.eps):
            return True
        return row.norm == UNION or (check.norm in BALLS and row.norm not in (None, *BALLS))

    return any(check.defence == row.defence and speaks(check) for check in checks if not check.passed)


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


def _row(job: Job, score: Tensor, cost: Tensor) -> Row:
    made = _scored(job.defence.name, job.label, job.view, score)
    if job.threat is not None:
        made = replace(
            made, norm=job.threat.norm, eps=job.threat.eps, trained=job.threat in job.defence.trained
        )
    return replace(made, **dict(zip(COSTS, cost.tolist(), strict=True)))


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
