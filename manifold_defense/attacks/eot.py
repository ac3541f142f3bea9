"""Expectation over transformation: a randomised model as the mean of its draws (Athalye et al. 2018)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from manifold_defense.attacks.objective import correct
from manifold_defense.modes import evaluation_mode
from manifold_defense.randomised import seeded
from manifold_defense.types import Classifier


class Expectation(nn.Module):
    """What an attack climbs in place of `model`: log-probabilities (N, K) averaged over `draws`, in two ways.

    Every call repeats the draws that begin at `seed`, so that it is a function of the images: iterates
    can be compared, and a run repeated. The model's own stream of draws goes on as if nothing had been.

    Half is the logarithm of their mean probability: its gradient is that of the draws that still decide, and
    PGD leaves fewer images than on mean logits. But of large logits a single draw decides. So half is the
    mean of their logarithms, in which every draw counts alike at any scale, and a constant that a draw adds
    to its logits cancels. A margin above zero is not yet a majority of wrong draws: attack with
    `stop_early=False`, and score by `mean_over_draws`, on another seed and on more draws, since those that
    all images share err alike.
    """

    def __init__(self, model: Classifier, draws: int = 20, seed: int = 0) -> None:
        super().__init__()
        _check(draws)
        self.model, self.draws, self.seed = model, draws, seed

    def forward(self, x: Tensor) -> Tensor:
        with seeded(self.model, self.seed):
            values = torch.stack([F.log_softmax(self.model(x), dim=1) for _ in range(self.draws)])
        return (values.mean(0) + values.logsumexp(0) - math.log(self.draws)) / 2


@torch.no_grad()
def mean_over_draws(model: Classifier, x: Tensor, y: Tensor, draws: int = 20, seed: int = 1) -> Tensor:
    """The share (N,) of `draws` in which images (N, C, H, W) are classified as y (N,).

    Its mean over images is the accuracy of a randomised model. Give it a seed that no attack had. To ask
    that all draws be right is another question, whose answer falls with their number.
    """
    _check(draws)
    with evaluation_mode(model), seeded(model, seed):
        return torch.stack([correct(model(x), y) for _ in range(draws)]).double().mean(0)


def _check(draws: int) -> None:
    if draws < 1:
        raise ValueError(f"draws: expected at least 1, got {draws}")
