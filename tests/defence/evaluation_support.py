"""What an evaluation is tried with: threats, cheap attacks, labelled images."""

from typing import Any

import torch
from torch import Tensor, nn

from manifold_defense import Threat
from manifold_defense.evaluation import AttackConfig

LINF, L2 = Threat("linf", 0.1), Threat("l2", 0.5)
SUITE = [
    AttackConfig("noise", steps=3),
    AttackConfig("fgsm"),
    AttackConfig("pgd", steps=5),
    AttackConfig("pgd", steps=5, loss="margin"),
    AttackConfig("cw", steps=10, restarts=2, views=("exact",)),
]


def labelled(model: nn.Module, n: int = 12) -> tuple[Tensor, Tensor]:
    """Images (N, 1, 8, 8) and labels, a quarter of them wrong."""
    x = torch.rand(n, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 0.6 + 0.2
    with torch.no_grad():
        y = model(x).argmax(1)
    y[: n // 4] = (y[: n // 4] + 1) % 3
    return x, y


class Table(nn.Module):
    """Answers by heart: right or wrong by the first pixel of an image, a digit for each defence.

    An attack of these tests writes into that pixel how far it went.
    """

    def __init__(self, breaks_at: list[float]) -> None:
        super().__init__()
        self.breaks_at = torch.tensor(breaks_at)

    def forward(self, x: Tensor) -> Tensor:
        which, strength = (x[:, 0, 0, 1] * 100).round().long(), x[:, 0, 0, 0]
        right = strength < self.breaks_at[which] - 1e-6
        return torch.stack([~right, right], 1).float()


class Push(AttackConfig):
    """An attack of known strength; `seen` are the images that it met."""

    strength: float
    seen: list[list[int]]

    @classmethod
    def of(cls, strength: float, name: str = "pgd", loss: str = "") -> "Push":
        made = cls(name, loss=loss)  # type: ignore[arg-type]
        object.__setattr__(made, "strength", strength)
        object.__setattr__(made, "seen", [])
        return made

    def bind(self, threat: Threat, *, seed: int, press: bool, **more: Any) -> Any:
        def attack(model: Any, x: Tensor, y: Tensor) -> Tensor:
            self.seen.append((x[:, 0, 0, 1] * 100).round().long().tolist())
            moved = x.clone()
            moved[:, 0, 0, 0] = min(self.strength, threat.eps)
            return moved

        return attack


def numbered(n: int) -> tuple[Tensor, Tensor]:
    x = torch.zeros(n, 1, 8, 8)
    x[:, 0, 0, 1] = torch.arange(n) / 100
    return x, torch.ones(n, dtype=torch.long)


A = [0.0, 0.1, 0.2, 0.3, 2.0]  # image 0 is wrong when clean, image 4 is never broken
FAR = Threat("linf", 0.5)


class Coin(nn.Module):
    """Right in every second call, once the first pixel is lit."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        right = (x[:, 0, 0, 0] < 0.05) | (self.calls % 2 == 0)
        return torch.stack([~right, right], 1).float()
