"""Where a projection starts: (N, R, D) latents for N images and R restarts."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from manifold_defense.projection.config import ProjectionConfig
from manifold_defense.types import Encoder, Generator


class Bank(NamedTuple):
    """Samples of the generator to start from: the nearest ones to an image."""

    z: Tensor  # (M, D)
    image: Tensor  # (M, P)

    def nearest(self, x: Tensor, count: int) -> Tensor:
        """Latents (N, count, D) of the samples nearest to images (N, C, H, W), by one matrix product."""
        flat = x.detach().flatten(1)
        distance = self.image.square().sum(1) - 2 * flat @ self.image.T  # less ‖x‖², the same for all
        return self.z[distance.topk(count, largest=False).indices]


def make_bank(generator: Generator, like: Tensor, size: int, seed: int) -> Bank:
    """`size` samples of the prior and their images, on the device and in the type of `like`."""
    rng = torch.Generator().manual_seed(seed)
    with torch.inference_mode(False), torch.no_grad():
        z = torch.randn(size, generator.latent_dim, generator=rng).to(like.device, like.dtype)
        return Bank(z, torch.cat([generator(part).flatten(1) for part in z.split(512)]))


def starts(
    x: Tensor,
    latent_dim: int,
    config: ProjectionConfig,
    encoder: Encoder | None = None,
    bank: Bank | None = None,
) -> Tensor:
    """Starts for images (N, C, H, W).

    Prior draws are seeded per call and shared by all images, so that an image's result does not
    depend on its place in a batch. With `start="encoder"` the first restart is E(x). The choice
    from a bank is piecewise constant in x: no gradient flows through it.
    """
    if config.uses_encoder and encoder is None:
        raise ValueError("projection start 'encoder' needs an encoder; pass one, or start='prior'")
    if config.uses_bank:
        needed = config.restarts - config.uses_encoder
        if bank is None or len(bank.z) < needed:
            raise ValueError(f"these starts need a bank of at least {needed} samples; see `make_bank`")
        z = bank.nearest(x, needed)
    else:
        rng = torch.Generator().manual_seed(config.seed)
        # One draw at a time, so that more restarts add to the fewer and never replace them.
        draws = torch.stack([torch.randn(latent_dim, generator=rng) for _ in range(config.restarts)]).to(x)
        if config.start == "origin":
            draws = draws / latent_dim**0.5
        z = draws.unsqueeze(0).expand(len(x), -1, -1)[:, int(config.uses_encoder) :]
    if encoder is None or not config.uses_encoder:
        return z
    return torch.cat([encoder(x).unsqueeze(1), z], dim=1)
