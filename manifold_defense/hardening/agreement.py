"""What a drawing means to a classifier, beside what the image that it was made of means."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Agreement:
    """`KL(f(x) ‖ f(drawing))` in nats, for a classifier f that is frozen and put into eval mode here.

    Needs no labels: f's own answers to the images are the measure, right or wrong. As the natural and the
    robust output of TRADES (Zhang et al. 2019), with the filter in f's place as what is trained.
    """

    def __init__(self, classifier: nn.Module) -> None:
        self._classifier = classifier.requires_grad_(False).eval()

    def __call__(self, x: Tensor) -> Callable[[Tensor], Tensor]:
        """Images x (N, C, H, W) to a function of drawings (N, C, H, W) that gives (N,)."""
        with torch.no_grad():
            meant = self._classifier(x).softmax(1)

        def apart(drawings: Tensor) -> Tensor:
            log = self._classifier(drawings).log_softmax(1)
            return F.kl_div(log, meant, reduction="none").sum(1)

        return apart
