"""Attacks that may change `eps` pixels and those as they like (L0): by gradient, and by random search."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from manifold_defense.attacks.ascent import ascend
from manifold_defense.attacks.random_search import Draw, random_search
from manifold_defense.types import Classifier, Norm

# Sparse-RS: of 10,000 queries, those after which the initial share of pixels to exchange is divided
# by this (the paper's schedule for L0).
_DIVIDED = ((0, 2), (50, 4), (200, 5), (500, 6), (1000, 8), (2000, 10), (4000, 12), (6000, 15), (8000, 20))


def pgd_l0(
    model: Classifier,
    x: Tensor,
    y: Tensor,
    *,
    norm: Norm = "l0",
    eps: float = 10,
    step_size: float = 100.0,
    steps: int = 40,
    restarts: int = 1,
    loss: str = "ce",
    targeted: bool = False,
    stop_early: bool = True,
    seed: int = 0,
) -> Tensor:
    """PGD on the images that differ from x (N, C, H, W) in `eps` pixels, whatever their channels.

    After Croce & Hein (2019, section 3.2): a step along the gradient, then the nearest image of the
    box that differs in so few pixels. `step_size` is how far the most sensitive value moves in the
    first step; it falls linearly to zero. It is meant to be far beyond 1: the projection then picks the
    pixels that gain most, `g·δ`, where a small step would keep those already changed. Returns
    the iterate with the highest margin, or the clean image; `loss`, `restarts` and `stop_early` as
    in `pgd`. Blind where gradients are masked: `sparse_rs` is for that.
    """
    count = _pixels(norm, eps)
    rng = torch.Generator().manual_seed(seed)
    x = x.detach()

    def start(rows: Tensor) -> Tensor:
        places = torch.rand(len(x), *x.shape[2:], generator=rng).to(x)
        values = torch.rand(x.shape, generator=rng).to(x)
        return torch.where(_first(places, count), values, x)[rows]

    def move(clean: Tensor, at: Tensor, gradient: Tensor, left: float) -> Tensor:
        largest = gradient.abs().amax((1, 2, 3), keepdim=True)
        direction = gradient / torch.where(largest > 0, largest, 1.0)
        return _nearest_sparse(at + step_size * left * direction, clean, count)

    return ascend(
        model,
        x,
        y,
        start,
        move,
        steps=steps,
        restarts=restarts,
        loss=loss,
        targeted=targeted,
        stop_early=stop_early,
    )


def sparse_rs(
    model: Classifier,
    x: Tensor,
    y: Tensor,
    *,
    norm: Norm = "l0",
    eps: float = 10,
    steps: int = 1000,
    restarts: int = 1,
    initial_share: float = 0.3,
    targeted: bool = False,
    stop_early: bool = True,
    seed: int = 0,
) -> Tensor:
    """Sparse-RS (Croce et al. 2022, Algorithm 2) in L0, on images (N, C, H, W): asks for logits only.

    `eps` pixels hold corners of the colour cube. Each of `steps` queries a restart gives a share of
    them back and draws as many others, at first `initial_share` (the paper's α), less by the
    published schedule, stretched to `steps`; what raises the margin is kept. The one with the
    highest margin, or the clean image, is returned.
    """
    count = _pixels(norm, eps)
    if not 0 < initial_share <= 1:
        raise ValueError(f"initial_share: expected above 0 and at most 1, got {initial_share}")

    def start(clean: Tensor, draw: Draw) -> Tensor:
        return torch.where(_first(draw(*clean.shape[2:]), count), _corners(clean, draw), clean)

    def propose(current: Tensor, clean: Tensor, spent: float, draw: Draw) -> Tensor:
        divisor = [divided for query, divided in _DIVIDED if 10_000 * spent > query][-1]
        exchanged = min(max(round(initial_share * count / divisor), 1), count)
        changed = (current != clean).any(1, keepdim=True)
        # Scores in [0, 1) for whom a draw is for, out of reach for the others.
        returned = _first(draw(*clean.shape[2:]) + 2 * ~changed[:, 0], exchanged) & changed
        kept = changed & ~returned
        # A pixel given back may be drawn again: in another colour, if it has more than one channel.
        drawn = _first(draw(*clean.shape[2:]) + 2 * kept[:, 0], exchanged) & ~kept
        tried = torch.where(kept, current, clean)
        return torch.where(drawn, _corners(clean, draw), tried)

    return random_search(
        model,
        x,
        y,
        start,
        propose,
        steps=steps,
        restarts=restarts,
        targeted=targeted,
        stop_early=stop_early,
        seed=seed,
    )


def _pixels(norm: str, eps: float) -> int:
    """How many pixels may change, or a ValueError."""
    if norm != "l0":
        raise ValueError(f"norm: expected l0, got {norm!r}")
    if not 0 <= eps < math.inf or eps != int(eps):
        raise ValueError(f"eps: expected a whole number of pixels, got {eps}")
    return int(eps)


def _first(scores: Tensor, count: int) -> Tensor:
    """The `count` lowest of scores (N, H, W) in each image, (N, 1, H, W)."""
    flat = scores.flatten(1)
    chosen = flat.topk(min(count, flat.shape[1]), dim=1, largest=False).indices
    lowest = torch.zeros_like(flat, dtype=torch.bool).scatter_(1, chosen, True)
    return lowest.view_as(scores).unsqueeze(1)


def _nearest_sparse(moved: Tensor, clean: Tensor, count: int) -> Tensor:
    """The image in [0, 1] nearest to `moved` that differs from `clean` in at most `count` pixels.

    A pixel's squared distance falls by `‖δ‖² − ‖δ − clip(δ)‖²` if it may change.
    """
    boxed = moved.clamp(0, 1)
    gain = ((moved - clean).square() - (moved - boxed).square()).sum(1)
    return torch.where(_first(-gain, count), boxed, clean)


def _corners(clean: Tensor, draw: Draw) -> Tensor:
    """A corner of [0, 1]^C for each pixel of (N, C, H, W), never the pixel's own value."""
    drawn = (draw(*clean.shape[1:]) < 0.5).to(clean)
    return torch.where((drawn == clean).all(1, keepdim=True), 1 - drawn, drawn)
