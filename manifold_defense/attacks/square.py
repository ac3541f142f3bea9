"""Square Attack: random search over squares, without gradients (Andriushchenko et al. 2020)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from manifold_defense.attacks.contract import attack
from manifold_defense.attacks.norms import geometry
from manifold_defense.attacks.random_search import Draw, Propose, Start, random_search
from manifold_defense.types import Classifier, Norm

# Of 10,000 queries, those at which the squares' share of the image is halved (section 4.1).
_HALVED_AT = (10, 50, 200, 1000, 2000, 4000, 6000, 8000)
_TILES = 5  # of the first perturbation in L2, along each side


@attack
def square(
    model: Classifier,
    x: Tensor,
    y: Tensor,
    *,
    norm: Norm = "linf",
    eps: float = 0.3,
    steps: int = 1000,
    restarts: int = 1,
    initial_share: float = 0.8,
    targeted: bool = False,
    stop_early: bool = True,
    seed: int = 0,
) -> Tensor:
    """Square Attack in L∞ (Algorithm 2) or L2 (Algorithm 3) on images (N, C, H, W) with labels (N,).

    Asks for logits only, `steps` times for each image and restart, and raises the margin. Of all
    queries and the clean image the one with the highest margin is returned. The squares cover
    `initial_share` of the image (the paper's p) at first, less by the published schedule, stretched
    to `steps`. With `stop_early` an image leaves the batch once it clearly fools the model.
    """
    if norm not in ("linf", "l2"):
        raise ValueError(f"norm: expected one of linf, l2, got {norm!r}")
    if not 0 < initial_share <= 1:
        raise ValueError(f"initial_share: expected above 0 and at most 1, got {initial_share}")
    start, propose = (_linf if norm == "linf" else _l2)(x.detach(), eps, initial_share)
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


def _linf(x: Tensor, eps: float, initial_share: float) -> tuple[Start, Propose]:
    """Every pixel at ±eps; a proposal gives one square one sign for each channel."""

    def stripes(rows: Tensor, draw: Draw) -> Tensor:
        clean = x[rows]
        signs = _signs(draw(clean.shape[1], 1, clean.shape[3]))
        return (clean + eps * signs).clamp(0, 1)

    def propose(current: Tensor, clean: Tensor, spent: float, draw: Draw) -> Tensor:
        side = _side(initial_share, spent, clean)
        rows, columns = _window(clean, side, draw)
        inside = torch.zeros_like(clean[:, :1], dtype=torch.bool)
        image = torch.arange(len(clean), device=clean.device).view(-1, 1, 1)
        inside[image, 0, rows, columns] = True
        step = eps * _signs(draw(clean.shape[1], 1, 1))
        tried = torch.where(inside, (clean + step).clamp(0, 1), current)
        # A query that changes nothing is wasted: the square gets the opposite signs.
        same = (tried == current).flatten(1).all(1).view(-1, 1, 1, 1)
        return torch.where(same & inside, (clean - step).clamp(0, 1), tried)

    return stripes, propose


def _l2(x: Tensor, eps: float, initial_share: float) -> tuple[Start, Propose]:
    """Bumps; a proposal moves the L2 mass of one square into another, which gets one more bump."""
    shape = geometry("l2")

    def tiles(rows: Tensor, draw: Draw) -> Tensor:
        clean = x[rows]
        height, width = clean.shape[-2:]
        side = max(min(height, width) // _TILES, 1)
        delta = torch.zeros_like(clean)
        for top in range(0, height, side):
            for left in range(0, width, side):
                part = delta[:, :, top : top + side, left : left + side]
                part += _bump(part.shape[-2], part.shape[-1], clean) * _signs(draw(clean.shape[1], 1, 1))
        return (clean + eps * (1 - 1e-6) * shape.steepest(delta)).clamp(0, 1)

    def propose(current: Tensor, clean: Tensor, spent: float, draw: Draw) -> Tensor:
        side = _side(initial_share, spent, clean, least=2)
        image = torch.arange(len(clean), device=clean.device).view(-1, 1, 1)
        into, source = _window(clean, side, draw), _window(clean, side, draw)
        delta = current - clean
        kept = delta.clone()
        for rows, columns in (into, source):
            kept[image, :, rows, columns] = 0
        unused = (eps**2 - delta.square().flatten(1).sum(1)).clamp(min=0)
        moved = (delta - kept).square().sum((2, 3))  # (N, C)
        available = (moved + unused.view(-1, 1) / clean.shape[1]).sqrt()
        upright = (draw(1, 1) < 0.5).unsqueeze(-1)
        double = _double_bump(side, clean)
        bump = torch.where(upright, double, double.mT) * _signs(draw(clean.shape[1], 1, 1))  # (N, C, h, h)
        old = delta[image, :, into[0], into[1]].movedim(-1, 1)  # (N, C, h, h)
        shaped = _unit(_unit(old) + _unit(bump)) * available.view(*available.shape, 1, 1)
        kept[image, :, into[0], into[1]] = shaped.movedim(1, -1)
        return (clean + shape.project(kept, eps)).clamp(0, 1)

    return tiles, propose


def _side(initial_share: float, spent: float, images: Tensor, least: int = 1) -> int:
    """Of the squares to draw, once the share `spent` of the queries is."""
    share = initial_share / 2 ** sum(10_000 * spent > query for query in _HALVED_AT)
    height, width = images.shape[-2:]
    return min(max(round(math.sqrt(share * height * width)), least), height, width)


def _window(images: Tensor, side: int, draw: Draw) -> tuple[Tensor, Tensor]:
    """Rows (N, side, 1) and columns (N, 1, side) of one square in each image, anywhere inside."""
    choices = images.new_tensor([length - side + 1 for length in images.shape[-2:]])
    corner = torch.minimum((draw(2) * choices).floor(), choices - 1).long()
    offsets = torch.arange(side, device=images.device)
    return (corner[:, :1] + offsets).unsqueeze(2), (corner[:, 1:] + offsets).unsqueeze(1)


def _signs(uniform: Tensor) -> Tensor:
    return torch.where(uniform < 0.5, -1.0, 1.0).to(uniform)


def _bump(height: int, width: int, like: Tensor) -> Tensor:
    """(height, width), high in the middle: `Σ_{k ≤ M(r, s)} 1 / (n + 1 − k)²` (eq. 2)."""
    n = max(height, width) // 2
    rows, columns = torch.arange(height) - height // 2, torch.arange(width) - width // 2
    level = n - torch.maximum(rows.abs().view(-1, 1), columns.abs().view(1, -1))  # M(r, s)
    terms = torch.tensor([1 / (n + 1 - k) ** 2 for k in range(n + 1)]).cumsum(0)
    return torch.where(level >= 0, terms[level.clamp(min=0)], 0.0).to(like)


def _double_bump(side: int, like: Tensor) -> Tensor:
    """(side, side): a bump up beside a bump down."""
    left = side // 2
    return torch.cat([_bump(side, left, like), -_bump(side, side - left, like)], 1)


def _unit(windows: Tensor) -> Tensor:
    """Each channel of (N, C, h, h) at length 1; zero stays zero."""
    lengths: Tensor = torch.linalg.vector_norm(windows, dim=(2, 3), keepdim=True)
    return windows / lengths.clamp(min=1e-12)
