"""Projected gradient descent in any norm, and its one-step case."""

from __future__ import annotations

import torch
from torch import Tensor

from manifold_defense.attacks.norms import geometry
from manifold_defense.attacks.objective import clearly, evaluation_mode, logits_and_gradient, margins
from manifold_defense.types import Classifier, Norm


def pgd(
    model: Classifier,
    x: Tensor,
    y: Tensor,
    *,
    norm: Norm = "linf",
    eps: float = 0.3,
    step_size: float | None = None,
    steps: int = 40,
    restarts: int = 1,
    random_start: bool = True,
    loss: str = "ce",
    targeted: bool = False,
    stop_early: bool = True,
    bounds: tuple[float, float] = (0.0, 1.0),
    seed: int = 0,
) -> Tensor:
    """PGD (Madry et al. 2018) from images (N, C, H, W) with labels y (N,), the targets if `targeted`.

    Returns, of all iterates and the clean image, the one with the highest margin `max_{i≠y} Z_i − Z_y`;
    always inside the ball and `bounds`. `loss` is what the steps climb: `ce`, `margin`, `dlr`, or `both`,
    which alternates the first two between restarts. `step_size` is that of the first step, in pixels,
    and falls linearly to zero; by default eps: shorter first steps stop at the first flat place, which
    behind a filter left up to a third more images. With `stop_early` an image leaves the batch once it
    clearly fools the model; without, its margin is raised to the end, as a transfer attack needs.
    """
    shape = geometry(norm)
    if not eps >= 0 or steps < 1 or restarts < 1:
        raise ValueError(f"expected eps ≥ 0, steps ≥ 1, restarts ≥ 1, got {eps}, {steps}, {restarts}")
    climbed = ("ce", "margin") if loss == "both" else (loss,)
    step_size = eps if step_size is None else step_size
    rng = torch.Generator().manual_seed(seed)
    x = x.detach()
    best = x.clone()

    with evaluation_mode(model):
        with torch.no_grad():
            logits = model(x)
        best_margin = margins(logits, y, targeted)
        found = clearly(best_margin, logits)
        for restart in range(restarts):
            start = shape.sample(x, eps, rng) if random_start else torch.zeros_like(x)
            current = (x + shape.project(start, eps)).clamp(*bounds)
            active = (~found if stop_early else torch.ones_like(found)).nonzero().squeeze(1)
            for step in range(steps + 1):
                if len(active) == 0:
                    break
                at, clean, label = current[active], x[active], y[active]
                if step < steps:
                    value = climbed[restart % len(climbed)]
                    logits, gradient = logits_and_gradient(model, at, label, value, targeted)
                else:
                    with torch.no_grad():
                        logits = model(at)
                margin = margins(logits, label, targeted)
                better = margin > best_margin[active]
                best[active[better]], best_margin[active[better]] = at[better], margin[better]
                if step < steps:
                    # Where the gradient is not finite there is no direction; the next restart may differ.
                    up, length = gradient.nan_to_num(0, 0, 0), step_size * (1 - step / steps)
                    current[active] = shape.step(clean, at, up, length, eps, bounds)
                if stop_early:
                    # Just over the boundary, another batch's rounding could bring the image back.
                    found[active] |= clearly(margin, logits)
                    active = active[~found[active]]
    return best


def fgsm(
    model: Classifier,
    x: Tensor,
    y: Tensor,
    *,
    norm: Norm = "linf",
    eps: float = 0.3,
    random_step: float = 0.0,
    loss: str = "ce",
    targeted: bool = False,
    seed: int = 0,
) -> Tensor:
    """One step of length eps along the steepest direction of `norm` inside [0, 1] (Goodfellow et al. 2015).

    With `random_step`, a share of eps, a step in a random direction comes first, and the gradient's has
    what is left of eps (RAND+FGSM, Tramèr et al. 2018). An image that the step does not fool is
    returned as it was moved: the figure of a one-step attack.
    """
    if not 0 <= random_step <= 1:
        raise ValueError(f"random_step: expected in [0, 1], got {random_step}")
    shape = geometry(norm)
    start, left = x.detach(), (1 - random_step) * eps
    if random_step:
        draw = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)).to(x)
        first = random_step * eps
        start = (start + shape.project(first * shape.steepest(draw), first)).clamp(0, 1)
    with evaluation_mode(model):
        _, gradient = logits_and_gradient(model, start, y, loss, targeted)
    # Across the ball, and cut back to its surface: where the box stops a pixel the others go on.
    return shape.step(start, start, gradient.nan_to_num(0, 0, 0), 2 * left, left, (0.0, 1.0))
