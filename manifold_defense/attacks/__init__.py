"""Attacks: each a function `(model, x, y) -> x_adv`; bind parameters with `functools.partial`.

None defends anything: a figure is worth what the strongest of them leaves.
"""

from manifold_defense.attacks.apgd import apgd
from manifold_defense.attacks.continued import square_pgd, transfer_pgd
from manifold_defense.attacks.corruptions import CORRUPTIONS, corruption
from manifold_defense.attacks.cw import cw
from manifold_defense.attacks.ddn import ddn
from manifold_defense.attacks.deepfool import deepfool
from manifold_defense.attacks.detector_aware import detector_aware
from manifold_defense.attacks.eot import Expectation, mean_over_draws
from manifold_defense.attacks.fab import fab
from manifold_defense.attacks.feature_matching import feature_matching
from manifold_defense.attacks.fmn import fmn
from manifold_defense.attacks.hop_skip_jump import hop_skip_jump
from manifold_defense.attacks.jsma import jsma
from manifold_defense.attacks.latent import latent_attack
from manifold_defense.attacks.momentum import mi_fgsm
from manifold_defense.attacks.noise import noise
from manifold_defense.attacks.norms import GEOMETRIES, geometry
from manifold_defense.attacks.on_range import range_attack
from manifold_defense.attacks.pairs import Pairs, overpowered_pairs, pair_break
from manifold_defense.attacks.patch import patch
from manifold_defense.attacks.pgd import fgsm, pgd
from manifold_defense.attacks.sparse import pgd_l0, sparse_rs, stroke_search
from manifold_defense.attacks.square import square
from manifold_defense.attacks.window import window_pgd

__all__ = [
    "CORRUPTIONS",
    "GEOMETRIES",
    "Expectation",
    "Pairs",
    "apgd",
    "corruption",
    "cw",
    "ddn",
    "deepfool",
    "detector_aware",
    "fab",
    "feature_matching",
    "fgsm",
    "fmn",
    "geometry",
    "hop_skip_jump",
    "jsma",
    "latent_attack",
    "mean_over_draws",
    "mi_fgsm",
    "noise",
    "overpowered_pairs",
    "pair_break",
    "patch",
    "pgd",
    "pgd_l0",
    "range_attack",
    "sparse_rs",
    "square",
    "square_pgd",
    "stroke_search",
    "transfer_pgd",
    "window_pgd",
]
