"""Adversarial training and its relatives: one loop, in which the objective is a value.

The loop (`manifold_defense.hardening.training`) needs lightning-fabric and is imported by name.
"""

from manifold_defense.hardening.objectives import Clean, Latent, Objective, Pgd

__all__ = ["Clean", "Latent", "Objective", "Pgd"]
