"""What a defence is worth: the per-image worst over attacks and views, with checks for masked gradients."""

from manifold_defense.evaluation.checks import CHECKS, Check, examine
from manifold_defense.evaluation.evaluate import (
    Evaluation,
    Outcome,
    Row,
    Store,
    attack_images,
    evaluate,
    in_batches,
    run_job,
)
from manifold_defense.evaluation.statistics import wilson
from manifold_defense.evaluation.suite import AttackConfig, Defence, Job, jobs

__all__ = [
    "CHECKS",
    "AttackConfig",
    "Check",
    "Defence",
    "Evaluation",
    "Job",
    "Outcome",
    "Row",
    "Store",
    "attack_images",
    "evaluate",
    "examine",
    "in_batches",
    "jobs",
    "run_job",
    "wilson",
]
