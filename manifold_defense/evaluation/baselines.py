"""Preprocessing baselines: what a learned filter must beat before it has proved anything.

Each is a module that maps images (N, C, H, W) in [0, 1] to the same shape. Its result is always the
deployed one; where that is flat or stepped, a view says which gradient stands in for it (BPDA:
Athalye, Carlini & Wagner 2018, section 4.1). `views()` lists them, `seen(view)` is the same module
differentiated so, as with `ManifoldFilter`.

None of them defends: most of what they seem to hold is masked, which is what they are here to show.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from manifold_defense.attacks.jpeg import compress
from manifold_defense.attacks.resampling import blur
from manifold_defense.filter import with_parts

# Steepness of the soft steps of `Binarise` and `BitDepth`, by view.
_SLOPES = {"soft": 5.0, "sharp": 20.0}
# Temperature of the soft nearest neighbour, as a share of the bank's own squared distances, by view.
_TEMPERATURES = {"soft": 0.5, "sharp": 0.05}


class Preprocess(nn.Module, ABC):
    """A baseline: `deployed` is what it does, `stand_in` what its gradient is taken of in a view.

    `exact` differentiates the deployed computation, `identity` the identity. The first of `_views`
    is the default. Of one that is `monotone` no pixel falls where none did before, so that a box of images
    is mapped into the box between what becomes of its corners.
    """

    _views: ClassVar[tuple[str, ...]]
    monotone: ClassVar[bool] = False

    def __init__(self, view: str | None = None) -> None:
        super().__init__()
        self.view = self._checked(self._views[0] if view is None else view)

    def views(self) -> tuple[str, ...]:
        """The gradients that this module can be seen through."""
        return self._views

    def seen(self, view: str) -> Self:
        """This module, sharing its state, differentiated as `view` says."""
        other = with_parts(self)
        other.view = self._checked(view)
        return other

    @abstractmethod
    def deployed(self, x: Tensor) -> Tensor: ...

    def stand_in(self, x: Tensor) -> Tensor:
        """A differentiable imitation of `deployed`, in a view of its own; only its gradient counts."""
        return self.deployed(x)

    def forward(self, x: Tensor) -> Tensor:
        """The deployed result, with the gradient of the view."""
        if self.view == "exact" or not (torch.is_grad_enabled() and x.requires_grad):
            return self.deployed(x)
        imitation = x if self.view == "identity" else self.stand_in(x)
        return self.deployed(x.detach()) + (imitation - imitation.detach())

    def _checked(self, view: str) -> str:
        if view not in self._views:
            raise ValueError(f"view: expected one of {', '.join(self._views)}, got {view!r}")
        return view


class Binarise(Preprocess):
    """1 above the threshold, 0 up to it; `soft` and `sharp` are sigmoids of slope 5 and 20 around it.

    They weigh pixels, and so change the direction of an L2 or a sparse step; the signs of an L∞ step
    are those of `identity`.
    """

    _views = ("identity", "soft", "sharp")
    monotone = True

    def __init__(self, threshold: float = 0.5, view: str | None = None) -> None:
        super().__init__(view)
        self.threshold = threshold

    def deployed(self, x: Tensor) -> Tensor:
        return (x > self.threshold).to(x.dtype)

    def stand_in(self, x: Tensor) -> Tensor:
        return torch.sigmoid(_SLOPES[self.view] * (x - self.threshold))


class BitDepth(Preprocess):
    """The nearest of 2^bits grey levels; `soft` and `sharp` round every step off to a sigmoid.

    Feature squeezing (Xu, Evans & Qi 2018), whose one bit is `Binarise`.
    """

    _views = ("identity", "soft", "sharp")
    monotone = True

    def __init__(self, bits: int = 3, view: str | None = None) -> None:
        super().__init__(view)
        if bits < 1:
            raise ValueError(f"bits: expected at least 1, got {bits}")
        self.levels: int = 2**bits - 1

    def deployed(self, x: Tensor) -> Tensor:
        return torch.round(x * self.levels) / self.levels

    def stand_in(self, x: Tensor) -> Tensor:
        steps = x * self.levels
        floor = steps.detach().floor()
        return (floor + torch.sigmoid(_SLOPES[self.view] * (steps - floor - 0.5))) / self.levels


class Jpeg(Preprocess):
    """JPEG at `quality`, see `compress`. The views differ in what stands in for rounding:

    identity  the identity; `straight_through` rounding comes to the same, for the DCT is orthonormal
    soft      `⌊v⌉ + (v − ⌊v⌉)³` (Shin & Song 2017): a coefficient counts when it is about to change
    sharp     the identity for coefficients that are kept, nothing for those that are rounded to 0
    """

    _views = ("identity", "soft", "sharp")

    def __init__(self, quality: float = 50, view: str | None = None) -> None:
        super().__init__(view)
        if not 1 <= quality <= 100:
            raise ValueError(f"quality: expected 1 to 100, got {quality}")
        self.quality = quality

    def deployed(self, x: Tensor) -> Tensor:
        return compress(x, self.quality).clamp(0, 1)

    def stand_in(self, x: Tensor) -> Tensor:
        return compress(x, self.quality, _cubic if self.view == "soft" else _kept)


def _cubic(v: Tensor) -> Tensor:
    nearest = torch.round(v).detach()
    return nearest + (v - nearest) ** 3


def _kept(v: Tensor) -> Tensor:
    return torch.where(torch.round(v) != 0, v, 0)


class Blur(Preprocess):
    """A Gaussian of `sigma` pixels: linear, so that nothing need stand in for it."""

    _views = ("exact", "identity")
    monotone = True

    def __init__(self, sigma: float = 1.0, view: str | None = None) -> None:
        super().__init__(view)
        if not sigma > 0:
            raise ValueError(f"sigma: expected above 0, got {sigma}")
        self.sigma = sigma

    def deployed(self, x: Tensor) -> Tensor:
        blurred = blur(x, self.sigma)
        # What is clipped is rounding, and must not take the gradient with it.
        return blurred + (blurred.clamp(0, 1) - blurred).detach()


class NearestBank(Preprocess):
    """The nearest image of a bank (M, C, H, W), in L2: training images, or a generator's G(z).

    `soft` and `sharp` are the mean of the bank under `softmax(−d² / τ)`, with τ a half and a twentieth of
    the bank's mean squared distance from an image to its nearest other. The distances (N, M) are one
    matrix product and must fit into memory.
    """

    _views = ("identity", "soft", "sharp")
    bank: Tensor  # (M, C, H, W)
    spread: Tensor  # (), the mean squared distance to the nearest other image, over the first 512

    def __init__(self, bank: Tensor, view: str | None = None) -> None:
        super().__init__(view)
        if bank.dim() != 4 or len(bank) == 0 or not bank.is_floating_point():
            raise ValueError(f"bank: expected images (M, C, H, W), got {tuple(bank.shape)} of {bank.dtype}")
        self.register_buffer("bank", bank.detach().clone())
        own = self._distances(self.bank[:512])
        nearest = own.fill_diagonal_(torch.inf).amin(1)
        # One image alone has no other: any temperature does.
        spread = nearest.mean() if len(bank) > 1 else torch.ones_like(nearest[0])
        self.register_buffer("spread", spread.clamp(min=1e-6))

    def deployed(self, x: Tensor) -> Tensor:
        return self.bank.to(x)[self._distances(x).argmin(1)]

    def stand_in(self, x: Tensor) -> Tensor:
        weights = torch.softmax(-self._distances(x) / (_TEMPERATURES[self.view] * self.spread.to(x)), 1)
        return (weights @ self.bank.to(x).flatten(1)).view_as(x)

    def _distances(self, x: Tensor) -> Tensor:
        """Squared L2 distances of images (N, C, H, W) to those of the bank, (N, M)."""
        if x.shape[1:] != self.bank.shape[1:]:
            raise ValueError(
                f"expected images (N, {', '.join(map(str, self.bank.shape[1:]))}), got {tuple(x.shape)}"
            )
        flat, bank = x.flatten(1), self.bank.to(x).flatten(1)
        squares = flat.square().sum(1, keepdim=True) + bank.square().sum(1)
        return torch.addmm(squares, flat, bank.T, alpha=-2).clamp(min=0)


class RandomNoise(Preprocess):
    """Fresh Gaussian noise of `sigma` on every call, clipped to [0, 1].

    The draws come from a stream of its own, which `reseed` starts again and which all views share: an
    attack that averages over draws, and a figure over fresh ones, are the evaluator's business.
    `exact` is the gradient under the draw that was made, 0 where that draw was clipped.
    """

    _views = ("exact", "identity")

    def __init__(self, sigma: float = 0.1, seed: int = 0, view: str | None = None) -> None:
        super().__init__(view)
        if not sigma >= 0:
            raise ValueError(f"sigma: expected at least 0, got {sigma}")
        self.sigma = sigma
        self.rng = torch.Generator()
        self.reseed(seed)

    def reseed(self, seed: int) -> None:
        self.rng.manual_seed(seed)

    def deployed(self, x: Tensor) -> Tensor:
        return (x + self.sigma * torch.randn(x.shape, generator=self.rng).to(x)).clamp(0, 1)


class Preprocessed(nn.Module):
    """`classifier(preprocess(x))`: images (N, C, H, W) in [0, 1] to logits (N, K).

    `view(name)` gives the same model with another gradient, as with `DefendedClassifier`.
    """

    def __init__(self, preprocess: Preprocess, classifier: nn.Module) -> None:
        super().__init__()
        self.preprocess = preprocess
        self.classifier = classifier

    def views(self) -> tuple[str, ...]:
        return self.preprocess.views()

    def view(self, name: str) -> Self:
        """This model, sharing all weights, differentiated as `name` says."""
        return with_parts(self, preprocess=self.preprocess.seen(name))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.preprocess(x))
        return logits
