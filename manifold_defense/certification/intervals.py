"""Interval bound propagation (Gowal et al. 2018): boxes around all that a layer can be made to say, L∞."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from manifold_defense.certification.certificates import Certificates
from manifold_defense.certification.lipschitz import chain
from manifold_defense.classifiers import ImageClassifier
from manifold_defense.evaluation.baselines import Preprocessed
from manifold_defense.types import Classifier

_BISECTIONS = 12


# What the bounds can follow: a chain of layers, bare or behind a monotone preprocessing.
Bounded = ImageClassifier | Preprocessed


def interval_logits(model: Bounded, x: Tensor, y: Tensor, eps: float | Tensor) -> Tensor:
    """Upper bounds (N, K) of `Z_j − Z_y` within eps of images (N, C, H, W) and inside [0, 1]; 0 at y.

    All others below 0: no image of the box is given another label than y (N,). The last layer is joined
    with the difference (Gowal et al. 2018, section 3), so that the cross-entropy of these bounds is an
    upper bound of the worst one. eps is one radius for all, one an image (N,) or one a pixel (N, C, H, W).
    Differentiable in the weights. Raises TypeError for a model that the bounds cannot follow.
    """
    eps = eps.view(-1, 1, 1, 1) if isinstance(eps, Tensor) and eps.dim() == 1 else eps
    lower, upper = (x - eps).clamp(0, 1), (x + eps).clamp(0, 1)
    if isinstance(model, Preprocessed):
        if not model.preprocess.monotone:
            raise TypeError(f"interval bounds cannot follow {type(model.preprocess).__name__}")
        lower, upper, inner = model.preprocess(lower), model.preprocess(upper), model.classifier
    else:
        inner = model
    return box_logits(inner, lower, upper, y)


def box_logits(model: Classifier, lower: Tensor, upper: Tensor, y: Tensor) -> Tensor:
    """Upper bounds (N, K) of `Z_j − Z_y` between images lower and upper (N, C, H, W); 0 at y (N,).

    Raises TypeError for a model that the bounds cannot follow.
    """
    if not isinstance(model, ImageClassifier):
        raise TypeError(f"interval bounds follow an ImageClassifier, got {type(model).__name__}")
    lower, upper = (lower - model.mean) / model.std, (upper - model.mean) / model.std
    centre, radius = (lower + upper) / 2, (upper - lower) / 2
    for layer in chain(model.body):
        centre, radius = _through(layer, centre, radius)
    weight, bias = model.head.weight, model.head.bias
    own = weight[y]  # (N, F)
    difference = weight.unsqueeze(0) - own.unsqueeze(1)  # (N, K, F)
    bounds = (difference @ centre.unsqueeze(2) + difference.abs() @ radius.unsqueeze(2)).squeeze(2)
    return bounds + bias - bias[y].unsqueeze(1)


def _through(layer: nn.Module, centre: Tensor, radius: Tensor) -> tuple[Tensor, Tensor]:
    if isinstance(layer, nn.Conv2d):
        spread = F.conv2d(
            radius, layer.weight.abs(), None, layer.stride, layer.padding, layer.dilation, layer.groups
        )
        return layer(centre), spread
    if isinstance(layer, nn.Linear):
        return layer(centre), F.linear(radius, layer.weight.abs())
    if isinstance(layer, nn.ReLU):
        lower, upper = layer(centre - radius), layer(centre + radius)
        return (lower + upper) / 2, (upper - lower) / 2
    return layer(centre), layer(radius)  # shapes alone


@torch.no_grad()
def intervals_prove(model: Bounded, x: Tensor, y: Tensor, eps: float | Tensor) -> Tensor:
    """Whether no image of a box can have another label than y (N,), by `interval_logits`; (N,)."""
    bounds = interval_logits(model, x, y, eps)
    return bounds.scatter(1, y.unsqueeze(1), -torch.inf).amax(1) < 0


@torch.no_grad()
def interval_certificates(model: Bounded, x: Tensor, *, largest: float = 1.0) -> Certificates:
    """The largest L∞ radius up to `largest` at which the bounds prove the prediction, found by bisection.

    Exact to largest / 4096, and never above what is proved.
    """
    prediction = model(x).argmax(1)
    proved, failed = x.new_zeros(len(x)), x.new_full((len(x),), float(largest))
    for step in range(_BISECTIONS + 1):
        tried = failed if step == 0 else (proved + failed) / 2
        safe = intervals_prove(model, x, prediction, tried)
        proved, failed = torch.where(safe, tried, proved), torch.where(safe, failed, tried)
    return Certificates(prediction, proved)
