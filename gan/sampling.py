"""Randomness that is a function of (seed, step), so that a resumed run needs no saved RNG state."""

from __future__ import annotations

import hashlib
from functools import lru_cache

import torch
from torch import Tensor


def step_rng(seed: int, step: int, rank: int = 0) -> torch.Generator:
    """A CPU generator for one training step of one process."""
    digest = hashlib.sha256(f"{seed}/{step}/{rank}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))


@lru_cache(maxsize=2)
def _permutation(count: int, seed: int, epoch: int) -> Tensor:
    return torch.randperm(count, generator=step_rng(seed, epoch, rank=-1))


def batch_indices(
    count: int, batch_size: int, seed: int, step: int, rank: int = 0, world_size: int = 1
) -> Tensor:
    """Which images process `rank` sees at `step`: (batch_size,) indices into `count` images.

    Every epoch is a fresh permutation; `batch_size` is that of one process. Batches run on over
    the end of an epoch, so a data set smaller than a batch works.
    """
    first = (step * world_size + rank) * batch_size
    positions = torch.arange(first, first + batch_size)
    epochs, offsets = positions // count, positions % count
    return torch.cat(
        [_permutation(count, seed, int(e))[offsets[epochs == e]] for e in torch.unique_consecutive(epochs)]
    )
