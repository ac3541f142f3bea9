"""The stages, in order; `STAGES` is the whole pipeline."""

from __future__ import annotations

from pipelines.config import Config
from pipelines.stage import Stage
from pipelines.stages import classifiers, evaluate, export, project, report, train_encoder, train_gan


def _harden_inputs(config: Config) -> tuple[str, ...]:
    """Only on-manifold training needs the manifold."""
    return ("train-classifier", *(("train-encoder",) if config.harden.objective == "latent" else ()))


_ALL = (
    Stage(
        "train-gan",
        2,
        "generator, critic and joint encoder",
        ("seed", "data", "gan"),
        lambda config: (),
        train_gan.run,
    ),
    Stage(
        "train-encoder",
        1,
        "encoder of the finished generator",
        ("seed", "filter", "data", "encoder"),
        lambda config: () if config.filter else ("train-gan",),
        train_encoder.run,
    ),
    Stage(
        "train-classifier",
        1,
        "classifier on clean images",
        ("seed", "data", "classifier"),
        lambda config: (),
        classifiers.train,
    ),
    Stage(
        "project",
        1,
        "projection of test images, quality of the generator",
        ("seed", "data", "projection", "project"),
        lambda config: ("train-encoder", "train-classifier"),
        project.run,
    ),
    Stage(
        "harden",
        1,
        "adversarial training of the classifier",
        ("seed", "data", "harden"),
        _harden_inputs,
        classifiers.harden,
    ),
    Stage(
        "evaluate",
        4,
        "every attack on every defence, worst per image",
        ("seed", "data", "projection", "harden", "evaluate"),
        lambda config: () if config.evaluate.classifier else ("train-encoder", "train-classifier", "harden"),
        evaluate.run,
    ),
    Stage("report", 1, "tables and pictures", (), lambda config: ("project", "evaluate"), report.run),
    Stage(
        "export",
        1,
        "deployable filter and classifiers",
        ("projection",),
        lambda config: ("train-encoder", "train-classifier", "harden"),
        export.run,
    ),
)

STAGES = {stage.name: stage for stage in _ALL}
