"""Training on the generator's range: around an image's own latent, on both manifolds, on pairs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from manifold_defense.attacks import latent_attack, overpowered_pairs
from manifold_defense.filter import ManifoldFilter
from manifold_defense.hardening.adversarial import training_attack
from manifold_defense.hardening.objective import Base, InBall, Step, check, mixed, ramped
from manifold_defense.types import Ball, Classifier, Encoder, Generator, Threat


def _manifold(step: Step) -> tuple[Generator, Encoder]:
    filter = step.manifold
    if not isinstance(filter, ManifoldFilter) or filter.encoder is None:
        raise ValueError("an objective on the manifold needs a filter with an encoder, as `Step.manifold`")
    return cast(Generator, filter.generator), filter.encoder


def _on_manifold_attack(
    model: Classifier, x: Tensor, y: Tensor, step: Step, *, eps: float, steps: int
) -> Tensor:
    generator, encoder = _manifold(step)
    with torch.no_grad():
        z = encoder(x).to(x)  # an attack is to take its steps in full
    return latent_attack(model, generator, z, y, eps=eps, steps=steps, seed=step.seed)


@dataclass(frozen=True)
class Latent(Base):
    """On-manifold adversarial training (Stutz, Hein & Schiele 2019) around E(x).

    Lowers the test error; by itself it gives no robustness off the manifold.

    eps  radius in latents, L∞, in standard deviations of the prior; at 0.3 a generator of all classes leaves
         the class of most images
    """

    needs_manifold: ClassVar[bool] = True
    name: Literal["latent"] = "latent"
    eps: float = 0.1
    steps: int = 5
    clean_share: float = 0.5

    def __post_init__(self) -> None:
        check(self, positive=("eps", "steps"), shares=("clean_share",))

    def __call__(self, model: Classifier, x: Tensor, y: Tensor, step: Step, /) -> Tensor:
        x_adv = _on_manifold_attack(model, x, y, step, eps=self.eps, steps=self.steps)
        return mixed(model, x, x_adv, y, self.clean_share)


@dataclass(frozen=True)
class Dual(InBall):
    """Dual-manifold training (Lin et al. 2020): half on attacks in pixels, half on attacks in latents.

    eps_latent  radius of the latter, as `eps` of `Latent`
    """

    needs_manifold: ClassVar[bool] = True
    name: Literal["dual"] = "dual"
    eps_latent: float = 0.1
    steps: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self, positive=("eps_latent", "steps"))

    def __call__(self, model: Classifier, x: Tensor, y: Tensor, step: Step, /) -> Tensor:
        eps = self.radius(step)
        off = training_attack(model, x, y, norm=self.norm, eps=eps, steps=self.steps, seed=step.seed)
        on = _on_manifold_attack(model, x, y, step, eps=self.eps_latent, steps=self.steps)
        losses = F.cross_entropy(model(torch.cat([off, on])), torch.cat([y, y]), reduction="none")
        return losses.view(2, -1).mean(0)


@dataclass(frozen=True)
class RobustManifold(Base):
    """PGD training, and overpowered pairs found against the model of the moment (Ilyas et al. 2017).

    Each step looks for pairs that the model tells apart, and adds their mean cross-entropy. Both ends stay
    around one image's latent, and have its label as long as `eps_latent` is as small as that asks for.

    norm        of PGD's ball
    eps         its radius, in pixels; 0 leaves the images clean
    ramp        share of the training over which it grows from 0
    weight      of the pairs
    pairs       looked for at each step
    pair_eps    how far apart they may lie, L2, in pixels
    pair_steps  of that search
    eps_latent  how far from E(x), as `eps` of `Latent`
    """

    needs_manifold: ClassVar[bool] = True
    name: Literal["robust_manifold"] = "robust_manifold"
    norm: Ball = "linf"
    eps: float = 0.15
    steps: int = 5
    ramp: float = 0.3
    weight: float = 0.5
    pairs: int = 16
    pair_eps: float = 1.0
    pair_steps: int = 10
    eps_latent: float = 0.1

    def __post_init__(self) -> None:
        positive = ("steps", "weight", "pairs", "pair_eps", "pair_steps", "eps_latent")
        check(self, positive=positive, shares=("ramp",))

    @property
    def threats(self) -> tuple[Threat, ...]:
        return (Threat(self.norm, self.eps),) if self.eps else ()

    def __call__(self, model: Classifier, x: Tensor, y: Tensor, step: Step, /) -> Tensor:
        x_adv = x
        if self.eps:
            eps = ramped(self.eps, step.progress, self.ramp)
            x_adv = training_attack(model, x, y, norm=self.norm, eps=eps, steps=self.steps, seed=step.seed)
        ends, labels = self.found(model, x, y, step)
        losses = F.cross_entropy(
            model(torch.cat([x_adv, ends])), torch.cat([y, labels, labels]), reduction="none"
        )
        own, paired = losses[: len(x)], losses[len(x) :]
        # Spread over the batch, so that its mean is the sum of both parts.
        return own + self.weight * (paired.mean() if len(paired) else 0.0)

    def found(self, model: Classifier, x: Tensor, y: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        """Ends G(z₁) and then G(z₂) of M pairs around the first images, (2M, C, H, W), their labels (M,)."""
        generator, encoder = _manifold(step)
        with torch.no_grad():
            latents = encoder(x[: self.pairs]).to(x)
        pairs = overpowered_pairs(
            model,
            generator,
            around=(latents, self.eps_latent),
            eps=self.pair_eps,
            steps=self.pair_steps,
            seed=step.seed,
        )
        kept = pairs.found
        return torch.cat([pairs.x1[kept], pairs.x2[kept]]).detach(), y[: self.pairs][kept]
