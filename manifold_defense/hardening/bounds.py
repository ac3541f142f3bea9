"""Training that proves what it gains."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from manifold_defense.certification.intervals import Bounded, interval_logits, intervals_prove
from manifold_defense.hardening.adversarial import training_attack
from manifold_defense.hardening.objective import Base, Step, check, ramped
from manifold_defense.types import Classifier, Threat


@dataclass(frozen=True)
class IntervalBounds(Base):
    """Interval bound propagation (Gowal et al. 2018): `κ ℓ(f(x)) + (1 − κ) ℓ(bounds)`.

    The model must be one that the bounds can follow, a binarised one for example.

    eps     radius of the box, L∞, in pixels
    kappa   κ at the end; it falls from 1 as the radius grows
    warmup  share of the training, on clean images alone, before the radius grows
    ramp    share over which it grows
    free    share of the pixels, drawn anew, that is bounded over all its reach; the others stand where an
            attack puts them (after Müller et al. 2023, who bound a smaller box around it): a classifier less
            held back, of which intervals alone prove less, and branch and bound more
    """

    name: Literal["interval_bounds"] = "interval_bounds"
    eps: float = 0.15
    kappa: float = 0.5
    warmup: float = 0.05
    ramp: float = 0.5
    free: float = 1.0
    steps: int = 2

    def __post_init__(self) -> None:
        check(self, positive=("free", "steps"), shares=("kappa", "warmup", "ramp", "free"))

    @property
    def threats(self) -> tuple[Threat, ...]:
        return (Threat("linf", self.eps),)

    def proved(self, model: Classifier, x: Tensor, y: Tensor, /) -> Tensor | None:
        if self.free < 1:
            return None  # branch and bound may, but not as often as a training is validated
        return intervals_prove(cast(Bounded, model), x, y, self.eps)

    def __call__(self, model: Classifier, x: Tensor, y: Tensor, step: Step, /) -> Tensor:
        since = step.progress - self.warmup
        done = ramped(1.0, since, self.ramp) if since >= 0 else 0.0
        kappa = 1 - (1 - self.kappa) * done
        loss = torch.zeros_like(y, dtype=x.dtype)
        if kappa > 0:
            loss = loss + kappa * F.cross_entropy(model(x), y, reduction="none")
        if kappa < 1:
            centre, eps = self._box(model, x, y, self.eps * done, step.seed)
            bounds = interval_logits(cast(Bounded, model), centre, y, eps)
            loss = loss + (1 - kappa) * F.cross_entropy(bounds, y, reduction="none")
        return loss

    def _box(
        self, model: Classifier, x: Tensor, y: Tensor, eps: float, seed: int
    ) -> tuple[Tensor, float | Tensor]:
        """The middle (N, C, H, W) of what is bounded and its radius, one or one a pixel."""
        if self.free == 1:
            return x, eps
        x_adv = training_attack(model, x, y, norm="linf", eps=eps, steps=self.steps, seed=seed)
        rng = torch.Generator().manual_seed(seed)
        free = torch.rand(x.shape, generator=rng).to(x) < self.free
        return torch.where(free, x, x_adv), free * eps
