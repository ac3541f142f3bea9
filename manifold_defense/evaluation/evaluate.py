"""Attack defences, keep every image's outcome, and report the worst over attacks, views and threats.

N images, M of them met by a job. What counts are the predictions of the deployed model on the
images that an attack returned; an image is robust to a threat only if it is classified correctly
when clean and after every attack of that threat in every view, its images for other defences
included.
"""

from __future__ import annotations

import copy
import gc
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, get_args

import torch
from torch import Tensor, nn

from manifold_defense.evaluation.checks import CHECKS, EXAMINED, OF_THREAT, Checks, convergence
from manifold_defense.evaluation.course import Course, Store
from manifold_defense.evaluation.defence import Defence, ModelError
from manifold_defense.evaluation.ledger import UNION, Mode, Row
from manifold_defense.evaluation.outcome import Compute, Outcome, in_batches
from manifold_defense.evaluation.plan import Job, jobs
from manifold_defense.evaluation.recipe import SPECS, AttackConfig
from manifold_defense.evaluation.statistics import paired
from manifold_defense.evaluation.subject import Check
from manifold_defense.modes import evaluation_mode
from manifold_defense.projection import check_images
from manifold_defense.randomised import seeded
from manifold_defense.types import Classifier, Threat


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
        groups = [[threat] for threat in threats]
        if len(threats) > 1:
            groups.append(threats)
        found = []
        for group in groups:
            scores = [torch.stack([self.worst[name, t] for t in group]).amin(0) for name in (before, after)]
            norm, eps = (group[0].norm, group[0].eps) if len(group) == 1 else (UNION, 0.0)
            line = {"before": before, "after": after, "norm": norm, "eps": eps}
            found.append({**line, **paired(*scores)._asdict()})
        return found

    def transfers(self) -> list[dict[str, Any]]:
        """Who fools whom: of the images that attacks on `source` broke, the share that fools `target`."""
        first: dict[str, tuple[Job, Outcome]] = {}  # later ones are of what still withstood alone
        for job, outcome in self.outcomes:
            if job.source not in (None, job.defence.name):
                first.setdefault(job.name, (job, outcome))
        return [
            {
                "source": job.source,
                "target": job.defence.name,
                "norm": job.threat.norm,
                "eps": job.threat.eps,
                "images": len(outcome.score),
                "fooled": float(1 - outcome.score.mean()),
            }
            for job, outcome in first.values()
            if job.threat is not None and len(outcome.score)
        ]


def _check(
    defences: Sequence[Defence],
    attacks: Sequence[AttackConfig],
    threats: Sequence[Threat],
    x: Tensor,
    y: Tensor,
    mode: str,
    checks: int,
) -> None:
    """Raise ValueError for what `evaluate` cannot take, TypeError for no defence, attack or threat."""
    kinds = (
        ("defences", defences, Defence, "Defence.of(name, model)"),
        ("attacks", attacks, AttackConfig, 'AttackConfig("pgd")'),
        ("threats", threats, Threat, 'Threat("linf", 0.3)'),
    )
    for what, given, kind, example in kinds:
        for entry in given:
            if not isinstance(entry, kind):
                raise TypeError(f"{what}: expected each as {example} makes it, got {type(entry).__name__}")
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
    if checks < 0:
        raise ValueError(f"checks: expected at least 0, got {checks}")
    if x.dim() != 4:
        raise ValueError(f"images: expected shape (N, C, H, W), got {tuple(x.shape)}")
    _, channels, height, width = x.shape
    check_images(x, (channels, height, width))
    if x.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"images: expected float32 or float64, in which radii are exact, got {x.dtype}")
    if y.dtype != torch.int64 or y.shape != x.shape[:1]:
        raise ValueError(f"labels: expected {len(x)} of int64, got {y.dtype} of shape {tuple(y.shape)}")
    if (y < 0).any():
        raise ValueError(f"labels: expected at least 0, got {int(y.min())}")


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
    latter. Then every defence meets the images that broke it within a smaller threat of the same norm, and
    those that broke the others, until nothing is left to try. At the end each is examined
    for masked gradients on `checks` images that it gets right, and for a stronger attack on as
    many of those that were left (0: none is): under every L∞ and L2 threat by all checks, under others for
    the stronger attack alone. What that breaks counts as broken, and is tried on the others, too. The rows of
    a threat under which a defence fails are marked, and those of threats that are no such ball if it fails
    under one.

    mode         standard: an attack meets the images that the cheaper ones before it left; full: all of them,
                 for a matrix of who breaks what
    compute      how work on N images is shared out, by default all at once; `in_batches(size)`
    store        where finished jobs are kept, so that an interrupted evaluation goes on; by default nowhere
    on_progress  is told how many jobs are done, of how many

    In `Evaluation.worst` a score is 1 for an image that is right after everything, 0 for one that is broken,
    and in between for a model that draws: the share of its draws that are right. Raises ValueError
    for images outside [0, 1], labels that are not int64, defences or attacks of the same name, a threat
    that no attack applies to, and a model that returns no finite logits or changes the images that it is
    given.
    """
    _check(defences, attacks, threats, x, y, mode, checks)
    todo, pairs = list(jobs(defences, attacks, threats)), _transfers(defences, threats)
    examined = list(product(defences, threats)) if checks and len(x) else []
    unused = {defence.name: _copied(defence.model) for defence in defences} if examined else {}
    for defence in defences if len(x) else ():
        _ask(defence, x, y)
    total = len(todo) + len(pairs) + len(examined)
    shared_out = compute or in_batches(max(len(x), 1))
    course = Course(x, y, mode, seed, shared_out, store, lambda done: on_progress(done, total))
    for job in todo:
        course.attack(job)
    course.transfer(pairs)
    found: list[Check] = []
    for done, (defence, threat) in enumerate(examined, 1):
        found += course.examine(defence, threat, _checks_under(threat, threats), unused[defence.name], checks)
        on_progress(len(todo) + len(pairs) + done, total)
    course.transfer(pairs)
    ledger = course.ledger
    rows = [*ledger.rows, *ledger.worst_rows(defences)]
    return Evaluation(
        mode,
        len(x),
        course.outcomes,
        [replace(row, masked=_masked(row, found)) for row in rows],
        found,
        ledger.worst,
        {key: torch.stack(list(images.values())) for key, images in ledger.broken.items() if images},
    )


def _checks_under(threat: Threat, threats: Sequence[Threat]) -> Checks:
    """Those of the model under one of the threats, an examined one if there is one."""
    first = next((other for other in threats if other.norm in EXAMINED), threats[0])
    return CHECKS if threat is first else OF_THREAT if threat.norm in EXAMINED else (convergence,)


@torch.no_grad()
def _ask(defence: Defence, x: Tensor, y: Tensor) -> None:
    """Raise ModelError for a model that cannot be evaluated on images x (N, C, H, W), labels y (N,)."""
    given, known = x[:2].clone(), int(y.max()) + 1

    def answers(model: Classifier, of: str = defence.name) -> Tensor:
        with evaluation_mode(model), seeded(model, 0):
            logits = defence.asked(model, given)
        expected = f"{of}: expected float logits (N, K) of {len(given)} images, got"
        if not isinstance(logits, Tensor):
            raise ModelError(f"{expected} {type(logits).__name__}")
        fits = logits.dim() == 2 and len(logits) == len(given) and logits.shape[1] > 1
        if not fits or not logits.is_floating_point() or logits.layout != torch.strided:
            raise ModelError(f"{expected} {logits.dtype} of shape {tuple(logits.shape)}, {logits.layout}")
        if not logits.isfinite().all():
            raise ModelError(f"{expected} some that are not finite")
        return logits

    logits = answers(defence.model)
    if logits.shape[1] < known:
        raise ValueError(
            f"labels: expected below {logits.shape[1]}, the classes of {defence.name}, got {known - 1}"
        )
    if defence.predict is not None:
        with evaluation_mode(defence.model), seeded(defence.model, 0):
            labels = defence.predict(given)
        fits = isinstance(labels, Tensor) and labels.dtype == torch.int64 and labels.shape == given.shape[:1]
        if not fits:
            got = f"{labels.dtype} of shape {tuple(labels.shape)}" if isinstance(labels, Tensor) else labels
            raise ModelError(f"{defence.name}: predict: expected {len(given)} labels of int64, got {got}")
    if not torch.equal(logits, answers(defence.model)):
        return  # it draws in a way of its own: nothing can be compared
    for view, model in defence.attacked.items():
        if model is defence.model or defence.presses(view):
            continue
        if not _same_answers(answers(model, f"{defence.name}: view {view}"), logits):
            # An attack that fools it stops there, and would be judged by another model.
            raise ModelError(
                f"{defence.name}: view {view}: expected the logits of the deployed model, or the view to be "
                "one of `surrogates`"
            )


def _same_answers(a: Tensor, b: Tensor) -> bool:
    """Whether logits (N, K) and (N, K) are the same but for rounding, each seen from its largest."""
    if a.shape != b.shape:
        return False
    a, b = a.double(), b.double()
    rounding = 1e-3 + 1e-5 * float(b.abs().max())
    return torch.allclose(a - a.amax(1, keepdim=True), b - b.amax(1, keepdim=True), rtol=1e-3, atol=rounding)


def _copied(model: Classifier) -> Classifier:
    """The model as it is now; itself if it cannot be copied.

    With what functions within it close over, and the modules that they know by name.
    """
    try:
        functions = _closures(model)
        # `deepcopy` takes a function for a constant, unless it is told what has become of it.
        memo: dict[int, Any] = {}
        for function in functions:
            cells = tuple(types.CellType() for _ in function.__closure__ or ())
            memo[id(function)] = types.FunctionType(
                function.__code__, dict(function.__globals__), function.__name__, None, cells
            )
        for function in functions:
            made = memo[id(function)]
            made.__globals__.update(copy.deepcopy(_known(function), memo))
            made.__defaults__ = copy.deepcopy(function.__defaults__, memo)
            made.__kwdefaults__ = copy.deepcopy(function.__kwdefaults__, memo)
            made.__dict__.update(copy.deepcopy(function.__dict__, memo))
            for cell, kept in zip(made.__closure__ or (), function.__closure__ or (), strict=True):
                cell.cell_contents = copy.deepcopy(kept.cell_contents, memo)
        return copy.deepcopy(model, memo)
    except Exception:  # whatever a class of the user's raises
        return model


def _closures(model: Classifier) -> list[types.FunctionType]:
    """The functions with something of their own to remember by that can be reached from a model."""
    found: list[types.FunctionType] = []
    seen: set[int] = set()
    left: list[Any] = [model]
    while left:
        value = left.pop()
        if id(value) in seen or isinstance(value, (types.ModuleType, type, Tensor)):
            continue
        seen.add(id(value))
        if isinstance(value, types.FunctionType):
            kept = (
                value.__closure__,
                value.__defaults__,
                value.__kwdefaults__,
                value.__dict__,
                _known(value),
            )
            if any(kept):
                found.append(value)
            left.extend(kept)  # what else is global is no model's own
        else:
            left.extend(gc.get_referents(value))
    return found


def _known(function: types.FunctionType) -> dict[str, nn.Module]:
    """The modules that a function knows by a global name, such as that of `lambda x: net(x)`."""
    named = ((name, function.__globals__.get(name)) for name in function.__code__.co_names)
    return {name: value for name, value in named if isinstance(value, nn.Module)}


def _masked(row: Row, checks: Sequence[Check]) -> bool:
    """Whether a failed check speaks of this row.

    One of the model does, one of its threat, of any ball if its own threat is none, and any of the union.
    """

    def speaks(check: Check) -> bool:
        if check.norm is None or (check.norm, check.eps) == (row.norm, row.eps):
            return True
        return row.norm == UNION or (check.norm in EXAMINED and row.norm not in (None, *EXAMINED))

    return any(check.defence == row.defence and speaks(check) for check in checks if not check.passed)


def _transfers(defences: Sequence[Defence], threats: Sequence[Threat]) -> list[Job]:
    """From one defence to another, and from the smaller threats of a defence to its larger ones."""
    return [
        Job(target, None, "transfer", threat, source.name)
        for target in defences
        for threat in threats
        for source in defences
        if source is not target or any(threat.holds(smaller) for smaller in threats)
    ]
