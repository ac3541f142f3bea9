"""Randomized smoothing (Cohen, Rosenfeld & Kolter 2019): the majority vote under Gaussian noise, L2.

Works on any classifier, behind a filter or not; what is certified is the vote, not the classifier. The
noise is not clipped to [0, 1], for the proof needs a Gaussian; a model that takes no other images goes
behind `Clipped`, which makes clipping a part of what is voted on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from scipy.stats import binomtest, norm
from torch import Tensor, nn

from manifold_defense.certification.certificates import ABSTAINED, Certificates
from manifold_defense.modes import evaluation_mode
from manifold_defense.types import Classifier


@dataclass(frozen=True)
class SmoothingConfig:
    """Noise, draws and level of randomized smoothing.

    sigma       of the noise, in pixels
    selection   draws that choose the class (n₀)
    draws       more that prove it (n)
    alpha       probability at most that a certificate is wrong, for each image by itself
    batch_size  draws a pass; bounds memory
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}  # read by pipelines.settings

    sigma: float = 0.25
    selection: int = 100
    draws: int = 10_000
    alpha: float = 0.001
    batch_size: int = 1_000

    def __post_init__(self) -> None:
        if not 0 < self.sigma <= 1e6:
            raise ValueError(f"sigma: expected above 0 and at most a million, got {self.sigma}")
        if not 0 < self.alpha < 1:
            raise ValueError(f"alpha: expected in (0, 1), got {self.alpha}")
        for name in ("selection", "draws", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")


class Clipped(nn.Module):
    """A model that is handed images in [0, 1] whatever noise makes of them."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.model(x.clamp(0, 1))
        return logits


def smoothed_certify(model: Classifier, x: Tensor, config: SmoothingConfig, *, seed: int = 0) -> Certificates:
    """`CERTIFY`: the class of most votes and the radius `σ Φ⁻¹(p)` of images (N, C, H, W).

    p is the lower Clopper–Pearson bound of its share; below a half there is no answer. Each image meets
    the same noise, which leaves every proof as it is and makes it independent of the batch.
    """
    predictions, radii = [], []
    for image in x:
        rng = torch.Generator().manual_seed(seed)
        top = int(_votes(model, image, config.selection, config, rng).argmax())
        votes = _votes(model, image, config.draws, config, rng)
        radius = certified_radius(int(votes[top]), config)
        predictions.append(top if radius > 0 else ABSTAINED)
        radii.append(radius)
    return Certificates(torch.tensor(predictions, device=x.device, dtype=torch.int64), x.new_tensor(radii))


def smoothed_predict(model: Classifier, x: Tensor, config: SmoothingConfig, *, seed: int = 0) -> Tensor:
    """`PREDICT`: the class of most votes (N,), ABSTAINED where the second might have as many.

    The test is two-sided, on the votes of the two (Hung & Fithian 2019), at level alpha.
    """
    predictions = []
    for image in x:
        rng = torch.Generator().manual_seed(seed)
        votes = _votes(model, image, config.draws, config, rng)
        (first, second), order = votes.topk(2)
        both = int(first + second)
        likely = both > 0 and binomtest(int(first), both, 0.5).pvalue <= config.alpha
        predictions.append(int(order[0]) if likely else ABSTAINED)
    return torch.tensor(predictions, device=x.device, dtype=torch.int64)


def certified_radius(votes: int, config: SmoothingConfig) -> float:
    """`σ Φ⁻¹(p)` for so many of `config.draws` votes, 0 where p is no more than a half."""
    test = binomtest(votes, config.draws, alternative="greater")
    share = float(test.proportion_ci(1 - config.alpha, method="exact").low)
    return config.sigma * float(norm.ppf(share)) if share > 0.5 else 0.0


@torch.no_grad()
def _votes(
    model: Classifier, image: Tensor, draws: int, config: SmoothingConfig, rng: torch.Generator
) -> Tensor:
    """How often each class (K,) was the answer for an image (C, H, W) under fresh noise.

    An answer that is not finite is a vote for no class.
    """
    counts = torch.zeros(0, dtype=torch.int64)
    with evaluation_mode(model):
        for first in range(0, draws, config.batch_size):
            size = min(config.batch_size, draws - first)
            noise = torch.randn(size, *image.shape, generator=rng).to(image)
            logits = model(image + config.sigma * noise)
            answers = logits.argmax(1)[logits.isfinite().all(1)]
            found = answers.bincount(minlength=logits.shape[1]).cpu()
            counts = found if len(counts) == 0 else counts + found
    return counts
