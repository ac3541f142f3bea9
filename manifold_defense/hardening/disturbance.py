"""Adversarial training of an encoder: what its images suffer, threat by threat.

`min_E max_{x'} ‖G(E(x')) − x‖²` over the images x' within a threat around x. Letters as in
`manifold_defense.types`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from manifold_defense.attacks.corruptions import draw_corruption
from manifold_defense.attacks.norms import geometry
from manifold_defense.attacks.objective import input_gradient
from manifold_defense.attacks.window import draw_pieces, draw_windows, squares
from manifold_defense.types import Norm, Threat

# Images (N, C, H, W) to what an attack raises, (N,): the squared error of drawings, or a class's lead.
Errors = Callable[[Tensor], Tensor]
# Images that share a draw of a corruption.
_TOGETHER = 8


@dataclass(frozen=True)
class Disturbance:
    """Images within threats, one threat a batch, by turns.

    kind      none: the images as they are; noise: drawn within the threat; adversarial: from there up
              the squared error of the drawing or the lead of another class, as PGD (Madry et al. 2018)
    threats   by turns; one that is named twice has two of them
    steps     gradients that are climbed; corruptions have none
    windows   under L2 and L1 the climb begins, as `window_pgd` does, at the worst of so many rectangles that
              turn bright or dark, and of the pieces below; without either it begins at random in the ball
    pieces    so many rectangles that turn into a piece of another image
    tries     draws of a patch, or of a corruption, of which each image meets the worst
    ramp      share of the training over which the radius of a ball grows from 0
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}  # read by pipelines.settings

    kind: Literal["none", "noise", "adversarial"] = "adversarial"
    threats: tuple[Threat, ...] = (Threat("linf", 0.15), Threat("l2", 1.0))
    steps: int = 4
    windows: int = 0
    pieces: int = 0
    tries: int = 4
    ramp: float = 0.5

    def __post_init__(self) -> None:
        if self.kind not in ("none", "noise", "adversarial"):
            raise ValueError(f"kind: expected one of none, noise, adversarial, got {self.kind!r}")
        if not self.threats:
            raise ValueError('threats: expected at least one; kind = "none" leaves the images as they are')
        for name, least in (("steps", 1), ("windows", 0), ("pieces", 0), ("tries", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: expected at least {least}, got {getattr(self, name)}")
        begun = self.kind == "adversarial" and any(threat.norm in ("l2", "l1") for threat in self.threats)
        for name in ("windows", "pieces"):
            if getattr(self, name) and not begun:
                raise ValueError(
                    f"{name}: expected 0, for only adversarial images of l2 or l1 begin there; "
                    f"got {getattr(self, name)}"
                )
        if not 0 <= self.ramp <= 1:
            raise ValueError(f"ramp: expected in [0, 1], got {self.ramp}")

    def __call__(self, errors: Errors, x: Tensor, step: int, done: float, rng: torch.Generator) -> Tensor:
        """Images (N, C, H, W) within the threat of this step, the share `done` of a training over."""
        if self.kind == "none" or len(x) == 0:
            return x
        threat = self.threats[step % len(self.threats)]
        if threat.norm == "corruption":
            return self._corrupted(errors, x, int(threat.eps), rng)
        if threat.norm == "patch":
            return self._patched(errors, x, int(threat.eps), rng)
        if threat.norm == "l0":
            return self._speckled(errors, x, int(threat.eps), rng)
        share = min(1.0, done / self.ramp) if self.ramp else 1.0
        return self._in_ball(errors, x, threat.norm, share * threat.eps, rng)

    def _in_ball(self, errors: Errors, x: Tensor, norm: Norm, eps: float, rng: torch.Generator) -> Tensor:
        shape = geometry(norm)
        # An image by itself has no other to take a piece of.
        piece = draw_pieces if len(x) > 1 else draw_windows
        draws = () if norm == "linf" else (draw_windows,) * self.windows + (piece,) * self.pieces
        if self.kind == "adversarial" and draws:
            tried = [shape.place(x, draw(x, rng), eps, (0.0, 1.0)) for draw in draws]
            at = _chosen(tried, _worst(errors, tried))
        else:
            # Of all lengths alike; of most pixels the ball has nearly all its volume at its surface.
            length = 1.0 if norm == "linf" else torch.rand(len(x), 1, 1, 1, generator=rng).to(x)
            at = shape.place(x, x + length * shape.sample(x, eps, rng), eps, (0.0, 1.0))
        # The lengths cross the ball, from wherever x' began; a change in one place lies at its edge.
        across = 1.25 if self.steps == 1 else 1.5 if draws else 2.5
        for _ in range(self._climbs):
            at = shape.step(x, at, _gradient(errors, at), across / self.steps * eps, eps, (0.0, 1.0))
        return at

    def _patched(self, errors: Errors, x: Tensor, side: int, rng: torch.Generator) -> Tensor:
        inside = [squares(x, side, rng) for _ in range(self._draws)]
        tried = [torch.where(where, _content(x, rng), x) for where in inside]
        worst = _worst(errors, tried)
        at, where = _chosen(tried, worst), _chosen(inside, worst)
        for _ in range(self._climbs):
            moved = at + 1.5 / self.steps * _gradient(errors, at).sign()
            at = torch.where(where, moved.clamp(0, 1), x)
        return at

    def _speckled(self, errors: Errors, x: Tensor, pixels: int, rng: torch.Generator) -> Tensor:
        """So many pixels white or black, a channel each; a climb chooses them anew, by what they gain."""
        n, _, rows, columns = x.shape
        colour = (torch.rand(x.shape, generator=rng) < 0.5).to(x)
        gain = torch.rand(n, rows * columns, generator=rng).to(x)
        at = torch.where(_highest(gain, pixels).view(n, 1, rows, columns), colour, x)
        for _ in range(self._climbs):
            gradient = _gradient(errors, at)
            colour = (gradient > 0).to(x)
            # A little at random, lest the same few pixels be chosen for ever.
            luck = 0.5 + torch.rand(n, rows * columns, generator=rng).to(x)
            gain = (gradient * (colour - x)).sum(1).flatten(1) * luck
            at = torch.where(_highest(gain, pixels).view(n, 1, rows, columns), colour, x)
        return at

    def _corrupted(self, errors: Errors, x: Tensor, severity: int, rng: torch.Generator) -> Tensor:
        def draw() -> Tensor:
            return torch.cat([draw_corruption(few, severity, rng) for few in x.split(_TOGETHER)])

        tried = [draw() for _ in range(self._draws)]
        return _chosen(tried, _worst(errors, tried))

    @property
    def _climbs(self) -> int:
        return self.steps if self.kind == "adversarial" else 0

    @property
    def _draws(self) -> int:
        return self.tries if self.kind == "adversarial" else 1


def _gradient(errors: Errors, at: Tensor) -> Tensor:
    with torch.enable_grad():
        at = at.detach().requires_grad_(True)
        return input_gradient(errors(at), at).nan_to_num(0, 0, 0)


@torch.no_grad()
def _worst(errors: Errors, tried: Sequence[Tensor]) -> Tensor:
    """Which of some versions of images (N, C, H, W) has the highest error, (N,)."""
    if len(tried) == 1:
        return torch.zeros(len(tried[0]), dtype=torch.long, device=tried[0].device)
    return torch.stack([errors(images) for images in tried]).argmax(0)


def _chosen(tried: Sequence[Tensor], which: Tensor) -> Tensor:
    """Of each image the version `which` (N,)."""
    return torch.stack(list(tried))[which, torch.arange(len(which), device=which.device)]


def _highest(values: Tensor, count: int) -> Tensor:
    """Where the `count` highest of each row (N, P) are, (N, P)."""
    chosen = values.topk(min(count, values.shape[1]), dim=1).indices
    return torch.zeros_like(values, dtype=torch.bool).scatter_(1, chosen, True)


def _content(x: Tensor, rng: torch.Generator) -> Tensor:
    """What a patch of images (N, C, H, W) may begin with: noise, one colour, or another image, moved."""
    kind = int(torch.randint(3, (), generator=rng))
    if kind == 0:
        return (torch.rand(x.shape, generator=rng) < 0.5).to(x)
    if kind == 1:
        return (torch.rand(len(x), x.shape[1], 1, 1, generator=rng) < 0.5).to(x).expand_as(x)
    moved = [int(torch.randint(side, (), generator=rng)) for side in x.shape[2:]]
    return x.roll((1, *moved), (0, 2, 3))
