"""The minimum-norm attack of Carlini and Wagner (2017, section VI.A)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from manifold_defense.attacks.contract import attack
from manifold_defense.attacks.norms import geometry
from manifold_defense.attacks.objective import fooled, input_gradient, margins
from manifold_defense.modes import evaluation_mode
from manifold_defense.types import Classifier, Norm

_OFFSET = 1e-2


@attack
def cw(
    model: Classifier,
    x: Tensor,
    y: Tensor,
    *,
    norm: Norm = "l2",
    eps: float = float("inf"),
    steps: int = 100,
    searches: int = 4,
    learning_rate: float = 0.1,
    confidence: float = 0.0,
    initial_weight: float = 1.0,
    targeted: bool = False,
    stop_early: bool = True,
    seed: int = 0,
) -> Tensor:
    """The nearest adversarial image found by C&W in L2, for images (N, C, H, W) and labels (N,).

    Minimises `‖δ‖² + c · max(Z_y − max_{i≠y} Z_i, −κ)` over tanh space with Adam, with a binary
    search on c. An image for which nothing within `eps` was found is returned unchanged. With a
    finite `eps` an image leaves the batch as soon as one is found: within the ball, nearer is not
    better. A transfer attack sets `stop_early` to False and a `confidence`: it gets the image of
    the highest margin within `eps` instead. Nothing is random: `seed` is there for the common signature.
    """
    if norm != "l2":
        raise ValueError(f"cw: expected norm l2, got {norm!r}")
    if steps < 1 or searches < 1:
        raise ValueError(f"expected steps ≥ 1, searches ≥ 1, got {steps}, {searches}")
    if not (initial_weight > 0 and learning_rate > 0):
        raise ValueError(
            f"expected initial_weight > 0, learning_rate > 0, got {initial_weight}, {learning_rate}"
        )
    size = geometry(norm).size
    x = x.detach()
    best, best_size = x.clone(), x.new_full((len(x),), torch.inf)
    best_margin = x.new_zeros(len(x))
    confident = not stop_early and not math.isinf(eps)
    weight = x.new_full((len(x),), initial_weight)
    low, high = torch.zeros_like(weight), torch.full_like(weight, torch.inf)

    with evaluation_mode(model):
        with torch.no_grad():
            logits = model(x)
        margin = margins(logits, y, targeted)
        best_size[fooled(logits, y, targeted) & (margin >= confidence)] = 0
        # tanh cannot leave pixels that are exactly 0 or 1: start off the boundary.
        start = torch.atanh((2 * x - 1) * (1 - _OFFSET))
        # Adam's first step moves every pixel: not farther together than half of eps.
        reach = ((1 - torch.tanh(start).square()) / 2).flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        rate = (eps / (2 * reach)).clamp(max=learning_rate)
        for _ in range(searches):
            w = start.clone()
            mean, square = torch.zeros_like(x), torch.zeros_like(x)
            succeeded = torch.zeros(len(x), dtype=torch.bool, device=x.device)
            for step in range(1, steps + 1):
                sought = best_size > eps if stop_early and not math.isinf(eps) else best_size > 0
                active = sought.nonzero().squeeze(1)
                if len(active) == 0:
                    return best
                clean, label = x[active], y[active]
                with torch.enable_grad():
                    at = w[active].requires_grad_(True)
                    tried = (torch.tanh(at) + 1) / 2
                    logits = model(tried)
                    margin = margins(logits, label, targeted)
                    distance = (tried - clean).square().flatten(1).sum(1)
                    total = distance + weight[active] * (confidence - margin).clamp(min=0)
                    gradient = input_gradient(total, at).nan_to_num(0, 0, 0)
                tried, margin, logits = tried.detach(), margin.detach().to(x.dtype), logits.detach()
                wrong = fooled(logits, label, targeted)
                hit = wrong & (margin >= confidence)
                succeeded[active] |= hit
                length = size(tried - clean)
                nearer, surer = length < best_size[active], margin > best_margin[active]
                better = (wrong & surer if confident else hit & nearer) & (length <= eps)
                chosen = active[better]
                best[chosen], best_size[chosen] = tried[better], length[better]
                best_margin[chosen] = margin[better]
                mean[active] = 0.9 * mean[active] + 0.1 * gradient
                square[active] = 0.999 * square[active] + 0.001 * gradient.square()
                scale = (square[active] / (1 - 0.999**step)).sqrt() + 1e-8
                w[active] -= rate[active] * mean[active] / (1 - 0.9**step) / scale
            high = torch.where(succeeded, torch.minimum(high, weight), high)
            low = torch.where(succeeded, low, torch.maximum(low, weight))
            weight = torch.where(torch.isfinite(high), (low + high) / 2, 10 * weight)
    return best
