"""Where a projection starts: (N, R, D) latents for N images and R restarts."""

from __future__ import annotations

import torch
from torch import Tensor

from manifold_defense.projection.config import ProjectionConfig
from manifold_defense.types import Encoder


def starts(x: Tensor, latent_dim: int, config: ProjectionConfig, encoder: Encoder | None) -> Tensor:
    """Starts for images (N, C, H, W).

    Prior draws are seeded per call and shared by all images, so that an image's result does not
    depend on its place in a batch. With `start="encoder"` the first restart is E(x).
    """
    rng = torch.Generator().manual_seed(config.seed)
    # One draw at a time, so that more restarts add to the fewer and never replace them.
    draws = torch.stack([torch.randn(latent_dim, generator=rng) for _ in range(config.restarts)]).to(x)
    if config.start == "origin":
        draws = draws / latent_dim**0.5
    z = draws.unsqueeze(0).expand(len(x), -1, -1)
    if config.start != "encoder":
        return z
    if encoder is None:
        raise ValueError("projection start 'encoder' needs an encoder; pass one, or start='prior'")
    return torch.cat([encoder(x).unsqueeze(1), z[:, 1:]], dim=1)
