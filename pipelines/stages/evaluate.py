"""Stage `evaluate`: every attack on every defence through every view; the per-image worst is the figure."""

from __future__ import annotations

import csv
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from manifold_defense.evaluation import Defence, Evaluation, Job, Outcome, attack_images, evaluate
from manifold_defense.filter import DefendedClassifier
from manifold_defense.rejection import RejectingClassifier, roc
from pipelines.board import Strip, predictions, save_figure, strips
from pipelines.context import Context
from pipelines.defences import compared, make_defences
from pipelines.own import blamed_on


def run(context: Context) -> dict[str, Any]:
    with blamed_on(context.config.evaluate.classifier):
        return _evaluate(context)


def _evaluate(context: Context) -> dict[str, Any]:
    config, seed = context.config.evaluate, context.config.seed
    x, y = context.test_images(config.images)
    defences = make_defences(context)
    store = _Store(context.folder / "jobs", context.fabric, _digest(defences, x[:2]))
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


def _digest(defences: list[Defence], x: Tensor) -> str:
    """Of all weights and settings of filters, and of the answers to images x (N, C, H, W) and some like them.

    Results of others are not these defences': a user's code may change under the same weights. Answers
    and their gradients count by a random projection to four digits, lest the rounding of a GPU, which
    differs from call to call, be taken for another model.
    """
    digest = hashlib.sha256()
    noisy = x + 0.2 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).to(x)
    asked = torch.cat([x, 1 - x, (x + x.flip(0)) / 2, noisy.clamp(0, 1)]).detach()

    def answered(value: Tensor) -> None:
        weights = torch.randn(value.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        digest.update(f"{float((weights * value.detach().cpu().double()).sum()):.4g} ".encode())

    for defence in defences:
        if isinstance(defence.model, nn.Module):
            for value in defence.model.state_dict().values():
                digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        filter = getattr(defence.model, "filter", None)
        digest.update(repr((getattr(filter, "config", None), defence.draws)).encode())
        images = asked.clone().requires_grad_(True)
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            torch.manual_seed(0)  # for models that draw
            logits = defence.strongest(images)
        answered(logits)
        if logits.requires_grad:
            (slope,) = torch.autograd.grad(logits.square().sum(), images, allow_unused=True)
            answered(torch.zeros_like(images) if slope is None else slope)
    return digest.hexdigest()[:16]


@dataclass
class _Store:
    """Finished jobs, a file each, so that an interrupted evaluation goes on where it stopped.

    The first process reads and writes; the others are told, lest they disagree on what is still to do.
    """

    folder: Path
    fabric: Fabric
    digest: str

    def __post_init__(self) -> None:
        if self.fabric.is_global_zero:
            self.folder.mkdir(exist_ok=True)

    def _path(self, job: Job) -> Path:
        facts = f"{self.digest} {job.name} {job.threat!r} {job.attack!r}"
        return self.folder / f"{hashlib.sha256(facts.encode()).hexdigest()[:16]}.safetensors"

    def get(self, job: Job, met: Tensor) -> Outcome | None:
        """What an interrupted run found for the job; one damaged or of other images is done again."""
        return self.fabric.broadcast(self._read(job, met) if self.fabric.is_global_zero else None)

    def _read(self, job: Job, met: Tensor) -> Outcome | None:
        try:
            outcome = Outcome(**load_file(self._path(job)))
        except (FileNotFoundError, SafetensorError, TypeError):
            return None
        return outcome if torch.equal(outcome.met, met) else None

    def put(self, job: Job, outcome: Outcome) -> None:
        if not self.fabric.is_global_zero:
            return
        path = self._path(job)
        partial = path.with_suffix(".partial")
        save_file({name: value.contiguous() for name, value in outcome._asdict().items()}, partial)
        partial.replace(path)


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
    partial = path.with_suffix(".partial")
    labels = y.tolist()
    with partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(_COLUMNS)
        for job, outcome in evaluation.outcomes:
            threat = (job.threat.norm, job.threat.eps) if job.threat else ("", 0.0)
            facts = (job.defence.name, job.label, job.view or "", *threat)
            columns = (outcome.met, outcome.prediction, outcome.score, outcome.size)
            for i, prediction, score, size in zip(*(c.tolist() for c in columns), strict=True):
                writer.writerow((i, labels[i], *facts, prediction, f"{score:g}", f"{size:.5f}"))
    partial.replace(path)


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
