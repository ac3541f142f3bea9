"""An encoder that begins as a classifier. Letters as in `manifold_defense.types`; F features."""

from __future__ import annotations

import copy

import torch
from torch import nn

from manifold_defense.classifiers import ImageClassifier
from manifold_defense.types import Generator

_BATCH = 500
_ROUNDED = 1e-5  # of the largest singular value of features in float32


@torch.no_grad()
def encoder_from(
    classifier: ImageClassifier, generator: Generator, *, samples: int = 20_000, seed: int = 0
) -> ImageClassifier:
    """The body of a classifier, copied, under a last layer for latents: (N, C, H, W) to (N, D).

    That layer is the least-squares answer on samples: of all affine maps of the features of G(z) the one
    nearest to z. The rest is for `train_encoder`, but what the body has learnt to withstand it need not
    learn again (robust features transfer: Shafahi et al. 2020). Raises ValueError for other images.
    """
    if classifier.image_shape != tuple(generator.image_shape):
        expected, got = tuple(generator.image_shape), classifier.image_shape
        raise ValueError(f"classifier: expected one of images {expected}, got {got}")
    encoder = copy.deepcopy(classifier).eval()
    near = encoder.head.weight
    rng = torch.Generator().manual_seed(seed)
    z = torch.randn(samples, generator.latent_dim, generator=rng)
    features = torch.cat([encoder.features(generator(few.to(near))).cpu() for few in z.split(_BATCH)])
    rows = torch.cat([features, torch.ones(samples, 1)], 1).double()  # (samples, F + 1)
    # The shortest solution: it makes nothing of features that no sample has, or that round-off tells apart.
    solution = torch.linalg.lstsq(rows, z.double(), rcond=_ROUNDED, driver="gelsd").solution
    # Not initialised: that would draw from the global generator.
    head = nn.utils.skip_init(nn.Linear, features.shape[1], generator.latent_dim).to(near)
    head.weight.copy_(solution[:-1].T)
    head.bias.copy_(solution[-1])
    encoder.head, encoder.classes = head, generator.latent_dim
    return encoder.requires_grad_(True)
