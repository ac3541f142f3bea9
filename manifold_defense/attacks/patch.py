"""Adversarial patches: one square of the image, whose place and content the attacker chooses."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from manifold_defense.attacks.contract import attack
from manifold_defense.attacks.highest import Highest
from manifold_defense.attacks.objective import clearly, logits_and_gradient, margins
from manifold_defense.modes import evaluation_mode
from manifold_defense.types import Classifier, Norm


@attack
def patch(
    model: Classifier,
    x: Tensor,
    y: Tensor,
    *,
    norm: Norm = "patch",
    eps: float = 5,
    steps: int = 40,
    restarts: int = 1,
    locations: int = 16,
    loss: str = "ce",
    targeted: bool = False,
    stop_early: bool = True,
    seed: int = 0,
) -> Tensor:
    """A square of side `eps` pixels with any content in [0, 1], its place and content optimised.

    A patch of its own for each image (N, C, H, W) with labels y (N,); Brown et al. (2017) have one
    for all. `locations` are tried for each image and restart, half of them those whose window gains
    most to first order, the others random. They compete: a few steps of PGD on the content of each,
    then the better half goes on with twice as many, until the last gets `steps`; in all about
    `steps · (1 + log₂ locations)` gradients. Returns the image with the highest margin that was
    seen, the clean one included; `loss`, `restarts` and `stop_early` as in `pgd`. Blind where
    gradients are masked.
    """
    if norm != "patch":
        raise ValueError(f"norm: expected patch, got {norm!r}")
    if eps < 1 or eps != int(eps):
        raise ValueError(f"eps: expected a whole number of pixels, at least 1, got {eps}")
    if steps < 1 or restarts < 1 or locations < 1:
        raise ValueError(f"expected steps, restarts, locations ≥ 1, got {steps}, {restarts}, {locations}")
    climbed = ("ce", "margin") if loss == "both" else (loss,)
    rng = torch.Generator().manual_seed(seed)
    x = x.detach()
    with evaluation_mode(model):
        logits, gradient = logits_and_gradient(model, x, y, "margin", targeted)
        best = Highest(x, y, logits, targeted=targeted, stop_early=stop_early)
        gains = _window_gains(x, gradient.nan_to_num(0, 0, 0), int(eps))
        for restart in range(restarts):
            value = climbed[restart % len(climbed)]
            corners = _candidates(gains, locations, rng)  # (N, L, 2)
            content = torch.rand(len(x), corners.shape[1], *x.shape[1:], generator=rng).to(x)
            while True:
                rivals = corners.shape[1]
                reached = best.margin.new_full((len(x), rivals), -torch.inf)
                for rival in range(rivals):
                    active = best.sought()
                    if len(active) == 0:
                        return best.image
                    inside = _inside(corners[active, rival], int(eps), x)
                    image, logits = _climb(
                        model,
                        torch.where(inside, content[active, rival], x[active]),
                        y[active],
                        inside,
                        max(steps // rivals, 1),
                        value,
                        targeted,
                        stop_early,
                    )
                    content[active, rival] = image
                    reached[active, rival] = best.keep(active, image, logits)
                if rivals == 1:
                    break
                ahead = reached.float().topk(rivals // 2, dim=1).indices  # in half precision topk has gaps
                image_index = torch.arange(len(x), device=x.device).unsqueeze(1)
                corners, content = corners[image_index, ahead], content[image_index, ahead]
    return best.image


def _climb(
    model: Classifier,
    start: Tensor,
    y: Tensor,
    inside: Tensor,
    steps: int,
    loss: str,
    targeted: bool,
    stop_early: bool,
) -> tuple[Tensor, Tensor]:
    """PGD on the pixels `inside` (N, 1, H, W): the iterates of highest margin, their logits (N, K)."""
    current, best = start.clone(), start.clone()
    active = torch.arange(len(start), device=start.device)
    for step in range(steps + 1):
        at, label = current[active], y[active]
        if step < steps:
            logits, gradient = logits_and_gradient(model, at, label, loss, targeted)
            # A ball of radius ½ about grey: `5 eps / steps` at first, falling to zero.
            length = 2.5 / steps * (1 - step / steps)
            direction = gradient.nan_to_num(0, 0, 0).sign() * inside[active]
            current[active] = (at + length * direction).clamp(0, 1)
        else:
            with torch.no_grad():
                logits = model(at)
        margin = margins(logits, label, targeted)
        if step == 0:
            best_margin, best_logits = margin.clone(), logits.clone()
        better = margin > best_margin[active]
        chosen = active[better]
        best[chosen], best_margin[chosen], best_logits[chosen] = at[better], margin[better], logits[better]
        if stop_early:
            active = active[~clearly(margin, logits)]
            if len(active) == 0:
                break
    return best, best_logits


def _window_gains(x: Tensor, gradient: Tensor, side: int) -> Tensor:
    """What the best content of each window adds to `g·δ`, (N, rows, columns) of its top left corner."""
    gain = torch.maximum(gradient * (1 - x), -gradient * x).sum(1, keepdim=True)
    window = (min(side, x.shape[2]), min(side, x.shape[3]))
    return F.avg_pool2d(gain, window, stride=1).squeeze(1) * (window[0] * window[1])


def _candidates(gains: Tensor, locations: int, rng: torch.Generator) -> Tensor:
    """Corners (N, L, 2): half of them where windows gain most but do not crowd, half random."""
    rows, columns = gains.shape[1:]
    locations = min(locations, rows * columns)
    row = torch.arange(rows, device=gains.device).view(-1, 1)
    column = torch.arange(columns, device=gains.device).view(1, -1)
    # Neighbours of a chosen window show the same pixels: they come after all others.
    reach = max(1, min(rows, columns) // 6)
    span = gains.amax((1, 2), keepdim=True) - gains.amin((1, 2), keepdim=True) + 1
    left, chosen = gains.clone(), []
    for _ in range((locations + 1) // 2):
        flat = left.flatten(1).argmax(1)
        chosen.append(flat)
        top, side = (flat // columns).view(-1, 1, 1), (flat % columns).view(-1, 1, 1)
        near = ((row - top).abs() <= reach) & ((column - side).abs() <= reach)
        left = torch.where(near, left - span, left)
        left = torch.where((row == top) & (column == side), -torch.inf, left)
    lottery = torch.rand(gains.shape, generator=rng).to(gains)
    lottery = torch.where(left == -torch.inf, -1.0, lottery).flatten(1)
    drawn = lottery.topk(locations // 2, dim=1).indices
    corners = torch.cat([torch.stack(chosen, 1), drawn], 1)
    return torch.stack([corners // columns, corners % columns], 2)


def _inside(corner: Tensor, side: int, x: Tensor) -> Tensor:
    """Where the windows with top left corners (N, 2) lie, (N, 1, H, W)."""
    row = torch.arange(x.shape[2], device=x.device).view(-1, 1) - corner[:, 0].view(-1, 1, 1, 1)
    column = torch.arange(x.shape[3], device=x.device) - corner[:, 1].view(-1, 1, 1, 1)
    return (row >= 0) & (row < side) & (column >= 0) & (column < side)
