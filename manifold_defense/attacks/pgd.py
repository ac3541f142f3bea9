"""Projected gradient descent in any norm, and its one-step case."""

from __future__ import annotations

import torch
from torch import Tensor

from manifold_defense.attacks.ascent import Climb, ascend_in_ball
from manifold_defense.attacks.contract import attack
from manifold_defense.attacks.norms import geometry
from manifold_defense.attacks.objective import logits_and_gradient
from manifold_defense.modes import evaluation_mode
from manifold_defense.types import Classifier, Norm


@attack
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
    target_classes: int = 0,
    targeted: bool = False,
    stop_early: bool = True,
    bounds: tuple[float, float] = (0.0, 1.0),
    seed: int = 0,
) -> Tensor:
    """PGD (Madry et al. 2018) from images (N, C, H, W) with labels y (N,), the targets if `targeted`.

    Returns, of all iterates and the clean image, the one with the highest margin `max_{i≠y} Z_i − Z_y`;
    always inside the ball and `bounds`. `loss` is what the steps climb: `ce`, `margin`, `dlr`, or `both`,
    which alternates the first two between restarts. With `target_classes` every restart is one for each of so
    many of the wrong classes that are most likely at x, on the targeted ratio of logits instead
    (MultiTargeted, Gowal et al. 2019, on APGD-T's loss). `step_size` is that of the first step, in pixels,
    and falls linearly to zero; by default eps: shorter first steps stop at the first flat place, and
    behind a filter leave up to twice as many images (docs/results/attacks.md). With `stop_early` an image
    leaves the batch once it clearly fools the model; without, its margin is raised to the end, as a
    transfer attack needs.
    """
    shape = geometry(norm)
    rng = torch.Generator().manual_seed(seed)
    x = x.detach()

    def start(rows: Tensor) -> Tensor:
        delta = shape.sample(x, eps, rng) if random_start else torch.zeros_like(x)
        return (x + shape.project(delta, eps)).clamp(*bounds)[rows]

    return ascend_in_ball(
        model,
        x,
        y,
        start,
        Climb(steps, restarts, loss, targeted, stop_early, target_classes),
        norm=norm,
        eps=eps,
        longest=eps if step_size is None else step_size,
        bounds=bounds,
    )


@attack
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
