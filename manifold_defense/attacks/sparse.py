"""Attacks that may change `eps` pixels and those as they like (L0): by gradient, random search, and both."""

from __future__ import annotations

import itertools
import math
from functools import partial

import torch
from torch import Tensor

from manifold_defense.attacks.ascent import Climb, ascend
from manifold_defense.attacks.contract import attack
from manifold_defense.attacks.random_search import Draw, random_search
from manifold_defense.attacks.window import best_drawn, pieces_for
from manifold_defense.types import Classifier, Norm

# Sparse-RS: of 10,000 queries, those after which the initial share of pixels to exchange is divided
# by this (the paper's schedule for L0).
_DIVIDED = ((0, 2), (50, 4), (200, 5), (500, 6), (1000, 8), (2000, 10), (4000, 12), (6000, 15), (8000, 20))
_EXCHANGED = 0.3  # of the pixels of `stroke_search`, in the first step up a gradient


@attack
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

    return ascend(model, x, y, start, move, Climb(steps, restarts, loss, targeted, stop_early))


@attack
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

    def start(rows: Tensor, draw: Draw) -> Tensor:
        clean = x[rows]
        return torch.where(_first(draw(*clean.shape[2:]), count), _corners(clean, draw), clean)

    propose = partial(_propose, count=count, initial_share=initial_share)
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


@attack
def stroke_search(
    model: Classifier,
    x: Tensor,
    y: Tensor,
    *,
    norm: Norm = "l0",
    eps: float = 10,
    steps: int = 30,
    restarts: int = 4,
    strokes: int = 4,
    tries: int = 50,
    queries: int = 2500,
    targeted: bool = False,
    stop_early: bool = True,
    pieces: Tensor | None = None,
    seed: int = 0,
) -> Tensor:
    """Images that differ from x (N, C, H, W) in `eps` pixels: by strokes, their gradient, and random search.

    A restart begins `strokes` times at the best of `tries` strokes, lines of one colour at any place and
    angle, or, by turns, of pieces of other images, of `pieces` (M, C, H, W) or, by default, of the batch, as
    far as so many pixels draw them, and climbs the margin for `steps` gradients, each of which exchanges
    some of the pixels for those that promise most; the best of what it found then meets Sparse-RS of so many
    `queries`. Pixels drawn one by one, as by `pgd_l0` and `sparse_rs`, are noise that a filter takes away; a
    stroke could belong to a digit. No part alone finds what they find together (docs/results/attacks.md).
    Returns the image of the highest margin found, the clean one included.
    """
    count = _pixels(norm, eps)
    if steps < 1 or strokes < 1 or tries < 1 or queries < 1:
        raise ValueError(
            f"expected steps, strokes, tries, queries ≥ 1, got {steps}, {strokes}, {tries}, {queries}"
        )
    rng = torch.Generator().manual_seed(seed)
    x = x.detach()
    begun = itertools.count()
    draw_stroke = partial(draw_strokes, count=count)
    draw_piece = pieces_for(x, pieces, draw_stroke)

    def place(clean: Tensor, drawn: Tensor) -> Tensor:
        return _nearest_sparse(drawn, clean, count)

    def move(clean: Tensor, at: Tensor, gradient: Tensor, left: float) -> Tensor:
        corners = (gradient > 0).to(clean)
        kept, drawn = (gradient * (to - clean) for to in (at, corners))
        many = min(max(round(_EXCHANGED * count * left), 1), count)
        return _exchange(at, clean, corners, kept.sum(1), -drawn.sum(1), many, count)

    def start(rows: Tensor, draw: Draw) -> Tensor:
        def begin(those: Tensor) -> Tensor:
            shapes = draw_piece if next(begun) % 2 else draw_stroke
            return best_drawn(model, shapes, place, x, y, rows[those], tries, targeted, rng)

        climb = Climb(steps, strokes, "margin", targeted, stop_early)
        return ascend(model, x[rows], y[rows], begin, move, climb)

    return random_search(
        model,
        x,
        y,
        start,
        partial(_propose, count=count, initial_share=_EXCHANGED),
        steps=queries,
        restarts=restarts,
        targeted=targeted,
        stop_early=stop_early,
        seed=seed + 1,
    )


def draw_strokes(x: Tensor, rng: torch.Generator, *, count: int) -> Tensor:
    """Images (N, C, H, W) in each of which a line of `count` pixels is white or black, a channel each.

    One to three pixels wide, anywhere and at any angle; where the image ends, the rest lies beside it.
    """
    n, channels, height, width = x.shape
    turned, down, right, half = (torch.rand(n, 1, 1, generator=rng) for _ in range(4))
    rows = torch.arange(height).view(-1, 1) - down * (height - 1)
    columns = torch.arange(width) - right * (width - 1)
    along = columns * (math.pi * turned).cos() + rows * (math.pi * turned).sin()
    across = rows * (math.pi * turned).cos() - columns * (math.pi * turned).sin()
    outside = across.abs() > 0.5 + (3 * half).floor() / 2
    score = along.abs() + across.abs() * outside + outside * (height + width)
    colour = (torch.rand(n, channels, 1, 1, generator=rng) < 0.5).to(x)
    return torch.where(_first(score, count).to(x.device), colour, x)


def _propose(
    current: Tensor, clean: Tensor, spent: float, draw: Draw, *, count: int, initial_share: float
) -> Tensor:
    """What Sparse-RS tries next: some of the changed pixels are given back, others drawn."""
    divisor = [divided for query, divided in _DIVIDED if 10_000 * spent > query][-1]
    many = min(max(round(initial_share * count / divisor), 1), count)
    returned, drawn = draw(*clean.shape[2:]), draw(*clean.shape[2:])
    return _exchange(current, clean, _corners(clean, draw), returned, drawn, many, count)


def _exchange(
    at: Tensor, clean: Tensor, corners: Tensor, returned: Tensor, drawn: Tensor, many: int, count: int
) -> Tensor:
    """Images that differ from `clean` in `count` pixels, all but `many` of them as in `at`.

    Of those that are changed in `at`, `many` of the lowest scores `returned` (N, H, W) are given back, and of
    all that are then clean so many of the lowest scores `drawn` take their corners that `count` are changed.
    """
    changed = (at != clean).any(1, keepdim=True)
    kept = changed & ~_first(returned.masked_fill(~changed[:, 0], torch.inf), many)
    # A pixel given back may be drawn again: in another colour, if it has more than one channel.
    wanted = count - kept.flatten(1).sum(1)
    taken = _first(drawn.masked_fill(kept[:, 0], torch.inf), wanted) & ~kept
    return torch.where(taken, corners, torch.where(kept, at, clean))


def _pixels(norm: str, eps: float) -> int:
    """How many pixels may change, or a ValueError."""
    if norm != "l0":
        raise ValueError(f"norm: expected l0, got {norm!r}")
    if eps != int(eps):
        raise ValueError(f"eps: expected a whole number of pixels, got {eps}")
    return int(eps)


def _first(scores: Tensor, count: int | Tensor) -> Tensor:
    """The `count` lowest of scores (N, H, W), for all or one for each image (N,): (N, 1, H, W)."""
    flat = scores.flatten(1)
    most = count if isinstance(count, int) else int(count.max()) if len(count) else 0
    chosen = flat.topk(min(most, flat.shape[1]), dim=1, largest=False).indices
    ranks = torch.arange(chosen.shape[1], device=flat.device).expand_as(chosen)
    among = ranks < (count if isinstance(count, int) else count.unsqueeze(1))
    lowest = torch.zeros_like(flat, dtype=torch.bool).scatter_(1, chosen, among)
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
