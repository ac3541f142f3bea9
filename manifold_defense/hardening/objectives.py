"""What a classifier is trained to make small. N images, K classes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from manifold_defense.attacks import latent_attack, pgd
from manifold_defense.types import Classifier, Encoder, Generator, Norm


class Objective(Protocol):
    """`objective(model, x (N, C, H, W), y (N,), progress, seed) -> loss (N,)`.

    `progress` runs from 0 to 1 over the training; `seed` is fresh at every step.
    """

    def __call__(
        self, model: Classifier, x: Tensor, y: Tensor, /, *, progress: float, seed: int
    ) -> Tensor: ...


@dataclass(frozen=True)
class Clean:
    """Cross-entropy on the images as they are."""

    def __call__(self, model: Classifier, x: Tensor, y: Tensor, /, *, progress: float, seed: int) -> Tensor:
        return F.cross_entropy(model(x), y, reduction="none")


@dataclass(frozen=True)
class Pgd:
    """PGD adversarial training (Madry et al. 2018); the radius grows over the first `ramp` of training."""

    norm: Norm = "linf"
    eps: float = 0.3
    steps: int = 7
    clean_share: float = 0.0
    ramp: float = 0.3

    def __call__(self, model: Classifier, x: Tensor, y: Tensor, /, *, progress: float, seed: int) -> Tensor:
        eps = self.eps * min(1.0, progress / self.ramp) if self.ramp > 0 else self.eps
        x_adv = pgd(
            model,
            x,
            y,
            norm=self.norm,
            eps=eps,
            step_size=5 * eps / self.steps,  # falls to zero; the sum crosses the ball
            steps=self.steps,
            stop_early=False,
            seed=seed,
        )
        return _mixed(model, x, x_adv, y, self.clean_share)


@dataclass(frozen=True)
class Latent:
    """On-manifold adversarial training (Stutz, Hein & Schiele 2019) around E(x).

    Lowers the test error; by itself it gives no robustness off the manifold.
    """

    generator: Generator
    encoder: Encoder
    eps: float = 0.3
    steps: int = 7
    clean_share: float = 0.5

    def __call__(self, model: Classifier, x: Tensor, y: Tensor, /, *, progress: float, seed: int) -> Tensor:
        with torch.no_grad():
            z = self.encoder(x)
        x_adv = latent_attack(model, self.generator, z, y, eps=self.eps, steps=self.steps, seed=seed)
        return _mixed(model, x, x_adv, y, self.clean_share)


def _mixed(model: Classifier, x: Tensor, x_adv: Tensor, y: Tensor, clean_share: float) -> Tensor:
    """Cross-entropy (N,) on adversarial images, blended with that on the clean ones."""
    loss = F.cross_entropy(model(x_adv), y, reduction="none")
    if clean_share == 0:
        return loss
    clean = F.cross_entropy(model(x), y, reduction="none")
    return clean_share * clean + (1 - clean_share) * loss
