"""Train generator and critic, and with them an encoder that inverts the generator.

The loop is a Python generator: it yields after every step, and whoever iterates decides about
progress bars, saving and stopping. All that a step needs beyond `state` is a function of the seed
and the step, so a loop restarted from a saved state continues bit for bit (on CPU).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from lightning_fabric import Fabric
from torch import Tensor

from gan.averaging import averaged_copy, update_average
from gan.losses import LOSSES
from gan.networks import Critic, Encoder, Generator, NetworkConfig
from gan.optimisation import Batches, Record, State, cosine, descend, seeded
from gan.sampling import step_rng


@dataclass(frozen=True)
class GanConfig:
    """Training of the generator; lengths are counted in real images that its own steps see.

    loss                   r3gan (Huang et al. 2024) or wgan_gp (Gulrajani et al. 2017)
    images                 seen in the whole training
    batch_size             images a step and process
    critic_steps           steps of the critic before each of the generator
    lr                     of Adam at the start; it falls along a cosine
    beta1                  of Adam
    beta2                  of Adam
    penalty_weight         of the critic's gradient penalty
    penalty_every          how many steps of the critic apart it is computed, at as many times the weight
    reconstruction_weight  of `‖G(E(x)) − x‖²`, summed over pixels, which trains the encoder jointly (0: no
                           joint encoder)
    latent_weight          of `‖E(G(z)) − z‖²`, for the encoder alone
    average_half_life      images after which a step's weights count half in the average that is kept
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}  # read by pipelines.settings

    loss: Literal["r3gan", "wgan_gp"] = "r3gan"
    images: int = 80_000
    batch_size: int = 64
    critic_steps: int = 1
    lr: float = 1e-3
    beta1: float = 0.0
    beta2: float = 0.99
    penalty_weight: float = 1.0
    penalty_every: int = 4
    reconstruction_weight: float = 0.05
    latent_weight: float = 0.02
    average_half_life: int = 5_000
    network: NetworkConfig = field(default_factory=NetworkConfig)

    def __post_init__(self) -> None:
        if self.loss not in LOSSES:
            raise ValueError(f"loss: expected one of {', '.join(LOSSES)}, got {self.loss!r}")
        for name in ("images", "batch_size", "critic_steps", "penalty_every", "average_half_life"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if not 0 < self.lr <= 1:
            raise ValueError(f"lr: expected above 0 and at most 1, got {self.lr}")
        for name in ("penalty_weight", "reconstruction_weight", "latent_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}: expected at least 0 and finite, got {getattr(self, name)}")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}: expected in [0, 1), got {getattr(self, name)}")


def gan_state(fabric: Fabric, image_shape: tuple[int, int, int], config: GanConfig, seed: int) -> State:
    """Fresh networks, optimisers and counters for images of shape (C, H, W)."""
    networks = config.network
    generator = seeded(seed, lambda: Generator(image_shape, networks)).to(fabric.device)
    critic = seeded(seed + 1, lambda: Critic(image_shape, networks)).to(fabric.device)
    encoder = seeded(seed + 2, lambda: Encoder(image_shape, networks)).to(fabric.device)
    betas = (config.beta1, config.beta2)
    inverse = list(encoder.parameters()) if config.reconstruction_weight > 0 else []
    return {
        "generator": generator,
        "critic": critic,
        "encoder": encoder,
        "generator_average": averaged_copy(generator),
        "encoder_average": averaged_copy(encoder),
        "generator_optimizer": fabric.setup_optimizers(
            torch.optim.Adam([*generator.parameters(), *inverse], lr=config.lr, betas=betas)
        ),
        "critic_optimizer": fabric.setup_optimizers(
            torch.optim.Adam(critic.parameters(), lr=config.lr, betas=betas)
        ),
        "step": 0,
        "images": 0,
    }


def train_gan(
    fabric: Fabric, state: State, batches: Batches, config: GanConfig, seed: int
) -> Iterator[Record]:
    """Train `state` in place until `config.images` have been seen, yielding after every step."""
    generator, critic, encoder = state["generator"], state["critic"], state["encoder"]
    loss = LOSSES[config.loss]
    critic_updates = state["step"] * config.critic_steps

    while state["images"] < config.images:
        rng = step_rng(seed, state["step"], fabric.global_rank)
        lr = cosine(config.lr, state["images"], config.images)

        # Critic: tell real images from generated ones.
        critic.requires_grad_(True)
        for _ in range(config.critic_steps):
            real = batches(critic_updates)
            with torch.no_grad(), fabric.autocast():
                fake = generator(_prior(real, generator.latent_dim, rng)).to(real)
            with fabric.autocast():
                critic_loss = loss.critic(critic(real), critic(fake)).mean()
                if critic_updates % config.penalty_every == 0:
                    # Lazy regularisation: seldom, and stronger by as much (Karras et al. 2020).
                    weight = config.penalty_weight * config.penalty_every
                    critic_loss = critic_loss + weight * loss.penalty(critic, real, fake, rng).mean()
            descend(fabric, state["critic_optimizer"], critic_loss, lr)
            critic_updates += 1

        # Generator, and the encoder with it: fool the critic, and draw what the data holds.
        critic.requires_grad_(False)
        with fabric.autocast():
            z = _prior(real, generator.latent_dim, rng)
            fake = generator(z)
            generator_loss = loss.generator(critic(real), critic(fake)).mean()
            total = generator_loss
            if config.reconstruction_weight > 0:
                reconstruction = (generator(encoder(real)) - real).square().flatten(1)
                total = total + config.reconstruction_weight * reconstruction.sum(1).mean()
                if config.latent_weight > 0:
                    inversion = (encoder(fake.detach()) - z).square().sum(1).mean()
                    total = total + config.latent_weight * inversion
        descend(fabric, state["generator_optimizer"], total, lr)

        batch = config.batch_size * fabric.world_size
        state["step"] += 1
        state["images"] += batch
        for name in ("generator", "encoder"):
            update_average(
                state[f"{name}_average"], state[name], batch, state["images"], config.average_half_life
            )
        metrics = {"critic_loss": critic_loss.detach(), "generator_loss": generator_loss.detach()}
        if config.reconstruction_weight > 0:
            metrics["reconstruction_error"] = reconstruction.detach().mean()
        yield Record(state["images"], metrics)


def _prior(like: Tensor, latent_dim: int, rng: torch.Generator) -> Tensor:
    """Standard normal latents (N, D), one for each image of `like`."""
    return torch.randn(len(like), latent_dim, generator=rng).to(like)
