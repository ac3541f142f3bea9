"""On-manifold attack: move an image's latent instead of its pixels (Stutz, Hein & Schiele 2019, eq. 2)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from manifold_defense.attacks.pgd import pgd
from manifold_defense.modes import evaluation_mode
from manifold_defense.types import Classifier, Generator


def latent_attack(
    model: Classifier,
    generator: Generator,
    z: Tensor,
    y: Tensor,
    *,
    eps: float = 0.3,
    steps: int = 10,
    restarts: int = 1,
    seed: int = 0,
) -> Tensor:
    """`max ℓ(f(G(z + ζ)), y)` over `‖ζ‖∞ ≤ eps` from latents z (N, D): images (N, C, H, W).

    The label stays that of G(z) as long as eps is small against the distance between classes.
    """
    with evaluation_mode(model, generator):
        moved = pgd(
            lambda latent: model(generator(latent)),
            z,
            y,
            norm="linf",
            eps=eps,
            steps=steps,
            restarts=restarts,
            stop_early=False,
            bounds=(-math.inf, math.inf),
            seed=seed,
        )
        with torch.no_grad():
            return generator(moved)
