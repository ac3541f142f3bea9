"""The stages; `STAGES` is the whole pipeline."""

from __future__ import annotations

from pipelines.config import Config
from pipelines.stage import Stage
from pipelines.stages import certify, classifiers, evaluate, export, project, report, train_encoder, train_gan


def _encoder_inputs(config: Config) -> tuple[str, ...]:
    """Without a finished filter its own GAN; the classifiers that it is to begin as or to agree with."""
    encoder = config.encoder
    judged = encoder.agrees and not encoder.classifier
    return (
        *(() if config.filter else ("train-gan",)),
        *(("train-classifier",) if judged else ()),
        *(("harden",) if config.encoder_needs_variants else ()),
    )


def _harden_inputs(config: Config) -> tuple[str, ...]:
    """Only training on the manifold, or behind the filter, needs it."""
    needed = any(variant.needs_filter for variant in config.harden)
    return ("train-classifier", *(("train-encoder",) if needed else ()))


def _harden_sections(config: Config) -> tuple[str, ...]:
    projects = any(variant.projects for variant in config.harden)
    return ("seed", "data", "harden", *(("projection",) if projects else ()))


def _of_the_run(config: Config) -> bool:
    """Whether what is attacked was made by the run, and is no function of the user's own."""
    return not config.evaluate.classifier


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
        "train-classifier",
        2,
        "classifier on clean images",
        ("seed", "data", "classifier"),
        lambda config: (),
        classifiers.train,
    ),
    Stage(
        "train-encoder",
        2,
        "encoder of the finished generator",
        ("seed", "filter", "data", "encoder"),
        _encoder_inputs,
        train_encoder.run,
    ),
    Stage(
        "project",
        2,
        "projection of test images, quality of the generator",
        ("seed", "data", "projection", "project"),
        lambda config: ("train-encoder", "train-classifier"),
        project.run,
    ),
    Stage(
        "harden",
        classifiers.VERSION,
        "adversarial training of the classifier",
        _harden_sections,
        _harden_inputs,
        classifiers.harden,
    ),
    Stage(
        "evaluate",
        24,
        "every attack on every defence, worst per image",
        ("seed", "data", "projection", "harden", "evaluate"),
        lambda config: ("train-encoder", "train-classifier", "harden") if _of_the_run(config) else (),
        evaluate.run,
        _of_the_run,
    ),
    Stage(
        "certify",
        4,
        "proofs, and attacks on them",
        ("seed", "data", "projection", "harden", "certify"),
        lambda config: ("train-encoder", "train-classifier", "harden"),
        certify.run,
    ),
    Stage(
        "report",
        3,
        "tables and pictures",
        (),
        lambda config: ("project", "evaluate", "certify"),
        report.run,
        derived=True,
    ),
    Stage(
        "export",
        2,
        "deployable filter and classifiers",
        ("projection",),
        lambda config: ("train-encoder", "train-classifier", "harden"),
        export.run,
    ),
)

STAGES = {stage.name: stage for stage in _ALL}


def in_order(config: Config) -> dict[str, Stage]:
    """All stages, each behind its inputs, otherwise as above: an encoder may need variants, or they it."""
    found: dict[str, Stage] = {}

    def place(name: str) -> None:
        if name not in found:
            for needed in STAGES[name].inputs(config):
                place(needed)
            found[name] = STAGES[name]

    for name in STAGES:
        place(name)
    return found
