"""Expectation over transformation: a randomised model as the mean of its draws (Athalye et al. 2018)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from manifold_defense.attacks.objective import correct, evaluation_mode
from manifold_defense.randomised import seeded
from manifold_defense.types import Classifier


class Expectation(nn.Module):
    """The logarithm of the mean probabilities (N, K) of `model` over `draws`, which is what an attack climbs.

    Every call repeats the draws that begin at `seed`, so that it is a function of the images: iterates
    can be compared, and a run repeated. The model's own stream of draws goes on as if nothing had been.

    A draw that is fooled already has little left to give, and the gradient is that of the others; of mean
    logits, every draw's counts alike, and PGD leaves more. A constant that a draw adds to its logits cancels
    first, and where all are sure the logarithm still has a slope. A margin of the mean above zero is not yet
    a majority of wrong draws: attack with `stop_early=False`, and score by `mean_over_draws`, on another
    seed and on more draws, since those that all images share err alike.
    """

    def __init__(self, model: Classifier, draws: int = 20, seed: int = 0) -> None:
        super().__init__()
        _check(draws)
        self.model, self.draws, self.seed = model, draws, seed

    def forward(self, x: Tensor) -> Tensor:
        with seeded(self.model, self.seed):
            values = [F.log_softmax(self.model(x), dim=1) for _ in range(self.draws)]
        return torch.stack(values).logsumexp(0) - math.log(self.draws)


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
