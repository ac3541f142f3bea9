"""Random search: what the attacks that need neither a gradient nor its neighbourhood have in common."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from manifold_defense.attacks.highest import Highest
from manifold_defense.modes import evaluation_mode
from manifold_defense.types import Classifier

# draw(*shape): numbers uniform in [0, 1), (N, *shape), a row for each image that is being attacked.
Draw = Callable[..., Tensor]
# (rows, draw) to the first images (M, C, H, W) of those rows (M,)
Start = Callable[[Tensor, Draw], Tensor]
# (current, clean, share of the queries that is spent, draw) to the images to try next, (N, C, H, W)
Propose = Callable[[Tensor, Tensor, float, Draw], Tensor]


@torch.no_grad()
def random_search(
    model: Classifier,
    x: Tensor,
    y: Tensor,
    start: Start,
    propose: Propose,
    *,
    steps: int,
    restarts: int,
    targeted: bool,
    stop_early: bool,
    seed: int,
) -> Tensor:
    """Images (N, C, H, W) that raise the margin: each proposal is kept if its margin is higher.

    `steps` are the queries of each restart, `start` the first of them. Every image draws its own
    numbers, and the same ones whichever images are still in the batch. Both functions must stay
    inside the threat; the one with the highest margin, or the clean image, is returned.
    """
    if steps < 1 or restarts < 1:
        raise ValueError(f"expected steps ≥ 1, restarts ≥ 1, got {steps}, {restarts}")
    rng = torch.Generator().manual_seed(seed)
    x = x.detach()
    with evaluation_mode(model):
        best = Highest(x, y, model(x), targeted=targeted, stop_early=stop_early)
        for _ in range(restarts):
            current, current_margin = x.clone(), torch.full_like(best.margin, -torch.inf)
            for step in range(steps):
                active = best.sought()
                if len(active) == 0:
                    break

                def draw(*shape: int, active: Tensor = active) -> Tensor:
                    return torch.rand(len(x), *shape, generator=rng).to(x)[active]

                clean = x[active]
                if step == 0:
                    tried = start(active, draw)
                else:
                    tried = propose(current[active], clean, step / steps, draw)
                margin = best.keep(active, tried, model(tried))
                higher = margin > current_margin[active]
                moved = active[higher]
                current[moved], current_margin[moved] = tried[higher], margin[higher]
    return best.image
