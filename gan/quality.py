"""How well a generator covers the data, measured in the features of a classifier.

Shapes: N real and M generated samples, F features. Never in Inception features: grey 8×8 digits
have no business there, and our own classifier is what the defence protects.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# Not by a matrix product, which loses the digits of distances that are small beside the features.
_EXACT = "donot_use_mm_for_euclid_dist"


class PrecisionRecall(NamedTuple):
    precision: float
    recall: float


def _radii(features: Tensor, neighbours: int) -> Tensor:
    """Distance of each of (N, F) points to its k-th nearest other point, (N,)."""
    distances = torch.cdist(features, features, compute_mode=_EXACT)
    return distances.kthvalue(min(neighbours + 1, len(features)), dim=1).values


def precision_recall(real: Tensor, fake: Tensor, neighbours: int = 3) -> PrecisionRecall:
    """Improved precision and recall of (N, F) real and (M, F) generated features.

    Precision: share of generated points inside the real manifold, the union of balls that reach
    each real point's k-th neighbour; recall: the converse. Kynkäänniemi et al. 2019, eq. 1 and 2.
    """
    distances = torch.cdist(fake, real, compute_mode=_EXACT)  # (M, N)
    precision = (distances <= _radii(real, neighbours)).any(1).float().mean()
    recall = (_radii(fake, neighbours) >= distances.T).any(1).float().mean()
    return PrecisionRecall(float(precision), float(recall))


def frechet_distance(real: Tensor, fake: Tensor) -> float:
    """`‖μ₁ − μ₂‖² + tr(C₁ + C₂ − 2 (C₁C₂)^½)` of (N, F) and (M, F) features (Heusel et al. 2017, eq. 6).

    The trace of the square root is taken from the eigenvalues of the symmetric `C₁^½ C₂ C₁^½`.
    """
    if min(len(real), len(fake)) < 2:
        return float("nan")  # a single point has no covariance
    real, fake = real.cpu().double(), fake.cpu().double()
    difference = real.mean(0) - fake.mean(0)
    covariances = torch.atleast_2d(torch.cov(real.T)), torch.atleast_2d(torch.cov(fake.T))
    values, vectors = torch.linalg.eigh(covariances[0])
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ covariances[1] @ root).clamp(min=0).sqrt().sum()
    total = difference.square().sum() + covariances[0].trace() + covariances[1].trace() - 2 * cross
    return max(float(total), 0.0)
