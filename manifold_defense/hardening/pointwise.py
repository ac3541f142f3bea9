"""Training without an inner attack: clean, by penalty, by a teacher, under noise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from manifold_defense.hardening.objective import Base, InBall, Step, check
from manifold_defense.types import Ball, Classifier


@dataclass(frozen=True)
class Clean(Base):
    """Cross-entropy on the images as they are; behind a filter, on reconstructions made anew ("Rec")."""

    name: Literal["clean"] = "clean"

    def __call__(self, model: Classifier, x: Tensor, y: Tensor, step: Step, /) -> Tensor:
        return F.cross_entropy(model(x), y, reduction="none")


@dataclass(frozen=True)
class Noise(Base):
    """Cross-entropy under Gaussian noise, not clipped: what randomized smoothing is trained with (Cohen,
    Rosenfeld & Kolter 2019). Against an attack it masks more than it defends.

    sigma  of the noise, in pixels
    """

    name: Literal["noise"] = "noise"
    sigma: float = 0.25

    def __post_init__(self) -> None:
        check(self, positive=("sigma",))

    def __call__(self, model: Classifier, x: Tensor, y: Tensor, step: Step, /) -> Tensor:
        rng = torch.Generator().manual_seed(step.seed)
        noisy = x + self.sigma * torch.randn(x.shape, generator=rng).to(x)
        return F.cross_entropy(model(noisy), y, reduction="none")


@dataclass(frozen=True)
class GradientPenalty(InBall):
    """`ℓ + eps ‖∇ₓℓ‖` in the dual norm of the ball: L1 for L∞, L2 for L2.

    Equal to adversarial training to first order in eps (Lyu, Huang & Liang 2015; Simon-Gabriel et al.
    2019), and hence blind to what lies further out.
    """

    name: Literal["gradient_penalty"] = "gradient_penalty"
    norms: ClassVar[tuple[Ball, ...]] = ("linf", "l2")
    norm: Literal["linf", "l2"] = "linf"

    def __call__(self, model: Classifier, x: Tensor, y: Tensor, step: Step, /) -> Tensor:
        x = x.detach().requires_grad_(True)
        loss = F.cross_entropy(model(x), y, reduction="none")
        (gradient,) = torch.autograd.grad(loss.sum(), x, create_graph=True)
        gradient = gradient.flatten(1)
        if self.norm == "linf":
            length = gradient.abs().sum(1)
        else:
            length = gradient.square().sum(1).clamp(min=1e-20).sqrt()
        return loss + self.radius(step) * length


@dataclass(frozen=True)
class Distillation(Base):
    """Defensive distillation (Papernot et al. 2016), to be broken: the answers of a teacher, both at
    `temperature`; deployed at 1, where the softmax is flat and cross-entropy has no gradient left.

    Without a teacher the labels are learned at the temperature: such a teacher has to be trained first.

    temperature  by which logits are divided
    """

    takes_teacher: ClassVar[bool] = True
    name: Literal["distillation"] = "distillation"
    temperature: float = 50.0

    def __post_init__(self) -> None:
        check(self, positive=("temperature",))

    def __call__(self, model: Classifier, x: Tensor, y: Tensor, step: Step, /) -> Tensor:
        logits = model(x) / self.temperature
        if step.teacher is None:
            return F.cross_entropy(logits, y, reduction="none")
        with torch.no_grad():
            soft = (step.teacher(x) / self.temperature).softmax(1)
        return F.cross_entropy(logits, soft, reduction="none")
