"""Interval bound propagation (Gowal et al. 2018): boxes around all that a layer can be made to say, L∞."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from manifold_defense.certification.certificates import Certificates
from manifold_defense.certification.lipschitz import chain
from manifold_defense.classifiers import ImageClassifier
from manifold_defense.evaluation.baselines import Preprocessed
from manifold_defense.modes import as_deployed
from manifold_defense.projection import check_images
from manifold_defense.types import Classifier

_BISECTIONS = 12
# What x ± eps may lose by rounding. Behind a threshold an ulp is the whole grey scale: 51 / 255 + 0.3 is a
# hair above a half, in float32 it is a half.
_ROUNDING = 2.0**-22


class Box(NamedTuple):
    """All between two tensors of one shape (B, ...)."""

    lower: Tensor
    upper: Tensor

    def middle(self) -> tuple[Tensor, Tensor]:
        """Centre and radius, of the same shape."""
        return (self.lower + self.upper) / 2, (self.upper - self.lower) / 2


# What the bounds can follow: a chain of layers, bare or behind a monotone preprocessing.
Bounded = ImageClassifier | Preprocessed


def ball(x: Tensor, eps: float | Tensor) -> Box:
    """Images within eps of x (N, C, H, W) and inside [0, 1]; one radius, one an image (N,) or one a pixel."""
    eps = eps.view(-1, 1, 1, 1) if isinstance(eps, Tensor) and eps.dim() == 1 else eps
    return Box((x - eps).clamp(0, 1), (x + eps).clamp(0, 1))


def outward(eps: float | Tensor) -> float | Tensor:
    """A radius whose `ball` holds all within eps, whatever rounding does; ValueError below 0."""
    if not bool(torch.as_tensor(eps >= 0).all()):
        raise ValueError(f"eps: expected at least 0, got {float(torch.as_tensor(eps).min())}")
    return eps + _ROUNDING


def interval_logits(model: Bounded, x: Tensor, y: Tensor, eps: float | Tensor) -> Tensor:
    """Upper bounds (N, K) of `Z_j − Z_y` within eps of images (N, C, H, W) and inside [0, 1]; 0 at y.

    All others below 0: no image of the box is given another label than y (N,). The last layer is joined
    with the difference (Gowal et al. 2018, section 3), so that the cross-entropy of these bounds is an
    upper bound of the worst one. eps as in `ball`. Differentiable in the weights. Raises TypeError for a
    model that the bounds cannot follow.
    """
    inner, (lower, upper) = followed(model), ball(x, eps)
    if isinstance(model, Preprocessed):
        lower, upper = model.preprocess(lower), model.preprocess(upper)
    return box_logits(inner, lower, upper, y)


def box_logits(model: ImageClassifier, lower: Tensor, upper: Tensor, y: Tensor) -> Tensor:
    """Upper bounds (N, K) of `Z_j − Z_y` between images lower and upper (N, C, H, W); 0 at y (N,)."""
    *_, features = _followed(model, Box(lower, upper))
    centre, radius = features.middle()
    weight, bias = model.head.weight, model.head.bias
    own = weight[y]  # (N, F)
    difference = weight.unsqueeze(0) - own.unsqueeze(1)  # (N, K, F)
    bounds = (difference @ centre.unsqueeze(2) + difference.abs() @ radius.unsqueeze(2)).squeeze(2)
    return bounds + bias - bias[y].unsqueeze(1)


def followed(model: Classifier) -> ImageClassifier:
    """The classifier in it whose layers the bounds follow; TypeError for a model that they cannot follow."""
    if isinstance(model, Preprocessed):
        if not model.preprocess.monotone:
            raise TypeError(f"interval bounds cannot follow {type(model.preprocess).__name__}")
        model = model.classifier
    if not isinstance(model, ImageClassifier):
        raise TypeError(f"interval bounds follow an ImageClassifier, got {type(model).__name__}")
    return model


def hidden_boxes(model: ImageClassifier, box: Box, known: Sequence[Box] = ()) -> list[Box]:
    """What goes into each ReLU (B, ...), for images of boxes (B, C, H, W); inside what is `known` of it."""
    return list(_followed(model, box, known))[:-1]


def _followed(model: ImageClassifier, box: Box, known: Sequence[Box] = ()) -> Iterator[Box]:
    """Bounds of what goes into each ReLU, and last of the features."""
    inside = iter(known)
    box = Box((box.lower - model.mean) / model.std, (box.upper - model.mean) / model.std)
    for layer in chain(model.body):
        if isinstance(layer, nn.ReLU):
            if within := next(inside, None):
                box = Box(torch.maximum(box.lower, within.lower), torch.minimum(box.upper, within.upper))
            yield box
            # Not by the layer, which may write over what was handed out.
            box = Box(box.lower.relu(), box.upper.relu())
        else:
            box = _through(layer, box)
    yield box


def _through(layer: nn.Module, box: Box) -> Box:
    centre, radius = box.middle()
    if isinstance(layer, nn.Conv2d):
        spread = F.conv2d(
            radius, layer.weight.abs(), None, layer.stride, layer.padding, layer.dilation, layer.groups
        )
    elif isinstance(layer, nn.Linear):
        spread = F.linear(radius, layer.weight.abs())
    else:
        return Box(layer(box.lower), layer(box.upper))  # shapes alone
    centre = layer(centre)
    return Box(centre - spread, centre + spread)


@torch.no_grad()
def intervals_prove(model: Bounded, x: Tensor, y: Tensor, eps: float | Tensor) -> Tensor:
    """Whether no image within eps can have another label than y (N,), by `interval_logits`; (N,).

    Raises ValueError for an eps below 0 and for images x (N, C, H, W) that are not those of the model in
    [0, 1].
    """
    check_images(x, followed(model).image_shape)
    with as_deployed(model):
        bounds = interval_logits(model, x, y, outward(eps))
    return bounds.scatter(1, y.unsqueeze(1), -torch.inf).amax(1) < 0


@torch.no_grad()
def interval_certificates(model: Bounded, x: Tensor) -> Certificates:
    """The largest L∞ radius at which the bounds prove the prediction, found by bisection.

    Exact to 1 / 4096, and never above what is proved.
    """
    with as_deployed(model):
        prediction = model(x).argmax(1)
    proved, failed = x.new_zeros(len(x)), x.new_ones(len(x))
    for step in range(_BISECTIONS + 1):
        tried = failed if step == 0 else (proved + failed) / 2
        safe = intervals_prove(model, x, prediction, tried)
        proved, failed = torch.where(safe, tried, proved), torch.where(safe, failed, tried)
    return Certificates(prediction, proved)
