"""Training a classifier against several threats at once, as an encoder is trained."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from manifold_defense.attacks.objective import margins
from manifold_defense.hardening.disturbance import Disturbance
from manifold_defense.hardening.objective import Base, Step, check, divergence
from manifold_defense.modes import evaluation_mode
from manifold_defense.types import Classifier, Threat


@dataclass(frozen=True)
class Union(Base):
    """`ℓ(f(x), y) + β KL(f(x) ‖ f(x'))` with x' within one of several threats, one a batch, by turns.

    The loss of TRADES (Zhang et al. 2019, eq. 5), the turns of Madaan, Shin & Hwang 2021, for the union of
    Tramèr & Boneh 2019. x' is where `disturbance` leads up the lead of another class, the very images that
    `train-encoder` trains an encoder on: what a filter gains is to be measured beside this.

    beta  β
    """

    name: Literal["union"] = "union"
    beta: float = 6.0
    disturbance: Disturbance = field(default_factory=Disturbance)

    def __post_init__(self) -> None:
        check(self, positive=("beta",))

    @property
    def threats(self) -> tuple[Threat, ...]:
        """None without an adversary."""
        adversarial = self.disturbance.kind == "adversarial"
        return tuple(dict.fromkeys(self.disturbance.threats)) if adversarial else ()

    def __call__(self, model: Classifier, x: Tensor, y: Tensor, step: Step, /) -> Tensor:
        def lead(images: Tensor) -> Tensor:
            return margins(model(images), y, targeted=False)

        rng = torch.Generator().manual_seed(step.seed)
        with evaluation_mode(model):
            x_adv = self.disturbance(lead, x, step.number, step.progress, rng)
        logits = model(x)
        gap = divergence(logits, model(x_adv))
        return F.cross_entropy(logits, y, reduction="none") + self.beta * gap
