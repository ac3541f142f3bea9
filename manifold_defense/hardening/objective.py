"""What a classifier is trained to make small, and what an objective may know of the training. N images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol, get_args

from torch import Tensor
from torch.nn import functional as F

from manifold_defense.filter import ManifoldFilter
from manifold_defense.types import Ball, Classifier, Threat


@dataclass(frozen=True)
class Step:
    """One step of a training, as the objective sees it.

    progress  from 0 to 1 over the training
    seed      fresh at every step
    number    how many came before
    manifold  the filter whose generator and encoder on-manifold objectives move on
    teacher   whom distillation asks, a classifier of images (N, C, H, W)
    """

    progress: float = 1.0
    seed: int = 0
    number: int = 0
    manifold: ManifoldFilter | None = None
    teacher: Classifier | None = None


class Objective(Protocol):
    """A frozen dataclass: `objective(model, x (N, C, H, W), y (N,), step) -> loss (N,)`.

    It is the whole configuration of a training; a new one needs no change to the loop.
    """

    needs_manifold: ClassVar[bool]
    takes_teacher: ClassVar[bool]

    @property
    def name(self) -> str:
        """In a configuration."""

    @property
    def threats(self) -> tuple[Threat, ...]:
        """What it trains for, if for any: its training is judged by the worst of them."""

    def proved(self, model: Classifier, x: Tensor, y: Tensor, /) -> Tensor | None:
        """Which labels (N,) it proves in all of its ball, and is judged by; None if it proves none."""

    def __call__(self, model: Classifier, x: Tensor, y: Tensor, step: Step, /) -> Tensor: ...


class Base:
    """What most objectives are: for no ball, in need of nothing.

    Of their settings these are the same in all that have them:

    name         of the objective
    steps        gradients of each attack
    clean_share  weight of clean images beside attacked ones
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}  # read by pipelines.settings
    needs_manifold: ClassVar[bool] = False
    takes_teacher: ClassVar[bool] = False

    @property
    def threats(self) -> tuple[Threat, ...]:
        return ()

    def proved(self, model: Classifier, x: Tensor, y: Tensor, /) -> Tensor | None:
        return None


@dataclass(frozen=True)
class InBall(Base):
    """For one ball, whose radius grows to eps.

    norm  of the ball
    eps   its radius, in pixel units of [0, 1]
    ramp  share of the training over which it grows from 0
    """

    norms: ClassVar[tuple[Ball, ...]] = get_args(Ball)  # that the objective is for
    norm: Ball = "linf"
    eps: float = 0.15
    ramp: float = 0.3

    def __post_init__(self) -> None:
        if self.norm not in self.norms:
            raise ValueError(f"norm: expected one of {', '.join(self.norms)}, got {self.norm!r}")
        check(self, shares=("ramp",))

    @property
    def threats(self) -> tuple[Threat, ...]:
        return (Threat(self.norm, self.eps),)

    def radius(self, step: Step) -> float:
        return ramped(self.eps, step.progress, self.ramp)


def mixed(model: Classifier, x: Tensor, x_adv: Tensor, y: Tensor, clean_share: float) -> Tensor:
    """Cross-entropy (N,) on adversarial images, blended with that on the clean ones."""
    loss = F.cross_entropy(model(x_adv), y, reduction="none")
    if clean_share == 0:
        return loss
    clean = F.cross_entropy(model(x), y, reduction="none")
    return clean_share * clean + (1 - clean_share) * loss


def divergence(meant: Tensor, logits: Tensor) -> Tensor:
    """`KL(softmax(meant) ‖ softmax(logits))` in nats, (N,), of logits (N, K)."""
    # Of logarithms: a probability that has sunk to 0 has no gradient.
    return F.kl_div(logits.log_softmax(1), meant.log_softmax(1), reduction="none", log_target=True).sum(1)


def ramped(value: float, progress: float, ramp: float) -> float:
    """`value`, reached linearly over the first `ramp` of the training."""
    return value * min(1.0, progress / ramp) if ramp > 0 else value


def check(objective: Base, *, positive: tuple[str, ...] = (), shares: tuple[str, ...] = ()) -> None:
    """Raise ValueError that names the first field out of its range, those of its threats included."""
    for name in positive:
        if not 0 < getattr(objective, name) <= 1e6:
            raise ValueError(
                f"{name}: expected above 0 and at most a million, got {getattr(objective, name)}"
            )
    for name in shares:
        if not 0 <= getattr(objective, name) <= 1:
            raise ValueError(f"{name}: expected in [0, 1], got {getattr(objective, name)}")
    _ = objective.threats
