"""Branch and bound behind a threshold, L∞: a proof, or an image that refutes it.

A binarised pixel within reach of the threshold is black or white, nothing else, so that the images of a
box are finitely many. Where interval bounds on all of them prove nothing, a pixel is fixed at both of its
values and each half bounded anew (branch and bound; Bunel et al. 2018). N images, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from manifold_defense.certification.certificates import Certificates
from manifold_defense.certification.intervals import box_logits
from manifold_defense.evaluation.baselines import Binarise, Preprocessed
from manifold_defense.types import Classifier

_AT_ONCE = 64  # boxes that are halved together, those of the highest bound first


class Verdicts(NamedTuple):
    """Of N images: neither proved nor broken are those whose boxes ran out."""

    proved: Tensor  # (N,) bool: no image within eps has another label
    broken: Tensor  # (N,) bool: one was found
    x_adv: Tensor  # (N, C, H, W): that one, within eps and [0, 1]; else the image itself


def decide(model: Preprocessed, x: Tensor, y: Tensor, eps: float, *, boxes: int = 2000) -> Verdicts:
    """Whether an image within eps of x (N, C, H, W) and inside [0, 1] has another label than y (N,).

    Bounds at most some `boxes` parts of the box of an image. Raises TypeError for a model that is not an
    `ImageClassifier` behind `Binarise`, ValueError for an eps or a number of boxes out of range.
    """
    if not isinstance(model, Preprocessed) or not isinstance(model.preprocess, Binarise):
        raise TypeError(f"branch and bound follows a classifier behind Binarise, got {type(model).__name__}")
    if not eps >= 0:
        raise ValueError(f"eps: expected at least 0, got {eps}")
    if boxes < 1:
        raise ValueError(f"boxes: expected at least 1, got {boxes}")
    lower, upper = (x - eps).clamp(0, 1), (x + eps).clamp(0, 1)
    black, white, own = (model.preprocess.deployed(images) for images in (lower, upper, x))
    with torch.no_grad():
        broken = model(x).argmax(1) != y
        proved = ~broken & (_worst(model.classifier, black, white, y) < 0)
    x_adv = x.clone()
    for i in (~proved & ~broken).nonzero()[:, 0].tolist():
        found = _search(model.classifier, black[i], white[i], y[i], boxes)
        if isinstance(found, Tensor):
            broken[i] = True
            # Only pixels that change sides are moved.
            x_adv[i] = torch.where(found == own[i], x[i], torch.where(found > 0, upper[i], lower[i]))
        else:
            proved[i] = found
    return Verdicts(proved, broken, x_adv)


def branching_certificates(
    model: Preprocessed, x: Tensor, *, radii: Sequence[float], boxes: int = 2000
) -> Certificates:
    """The largest of the radii at which `decide` proves the prediction; 0 if it does at none."""
    with torch.no_grad():
        prediction = model(x).argmax(1)
    radius = x.new_zeros(len(x))
    alive = torch.arange(len(x), device=x.device)
    for eps in sorted(radii):
        alive = alive[decide(model, x[alive], prediction[alive], eps, boxes=boxes).proved]
        radius[alive] = eps
    return Certificates(prediction, radius)


def _search(model: Classifier, black: Tensor, white: Tensor, y: Tensor, boxes: int) -> Tensor | bool:
    """Binary images between black and white (C, H, W): one of another label, or whether there is none."""
    lower, upper = black.unsqueeze(0), white.unsqueeze(0)
    bounds = _worst(model, lower, upper, y).detach()
    spent = 1
    while True:
        open_ = ~(bounds < 0)  # NaN proves nothing
        lower, upper, bounds = lower[open_], upper[open_], bounds[open_]
        if not len(bounds):
            return True
        first = bounds.topk(min(_AT_ONCE, len(bounds))).indices
        slope_lower, slope_upper = _slopes(model, lower[first], upper[first], y)
        # Where the bound would have the pixels: an image, which may be one that refutes.
        at = torch.where(slope_lower + slope_upper > 0, upper[first], lower[first])
        with torch.no_grad():
            fooled = (model(at).argmax(1) != y).nonzero()[:, 0]
        if len(fooled):
            return at[fooled[0]]
        if spent >= boxes:
            return False
        # The pixel that weighs most in the bound. If none is left to choose, the box is one image, which has
        # the label y: its bound is rounding.
        gain = ((slope_upper - slope_lower) * (upper[first] - lower[first])).flatten(1)
        pixel = gain.argmax(1, keepdim=True)
        halves = _fixed(lower[first], upper[first], pixel)
        kept = torch.ones(len(bounds), dtype=torch.bool, device=bounds.device)
        kept[first] = False
        with torch.no_grad():
            new = _worst(model, *halves, y)
        spent += len(new)
        lower, upper = (torch.cat([a[kept], b]) for a, b in zip((lower, upper), halves, strict=True))
        bounds = torch.cat([bounds[kept], new])


def _worst(model: Classifier, lower: Tensor, upper: Tensor, y: Tensor) -> Tensor:
    """The largest bound (B,) of another class's lead over y, () or (B,), in each box (B, C, H, W)."""
    labels = y.expand(len(lower))
    return box_logits(model, lower, upper, labels).scatter(1, labels.unsqueeze(1), -torch.inf).amax(1)


def _slopes(model: Classifier, lower: Tensor, upper: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    with torch.enable_grad():
        ends = lower.detach().requires_grad_(), upper.detach().requires_grad_()
        at_lower, at_upper = torch.autograd.grad(_worst(model, *ends, y).sum(), ends)
    return at_lower, at_upper


def _fixed(lower: Tensor, upper: Tensor, pixel: Tensor) -> tuple[Tensor, Tensor]:
    """Each box (B, C, H, W) twice, its pixel (B, 1) black in the one and white in the other."""
    ends = lower.flatten(1), upper.flatten(1)
    black = ends[1].scatter(1, pixel, ends[0].gather(1, pixel))
    white = ends[0].scatter(1, pixel, ends[1].gather(1, pixel))
    return torch.cat([lower, white.view_as(lower)]), torch.cat([black.view_as(upper), upper])
