"""Adversarial training and its relatives: one loop, in which the objective is a value.

The loop (`manifold_defense.hardening.training`) needs lightning-fabric and is imported by name.
"""

from manifold_defense.hardening.adversarial import Curriculum, Fast, Mixture, Pgd, Trades
from manifold_defense.hardening.bounds import IntervalBounds
from manifold_defense.hardening.objective import Objective, Step
from manifold_defense.hardening.on_manifold import Dual, Latent, RobustManifold
from manifold_defense.hardening.pointwise import Clean, Distillation, GradientPenalty, Noise
from manifold_defense.hardening.union import Union

# Every objective by its name in a configuration.
OBJECTIVES = (
    Clean,
    Noise,
    Pgd,
    Fast,
    Trades,
    Union,
    Mixture,
    Curriculum,
    Latent,
    Dual,
    RobustManifold,
    GradientPenalty,
    Distillation,
    IntervalBounds,
)

__all__ = [
    "OBJECTIVES",
    "Clean",
    "Curriculum",
    "Distillation",
    "Dual",
    "Fast",
    "GradientPenalty",
    "IntervalBounds",
    "Latent",
    "Mixture",
    "Noise",
    "Objective",
    "Pgd",
    "RobustManifold",
    "Step",
    "Trades",
    "Union",
]
