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

from manifold_defense.certification.intervals import Box, hidden_boxes
from manifold_defense.certification.lipschitz import chain
from manifold_defense.classifiers import ImageClassifier

Layer = Callable[[Tensor], Tensor]

_TOGETHER = 512  # functions that are bounded at once
_FITS = 10  # steps that fit the lower lines; the next thirty gain a tenth of what these do


class Linear(NamedTuple):
    """`slope · x + offset`: S functions of the images x of each of B boxes."""

    slope: Tensor  # (B, S, C, H, W)
    offset: Tensor  # (B, S)

    def largest(self, box: Box) -> Tensor:
        """The largest values (B, S) in boxes of images (B, C, H, W)."""
        lower, upper = (end.flatten(1).unsqueeze(2) for end in box)
        slope = self.slope.flatten(2)
        return (slope.clamp(min=0) @ upper + slope.clamp(max=0) @ lower).squeeze(2) + self.offset


def lead_bounds(
    model: ImageClassifier,
    hidden: Sequence[Box],
    y: Tensor,
    classes: Tensor,
    lines: Sequence[Tensor] | None = None,
) -> Linear:
    """Above the leads `Z_j − Z_y` of `classes` (S,) over the label y, (), wherever `hidden` holds.

    `hidden` bounds what goes into each ReLU, as `hidden_boxes` or, tighter, `tightened` has it. `lines` are
    the slopes in [0, 1] of the lines below each, (1, S, ...), those of `fitted_lines`; without, 0 or 1.
    """
    weight, bias, boxes = model.head.weight, model.head.bias, len(hidden[0].lower)
    slope = (weight[classes] - weight[y]).expand(boxes, -1, -1)
    offset = (bias[classes] - bias[y]).expand(boxes, -1)
    return _back(model, chain(model.body), hidden, slope, offset, lines)


def fitted_lines(
    model: ImageClassifier, box: Box, hidden: Sequence[Box], y: Tensor, classes: Tensor
) -> list[Tensor]:
    """Lines for `lead_bounds` whose leads in one box are the lowest that ten steps of Adam find.

    Any are sound, in the box and in its parts (α-CROWN; Xu et al. 2021).
    """
    lines = [
        _nearer(each.lower, each.upper).unsqueeze(1).repeat(1, len(classes), *(1,) * (each.lower.dim() - 1))
        for each in hidden
    ]
    with torch.enable_grad():
        for line in lines:
            line.requires_grad_(True)
        adam = torch.optim.Adam(lines, lr=0.1)
        for _ in range(_FITS):
            bound = lead_bounds(model, hidden, y, classes, lines).largest(box).sum()
            for line, gradient in zip(lines, torch.autograd.grad(bound, lines), strict=True):
                line.grad = gradient
            adam.step()
            for line in lines:
                line.data.clamp_(0, 1)
    return [line.detach() for line in lines]


class Hidden(NamedTuple):
    """What goes into each ReLU, for the images of a box (1, C, H, W)."""

    boxes: list[Box]  # (1, ...) each
    neurons: Tensor  # (S,): those of the last layer whose sign is open
    ends: Linear  # S functions above them and S above their negatives

    def within(self, part: Box) -> list[Box]:
        """The same for the images of parts (B, C, H, W) of the box, as far as it is quickly said."""
        *before, last = self.boxes
        last = Box(*(end.expand(len(part.lower), *end.shape[1:]) for end in last))
        return [*before, _met(last, self.neurons, self.ends.largest(part))]


def tightened(model: ImageClassifier, box: Box) -> Hidden:
    """The intervals of one box, each neuron whose sign they leave open bounded once more."""
    layers = chain(model.body)
    relus = [k for k, layer in enumerate(layers) if isinstance(layer, nn.ReLU)]
    if not relus:
        raise TypeError("branch and bound follows networks with a ReLU, got one without")
    found: list[Box] = []
    for k, known in zip(relus, hidden_boxes(model, box), strict=True):
        neurons = ((known.lower < 0) & (known.upper > 0)).flatten().nonzero()[:, 0]
        if not found:
            neurons = neurons[:0]  # linear in the image: intervals are exact
        ends = _ends(model, layers[:k], found, known.lower, neurons)
        found.append(_met(known, neurons, ends.largest(box)))
    return Hidden(found, neurons, ends)


def _ends(
    model: ImageClassifier, layers: Sequence[nn.Module], hidden: Sequence[Box], like: Tensor, neurons: Tensor
) -> Linear:
    """Functions above some neurons of what comes out of the layers, (1, ...), then above their negatives."""
    both, signs = neurons.repeat(2), torch.ones_like(neurons, dtype=like.dtype)
    found = [Linear(like.new_zeros(1, 0, *model.image_shape), like.new_zeros(1, 0))]
    for chosen, sign in zip(both.split(_TOGETHER), torch.cat([signs, -signs]).split(_TOGETHER), strict=True):
        if len(chosen):
            slope = sign.unsqueeze(1) * F.one_hot(chosen, like.numel())
            slope = slope.view(1, len(chosen), *like.shape[1:])
            found.append(_back(model, layers, hidden, slope, like.new_zeros(1, len(chosen))))
    return Linear(*(torch.cat(columns, 1) for columns in zip(*found, strict=True)))


def _met(box: Box, neurons: Tensor, ends: Tensor) -> Box:
    """Boxes (B, ...) where `ends` (B, 2S) are above some neurons, and then above their negatives."""
    above, below = ends.chunk(2, dim=1)
    lower, upper = (end.flatten(1).clone() for end in box)
    lower[:, neurons] = torch.maximum(lower[:, neurons], -below)
    upper[:, neurons] = torch.minimum(upper[:, neurons], above)
    return Box(lower.view_as(box.lower), upper.view_as(box.upper))


def _back(
    model: ImageClassifier,
    layers: Sequence[nn.Module],
    hidden: Sequence[Box],
    slope: Tensor,
    offset: Tensor,
    lines: Sequence[Tensor] | None = None,
) -> Linear:
    """Above `slope · v + offset`, v what comes out of the layers: slopes (B, S, ...), offsets (B, S)."""
    boxes = list(hidden[: sum(isinstance(layer, nn.ReLU) for layer in layers)])
    below: list[Tensor | None] = list(lines) if lines is not None else [None] * len(boxes)
    steps: list[Layer] = [lambda x: (x - model.mean) / model.std, *layers]
    for layer, shape in zip(reversed(steps), reversed(_shapes(model, steps)), strict=True):
        if isinstance(layer, nn.ReLU):
            slope, offset = _back_through_relu(slope, offset, boxes.pop(), below.pop())
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


def _back_through_relu(slope: Tensor, offset: Tensor, box: Box, line: Tensor | None) -> tuple[Tensor, Tensor]:
    """Where the slope is positive below the chord, else above a line through 0."""
    low, high = box.lower.clamp(max=0).unsqueeze(1), box.upper.clamp(min=0).unsqueeze(1)
    chord = high / (high - low).clamp(min=torch.finfo(low.dtype).tiny)
    # Of one sign alone a ReLU is its chord, which is 0 or 1.
    below = _nearer(low, high) if line is None else torch.where((low < 0) & (high > 0), line, chord)
    rising = slope.clamp(min=0)
    offset = offset - (rising.flatten(2) @ (chord * low).flatten(1).unsqueeze(2)).squeeze(2)
    return rising * chord + (slope - rising) * below, offset


def _nearer(low: Tensor, high: Tensor) -> Tensor:
    """0 or 1: which of 0 and the input itself is the nearer to its ReLU, by area."""
    return (high > -low).to(low)
