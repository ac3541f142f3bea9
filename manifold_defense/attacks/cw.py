"""The minimum-norm attack of Carlini and Wagner (2017, section VI.A)."""

from __future__ import annotations

import torch
from torch import Tensor

from manifold_defense.attacks.norms import geometry
from manifold_defense.attacks.objective import attack_loss, evaluation_mode, fooled
from manifold_defense.types import Classifier, Norm


def cw(
    model: Classifier,
    x: Tensor,
    y: Tensor,
    *,
    norm: Norm = "l2",
    eps: float = float("inf"),
    steps: int = 100,
    searches: int = 4,
    learning_rate: float = 0.05,
    confidence: float = 0.0,
    initial_weight: float = 1.0,
    targeted: bool = False,
    seed: int = 0,
) -> Tensor:
    """The nearest adversarial image found by C&W in L2, for images (N, C, H, W) and labels (N,).

    Minimises `‖δ‖² + c · max(Z_y − max_{i≠y} Z_i, −κ)` over tanh space with Adam, with a binary
    search on c. An image for which nothing within `eps` was found is returned unchanged.
    """
    if norm != "l2":
        raise ValueError(f"cw: expected norm l2, got {norm!r}")
    size = geometry(norm).size
    x = x.detach()
    best, best_size = x.clone(), torch.full((len(x),), torch.inf, device=x.device)
    weight = torch.full((len(x),), initial_weight, device=x.device)
    low, high = torch.zeros_like(weight), torch.full_like(weight, torch.inf)
    # tanh cannot leave pixels that are exactly 0 or 1: start a hair inside.
    origin = torch.atanh((2 * x - 1) * (1 - 1e-3))

    with evaluation_mode(model):
        for _ in range(searches):
            w, mean, square = origin.clone(), torch.zeros_like(x), torch.zeros_like(x)
            succeeded = torch.zeros(len(x), dtype=torch.bool, device=x.device)
            for step in range(1, steps + 1):
                with torch.enable_grad():
                    w.requires_grad_(True)
                    tried = (torch.tanh(w) + 1) / 2
                    logits = model(tried)
                    margin = -attack_loss(logits, y, "margin", targeted)
                    distance = (tried - x).square().flatten(1).sum(1)
                    total = distance + weight * margin.clamp(min=-confidence)
                    (gradient,) = torch.autograd.grad(total.sum(), w)
                w, tried, logits, margin = w.detach(), tried.detach(), logits.detach(), margin.detach()
                hit = fooled(logits, y, targeted) & (margin <= -confidence)
                succeeded |= hit
                length = size(tried - x)
                better = hit & (length < best_size) & (length <= eps)
                best[better], best_size[better] = tried[better], length[better]
                mean = 0.9 * mean + 0.1 * gradient
                square = 0.999 * square + 0.001 * gradient.square()
                scale = (square / (1 - 0.999**step)).sqrt() + 1e-8
                w = w - learning_rate * mean / (1 - 0.9**step) / scale
            high = torch.where(succeeded, torch.minimum(high, weight), high)
            low = torch.where(succeeded, low, torch.maximum(low, weight))
            bounded = torch.isfinite(high)
            weight = torch.where(bounded, (low + high) / 2, 10 * weight)
    return best
