"""Linear bounds of a network in a box (CROWN; Zhang et al. 2018): tighter than intervals, and dearer.

Each ReLU is put between two lines, so that what a network makes of an image lies below one linear function
of it, whose largest value in the box is known. B boxes, S functions of what a layer gives.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from manifold_defense.certification.intervals import Box
from manifold_defense.certification.lipschitz import chain
from manifold_defense.classifiers import ImageClassifier

Layer = Callable[[Tensor], Tensor]

_TOGETHER = 512  # functions that are bounded at once


class Linear(NamedTuple):
    """`slope · x + offset`: S functions of the images x of each of B boxes."""

    slope: Tensor  # (B, S, C, H, W)
    offset: Tensor  # (B, S)

    def largest(self, box: Box) -> Tensor:
        """The largest values (B, S) in boxes of images (B, C, H, W)."""
        lower, upper = (end.flatten(1).unsqueeze(2) for end in box)
        slope = self.slope.flatten(2)
        return (slope.clamp(min=0) @ upper + slope.clamp(max=0) @ lower).squeeze(2) + self.offset


def lead_bounds(model: ImageClassifier, hidden: Sequence[Box], y: Tensor, classes: Tensor) -> Linear:
    """Above the leads `Z_j − Z_y` of `classes` (S,) over the label y, (), wherever `hidden` holds.

    `hidden` bounds what goes into each ReLU, as `hidden_boxes` or, tighter, `tightened` has it.
    """
    weight, bias, boxes = model.head.weight, model.head.bias, len(hidden[0].lower)
    slope = (weight[classes] - weight[y]).expand(boxes, -1, -1)
    return _back(model, chain(model.body), hidden, slope, (bias[classes] - bias[y]).expand(boxes, -1))


def tightened(model: ImageClassifier, box: Box, hidden: Sequence[Box]) -> list[Box]:
    """`hidden` of one box (1, C, H, W), each neuron whose sign it leaves open bounded once more."""
    layers = chain(model.body)
    relus = [k for k, layer in enumerate(layers) if isinstance(layer, nn.ReLU)]
    found = list(hidden[:1])  # what goes into the first is linear in the image: its intervals are exact
    for k, (lower, upper) in zip(relus[1:], hidden[1:], strict=True):
        low, high = lower.flatten().clone(), upper.flatten().clone()
        for neurons in ((low < 0) & (high > 0)).nonzero()[:, 0].split(_TOGETHER // 2):
            unit = F.one_hot(neurons, len(low)).to(low).view(1, -1, *lower.shape[1:])
            ends = torch.cat([unit, -unit], 1)
            bounds = _back(model, layers[:k], found, ends, ends.new_zeros(1, ends.shape[1])).largest(box)
            above, below = bounds[0].chunk(2)
            high[neurons] = torch.minimum(high[neurons], above)
            low[neurons] = torch.maximum(low[neurons], -below)
        found.append(Box(low.view_as(lower), high.view_as(upper)))
    return found


def _back(
    model: ImageClassifier, layers: Sequence[nn.Module], hidden: Sequence[Box], slope: Tensor, offset: Tensor
) -> Linear:
    """Above `slope · v + offset`, v what comes out of the layers: slopes (B, S, ...), offsets (B, S)."""
    boxes = list(hidden[: sum(isinstance(layer, nn.ReLU) for layer in layers)])
    steps: list[Layer] = [lambda x: (x - model.mean) / model.std, *layers]
    for layer, shape in zip(reversed(steps), reversed(_shapes(model, steps)), strict=True):
        if isinstance(layer, nn.ReLU):
            slope, offset = _back_through_relu(slope, offset, boxes.pop())
        else:
            slope, offset = _back_through_affine(slope, offset, layer, shape)
    return Linear(slope, offset)


def _shapes(model: ImageClassifier, layers: Sequence[Layer]) -> list[torch.Size]:
    """Of one image, as it goes into each layer."""
    at, shapes = model.mean.new_zeros(1, *model.image_shape), []
    for layer in layers:
        shapes.append(at.shape[1:])
        at = layer(at)
    return shapes


def _back_through_affine(
    slope: Tensor, offset: Tensor, layer: Layer, shape: torch.Size
) -> tuple[Tensor, Tensor]:
    """The same functions of what goes into the layer (…, of that shape): exact."""
    constant, transposed, *_ = torch.func.vjp(layer, slope.new_zeros(1, *shape))
    offset = offset + slope.flatten(2) @ constant.flatten()
    (back,) = torch.func.vmap(transposed)(slope.flatten(0, 1).unsqueeze(1))
    return back.reshape(*slope.shape[:2], *shape), offset


def _back_through_relu(slope: Tensor, offset: Tensor, box: Box) -> tuple[Tensor, Tensor]:
    """Where the slope is positive below the chord, else above 0 or the input itself, whichever is nearer."""
    low, high = box.lower.clamp(max=0).unsqueeze(1), box.upper.clamp(min=0).unsqueeze(1)
    chord = high / (high - low).clamp(min=torch.finfo(low.dtype).tiny)
    line = (high > -low).to(chord)
    rising = slope.clamp(min=0)
    offset = offset - (rising.flatten(2) @ (chord * low).flatten(1).unsqueeze(2)).squeeze(2)
    return rising * chord + (slope - rising) * line, offset
