"""What a projection is made of, as a plain value: start × loss × solver × schedule."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from numbers import Real
from typing import ClassVar, Literal, get_args, get_type_hints

from manifold_defense.types import View


@dataclass(frozen=True)
class ProjectionConfig:
    """Settings of `project`.

    Solver
    solver        gd: momentum, on the mean loss over pixels (summed, with a metric); adam; lbfgs
    steps         generator gradients spent per restart, at most
    step_size     of the first step; 0 takes the solver's own (see `solvers`)
    momentum      of gd
    metric        mean: solve in coordinates in which the range is round on average (see `metric`)
    iterate       best: the iterate of least loss; last: the one after the last step

    Starts
    start         encoder: E(x); bank: the nearest of `bank` cached samples; prior: z ~ N(0, I);
                  origin: N(0, I/D)
    restarts      starts tried for each image; the least loss wins
    others        where the further restarts of `encoder` come from
    bank          samples in the bank
    seed          of bank and prior starts, which all images of a call share

    Loss
    loss          squared, huber, dead_zone_linf or dead_zone_l2 (see `losses`)
    radius        where Huber's loss turns linear, or the radius of the ball that a dead zone forgives
    prior_weight  μ of the term μ‖z‖² added to the loss
    clip          the largest ‖z‖ / √D allowed, at the start and after a step; 0 for none

    Schedule
    halve_every   drop the worse half of an image's restarts after every so many steps; 0 never
    target_error  an image stops once its mean squared error is as low; 0 never
    tolerance     a restart stops once its gradient is as short, in the solver's coordinates; 0 never
    chunk         latents optimised at a time, images times restarts; bounds memory, not the result
                  (0: 256 on a CPU, whose caches hold no more of them, 2048 elsewhere)
    precision     of the generator while it is descended: full is that of the images; bfloat16 is faster
                  where the device has it, and the same as full where it has not. G(z*) is drawn, and
                  gradients of the projection are taken, in full
    compiled      descend by way of torch.compile: the first call takes a minute at most, for each size of
                  batch at first, and those that follow less time than without; needs a C++ compiler, on CUDA
                  Triton. For the same results but for rounding

    Filter
    strength      how far a filter moves x towards its projection: x + strength (G(z*) − x)
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}  # read by pipelines.settings

    solver: Literal["gd", "adam", "lbfgs"] = "gd"
    start: Literal["encoder", "bank", "prior", "origin"] = "encoder"
    restarts: int = 1
    steps: int = 10
    step_size: float = 0.0
    momentum: float = 0.7
    metric: Literal["none", "mean"] = "mean"
    iterate: Literal["best", "last"] = "best"
    others: Literal["prior", "bank"] = "prior"
    bank: int = 2048
    seed: int = 0
    loss: Literal["squared", "huber", "dead_zone_linf", "dead_zone_l2"] = "squared"
    radius: float = 0.1
    prior_weight: float = 0.0
    clip: float = 0.0
    halve_every: int = 0
    target_error: float = 0.0
    tolerance: float = 0.0
    chunk: int = 0
    precision: Literal["full", "bfloat16"] = "full"
    compiled: bool = False
    strength: float = 1.0

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for field in fields(self):
            value, allowed = getattr(self, field.name), get_args(hints[field.name])
            if allowed and value not in allowed:
                raise ValueError(f"{field.name}: expected one of {', '.join(allowed)}, got {value!r}")
        for name, least in (
            ("restarts", 1),
            ("steps", 0),
            ("bank", 1),
            ("seed", 0),
            ("halve_every", 0),
            ("chunk", 0),
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not least <= value < 2**63:
                raise ValueError(
                    f"{name}: expected a whole number of at least {least}, below 2 to the 63, got {value!r}"
                )
        if not isinstance(self.compiled, bool):
            raise ValueError(f"compiled: expected true or false, got {self.compiled!r}")
        sizes = ("step_size", "radius", "prior_weight", "clip", "target_error", "tolerance")
        for name in (*sizes, "momentum", "strength"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, Real):
                raise ValueError(f"{name}: expected a number, got {value!r}")
            if name in sizes and not 0 <= float(value) < math.inf:
                raise ValueError(f"{name}: expected at least 0 and finite, got {value}")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum: expected in [0, 1), got {self.momentum}")
        if not 0 < self.strength <= 1:
            raise ValueError(f"strength: expected in (0, 1], got {self.strength}")
        if self.loss == "huber" and self.radius == 0:
            raise ValueError("radius: expected above 0 for the huber loss, got 0")

    def chunk_on(self, device: str) -> int:
        """Latents optimised at a time on a device of this type: `x.device.type`."""
        return self.chunk or (256 if device == "cpu" else 2048)

    @property
    def views(self) -> tuple[View, ...]:
        """The views of such a filter that are no other's: see `ManifoldFilter`."""
        if self.uses_encoder and not self.steps and self.restarts == 1:
            return ("identity", "exact")
        lacking = {"start": not self.uses_encoder, "soft": self.restarts == 1}
        return tuple(view for view in get_args(View) if not lacking.get(view))

    @property
    def uses_encoder(self) -> bool:
        return self.start == "encoder"

    @property
    def uses_metric(self) -> bool:
        return self.metric != "none" and self.steps > 0

    @property
    def chooses(self) -> bool:
        """Whether the result is the best of several points."""
        return self.restarts > 1 or (self.steps > 0 and self.iterate == "best")

    @property
    def uses_bank(self) -> bool:
        return self.start == "bank" or (
            self.start == "encoder" and self.others == "bank" and self.restarts > 1
        )
