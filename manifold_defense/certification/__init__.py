"""Proofs: within a radius of an image no attack, known or not, changes the answer.

Every method returns `Certificates`, a prediction and a radius an image. A proof holds for the computation
that it was made of, up to the rounding of its arithmetic; a radius of 0 says that nothing was proved, not
that the image is safe at 0.
"""

from manifold_defense.certification.branching import Verdicts, branching_certificates, decide
from manifold_defense.certification.certificates import ABSTAINED, Certificates, certified_accuracy
from manifold_defense.certification.distance import PatchClassifier, fit_patches
from manifold_defense.certification.intervals import interval_certificates, interval_logits, intervals_prove
from manifold_defense.certification.linear import linear_certificates, linear_worst_margin
from manifold_defense.certification.lipschitz import lipschitz_certificates, lipschitz_constant
from manifold_defense.certification.smoothing import (
    Clipped,
    SmoothingConfig,
    smoothed_certify,
    smoothed_predict,
)

__all__ = [
    "ABSTAINED",
    "Certificates",
    "Clipped",
    "PatchClassifier",
    "SmoothingConfig",
    "Verdicts",
    "branching_certificates",
    "certified_accuracy",
    "decide",
    "fit_patches",
    "interval_certificates",
    "interval_logits",
    "intervals_prove",
    "linear_certificates",
    "linear_worst_margin",
    "lipschitz_certificates",
    "lipschitz_constant",
    "smoothed_certify",
    "smoothed_predict",
]
