"""Stage `evaluate`: every attack on every defence through every view; the per-image worst is the figure."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from torch import Tensor

from manifold_defense.evaluation import Evaluation, attack_images, evaluate
from manifold_defense.filter import DefendedClassifier
from manifold_defense.rejection import RejectingClassifier, roc
from pipelines.board import Strip, predictions, save_figure, strips
from pipelines.context import Context
from pipelines.defences import compared, make_defences
from pipelines.files import whole
from pipelines.jobs import JobStore, digest_of
from pipelines.own import blamed_on


def run(context: Context) -> dict[str, Any]:
    with blamed_on(context.config.evaluate.classifier):
        return _evaluate(context)


def _evaluate(context: Context) -> dict[str, Any]:
    config, seed = context.config.evaluate, context.config.seed
    x, y = context.test_images(config.images)
    defences = make_defences(context)
    store = JobStore(context.folder / "jobs", context.fabric, digest_of(defences, x[:2]))
    context.fabric.barrier()

    with context.progress(0, unit="jobs") as advance:
        evaluation = evaluate(
            defences,
            config.attacks,
            config.threats,
            x,
            y,
            mode=config.mode,
            checks=config.checks,
            seed=seed,
            compute=lambda work, n: context.map_images(work, n, config.batch_size),
            store=store,
            on_progress=advance,
        )
    if config.classifier:
        _doubt_guesses(context, evaluation)
    if context.main:
        _write_csv(context.folder / "images.csv", y, evaluation)
        _pictures(context, evaluation, x, y)
        for r in evaluation.rows:
            cell = (r.defence, r.norm, f"{r.eps:g}", r.attack, r.view)
            context.board.add_scalar("/".join(part for part in cell if part), r.robust_accuracy, 0)
    return {
        "n": len(x),
        "mode": config.mode,
        "warnings": [str(check) for check in evaluation.checks if not check.passed],
        "checked": config.checks,
        "checks": [check.as_dict() for check in evaluation.checks],
        "rows": [r.as_dict() for r in evaluation.rows],
        "comparisons": [line for pair in compared(context.config) for line in evaluation.comparisons(*pair)],
        "transfers": evaluation.transfers(),
        "detection": _detection(evaluation, x),
    }


def _doubt_guesses(context: Context, evaluation: Evaluation) -> None:
    """Say so if a classifier of the user's is no better than chance on clean images."""
    own = next(row for row in evaluation.rows if row.attack == "clean")
    classes = context.data.classes
    if own.ci_low <= 1 / len(classes):
        context.say(
            f"{own.defence}: right on {own.robust_accuracy:.1%} of clean images, as by guessing: do its "
            f"columns follow the classes ({', '.join(classes[:3])} …), does it take images in [0, 1]?"
        )


def _detection(evaluation: Evaluation, x: Tensor) -> list[dict[str, Any]]:
    """How well the residual tells the images that broke a filtered defence from clean ones.

    The area under the curve for images of attackers who fooled the classifier: 0.5 is chance.
    """
    found = []
    for (name, threat), images in evaluation.broken.items():
        model = next(job.defence.model for job, _ in evaluation.outcomes if job.defence.name == name)
        if not isinstance(model, (DefendedClassifier, RejectingClassifier)):
            continue
        errors = [model.filter.project(part.to(x)).error.cpu() for part in (x, images)]
        area = roc(*errors).auc
        found.append({"defence": name, "norm": threat.norm, "eps": threat.eps, "auc": area})
    return found


_COLUMNS = (
    "image",
    "label",
    "defence",
    "attack",
    "view",
    "norm",
    "eps",
    "prediction",
    "score",
    "distance",
)


def _write_csv(path: Path, y: Tensor, evaluation: Evaluation) -> None:
    """A row an image and job that met it; `distance` is the size of the perturbation in the threat's unit."""
    labels = y.tolist()
    with whole(path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(_COLUMNS)
        for job, outcome in evaluation.outcomes:
            threat = (job.threat.norm, job.threat.eps) if job.threat else ("", 0.0)
            facts = (job.defence.name, job.label, job.view or "", *threat)
            columns = (outcome.met, outcome.prediction, outcome.score, outcome.size)
            for i, prediction, score, size in zip(*(c.tolist() for c in columns), strict=True):
                writer.writerow((i, labels[i], *facts, prediction, f"{score:g}", f"{size:.5f}"))


def _pictures(context: Context, evaluation: Evaluation, x: Tensor, y: Tensor) -> None:
    """For each filtered defence and threat, one attack through the exact view: clean, attacked, G(z*)."""
    seen = set()
    for job, _ in evaluation.outcomes:
        defended = job.defence.model
        if (
            job.attack is None
            or job.view != "exact"
            or job.attack.name not in ("pgd", "apgd", "patch", "pgd_l0")
        ):
            continue
        if not isinstance(defended, DefendedClassifier) or (job.defence.name, job.threat) in seen:
            continue
        seen.add((job.defence.name, job.threat))
        clean, labels = x[:10], y[:10]
        attacked = attack_images(job, clean, labels, context.config.seed)
        repaired = defended.filter(attacked)
        rows = [
            Strip("clean", clean, predictions(defended, clean)),
            Strip("attacked", attacked, predictions(defended.classifier, attacked)),
            Strip(
                "G(z*)" if defended.filter.config.strength == 1 else "filtered",
                repaired,
                predictions(defended.classifier, repaired),
            ),
        ]
        figure = strips(rows, labels.tolist(), context.data.classes)
        assert job.threat is not None
        name = f"{job.defence.name}-{job.threat.norm}-{job.threat.eps:g}"
        save_figure(figure, context.folder / f"strips-{name}.png")
        context.board.add_figure(f"clean | attacked | G(z*): {name}", figure, 0)
