"""What a defence is worth: the per-image worst over attacks and views, with an interval."""

from manifold_defense.evaluation.evaluate import Outcome, Row, attack_images, evaluate, run_job, worst_rows
from manifold_defense.evaluation.statistics import wilson
from manifold_defense.evaluation.suite import AttackConfig, Defence, Job, jobs

__all__ = [
    "AttackConfig",
    "Defence",
    "Job",
    "Outcome",
    "Row",
    "attack_images",
    "evaluate",
    "jobs",
    "run_job",
    "wilson",
    "worst_rows",
]
