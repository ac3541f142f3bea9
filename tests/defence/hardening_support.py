"""Every objective in small, and what they are tried on."""

from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from gan.optimisation import seeded
from manifold_defense.classifiers import ArchitectureConfig, ImageClassifier
from manifold_defense.hardening import (
    Clean,
    Curriculum,
    Distillation,
    Dual,
    Fast,
    GradientPenalty,
    IntervalBounds,
    Latent,
    Mixture,
    Noise,
    Objective,
    Pgd,
    RobustManifold,
    Trades,
    Union,
)
from manifold_defense.hardening.disturbance import Disturbance
from manifold_defense.hardening.training import TrainingConfig, classifier_state, train_classifier
from manifold_defense.types import Threat


def classifier(seed: int = 0) -> nn.Module:
    return seeded(seed, lambda: ImageClassifier((1, 8, 8), 10, ArchitectureConfig(width=8)))


def with_batch_statistics(seed: int = 0) -> nn.Module:
    """Buffers, whole numbers among them, that an average and a saved state must carry."""
    return seeded(
        seed,
        lambda: nn.Sequential(
            nn.Conv2d(1, 4, 3, stride=2), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(36, 10)
        ),
    )


# Every objective there is, in small.
SMALL: dict[str, Objective] = {
    "clean": Clean(),
    "noise": Noise(sigma=0.2),
    "pgd-linf": Pgd(norm="linf", eps=0.1, steps=2),
    "pgd-l2": Pgd(norm="l2", eps=0.5, steps=2, ramp=0.0),
    "pgd-mixed": Pgd(norm="linf", eps=0.1, steps=2, clean_share=0.5),
    "fast": Fast(eps=0.1),
    "trades": Trades(eps=0.1, steps=2, beta=2.0),
    "union": Union(
        disturbance=Disturbance(threats=(Threat("linf", 0.1), Threat("l0", 3)), steps=2, ramp=0.0)
    ),
    "mixture": Mixture(eps=0.1, steps=2),
    "curriculum": Curriculum(eps_l2=0.5, eps=0.1, steps=2),
    "latent": Latent(eps=0.2, steps=2),
    "dual": Dual(eps=0.1, eps_latent=0.2, steps=2),
    "robust_manifold": RobustManifold(eps=0.1, steps=2, pairs=8, pair_steps=3),
    "penalty-linf": GradientPenalty(eps=0.05),
    "penalty-l2": GradientPenalty(norm="l2", eps=0.5),
    "distillation": Distillation(temperature=5.0),
    "interval_bounds": IntervalBounds(eps=0.01),
    "partial_bounds": IntervalBounds(eps=0.01, free=0.5),
}


class Mixtures(nn.Module):
    """Linear mixtures of the digits: a manifold whose encoder is known."""

    latent_dim, image_shape = 20, (1, 8, 8)

    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self.mean = x.mean(0)
        _, _, basis = torch.linalg.svd((x - self.mean).flatten(1), full_matrices=False)
        self.basis = basis[: self.latent_dim]

    def forward(self, z: Tensor) -> Tensor:
        return (self.mean + (z @ self.basis).unflatten(1, self.image_shape)).clamp(0, 1)


class Encoder(nn.Module):
    def __init__(self, mixtures: Mixtures) -> None:
        super().__init__()
        self.mixtures = mixtures

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mixtures.mean).flatten(1) @ self.mixtures.basis.T


def trained(fabric: Fabric, digits: Any, objective: Objective) -> ImageClassifier:
    """A classifier of 60 batches of digits, (200, 1, 8, 8) and labels."""
    config = TrainingConfig(images=60 * 50, batch_size=50, lr=5e-3, average_half_life=200)
    model = seeded(0, lambda: ImageClassifier((1, 8, 8), 10, ArchitectureConfig(width=8)))
    state = classifier_state(fabric, model, config)

    def batches(step: int) -> tuple[Tensor, Tensor]:
        chosen = torch.arange(50 * step, 50 * step + 50) % len(digits[0])
        return digits[0][chosen], digits[1][chosen]

    for _ in train_classifier(fabric, state, batches, config, objective, 0):
        pass
    best: ImageClassifier = state["best"]
    return best
