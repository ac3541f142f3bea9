"""Margins over Lipschitz constants (Tsuzuku, Sato & Sugiyama 2018): cheap proofs, mostly small ones."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from manifold_defense.certification.certificates import Certificates, nearest_boundary
from manifold_defense.classifiers import ImageClassifier
from manifold_defense.modes import as_deployed


@torch.no_grad()
def lipschitz_certificates(model: ImageClassifier, x: Tensor) -> Certificates:
    """L2 radii `min_j m_j / (L ‖w_y − w_j‖)` of images (N, C, H, W), L that of the features before the head.

    Never less than the usual `m / (2 L')` with L' of the whole network, for `‖w_y − w_j‖ ≤ 2 ‖W‖`.
    """
    constant = _of_features(model)
    weight = _double(model.head.weight)
    slopes = torch.linalg.vector_norm(weight[:, None] - weight[None], dim=2)
    with as_deployed(model):
        logits = model(x)
    return nearest_boundary(logits.double(), constant * slopes)


@torch.no_grad()
def lipschitz_constant(model: ImageClassifier) -> float:
    """An upper bound of the L2 Lipschitz constant of the logits: the product of the layers' norms."""
    return _of_features(model) * float(torch.linalg.matrix_norm(_double(model.head.weight), 2))


def _of_features(model: ImageClassifier) -> float:
    if not isinstance(model, ImageClassifier):
        raise TypeError(f"this proof follows an ImageClassifier, got {type(model).__name__}")
    shape = model.image_shape
    constant = 1 / float(model.std.min())
    for layer in chain(model.body):
        constant *= _layer_norm(layer, shape)
        if isinstance(layer, nn.Conv2d):
            like = layer.weight.new_zeros(1, *shape)
            shape = tuple(layer(like).shape[1:])
    return constant


def chain(body: nn.Module) -> list[nn.Module]:
    """The layers of a plain feed-forward network, in order.

    Raises TypeError for a network that is more than that, a ResNet for one, and for padding not of zeros.
    """
    if isinstance(body, nn.Sequential):
        return [layer for part in body for layer in chain(part)]
    if isinstance(body, nn.Conv2d) and body.padding_mode != "zeros":
        raise TypeError(f"this proof follows convolutions padded with zeros, got {body.padding_mode} padding")
    if isinstance(body, (nn.Conv2d, nn.Linear, nn.ReLU, nn.Flatten, nn.Identity)):
        return [body]
    raise TypeError(
        "this proof follows chains of Conv2d, Linear, ReLU and Flatten, got a layer of kind "
        f"{type(body).__name__}"
    )


def _layer_norm(layer: nn.Module, shape: tuple[int, ...]) -> float:
    if isinstance(layer, nn.Linear):
        return float(torch.linalg.matrix_norm(_double(layer.weight), 2))
    if isinstance(layer, nn.Conv2d):
        return convolution_norm(layer, shape)
    return 1.0


def convolution_norm(layer: nn.Conv2d, shape: tuple[int, ...]) -> float:
    """An upper bound of the spectral norm of a convolution on images (C, H, W), zero padding included.

    A strided convolution is an unstrided one on the s² interleaved subimages. With zero padding it is part
    of a circular one on a torus that is larger by the kernel, whose singular values are those of a small
    matrix at each frequency (Sedghi, Gupta & Long 2019). Unlike power iteration this never falls short.
    """
    if layer.groups != 1 or layer.dilation != (1, 1):
        raise TypeError("this proof follows plain convolutions, without groups or dilation")
    if not isinstance(layer.padding, tuple):
        raise TypeError("this proof needs the padding of a convolution in numbers")
    (rows, columns), weight = layer.stride, _double(layer.weight)
    out, channels, height, width = weight.shape
    tall, wide = math.ceil(height / rows), math.ceil(width / columns)
    weight = F.pad(weight, (0, wide * columns - width, 0, tall * rows - height))
    weight = weight.view(out, channels, tall, rows, wide, columns).permute(0, 1, 3, 5, 2, 4)
    weight = weight.reshape(out, channels * rows * columns, tall, wide)
    torus = [
        math.ceil((side + 2 * pad) / stride) + kernel
        for side, pad, stride, kernel in zip(
            shape[1:], layer.padding, layer.stride, (tall, wide), strict=True
        )
    ]
    spectrum = torch.fft.rfft2(weight, s=torus)
    return float(torch.linalg.matrix_norm(spectrum.permute(2, 3, 0, 1), 2).max())


def _double(weight: Tensor) -> Tensor:
    return weight.detach().double()
