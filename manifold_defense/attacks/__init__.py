"""Attacks: each a function `(model, x, y) -> x_adv`; bind parameters with `functools.partial`.

None defends anything: a figure is worth what the strongest of them leaves.
"""

from manifold_defense.attacks.cw import cw
from manifold_defense.attacks.latent import latent_attack
from manifold_defense.attacks.noise import noise
from manifold_defense.attacks.norms import GEOMETRIES, geometry
from manifold_defense.attacks.pgd import fgsm, pgd

__all__ = ["GEOMETRIES", "cw", "fgsm", "geometry", "latent_attack", "noise", "pgd"]
