"""A filter with a reject option: what the generator cannot draw is not classified.

N images. A rejected attacked image counts as defended, a rejected clean one as an error; whoever
attacks must both fool the classifier and pass (see `attacks.detector_aware`).
"""

from __future__ import annotations

from typing import NamedTuple, Self

import torch
from torch import Tensor, nn

from manifold_defense.filter import ManifoldFilter, with_parts
from manifold_defense.modes import evaluation_mode
from manifold_defense.types import View

REJECTED = -1


class RejectingClassifier(nn.Module):
    """`classifier(filter(x))`, unless the filter is too far from x: `‖G(z*) − x‖² / P > threshold`.

    As a module it gives the logits (N, K) of every image, refused or not, and `residual` what it is judged
    by: an attack differentiates both. `predict` is what is deployed.

    Does not defend against attacks that keep the residual low: on the range it is zero.
    """

    def __init__(self, filter: ManifoldFilter, classifier: nn.Module, threshold: float) -> None:
        super().__init__()
        if not threshold >= 0:
            raise ValueError(f"threshold: expected at least 0, got {threshold}")
        self.filter = filter
        self.classifier = classifier
        self.threshold = threshold

    def view(self, name: View) -> Self:
        """This model, sharing all weights, differentiated as `name` says."""
        return with_parts(self, filter=self.filter.seen(name))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.filter(x))
        return logits

    def residual(self, x: Tensor) -> Tensor:
        """Mean squared error (N,) of the projection of images (N, C, H, W), differentiable in them."""
        drawing = self.filter.drawing(x)
        if self.filter.view == "identity":
            # Its imitation of a gradient, that of x, would cancel here.
            drawing = drawing.detach()
        error: Tensor = (drawing - x).square().flatten(1).mean(1)
        return error

    @torch.no_grad()
    def predict(self, x: Tensor) -> Tensor:
        """Labels (N,) int64 of images (N, C, H, W); −1 where refused, and where nothing is finite."""
        with evaluation_mode(self):
            found = self.filter.project(x)
            logits = self.classifier(self.filter.blend(x, found.image))
        # A residual that is NaN is not below the threshold, and NaN logits are no label.
        sure = (found.error <= self.threshold) & logits.isfinite().all(1)
        return torch.where(sure, logits.argmax(1), REJECTED)


def credited(predictions: Tensor, y: Tensor, *, attacked: bool) -> Tensor:
    """Which predictions (N,), −1 for refused, do the defender credit, (N,) bool, given the labels y (N,).

    A refusal does if the image was attacked. An attack that fails returns the clean image: a robust
    accuracy is that of the images that are right when clean *and* defended when attacked.
    """
    return (predictions == y) | (attacked & (predictions == REJECTED))


def threshold_at(errors: Tensor, false_positive_rate: float) -> float:
    """The lowest threshold that refuses at most this share of clean images, given their errors (N,).

    Choose it on images other than those that are reported.
    """
    _check(errors, "errors")
    if not 0 <= false_positive_rate < 1:
        raise ValueError(f"false_positive_rate: expected in [0, 1), got {false_positive_rate}")
    refused = int(false_positive_rate * len(errors) + 1e-9)
    return float(errors.sort().values[len(errors) - 1 - refused])


class Roc(NamedTuple):
    """What a threshold on the residual tells apart, from the one that refuses nothing to none at all."""

    fpr: Tensor  # (T,) share of clean images refused, rising from 0 to 1
    tpr: Tensor  # (T,) share of attacked images refused, rising from 0 to 1
    thresholds: Tensor  # (T,) falling; refused is what lies above, and −∞ refuses everything
    auc: float  # area below the curve: P(attacked > clean), a tie for one half


def roc(clean_errors: Tensor, attacked_errors: Tensor) -> Roc:
    """The detector's curve for errors (N,) of clean and (M,) of attacked images (Fawcett 2006).

    It is worth what the attack is: give it images that fool the classifier, of an attacker who knows
    of the detector.
    """
    _check(clean_errors, "clean_errors")
    _check(attacked_errors, "attacked_errors")
    clean, attacked = (errors.double().sort().values for errors in (clean_errors, attacked_errors))
    thresholds = torch.cat([clean, attacked]).unique().flip(0)  # unique sorts
    thresholds = torch.cat([thresholds, thresholds.new_full((1,), -torch.inf)])
    fpr, tpr = (
        1 - torch.searchsorted(errors, thresholds, right=True) / len(errors) for errors in (clean, attacked)
    )
    return Roc(fpr, tpr, thresholds, float(torch.trapezoid(tpr.double(), fpr.double())))


def _check(errors: Tensor, name: str) -> None:
    if errors.dim() != 1 or len(errors) == 0 or bool(errors.isnan().any()):
        raise ValueError(f"{name}: expected shape (N,) without NaN, N > 0, got {tuple(errors.shape)}")
