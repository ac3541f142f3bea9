"""Stage `evaluate`: every attack on every defence through every view; the per-image worst is the figure."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from manifold_defense.artifact import load_classifier
from manifold_defense.evaluation import Defence, Job, Outcome, attack_images, jobs, run_job, worst_rows
from manifold_defense.evaluation.checks import dead_gradients, order, views
from manifold_defense.evaluation.evaluate import row
from manifold_defense.filter import DefendedClassifier
from pipelines.board import Strip, predictions, save_figure, strips
from pipelines.context import Context
from pipelines.stages.project import load_parts


def run(context: Context) -> dict[str, Any]:
    config, seed = context.config.evaluate, context.config.seed
    x, y = context.test_images(config.images)
    defences = make_defences(context)
    todo = list(jobs(defences, config.attacks, config.threats))
    kept = context.folder / "jobs"
    if context.main:
        kept.mkdir(exist_ok=True)
    context.fabric.barrier()

    outcomes: list[tuple[Job, Outcome]] = []
    with context.progress(len(todo), unit="jobs") as advance:
        for index, job in enumerate(todo):
            path = kept / f"{index:03d}.safetensors"
            outcome = _kept(path, job, len(x))
            if outcome is None:

                def work(chunk: int, part: slice, job: Job = job) -> tuple[Tensor, ...]:
                    return run_job(job, x[part], y[part], seed + chunk)

                outcome = Outcome(*context.map_images(work, len(x), config.batch_size))
                if context.main:
                    _keep(path, job, outcome)
            outcomes.append((job, outcome))
            advance(index + 1)

    rows = [row(job, outcome) for job, outcome in outcomes] + worst_rows(outcomes)
    warnings = order(rows) + views(rows)
    for defence in defences:
        warnings += dead_gradients(defence.name, defence.attacked["exact"], x[:50], y[:50])
    if context.main:
        _write_csv(context.folder / "images.csv", y, outcomes)
        _pictures(context, todo, x, y)
        for r in rows:
            cell = (r.defence, r.norm, f"{r.eps:g}", r.attack, r.view)
            context.board.add_scalar("/".join(part for part in cell if part), r.robust_accuracy, 0)
    return {"n": len(x), "warnings": warnings, "rows": [r.as_dict() for r in rows]}


def make_defences(context: Context) -> list[Defence]:
    """The classifier and the hardened one, each bare and behind the filter."""
    filter, classifier = load_parts(context)
    hardened = load_classifier(context.inputs["harden"]).requires_grad_(False).to(context.fabric.device)
    return [
        Defence.bare("undefended", classifier),
        Defence.filtered("filter", DefendedClassifier(filter, classifier)),
        Defence.bare("hardened", hardened),
        Defence.filtered("hardened+filter", DefendedClassifier(filter, hardened)),
    ]


def _keep(path: Path, job: Job, outcome: Outcome) -> None:
    partial = path.with_suffix(".partial")
    save_file(
        {name: value.contiguous() for name, value in outcome._asdict().items()},
        partial,
        metadata={"job": job.name},
    )
    partial.replace(path)


def _kept(path: Path, job: Job, n: int) -> Outcome | None:
    """What an interrupted run of this stage found for the job; a file damaged or of another is done again."""
    try:
        with safe_open(path, framework="pt") as file:
            if (file.metadata() or {}).get("job") != job.name:
                return None
        outcome = Outcome(**load_file(path))
        return outcome if len(outcome.correct) == n else None
    except (FileNotFoundError, SafetensorError):
        return None


def _write_csv(path: Path, y: Tensor, outcomes: list[tuple[Job, Outcome]]) -> None:
    """A row an image and job; `distance` is the size of the perturbation in the threat's norm."""
    partial = path.with_suffix(".partial")
    with partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(
            [
                "image",
                "label",
                "defence",
                "attack",
                "view",
                "norm",
                "eps",
                "prediction",
                "correct",
                "distance",
            ]
        )
        labels = y.tolist()
        for job, outcome in outcomes:
            r = row(job, outcome)
            facts = (r.defence, r.attack, r.view or "", r.norm or "", r.eps)
            columns = zip(
                labels,
                outcome.prediction.tolist(),
                outcome.correct.tolist(),
                outcome.size.tolist(),
                strict=True,
            )
            for i, (label, prediction, correct, size) in enumerate(columns):
                writer.writerow((i, label, *facts, prediction, int(correct), f"{size:.5f}"))
    partial.replace(path)


def _pictures(context: Context, todo: list[Job], x: Tensor, y: Tensor) -> None:
    """For each filtered defence and threat, PGD through the exact view: clean, attacked, reconstructed."""
    seen = set()
    for job in todo:
        defended = job.defence.model
        if job.attack is None or job.attack.name != "pgd" or job.view != "exact":
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
            Strip("G(z*)", repaired, predictions(defended.classifier, repaired)),
        ]
        figure = strips(rows, labels.tolist(), context.data.classes)
        assert job.threat is not None
        name = f"{job.defence.name}-{job.threat.norm}-{job.threat.eps:g}"
        save_figure(figure, context.folder / f"strips-{name}.png")
        context.board.add_figure(f"clean | attacked | G(z*): {name}", figure, 0)
