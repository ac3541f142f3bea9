"""Training against attacks in pixels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from manifold_defense.attacks import geometry, mi_fgsm, pgd
from manifold_defense.attacks.objective import logits_and_gradient
from manifold_defense.hardening.objective import Base, InBall, Step, check, divergence, mixed, ramped
from manifold_defense.modes import evaluation_mode
from manifold_defense.types import Ball, Classifier, Threat


@dataclass(frozen=True)
class Pgd(InBall):
    """PGD adversarial training (Madry et al. 2018)."""

    name: Literal["pgd"] = "pgd"
    steps: int = 5
    clean_share: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self, positive=("steps",), shares=("clean_share",))

    def __call__(self, model: Classifier, x: Tensor, y: Tensor, step: Step, /) -> Tensor:
        eps = self.radius(step)
        x_adv = training_attack(model, x, y, norm=self.norm, eps=eps, steps=self.steps, seed=step.seed)
        return mixed(model, x, x_adv, y, self.clean_share)


def training_attack(
    model: Classifier, x: Tensor, y: Tensor, *, norm: Ball, eps: float, steps: int, seed: int
) -> Tensor:
    """PGD of few steps, whose lengths fall to zero and whose sum crosses the ball."""
    return pgd(
        model,
        x,
        y,
        norm=norm,
        eps=eps,
        step_size=5 * eps / steps,
        steps=steps,
        stop_early=False,
        seed=seed,
    )


@dataclass(frozen=True)
class Fast(InBall):
    """One step from a random start (Wong, Rice & Kolter 2020): PGD-like at the price of two passes, as
    long as it does not collapse to a robustness against single steps alone.

    step_size  of that step, in units of eps
    """

    name: Literal["fast"] = "fast"
    step_size: float = 1.25
    clean_share: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self, positive=("step_size",), shares=("clean_share",))

    def __call__(self, model: Classifier, x: Tensor, y: Tensor, step: Step, /) -> Tensor:
        eps, shape = self.radius(step), geometry(self.norm)
        rng = torch.Generator().manual_seed(step.seed)
        with evaluation_mode(model):
            start = (x + shape.sample(x, eps, rng)).clamp(0, 1)
            _, gradient = logits_and_gradient(model, start, y, "ce", targeted=False)
        x_adv = shape.step(x, start, gradient.nan_to_num(0, 0, 0), self.step_size * eps, eps, (0.0, 1.0))
        return mixed(model, x, x_adv, y, self.clean_share)


@dataclass(frozen=True)
class Trades(InBall):
    """`ℓ(f(x), y) + β KL(f(x) ‖ f(x_adv))`, x_adv where the KL is largest (Zhang et al. 2019, eq. 5).

    beta  β
    """

    name: Literal["trades"] = "trades"
    steps: int = 5
    beta: float = 6.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self, positive=("steps", "beta"))

    def __call__(self, model: Classifier, x: Tensor, y: Tensor, step: Step, /) -> Tensor:
        eps = self.radius(step)
        x_adv = self._worst(model, x, eps, step.seed)
        logits = model(x)
        # One loss pulls both outputs: the clean one towards the label, each towards the other.
        gap = divergence(logits, model(x_adv))
        return F.cross_entropy(logits, y, reduction="none") + self.beta * gap

    def _worst(self, model: Classifier, x: Tensor, eps: float, seed: int) -> Tensor:
        shape, rng = geometry(self.norm), torch.Generator().manual_seed(seed)
        with evaluation_mode(model):
            with torch.no_grad():
                clean = model(x)

            def gap(logits: Tensor) -> Tensor:
                return divergence(clean, logits)

            # At x itself the gradient of the KL is zero.
            at = (x + shape.sample(x, eps, rng)).clamp(0, 1)
            for k in range(self.steps):
                _, gradient = logits_and_gradient(model, at, x.new_zeros(0), gap, targeted=False)
                length = 5 * eps / self.steps * (1 - k / self.steps)
                at = shape.step(x, at, gradient.nan_to_num(0, 0, 0), length, eps, (0.0, 1.0))
        return at.detach()


@dataclass(frozen=True)
class Mixture(InBall):
    """Clean images and MI-FGSM's of them in one loss (Dong et al. 2018 attack; the mixing of Goodfellow et
    al. 2015).

    decay  of the attack's momentum
    """

    name: Literal["mixture"] = "mixture"
    norms: ClassVar[tuple[Ball, ...]] = ("linf", "l2")
    norm: Literal["linf", "l2"] = "linf"
    steps: int = 5
    decay: float = 1.0
    clean_share: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self, positive=("steps",), shares=("clean_share",))
        if not self.decay >= 0:
            raise ValueError(f"decay: expected at least 0, got {self.decay}")

    def __call__(self, model: Classifier, x: Tensor, y: Tensor, step: Step, /) -> Tensor:
        eps = self.radius(step)
        x_adv = mi_fgsm(
            model,
            x,
            y,
            norm=self.norm,
            eps=eps,
            steps=self.steps,
            decay=self.decay,
            stop_early=False,
            seed=step.seed,
        )
        return mixed(model, x, x_adv, y, self.clean_share)


@dataclass(frozen=True)
class Curriculum(Base):
    """First PGD in an L2 ball, then in an L∞ ball, each with a radius that grows over half of its time.

    eps_l2  radius of the first, in pixels
    eps     of the second
    switch  share of the training at which the second begins
    """

    name: Literal["curriculum"] = "curriculum"
    eps_l2: float = 1.0
    eps: float = 0.15
    steps: int = 5
    switch: float = 0.4
    clean_share: float = 0.0

    def __post_init__(self) -> None:
        check(self, positive=("eps_l2", "steps"), shares=("switch", "clean_share"))
        if self.switch == 1:
            raise ValueError("switch: expected below 1, or it never meets L∞")

    @property
    def threats(self) -> tuple[Threat, ...]:
        return (Threat("linf", self.eps),)

    def __call__(self, model: Classifier, x: Tensor, y: Tensor, step: Step, /) -> Tensor:
        norm: Ball = "l2" if step.progress < self.switch else "linf"
        if norm == "l2":
            eps = ramped(self.eps_l2, step.progress / self.switch, 0.5)
        else:
            eps = ramped(self.eps, (step.progress - self.switch) / (1 - self.switch), 0.5)
        x_adv = training_attack(model, x, y, norm=norm, eps=eps, steps=self.steps, seed=step.seed)
        return mixed(model, x, x_adv, y, self.clean_share)
