"""What every attack may ask of what it is given, asked in one place."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from manifold_defense.modes import writes
from manifold_defense.types import Classifier

_Attack = TypeVar("_Attack", bound=Callable[..., Tensor])


def attack(function: _Attack) -> _Attack:
    """Around an attack `(model, x, y, *, eps, …)`: ValueError for what it would make nonsense of.

    That is images x (N, …) that are not finite, in float32 or float64, within its `bounds`, [0, 1] where it
    has none, labels y (N,) that are not int64 from 0, an `eps` that is no finite number from 0 (but for the
    default of attacks that seek the nearest image) or, in L∞, more than images can differ by, a step
    backwards, and a model that changes x in place. Images of another scale would pass for robust, a radius of
    another one for broken, and in half precision a radius is not exact.
    """
    defaults = {name: given.default for name, given in inspect.signature(function).parameters.items()}

    @functools.wraps(function)
    def checked(model: Classifier, x: Tensor, y: Tensor, **settings: Any) -> Tensor:
        given = defaults | settings
        bounds = given.get("bounds", (0.0, 1.0))
        _check(x, y, bounds)
        if given["eps"] is not None and given["eps"] != defaults["eps"]:
            _check_radius(given["eps"], bounds[1] - bounds[0] if given.get("norm") == "linf" else math.inf)
        if given.get("step_size") is not None and not given["step_size"] >= 0:
            raise ValueError(f"step_size: expected at least 0, got {given['step_size']}")
        before = writes(x)
        x_adv = function(model, x, y, **settings)
        if writes(x) != before:
            raise ValueError("model: expected one that leaves its images alone, it changed them in place")
        return x_adv

    return cast(_Attack, checked)


def _check(x: Tensor, y: Tensor, bounds: tuple[float, float]) -> None:
    if not isinstance(x, Tensor) or x.dtype not in (torch.float32, torch.float64):
        got = str(x.dtype) if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"images: expected a tensor of float32 or float64, got {got}")
    if not isinstance(y, Tensor) or y.dtype != torch.int64 or y.shape != x.shape[:1]:
        got = f"{y.dtype} of shape {tuple(y.shape)}" if isinstance(y, Tensor) else type(y).__name__
        raise ValueError(f"labels: expected {len(x)} of int64, got {got}")
    if len(x) == 0:
        return
    if (y < 0).any():
        raise ValueError(f"labels: expected at least 0, got {int(y.min())}")
    low, high = (float(end) for end in torch.aminmax(x.detach()))
    if not bounds[0] <= low <= high <= bounds[1]:  # NaN fails, too
        raise ValueError(
            f"images: expected values in [{bounds[0]:g}, {bounds[1]:g}], got [{low:.7g}, {high:.7g}]"
        )


def _check_radius(eps: float, most: float) -> None:
    if not eps >= 0:
        raise ValueError(f"eps: expected at least 0, got {eps}")
    if math.isinf(eps):
        raise ValueError(f"eps: expected a finite number, got {eps}")
    if eps > most:
        raise ValueError(
            f"eps: expected at most {most:g} in linf, by which images differ (8/255 is 0.0314), got {eps:g}"
        )
