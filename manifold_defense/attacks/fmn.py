"""Fast minimum-norm attacks in L0, L1, L2 and L∞ (Pintor et al. 2021)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from manifold_defense.attacks.contract import attack
from manifold_defense.attacks.halfspace import NORMS, nearest_in_halfspace
from manifold_defense.attacks.minimum_norm import Nearest, refine, smooth_gradient
from manifold_defense.attacks.norms import free, geometry, sizes
from manifold_defense.attacks.objective import margins
from manifold_defense.modes import evaluation_mode
from manifold_defense.types import Classifier, Norm

# The share of the passes that refines what the others have found.
_REFINED = 0.3


@attack
def fmn(
    model: Classifier,
    x: Tensor,
    y: Tensor,
    *,
    norm: Norm = "linf",
    eps: float = float("inf"),
    steps: int = 100,
    step_size: float = 1.0,
    gamma: tuple[float, float] = (0.05, 0.001),
    targeted: bool = False,
    stop_early: bool = True,
    seed: int = 0,
) -> Tensor:
    """The nearest adversarial image found by FMN in `norm`, for images (N, C, H, W) and labels (N,).

    Algorithm 1 of Pintor et al. (NeurIPS 2021). A radius per image: until the image first fools the
    model it is the distance to the linearised boundary; then it shrinks by a share while δ fools and
    grows by it while not, the share falling along a cosine from the first `gamma` to the second. δ
    steps along the gradient, `step_size` long in L2 and falling to a hundredth of that, and is
    projected on the ball of that radius. L0 counts pixels over channels, and its radius changes by a
    whole pixel at least. The gradient, the pixels at a bound and the refinement are as in `ddn`.

    An image for which nothing within `eps` was found is returned unchanged. With a finite `eps` and
    `stop_early` an image leaves the batch as soon as one is found within. Nothing is random: `seed`
    is there for the common signature.
    """
    if norm not in NORMS:
        raise ValueError(f"norm: expected one of {', '.join(NORMS)}, got {norm!r}")
    if steps < 1 or not step_size > 0:
        raise ValueError(f"expected steps ≥ 1, step_size > 0, got {steps}, {step_size}")
    if not 0 < gamma[1] <= gamma[0] < 1:
        raise ValueError(f"gamma: expected two shares that fall, between 0 and 1, got {gamma}")
    x = x.detach()
    refined = int(_REFINED * steps)

    with evaluation_mode(model):
        nearest = Nearest(model, x, y, norm=norm, eps=eps, targeted=targeted, stop_early=stop_early)
        current, radius = x.clone(), x.new_full((len(x),), torch.inf)
        for step in range(steps - refined):
            active = nearest.sought()
            if len(active) == 0:
                break
            clean, at, label = x[active], current[active], y[active]
            logits, gradient = smooth_gradient(model, at, label, targeted)
            hit = nearest.keep(active, at, logits)
            cosine = (1 + math.cos(math.pi * step / (steps - refined))) / 2
            share = gamma[1] + (gamma[0] - gamma[1]) * cosine
            gap = -margins(logits, label, targeted).nan_to_num(0, 0, 0).to(at.dtype)
            ahead = sizes(norm, nearest_in_halfspace(at, gradient, gap, norm))
            length = sizes(norm, at - clean)
            # Where several boundaries meet, the linearised one alone could keep the radius for ever.
            linearised = length + torch.maximum(ahead, share * length)
            radius[active] = _next_radius(norm, radius[active], nearest.size[active], linearised, hit, share)
            step_now = step_size * (0.01 + 0.99 * cosine)
            moved = at + step_now * geometry("l2").steepest(free(gradient, at, (0.0, 1.0)))
            delta = _project(norm, moved.clamp(0, 1) - clean, radius[active])
            current[active] = (clean + delta).clamp(0, 1)
        refine(model, nearest, refined)
    return nearest.within()


def _next_radius(
    norm: str, radius: Tensor, best: Tensor, linearised: Tensor, hit: Tensor, share: float
) -> Tensor:
    """The radius of Algorithm 1, all (N,): smaller where δ fools, larger where it does not (any more)."""
    change = share * radius
    if norm == "l0":
        change = change.clamp(min=1)
        smaller = torch.minimum(radius, best) - change
    else:
        smaller = torch.minimum(radius - change, best)
    larger = torch.where(best.isfinite(), radius + change, linearised)
    radius = torch.where(hit, smaller, larger).clamp(min=0)
    return radius.round() if norm == "l0" else radius


def _project(norm: str, delta: Tensor, radius: Tensor) -> Tensor:
    """The nearest perturbations to δ (N, C, H, W) in the balls of radii (N,), one for each image."""
    if norm != "l0":
        return geometry(norm).project(delta, radius)
    energy = delta.square().sum(1).flatten(1)
    rank = energy.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    return delta * (rank < radius.unsqueeze(1)).view(-1, 1, *delta.shape[2:])
