"""Branch and bound behind a threshold, L∞: a proof, or an image that refutes it.

A binarised pixel within reach of the threshold is black or white, nothing else, so that the images of a
box are finitely many. Where linear bounds on all of them prove nothing, a pixel is fixed at both of its
values and each half bounded anew (branch and bound; Bunel et al. 2018). N images, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from manifold_defense.attacks import pgd
from manifold_defense.certification.certificates import Certificates
from manifold_defense.certification.intervals import (
    Box,
    ball,
    followed,
    hidden_boxes,
    intervals_prove,
    outward,
)
from manifold_defense.certification.relaxation import fitted_lines, lead_bounds, tightened
from manifold_defense.classifiers import ImageClassifier
from manifold_defense.evaluation.baselines import Binarise, Preprocessed
from manifold_defense.types import Classifier

_STARTS, _STEPS = 16, 20  # of the attack that comes before a search
_AT_ONCE = 64  # boxes that are halved together, those of the highest bound first


class Verdicts(NamedTuple):
    """Of N images: neither proved nor broken are those whose boxes ran out."""

    proved: Tensor  # (N,) bool: no image within eps has another label
    broken: Tensor  # (N,) bool: one was found
    x_adv: Tensor  # (N, C, H, W): that one, within eps, up to rounding, and [0, 1]; else the image itself


@torch.inference_mode(False)  # within it nothing can be differentiated
@torch.no_grad()
def decide(model: Preprocessed, x: Tensor, y: Tensor, eps: float, *, boxes: int = 2000) -> Verdicts:
    """Whether an image within eps of x (N, C, H, W) and inside [0, 1] has another label than y (N,).

    Bounds at most some `boxes` parts of the box of an image. Raises TypeError for a model that is not an
    `ImageClassifier` behind `Binarise`, ValueError for an eps or a number of boxes out of range and for
    images that are not those of the model in [0, 1].
    """
    if not isinstance(model, Preprocessed) or not isinstance(model.preprocess, Binarise):
        raise TypeError(f"branch and bound follows a classifier behind Binarise, got {type(model).__name__}")
    if boxes < 1:
        raise ValueError(f"boxes: expected at least 1, got {boxes}")
    x, y, classifier = x.clone(), y.clone(), followed(model)
    proved = intervals_prove(model, x, y, eps)
    lower, upper = ball(x, outward(eps))
    black, white, own = (model.preprocess.deployed(images) for images in (lower, upper, x))
    broken = model(x).argmax(1) != y
    proved &= ~broken
    x_adv = x.clone()
    for i in (~proved & ~broken).nonzero()[:, 0].tolist():
        image = _attacked(model, x[i], y[i], eps)
        if image is None:
            found = _search(classifier, Box(black[i : i + 1], white[i : i + 1]), y[i], boxes)
            if isinstance(found, bool):
                proved[i] = found
                continue
            # Only pixels that change sides are moved.
            image = torch.where(found == own[i], x[i], torch.where(found > 0, upper[i], lower[i]))
        x_adv[i], broken[i] = image, True
    return Verdicts(proved, broken, x_adv)


def _attacked(model: Classifier, x: Tensor, y: Tensor, eps: float) -> Tensor | None:
    """An image within eps of x (C, H, W) of another label than y, (), if PGD finds one."""
    starts, labels = x.expand(_STARTS, -1, -1, -1), y.expand(_STARTS)
    x_adv = pgd(model, starts, labels, eps=eps, step_size=2 * eps, steps=_STEPS)
    fooled = (model(x_adv).argmax(1) != y).nonzero()[:, 0]
    return x_adv[fooled[0]] if len(fooled) else None


@torch.no_grad()
def branching_certificates(
    model: Preprocessed, x: Tensor, *, radii: Sequence[float], boxes: int = 2000
) -> Certificates:
    """The largest of the radii at which `decide` proves the prediction; 0 if it does at none."""
    prediction = model(x).argmax(1)
    radius = x.new_zeros(len(x), dtype=torch.float64)  # in float32 a radius would be another than was asked
    alive = torch.arange(len(x), device=x.device)
    for eps in sorted(radii):
        alive = alive[decide(model, x[alive], prediction[alive], eps, boxes=boxes).proved]
        radius[alive] = eps
    return Certificates(prediction, radius)


class _Parts(NamedTuple):
    """Boxes that together hold what is left of an image's, and how far other classes can lead there."""

    lower: Tensor  # (B, C, H, W)
    upper: Tensor  # (B, C, H, W)
    bounds: Tensor  # (B, S): of the lead of each of S other classes over the label
    slope: Tensor  # (B, C, H, W): how fast the highest of them rises with each pixel

    def those(self, which: Tensor) -> _Parts:
        return _Parts(*(column[which] for column in self))

    def within(self, bounds: Tensor) -> _Parts:
        """Where bounds (B, S) are known already."""
        return self._replace(bounds=torch.minimum(self.bounds, bounds))


def _search(model: ImageClassifier, box: Box, y: Tensor, boxes: int) -> Tensor | bool:
    """Binary images in a box (1, C, H, W): one of another label than y, (), or whether there is none."""
    hidden = tightened(model, box)
    others = torch.arange(model.head.out_features, device=y.device)
    others = others[others != y]
    bounds = lead_bounds(model, hidden.boxes, y, others).largest(box)
    open_ = ~(bounds[0] < 0)  # NaN proves nothing
    if not open_.any():
        return True
    others, bounds = others[open_], bounds[:, open_]
    lines = fitted_lines(model, box, hidden.boxes, y, others)
    parts = _bounded(model, box, hidden.boxes, y, others, lines).within(bounds)
    spent = 1
    while True:
        parts = parts.those(~(parts.bounds < 0).all(1))
        if not len(parts.bounds):
            return True
        order = parts.bounds.amax(1).argsort(descending=True)
        first, rest = parts.those(order[:_AT_ONCE]), parts.those(order[_AT_ONCE:])
        # Where the bound would have the pixels: an image, which may be one that refutes.
        at = torch.where(first.slope > 0, first.upper, first.lower)
        fooled = (model(at).argmax(1) != y).nonzero()[:, 0]
        if len(fooled):
            return at[fooled[0]]
        if spent >= boxes:
            return False
        halves = _halved(first)
        known = hidden_boxes(model, halves, hidden.within(halves))
        new = _bounded(model, halves, known, y, others, lines).within(first.bounds.repeat(2, 1))
        spent += len(new.bounds)
        parts = _Parts(*(torch.cat(columns) for columns in zip(rest, new, strict=True)))


def _bounded(
    model: ImageClassifier,
    box: Box,
    hidden: Sequence[Box],
    y: Tensor,
    others: Tensor,
    lines: Sequence[Tensor],
) -> _Parts:
    leads = lead_bounds(model, hidden, y, others, lines)
    bounds = leads.largest(box)
    worst = bounds.argmax(1)
    return _Parts(*box, bounds, leads.slope[torch.arange(len(worst), device=worst.device), worst])


def _halved(parts: _Parts) -> Box:
    """Each part twice, the pixel that weighs most in its bound black in the one and white in the other.

    If none is left to choose, the part is one image, which has the label y: its bound is rounding.
    """
    width = parts.upper - parts.lower
    gain = (parts.slope.abs() + torch.finfo(width.dtype).tiny) * width
    pixel = gain.flatten(1).argmax(1, keepdim=True)
    chosen = torch.zeros_like(gain).flatten(1).scatter(1, pixel, 1.0).view_as(gain) > 0
    black = torch.where(chosen, parts.lower, parts.upper)
    white = torch.where(chosen, parts.upper, parts.lower)
    return Box(torch.cat([parts.lower, white]), torch.cat([black, parts.upper]))
