"""What a drawing means to a classifier, beside what the image that it was made of means."""

from __future__ import annotations

import torch
from torch import Tensor

from manifold_defense.attacks.objective import margins
from manifold_defense.filter import both_answers
from manifold_defense.hardening.objective import divergence
from manifold_defense.types import Classifier


class Agreement:
    """Of drawings with images x (N, C, H, W), as a classifier f sees both: to train a filter for f.

    Needs no labels: f's own answers to x are the measure, right or wrong. As in TRADES (Zhang et al. 2019)
    the natural output stands beside the robust one; but what is trained is what stands before f. With a
    `share` below 1, f(drawing) is the answer to image and drawing, mixed as `DefendedClassifier` does.
    """

    def __init__(self, classifier: Classifier, x: Tensor, *, share: float = 1.0) -> None:
        with torch.no_grad():
            logits = classifier(x)
        self._classifier, self._share = classifier, share
        self._meant, self._class = logits, logits.argmax(1)

    def apart(self, images: Tensor, drawings: Tensor) -> Tensor:
        """`KL(f(x) ‖ f(drawing))` in nats, (N,), for images x' and their drawings (N, C, H, W)."""
        return divergence(self._meant, self._answer(images, drawings))

    def lead(self, images: Tensor, drawings: Tensor) -> Tensor:
        """That of the best other class over the one that f says of x, in logits, (N,)."""
        return margins(self._answer(images, drawings), self._class, targeted=False)

    def _answer(self, images: Tensor, drawings: Tensor) -> Tensor:
        drawn = self._classifier(drawings).to(images)  # the type of a loss, whatever the networks compute in
        if self._share == 1:
            return drawn
        return both_answers(self._classifier(images).to(images), drawn, self._share)
