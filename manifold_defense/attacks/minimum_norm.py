"""What the minimum-norm attacks share: the nearest image found, a gradient, and a refinement at the end."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from manifold_defense.attacks.halfspace import nearest_in_halfspace
from manifold_defense.attacks.norms import sizes
from manifold_defense.attacks.objective import (
    contested,
    fooled,
    input_gradient,
    logits_and_gradient,
    margins,
)
from manifold_defense.types import Classifier

# A margin, as a share of the largest logit, that the rounding of another batch does not undo.
_CLEAR = 1e-5
# How sharply `smooth_gradient` tells the classes apart, over the spread of an image's logits.
_SHARPNESS = 4.0
# How far below the largest logit one is of a class that is switched off, over the distance of the middle one.
_SWITCHED_OFF = 10.0
# Of the way to the linearised boundary, what the first and the last pass of the refinement go.
_DAMPING = (0.5, 0.05)
# How far, as a share of δ, a refined image is put beyond the linearised boundary.
_BEYOND = 1e-3


class Nearest:
    """The nearest adversarial image found so far to each image x (N, C, H, W), with its size (N,).

    `image` is x and `size` infinite where none was found, 0 where x itself fools the model.
    """

    def __init__(
        self,
        model: Classifier,
        x: Tensor,
        y: Tensor,
        *,
        norm: str,
        eps: float,
        targeted: bool,
        stop_early: bool = True,
    ) -> None:
        """Runs the model once, on x: inside `evaluation_mode`."""
        self.clean, self.labels, self.norm, self.eps, self.targeted = x, y, norm, eps, targeted
        # Within a ball that was named, nearer is not better.
        self.enough = eps if stop_early and not math.isinf(eps) else 0.0
        with torch.no_grad():
            already = fooled(model(x), y, targeted)
        self.image = x.clone()
        self.size = torch.where(already, 0.0, torch.full_like(already, torch.inf, dtype=x.dtype))

    def sought(self) -> Tensor:
        """The indices of the images for which a nearer one is worth passes."""
        return (self.size > self.enough).nonzero().squeeze(1)

    def found(self) -> Tensor:
        """Those of the sought for which something has been found."""
        active = self.sought()
        return active[self.size[active].isfinite()]

    def keep(self, active: Tensor, at: Tensor, logits: Tensor) -> Tensor:
        """Takes what is adversarial and nearer of the images `at` (A, C, H, W); whether each fools, (A,)."""
        label = self.labels[active]
        margin = margins(logits, label, self.targeted)
        hit = fooled(logits, label, self.targeted) & (margin > clearance(logits))
        length = sizes(self.norm, at - self.clean[active])
        nearer = hit & (length < self.size[active])
        chosen = active[nearer]
        self.image[chosen], self.size[chosen] = at[nearer], length[nearer]
        return hit

    def within(self) -> Tensor:
        """The images found within eps, the clean one where there is none, (N, C, H, W)."""
        inside = (self.size <= self.eps).view(-1, 1, 1, 1)
        return torch.where(inside, self.image, self.clean)


def clearance(logits: Tensor) -> Tensor:
    """The margin, (N,), from which an answer (N, K) counts as sure."""
    return _CLEAR * contested(logits)


def smooth_gradient(model: Classifier, x: Tensor, y: Tensor, targeted: bool) -> tuple[Tensor, Tensor]:
    """Logits (N, K) and the gradient in x of `log Σ_{i≠y} exp(s Zᵢ) / s − Z_y`; negated if targeted.

    At s = 1 it points where cross-entropy does, which leads to nearer classes than the margin alone,
    but is no smaller where the model is confident. s follows the spread of each image's logits, so
    that scaled or shifted logits, or a class that is switched off, give the same direction.
    """
    with torch.enable_grad():
        x = x.detach().requires_grad_(True)
        logits = model(x)
        centred = logits.to(x.dtype) - logits.detach().to(x.dtype).amax(1, keepdim=True)
        spread = _spread(centred.detach())
        sharpness = _SHARPNESS / torch.where(spread > 0, spread, 1.0)
        others = (centred * sharpness.unsqueeze(1)).scatter(1, y.unsqueeze(1), -torch.inf)
        value = others.logsumexp(1) / sharpness - centred.gather(1, y.unsqueeze(1)).squeeze(1)
        gradient = input_gradient(value, x)
    # A gradient that is not finite is no direction.
    gradient = gradient.nan_to_num(0, 0, 0)
    return logits.detach(), -gradient if targeted else gradient


def _spread(logits: Tensor) -> Tensor:
    """Standard deviation (N,) of logits (N, K) with a largest one of 0, but for classes switched off."""
    classes = logits.shape[1]
    middle = logits.sort(1, descending=True).values[:, [min(max(2, classes // 2), classes - 1)]]
    alive = logits >= _SWITCHED_OFF * middle
    count = alive.sum(1, keepdim=True)
    mean = torch.where(alive, logits, 0).sum(1, keepdim=True) / count
    deviation = torch.where(alive, logits - mean, 0)
    return (deviation.square().sum(1) / (count.squeeze(1) - 1)).sqrt()


def refine(model: Classifier, nearest: Nearest, passes: int) -> None:
    """Moves the nearest images along the boundary towards the clean ones, in `passes` passes and one forward.

    Each pass linearises the margin and goes part of the way to the point of that half-space and the box
    that is nearest to the *clean* image (as FAB does: Croce and Hein 2020).
    """
    current = nearest.image.clone()
    for step in range(passes + 1):
        active = nearest.found()
        if len(active) == 0:
            return
        clean, label, at = nearest.clean[active], nearest.labels[active], current[active]
        if step == passes:
            with torch.no_grad():
                nearest.keep(active, at, model(at))
            return
        logits, gradient = logits_and_gradient(model, at, label, "margin", nearest.targeted)
        nearest.keep(active, at, logits)
        gradient = gradient.nan_to_num(0, 0, 0)
        margin = margins(logits, label, nearest.targeted).nan_to_num(0, 0, 0).to(at.dtype)
        delta = at - clean
        gap = (gradient * delta).flatten(1).sum(1) - margin
        target = nearest_in_halfspace(clean, gradient, gap + _BEYOND * margin.abs(), nearest.norm)
        if nearest.norm == "l0":
            delta = target  # part of the way there would change the pixels of both
        else:
            first, last = _DAMPING
            share = first + (last - first) * step / passes
            delta = (delta + share * (target - delta)) * (1 + _BEYOND)
        current[active] = (clean + delta).clamp(0, 1)
