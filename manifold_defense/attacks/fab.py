"""FAB: along the linearised boundary, never far from the clean image (Croce & Hein 2020)."""

from __future__ import annotations

import torch
from torch import Tensor

from manifold_defense.attacks.contract import attack
from manifold_defense.attacks.halfspace import nearest_in_halfspace
from manifold_defense.attacks.minimum_norm import Nearest, clearance, refine
from manifold_defense.attacks.norms import column, geometry, sizes
from manifold_defense.attacks.objective import goals, input_gradient, margins
from manifold_defense.modes import evaluation_mode
from manifold_defense.types import Classifier, Norm

# Of the paper: how far beyond the linearised boundary, how much of the way back once the image fools, and the
# largest weight of the point that is nearest to the clean image.
_BEYOND, _BACK, _WEIGHT = 1.05, 0.9, 0.1
# How many passes more, as a share of the steps of a run, refine what all of them have found.
_REFINED = 0.3


@attack
def fab(
    model: Classifier,
    x: Tensor,
    y: Tensor,
    *,
    norm: Norm = "linf",
    eps: float = float("inf"),
    steps: int = 100,
    restarts: int = 1,
    target_classes: int = 0,
    targeted: bool = False,
    stop_early: bool = True,
    seed: int = 0,
) -> Tensor:
    """The nearest adversarial image found by FAB in `norm`, for images (N, C, H, W) and labels (N,).

    Algorithm 1 of Croce & Hein (ICML 2020). Each step linearises the boundary, goes to a mean of the
    points on it that are nearest to the iterate and to the clean image, in the box, and a twentieth beyond;
    an iterate that fools the model is first drawn a tenth of the way back. That no ball holds the iterates
    lets it reach boundaries that attacks inside one do not. With `target_classes` each restart has a
    run for each of so many of the wrong classes that are most likely at x, whose boundary is that between
    this class and the right one, though any wrong class will do (FAB-T); otherwise it is that of the
    margin. What differs from the paper: an iterate that fools the model gives the plane for its own way
    back as well, so that a step is one forward-backward pass and no more, and 30 % of a run's `steps` at the
    end slide the nearest image along the boundary (`refine`).

    The first restart begins at x, each other one at random within half the distance found so far, `eps` at
    most. An image for which nothing within `eps` was found is returned unchanged. With a finite `eps` and
    `stop_early` an image leaves the batch as soon as one is found within.
    """
    shape = geometry(norm)
    if steps < 1 or restarts < 1:
        raise ValueError(f"expected steps ≥ 1, restarts ≥ 1, got {steps}, {restarts}")
    rng = torch.Generator().manual_seed(seed)
    x = x.detach()

    with evaluation_mode(model):
        nearest = Nearest(model, x, y, norm=norm, eps=eps, targeted=targeted, stop_early=stop_early)
        with torch.no_grad():
            runs = goals(model(x), y, target_classes, targeted)
        for restart in range(restarts):
            start = _around(nearest, shape.sample(x, 1.0, rng)) if restart else x
            for goal in runs:
                _run(model, nearest, start, goal, steps)
        refine(model, nearest, int(_REFINED * steps))
    return nearest.within()


def _around(nearest: Nearest, drawn: Tensor) -> Tensor:
    """Images (N, C, H, W) off the clean ones by `drawn`, of length ≤ 1, times half the distance found."""
    reach = nearest.size.clamp(max=nearest.eps).nan_to_num(posinf=1.0)
    return (nearest.clean + column(reach / 2, drawn) * drawn).clamp(0, 1)


def _run(model: Classifier, nearest: Nearest, start: Tensor, goal: Tensor | None, steps: int) -> None:
    """From `start` (N, C, H, W) towards classes `goal` (N,), or whichever is most likely."""
    norm, current = nearest.norm, start.clone()
    for _ in range(steps):
        active = nearest.sought()
        if len(active) == 0:
            return
        clean, label = nearest.clean[active], nearest.labels[active]
        at = current[active].requires_grad_(True)
        with torch.enable_grad():
            logits = model(at)
            if goal is None:
                lead = margins(logits, label, nearest.targeted)
            else:
                pair = torch.stack([goal[active], label], 1)
                lead = logits.gather(1, pair) @ logits.new_tensor([1.0, -1.0])
            # A gradient that is not finite is no direction.
            gradient = input_gradient(lead, at).nan_to_num(0, 0, 0)
        at, logits = at.detach(), logits.detach()
        hit = nearest.keep(active, at, logits)
        lacking = (clearance(logits) - lead.detach()).nan_to_num(0, 0, 0).to(at.dtype)
        base = torch.where(column(hit, at), clean + _BACK * (at - clean), at)
        gap = lacking - (gradient * (base - at)).flatten(1).sum(1)
        ahead = nearest_in_halfspace(base, gradient, gap, norm)
        gap = gap + (gradient * (base - clean)).flatten(1).sum(1)
        aside = nearest_in_halfspace(clean, gradient, gap, norm)
        near, far = sizes(norm, ahead), sizes(norm, aside)
        weight = column((near / (near + far).clamp(min=1e-12)).clamp(max=_WEIGHT), at)
        moved = (1 - weight) * (base + _BEYOND * ahead) + weight * (clean + _BEYOND * aside)
        current[active] = moved.clamp(0, 1)
