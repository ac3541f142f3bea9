"""Exponential moving average of a network's weights, and of its batch statistics with them."""

from __future__ import annotations

import copy

import torch
from torch import nn


def averaged_copy(module: nn.Module) -> nn.Module:
    """A frozen copy that `update_average` moves towards `module`."""
    return copy.deepcopy(module).eval().requires_grad_(False)


@torch.no_grad()
def update_average(average: nn.Module, module: nn.Module, batch: int, images: int, half_life: float) -> None:
    """Move `average` towards `module` after `batch` of `images` seen so far.

    The half-life is counted in images and shortened to a tenth of those seen, so that early
    weights are forgotten (Karras et al. 2022, the ramp-up of EDM).
    """
    decay = 0.5 ** (batch / max(min(half_life, 0.1 * images), 1e-8))
    for mean, value in zip(average.parameters(), module.parameters(), strict=True):
        mean.lerp_(value.detach(), 1 - decay)
    for kept, current in zip(average.buffers(), module.buffers(), strict=True):
        if kept.is_floating_point():
            kept.lerp_(current, 1 - decay)
        else:
            kept.copy_(current)
