"""What an evaluation is tried with: threats, cheap attacks, labelled images."""

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
