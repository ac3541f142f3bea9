"""PGD that starts from changes in one place, where a classifier hardened against small ones is flat."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from manifold_defense.attacks.ascent import Climb, ascend_in_ball
from manifold_defense.attacks.contract import attack
from manifold_defense.attacks.norms import column, geometry
from manifold_defense.attacks.objective import margins
from manifold_defense.types import Classifier, Norm

# Of images (N, C, H, W) as many others, by what is drawn.
Drawing = Callable[[Tensor, torch.Generator], Tensor]

# The longest side of a window, and of one that holds a piece of another image, as shares of the image's.
_WINDOW, _PIECE = 0.3, 0.6


@attack
def window_pgd(
    model: Classifier,
    x: Tensor,
    y: Tensor,
    *,
    norm: Norm = "l2",
    eps: float = 2.5,
    step_size: float | None = None,
    steps: int = 40,
    restarts: int = 10,
    tries: int = 50,
    loss: str = "both",
    targeted: bool = False,
    stop_early: bool = True,
    pieces: Tensor | None = None,
    seed: int = 0,
) -> Tensor:
    """PGD from images (N, C, H, W) with labels y (N,), each restart from the best of `tries` windows.

    A window is a rectangle that turns bright or dark, a channel each, as far as the ball of radius eps
    lets it; the first moves of the Square attack are of this kind (Andriushchenko et al. 2020). Spread
    over an image the same length changes no pixel by more than a hardened classifier ignores, and from
    there its gradient leads nowhere: at L2 2.5 PGD leaves most images of one that was hardened at L∞
    0.3, and this attack nearly none (docs/results/attacks.md). Of every four restarts the last two fill the
    window with a piece of another image, of `pieces` (M, C, H, W) or, by default, of the batch, which
    breaks what has learnt to undo plain ones; what is found so depends on those. `step_size` is that of the
    first step, in pixels, and falls linearly to zero; by default 0.3 eps. A restart costs `tries` forward
    passes and `steps` gradients. Returns the image of the highest margin found, the clean one included.
    """
    shape = geometry(norm)
    if tries < 1:
        raise ValueError(f"expected tries ≥ 1, got {tries}")
    rng = torch.Generator().manual_seed(seed)
    x = x.detach()
    restart = itertools.count()

    def place(clean: Tensor, drawn: Tensor) -> Tensor:
        return shape.place(clean, drawn, eps, (0.0, 1.0))

    draw_piece = pieces_for(x, pieces, draw_windows)

    def start(rows: Tensor) -> Tensor:
        # Two and two, since two losses take turns.
        draw = draw_piece if next(restart) % 4 >= 2 else draw_windows
        return best_drawn(model, draw, place, x, y, rows, tries, targeted, rng)

    longest = 0.3 * eps if step_size is None else step_size
    climb = Climb(steps, restarts, loss, targeted, stop_early)
    return ascend_in_ball(model, x, y, start, climb, norm=norm, eps=eps, longest=longest)


@torch.no_grad()
def best_drawn(
    model: Classifier,
    draw: Drawing,
    place: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    y: Tensor,
    rows: Tensor,
    tries: int,
    targeted: bool,
    rng: torch.Generator,
) -> Tensor:
    """Images `rows` (M,) of x (N, C, H, W), labels y (N,), each as the draw of the highest margin of `tries`.

    `place` takes images and what was drawn of them into the threat.
    """
    best, highest = x[rows], x.new_full((len(rows),), -torch.inf)
    for _ in range(tries):
        tried = place(x[rows], draw(x, rng)[rows])
        reached = margins(model(tried), y[rows], targeted).to(highest)
        better = reached > highest
        best = torch.where(column(better, best), tried, best)
        highest = torch.where(better, reached, highest)
    return best


def draw_windows(x: Tensor, rng: torch.Generator) -> Tensor:
    """Images (N, C, H, W) in each of which a rectangle is white or black, a channel each."""
    where = _rectangles(x, _WINDOW, rng)
    colour = (torch.rand(len(x), x.shape[1], 1, 1, generator=rng) < 0.5).to(x)
    return torch.where(where, colour, x)


def draw_pieces(x: Tensor, rng: torch.Generator, others: Tensor | None = None) -> Tensor:
    """Images (N, C, H, W) in each of which a rectangle is that of another one, of `others` (M, C, H, W).

    By default of x; they are at least two.
    """
    where, n = _rectangles(x, _PIECE, rng), len(x)
    if others is None:
        piece = x[(torch.arange(n) + torch.randint(1, n, (n,), generator=rng)).to(x.device) % n]
    else:
        chosen = torch.randint(len(others), (n,), generator=rng).to(others.device)
        piece = others[chosen].to(x)
        same = (piece == x).flatten(1).all(1)  # they may be among them
        piece = torch.where(column(same, x), others[(chosen + 1) % len(others)].to(x), piece)
    return torch.where(where, piece, x)


def pieces_for(x: Tensor, others: Tensor | None, instead: Drawing) -> Drawing:
    """`draw_pieces` of `others` if each image of x (N, C, H, W) has another there, or of x, or `instead`."""
    if others is not None and others.shape[1:] != x.shape[1:]:
        raise ValueError(f"pieces: expected images {tuple(x.shape[1:])}, got {tuple(others.shape[1:])}")
    if others is not None and _has_another(others, x):
        return partial(draw_pieces, others=others)
    return draw_pieces if len(x) > 1 else instead


def _has_another(others: Tensor, x: Tensor) -> bool:
    if len(others) == 1:
        return bool((others != x).flatten(1).any(1).all())
    return len(others) > 1


def squares(x: Tensor, side: int, rng: torch.Generator) -> Tensor:
    """A square of so many pixels a side, or fewer if there are fewer, in each of the images: (N, 1, H, W)."""
    return _anywhere(x, lambda most: torch.full((len(x), 1), min(side, most)), rng)


def _rectangles(x: Tensor, largest: float, rng: torch.Generator) -> Tensor:
    """A rectangle in each of images (N, C, H, W), its sides up to that share of theirs: (N, 1, H, W)."""

    def length(side: int) -> Tensor:
        longest = max(1, math.ceil(largest * side))
        return 1 + (torch.rand(len(x), 1, generator=rng) * longest).long()

    return _anywhere(x, length, rng)


def _anywhere(x: Tensor, length_of: Callable[[int], Tensor], rng: torch.Generator) -> Tensor:
    """Rectangles somewhere in the images, (N, 1, H, W); how long, (N, 1), is asked for each side."""
    inside = []
    for side in x.shape[2:]:
        length = length_of(side)
        first = (torch.rand(len(x), 1, generator=rng) * (side - length + 1)).long()
        at = torch.arange(side)
        inside.append((at >= first) & (at < first + length))
    rows, columns = inside
    return (rows.unsqueeze(2) & columns.unsqueeze(1)).unsqueeze(1).to(x.device)
