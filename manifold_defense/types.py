"""The vocabulary of the defence, and the legend of shape letters used throughout the project.

N images   R restarts   D latent size   K classes   C channels   H, W pixels   P = C·H·W
G generator   E encoder   f classifier   x image   z latent   eps radius of a threat
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple, Protocol, get_args, runtime_checkable

from torch import Tensor

# What bounds a perturbation; see `Threat`.
Norm = Literal["linf", "l2", "l1", "l0", "patch", "corruption"]
Ball = Literal["linf", "l2", "l1"]  # the norms whose balls are convex
# How the gradient of a projection is taken; "exact" is that of the deployed computation.
View = Literal["exact", "implicit", "gauss_newton", "tangent", "soft", "start", "identity"]

Classifier = Callable[[Tensor], Tensor]  # images (N, C, H, W) in [0, 1] to logits (N, K)
Encoder = Callable[[Tensor], Tensor]  # images (N, C, H, W) in [0, 1] to latents (N, D)
Attack = Callable[[Classifier, Tensor, Tensor], Tensor]  # (model, x, y (N,)) to x_adv, shaped as x


@runtime_checkable
class Generator(Protocol):
    """Latents (N, D), standard normal a priori, to images (N, C, H, W) in [0, 1]."""

    latent_dim: int
    image_shape: tuple[int, int, int]

    def __call__(self, z: Tensor, /) -> Tensor: ...


class Projection(NamedTuple):
    """The point of the generator's range that a projection found for each image."""

    z: Tensor  # (N, D)
    image: Tensor  # (N, C, H, W), G(z)
    error: Tensor  # (N,) mean squared distance to the input, per pixel
    steps: Tensor  # (N,) generator gradient evaluations spent, all restarts together
    restart: Tensor  # (N,) int64, which of the restarts z is of


@dataclass(frozen=True)
class Threat:
    """All images that an attacker may put in the place of a clean one.

    norm  what bounds the change: linf, l2 or l1, a ball; l0, few pixels; patch, one square; corruption
    eps   of a ball the radius, in pixel units of [0, 1], over all channels; of l0 how many pixels may change,
          whatever their channels; of a patch its side in pixels, inside which everything may change; of a
          corruption its severity, 1 to 5 (see `attacks.corruptions`)
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}  # read by pipelines.settings

    norm: Norm = "linf"
    eps: float = 0.3

    def holds(self, other: Threat) -> bool:
        """Whether all of a smaller threat lies within this one."""
        return self.norm == other.norm and other.eps < self.eps

    def __post_init__(self) -> None:
        if self.norm not in get_args(Norm):
            raise ValueError(f"norm: expected one of {', '.join(get_args(Norm))}, got {self.norm!r}")
        if not 0 < self.eps <= 1e6:
            raise ValueError(f"eps: expected above 0 and at most a million, got {self.eps}")
        if self.norm == "linf" and self.eps > 1:
            raise ValueError(
                f"eps of linf: expected at most 1, for images in [0, 1] (8/255 is 0.0314), got {self.eps:g}"
            )
        if self.norm in ("l0", "patch", "corruption") and self.eps != int(self.eps):
            raise ValueError(f"eps of {self.norm}: expected a whole number, got {self.eps}")
        if self.norm == "corruption" and self.eps > 5:
            raise ValueError(f"eps of corruption: expected a severity of 1 to 5, got {self.eps:g}")
