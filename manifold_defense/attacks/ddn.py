"""The minimum-norm attack in L2 that decouples the direction of δ from its length (Rony et al. 2019)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from manifold_defense.attacks.contract import attack
from manifold_defense.attacks.minimum_norm import Nearest, refine, smooth_gradient
from manifold_defense.attacks.norms import free, geometry
from manifold_defense.modes import evaluation_mode
from manifold_defense.types import Classifier, Norm

# The share of the passes that refines what the others have found.
_REFINED = 0.3


@attack
def ddn(
    model: Classifier,
    x: Tensor,
    y: Tensor,
    *,
    norm: Norm = "l2",
    eps: float = float("inf"),
    steps: int = 100,
    gamma: float = 0.05,
    initial_size: float = 1.0,
    targeted: bool = False,
    stop_early: bool = True,
    seed: int = 0,
) -> Tensor:
    """The nearest adversarial image found by DDN in L2, for images (N, C, H, W) and labels (N,).

    Algorithm 1 of Rony et al. (CVPR 2019): δ takes a step of unit direction, whose length falls from 1
    to 0.01 along a cosine, and is then put at a length that shrinks by `gamma` while the image fools
    the model and grows by it while not; levels are not quantised. What differs from the paper: the
    gradient is that of a cross-entropy that neither saturates nor depends on the scale of the logits,
    pixels that would leave [0, 1] take no part in the direction, and the last 30 % of the `steps`
    forward-backward passes slide the image found along the boundary (`refine`). The length begins at
    `initial_size`, but with a finite `eps` there.

    An image for which nothing within `eps` was found is returned unchanged. With a finite `eps` and
    `stop_early` an image leaves the batch as soon as one is found within. Nothing is random: `seed`
    is there for the common signature.
    """
    if norm != "l2":
        raise ValueError(f"ddn: expected norm l2, got {norm!r}")
    if steps < 1 or not 0 < gamma < 1 or not initial_size > 0:
        raise ValueError(
            "expected steps ≥ 1, gamma between 0 and 1, initial_size > 0, "
            f"got {steps}, {gamma}, {initial_size}"
        )
    shape = geometry("l2")
    x = x.detach()
    refined = int(_REFINED * steps)

    with evaluation_mode(model):
        nearest = Nearest(model, x, y, norm=norm, eps=eps, targeted=targeted, stop_early=stop_early)
        current, length = x.clone(), x.new_full((len(x),), initial_size if math.isinf(eps) else eps)
        for step in range(steps - refined):
            active = nearest.sought()
            if len(active) == 0:
                break
            clean, at = x[active], current[active]
            logits, gradient = smooth_gradient(model, at, y[active], targeted)
            hit = nearest.keep(active, at, logits)
            length[active] *= torch.where(hit, 1 - gamma, 1 + gamma)
            step_size = 0.01 + 0.99 * (1 + math.cos(math.pi * step / (steps - refined))) / 2
            moved = at + step_size * shape.steepest(free(gradient, at, (0.0, 1.0)))
            direction = shape.steepest(moved.clamp(0, 1) - clean)
            current[active] = (clean + length[active].view(-1, 1, 1, 1) * direction).clamp(0, 1)
        refine(model, nearest, refined)
    return nearest.within()
