"""What a defence is worth: the per-image worst over attacks and views, with checks for masked gradients."""

from manifold_defense.evaluation.checks import CHECKS, examine
from manifold_defense.evaluation.course import Store
from manifold_defense.evaluation.defence import Defence, ModelError
from manifold_defense.evaluation.evaluate import Evaluation, evaluate
from manifold_defense.evaluation.ledger import Row
from manifold_defense.evaluation.outcome import Outcome, attack_images, in_batches, run_job
from manifold_defense.evaluation.plan import Job, jobs
from manifold_defense.evaluation.recipe import AttackConfig
from manifold_defense.evaluation.statistics import wilson
from manifold_defense.evaluation.subject import Check
from manifold_defense.evaluation.suites import SUITES

__all__ = [
    "CHECKS",
    "SUITES",
    "AttackConfig",
    "Check",
    "Defence",
    "Evaluation",
    "Job",
    "ModelError",
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
