"""Fit the encoder to a frozen generator: the amortised start of every projection.

N images, D latent size; x images (N, C, H, W) in [0, 1], δ a perturbation of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from gan.averaging import averaged_copy, update_average
from gan.networks import Generator
from gan.optimisation import Batches, Record, State, cosine, descend
from gan.sampling import step_rng

# Images x' (N, C, H, W) to what disturbing them is to make large, (N,).
Errors = Callable[[Tensor], Tensor]
# Errors, images x, the step, the share of the training that is over, and what to draw from: to images x'.
Disturb = Callable[[Errors, Tensor, int, float, torch.Generator], Tensor]


class Meaning(Protocol):
    """Compares a classifier's answers to disturbed images and their drawings with that to the clean ones."""

    def apart(self, images: Tensor, drawings: Tensor) -> Tensor:
        """Distance of the answers, (N,), for images x' and drawings (N, C, H, W): training lowers it."""

    def lead(self, images: Tensor, drawings: Tensor) -> Tensor:
        """By how much another class leads that of the clean answer, (N,): an attack raises it."""


# Clean images (N, C, H, W) to the comparison with what is answered to them.
Agree = Callable[[Tensor], Meaning]


@dataclass(frozen=True)
class EncoderConfig:
    """Training of the encoder.

    The loss is `‖G(E(x')) − x‖² + agreement_weight · P · KL(f(x) ‖ f(G(E(x'))))` on data, x' being x or what
    a disturbance makes of it, P its pixels and f the answers of a classifier, plus
    `latent_weight · ‖E(G(z)) − z‖²` on samples.

    images             real images seen in the whole training (0: it stays as it is)
    batch_size         images a step and process
    lr                 of Adam at the start; it falls along a cosine
    latent_weight      of the loss on samples
    average_half_life  images after which a step's weights count half in the average that is kept
    clean_share        weight of the loss at x beside that at x'
    agreement_weight   of the answers of a classifier that reconstructions are to keep (0: none is asked)
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}  # read by pipelines.settings

    images: int = 50_000
    batch_size: int = 64
    lr: float = 1e-3
    latent_weight: float = 0.02
    average_half_life: int = 5_000
    clean_share: float = 0.0
    agreement_weight: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.clean_share <= 1:
            raise ValueError(f"clean_share: expected in [0, 1], got {self.clean_share}")
        for name, least in (("images", 0), ("batch_size", 1), ("average_half_life", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: expected at least {least}, got {getattr(self, name)}")
        if not 0 < self.lr <= 1:
            raise ValueError(f"lr: expected above 0 and at most 1, got {self.lr}")
        for name in ("latent_weight", "agreement_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}: expected at least 0 and finite, got {getattr(self, name)}")


def encoder_state(fabric: Fabric, encoder: nn.Module, config: EncoderConfig) -> State:
    """Training starts from `encoder` (the joint one, or fresh)."""
    encoder = encoder.to(fabric.device)
    optimizer = torch.optim.Adam(encoder.parameters(), lr=config.lr, betas=(0.9, 0.99))
    return {
        "encoder": encoder,
        "encoder_average": averaged_copy(encoder),
        "optimizer": fabric.setup_optimizers(optimizer),
        "step": 0,
        "images": 0,
    }


def train_encoder(
    fabric: Fabric,
    state: State,
    generator: Generator,
    batches: Batches,
    config: EncoderConfig,
    seed: int,
    *,
    disturb: Disturb | None = None,
    agree: Agree | None = None,
) -> Iterator[Record]:
    """Train `state["encoder"]` in place until `config.images` have been seen, yielding after every step.

    The generator is frozen, and stays so.

    The encoder sees what `disturb` makes of the images, and is to draw what they were; None: nothing. With
    an `agreement_weight` the drawings are to mean to `agree` what the images mean to it, and `disturb` is
    given their lead in place of the squared error: it finds more than the loss itself does.
    """
    if config.images and (agree is None) != (config.agreement_weight == 0):
        raise ValueError("agree: expected if and only if agreement_weight is above 0")
    encoder: nn.Module = state["encoder"]
    generator.requires_grad_(False)
    while state["images"] < config.images:
        rng = step_rng(seed, state["step"], fabric.global_rank)
        real = batches(state["step"])
        loss_of = _Loss(encoder, generator, real, agree)

        def climbed(images: Tensor, loss_of: _Loss = loss_of) -> Tensor:
            with fabric.autocast():  # of the networks alone, not of the steps
                return loss_of.climbed(images)

        disturbed = real
        if disturb is not None:
            done = state["images"] / config.images
            disturbed = disturb(climbed, real, state["step"], done, rng)
        with fabric.autocast():
            squared, apart = loss_of(disturbed)
            if disturb is not None and config.clean_share > 0:
                squared_clean, apart_clean = loss_of(real)
                squared = squared.lerp(squared_clean, config.clean_share)
                apart = apart.lerp(apart_clean, config.clean_share)
            z = torch.randn(len(real), generator.latent_dim, generator=rng).to(real)
            inversion = (encoder(generator(z)) - z).square().sum(1).mean()
            weight = config.agreement_weight * real[0].numel()
            loss = (squared + weight * apart).mean() + config.latent_weight * inversion
        descend(fabric, state["optimizer"], loss, cosine(config.lr, state["images"], config.images))

        batch = config.batch_size * fabric.world_size
        state["step"] += 1
        state["images"] += batch
        update_average(state["encoder_average"], encoder, batch, state["images"], config.average_half_life)
        yield Record(
            state["images"],
            {
                "reconstruction_error": squared.detach().mean() / real[0].numel(),
                "latent_error": inversion.detach(),
                **({} if agree is None else {"disagreement": apart.detach().mean()}),
            },
        )


class _Loss:
    """The loss of images x' (N, C, H, W) as images of what `real` are."""

    def __init__(self, encoder: nn.Module, generator: Generator, real: Tensor, agree: Agree | None) -> None:
        self._encoder, self._generator, self._real = encoder, generator, real
        self._meaning = None if agree is None else agree(real)

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Squared error summed over pixels, and disagreement, (N,) each."""
        drawings = self._drawn(images)
        squared = self._squared(drawings)
        if self._meaning is None:
            return squared, torch.zeros_like(squared)
        return squared, self._meaning.apart(images, drawings)

    def climbed(self, images: Tensor) -> Tensor:
        drawings = self._drawn(images)
        return self._squared(drawings) if self._meaning is None else self._meaning.lead(images, drawings)

    def _drawn(self, images: Tensor) -> Tensor:
        drawings: Tensor = self._generator(self._encoder(images))
        return drawings.to(images)

    def _squared(self, drawings: Tensor) -> Tensor:
        return (drawings - self._real).square().flatten(1).sum(1)
