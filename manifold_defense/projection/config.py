"""What a projection is made of, as a plain value: start × solver × restarts × length."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal


@dataclass(frozen=True)
class ProjectionConfig:
    """Settings of `project`.

    solver      gd: momentum on the mean squared error; adam, lbfgs: on the summed one
    start       encoder: E(x), further restarts from the prior; prior: z ~ N(0, I); origin: N(0, I/D)
    restarts    starts tried for each image; the least error wins
    steps       generator gradients spent per restart
    step_size   of the first step; 0 takes the solver's own (gd 10, adam 0.1, lbfgs 1)
    momentum    of gd
    iterate     best: the iterate of least error; last: the one after the last step
    seed        of the prior starts, which all images of a call share
    chunk       latents optimised at a time, images times restarts; bounds memory, not the result
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}  # read by pipelines.config

    solver: Literal["gd", "adam", "lbfgs"] = "adam"
    start: Literal["encoder", "prior", "origin"] = "encoder"
    restarts: int = 1
    steps: int = 10
    step_size: float = 0.0
    momentum: float = 0.7
    iterate: Literal["best", "last"] = "best"
    seed: int = 0
    chunk: int = 512

    def __post_init__(self) -> None:
        for name, allowed in (
            ("solver", ("gd", "adam", "lbfgs")),
            ("start", ("encoder", "prior", "origin")),
            ("iterate", ("best", "last")),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}: expected one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        for name, least in (("restarts", 1), ("steps", 0), ("chunk", 1), ("seed", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise ValueError(f"{name}: expected a whole number of at least {least}, got {value!r}")
        if not self.step_size >= 0:
            raise ValueError(f"step_size: expected at least 0, got {self.step_size}")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum: expected in [0, 1), got {self.momentum}")


# Defense-GAN as published and coded: 200 momentum steps of rate 10, then 1, from each of 10 starts
# N(0, I/D); the least final error wins (Samangouei, Kabkab, Chellappa, ICLR 2018). The yardstick.
REFERENCE = ProjectionConfig(
    solver="gd", start="origin", restarts=10, steps=200, step_size=10.0, momentum=0.7, iterate="last"
)
