"""Natural corruptions as a threat: noise, blur, light, weather, compression and small motions.

Severities are 1 to 5. Those of noise, light and JPEG are the levels of Hendrycks & Dietterich (2019);
lengths are shares of the image side, so that a severity means the same at 8 and at 64 pixels. What
moves pixels repeats the image's border, which is black for digits and the scene's edge for photographs.

A random corruption draws once for a call and gives all images the same noise, haze or motion: what
becomes of an image depends neither on its neighbours in the batch nor on its place among them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Protocol
from zlib import crc32

import torch
from torch import Tensor
from torch.nn import functional as F

from manifold_defense.attacks.contract import attack
from manifold_defense.attacks.highest import Highest
from manifold_defense.attacks.jpeg import compress
from manifold_defense.attacks.resampling import blur, pixel_places, rotate, translate, warp
from manifold_defense.modes import evaluation_mode
from manifold_defense.types import Classifier, Norm

_DIRECTIONS = tuple((down, right) for down in (-1, 0, 1) for right in (-1, 0, 1) if (down, right) != (0, 0))


class Corruption(Protocol):
    """Images (N, C, H, W) in [0, 1] and a severity to images of the same shape, in [0, 1]."""

    def __call__(self, x: Tensor, severity: int, rng: torch.Generator) -> Tensor: ...


def _level(severity: int, *levels: float) -> float:
    if severity not in range(1, 6):
        raise ValueError(f"severity: expected 1 to 5, got {severity}")
    return levels[severity - 1]


def _side(x: Tensor) -> int:
    return min(x.shape[-2:])


def gaussian_noise(x: Tensor, severity: int, rng: torch.Generator) -> Tensor:
    sigma = _level(severity, 0.08, 0.12, 0.18, 0.26, 0.38)
    return (x + sigma * torch.randn(x.shape[1:], generator=rng).to(x)).clamp(0, 1)


def salt_and_pepper(x: Tensor, severity: int, rng: torch.Generator) -> Tensor:
    """A share of the pixels becomes white or black, in all channels."""
    share = _level(severity, 0.03, 0.06, 0.09, 0.17, 0.27)
    draw = torch.rand(x.shape[-2:], generator=rng).to(x.device)
    return x.masked_fill(draw < share / 2, 0).masked_fill(draw > 1 - share / 2, 1)


def gaussian_blur(x: Tensor, severity: int, rng: torch.Generator) -> Tensor:
    return blur(x, _level(severity, 1, 2, 3, 4, 5) * _side(x) / 64).clamp(0, 1)


def contrast(x: Tensor, severity: int, rng: torch.Generator) -> Tensor:
    """Every channel is drawn towards its own mean."""
    mean = x.mean((-2, -1), keepdim=True)
    return (mean + _level(severity, 0.4, 0.3, 0.2, 0.1, 0.05) * (x - mean)).clamp(0, 1)


def brightness(x: Tensor, severity: int, rng: torch.Generator) -> Tensor:
    return (x + _level(severity, 0.1, 0.2, 0.3, 0.4, 0.5)).clamp(0, 1)


def elastic(x: Tensor, severity: int, rng: torch.Generator) -> Tensor:
    """Smooth random displacements (Simard, Steinkraus & Platt 2003), the mean one, a shift, removed."""
    side = _side(x)
    field = blur(torch.randn(2, *x.shape[-2:], generator=rng, dtype=torch.float64), side / 8)
    field = field - field.mean((-2, -1), keepdim=True)
    field = field / field.square().mean().sqrt().clamp(min=1e-12)
    return warp(x, pixel_places(x) + _level(severity, 1, 2, 3, 4, 5) * side / 100 * field)


def fog(x: Tensor, severity: int, rng: torch.Generator) -> Tensor:
    """`(x + t h) / (1 + t)` for a haze h (H, W) in [0, 1]: noise on ever finer grids, each half as strong."""
    haze = torch.zeros(1, 1, *x.shape[-2:])
    for octave in range(1, 4):
        cells = torch.rand(1, 1, 2**octave + 1, 2**octave + 1, generator=rng)
        haze += F.interpolate(cells, x.shape[-2:], mode="bilinear", align_corners=True) / 2**octave
    haze = ((haze - haze.amin()) / (haze.amax() - haze.amin()).clamp(min=1e-12)).to(x)
    t = _level(severity, 0.3, 0.6, 0.9, 1.2, 1.5)
    return ((x + t * haze) / (1 + t)).clamp(0, 1)


def jpeg(x: Tensor, severity: int, rng: torch.Generator) -> Tensor:
    return compress(x, _level(severity, 25, 18, 15, 10, 7)).clamp(0, 1)


def shift(x: Tensor, severity: int, rng: torch.Generator) -> Tensor:
    """By whole pixels, a 28th of the side for each degree of severity rounded down, in one of 8 directions.

    At 8 pixels that is none up to severity 3: a pixel is as much there as three and a half of MNIST.
    """
    return _shift_towards(x, severity, _DIRECTIONS[int(torch.randint(8, (), generator=rng))])


def rotation(x: Tensor, severity: int, rng: torch.Generator) -> Tensor:
    """About the centre, one way or the other."""
    return _rotate_towards(x, severity, (-1, 1)[int(torch.randint(2, (), generator=rng))])


CORRUPTIONS: dict[str, Corruption] = {
    "gaussian_noise": gaussian_noise,
    "salt_and_pepper": salt_and_pepper,
    "gaussian_blur": gaussian_blur,
    "contrast": contrast,
    "brightness": brightness,
    "elastic": elastic,
    "fog": fog,
    "jpeg": jpeg,
    "shift": shift,
    "rotation": rotation,
}
# Those with nothing to draw, or whose few outcomes are all tried.
_FIXED = ("gaussian_blur", "contrast", "brightness", "jpeg")
_TRIES = {"shift": len(_DIRECTIONS), "rotation": 2}


@torch.no_grad()
@attack
def corruption(
    model: Classifier,
    x: Tensor,
    y: Tensor,
    *,
    norm: Norm = "corruption",
    eps: float = 3,
    draws: int = 5,
    targeted: bool = False,
    names: Sequence[str] = tuple(CORRUPTIONS),
    stop_early: bool = True,
    seed: int = 0,
) -> Tensor:
    """The worst natural corruption of images (N, C, H, W) with labels y (N,), the targets if `targeted`.

    Tries every corruption in `names` at every severity up to `eps`, the strongest first: all eight
    shifts, both rotations, `draws` draws of what is random. Returns the image with the highest
    margin, the clean one included; with `stop_early` the first that clearly fools the model. What is
    tried within a smaller eps, with fewer draws or names, is tried within a larger: the defender
    never gains by it. A grid search (Engstrom et al. 2019), blind to gradients: no bound on what a
    corruption with a chosen noise would do.
    """
    if norm != "corruption":
        raise ValueError(f"norm: expected one of corruption, got {norm!r}")
    if not 1 <= eps <= 5 or draws < 1:
        raise ValueError(f"expected eps, a severity, of 1 to 5 and draws ≥ 1, got {eps}, {draws}")
    if not names or not set(names) <= set(CORRUPTIONS):
        raise ValueError(f"names: expected some of {', '.join(CORRUPTIONS)}, got {list(names)}")
    x = x.detach()
    with evaluation_mode(model):
        best = Highest(x, y, model(x), targeted=targeted, stop_early=stop_early)
        for severity in range(int(eps), 0, -1):
            for change in (one for name in names for one in _variants(name, severity, draws, seed, _side(x))):
                active = best.sought()
                if len(active) == 0:
                    break
                tried = change(x[active])
                best.keep(active, tried, model(tried))
    return best.image


def draw_corruption(x: Tensor, severity: int, rng: torch.Generator) -> Tensor:
    """Images (N, C, H, W) under one corruption up to that severity, the oftener the more forms it has."""
    at = 1 + int(torch.randint(severity, (), generator=rng))
    names = [name for name in CORRUPTIONS for _ in range(_TRIES.get(name, 1 if name in _FIXED else 3))]
    return CORRUPTIONS[names[int(torch.randint(len(names), (), generator=rng))]](x, at, rng)


def _variants(
    name: str, severity: int, draws: int, seed: int, side: int
) -> Iterator[Callable[[Tensor], Tensor]]:
    """What the attack tries of one corruption, each a function of images (N, C, H, W)."""
    if name == "shift":
        # Of small images, severities share a number of pixels: the lowest of them tries it.
        if _pixels(severity, side) > _pixels(severity - 1, side):
            yield from (partial(_shift_towards, severity=severity, direction=way) for way in _DIRECTIONS)
    elif name == "rotation":
        yield from (partial(_rotate_towards, severity=severity, way=way) for way in (-1, 1))
    else:
        for draw in range(1 if name in _FIXED else draws):
            # A stream for each: what one corruption draws does not depend on which others are tried.
            rng = torch.Generator().manual_seed(crc32(f"{seed} {name} {severity} {draw}".encode()))
            yield partial(CORRUPTIONS[name], severity=severity, rng=rng)


def _shift_towards(x: Tensor, severity: int, direction: tuple[int, int]) -> Tensor:
    pixels = _pixels(int(_level(severity, 1, 2, 3, 4, 5)), _side(x))
    return translate(x, pixels * direction[0], pixels * direction[1])


def _pixels(severity: int, side: int) -> int:
    return severity * side // 28


def _rotate_towards(x: Tensor, severity: int, way: int) -> Tensor:
    return rotate(x, way * _level(severity, 6, 12, 18, 24, 30))
