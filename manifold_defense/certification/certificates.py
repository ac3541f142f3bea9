"""What every proof comes to: a prediction and a radius an image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

ABSTAINED = -1


class Certificates(NamedTuple):
    """Of N images: whatever is nearer than `radius`, in the norm of the method, is given `prediction`."""

    prediction: Tensor  # (N,) int64, ABSTAINED where the method gives no answer
    radius: Tensor  # (N,) at least 0, in pixel units of [0, 1]; 0 where nothing is proved


def certified_accuracy(found: Certificates, y: Tensor, radii: Sequence[float]) -> Tensor:
    """Share of the images that are right, labels y (N,), and proved so within each radius (len(radii),).

    At radius 0 this is the clean accuracy, abstentions counted as errors.
    """
    right = found.prediction == y
    shares = [(right & (found.radius >= radius)).double().mean() for radius in radii]
    return torch.stack(shares) if shares else torch.empty(0, dtype=torch.float64)


def nearest_boundary(logits: Tensor, slopes: Tensor) -> Certificates:
    """`min_j (Z_y − Z_j) / slopes[y, j]` for the predicted y of logits (N, K).

    slopes (K, K) say how fast the difference of two logits can change with the distance.
    """
    prediction = logits.argmax(1)
    margins = logits.gather(1, prediction.unsqueeze(1)) - logits
    own = torch.arange(logits.shape[1], device=logits.device) == prediction.unsqueeze(1)
    radii = margins / slopes[prediction].clamp(min=1e-300)
    return Certificates(prediction, radii.masked_fill(own, torch.inf).amin(1))
