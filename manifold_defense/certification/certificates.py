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


def from_margins(prediction: Tensor, radii: Tensor) -> Certificates:
    """The least of the radii (N, K) towards each other class; infinite ones (its own) do not count."""
    return Certificates(prediction, radii.amin(1).clamp(min=0).nan_to_num(0, posinf=torch.inf))
