"""What all attacks are tested with: their table, a network that shows side effects, a linear model.

A row of the table is an attack with its parameters bound, among them `norm` and `eps`; the tests of
`test_attack_properties.py` hold for every row.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from manifold_defense.attacks import cw, fgsm, noise, pgd
from manifold_defense.attacks.norms import sizes
from manifold_defense.attacks.objective import evaluation_mode

LINF: dict[str, Any] = {"norm": "linf", "eps": 0.1}
L2: dict[str, Any] = {"norm": "l2", "eps": 0.8}
ATTACKS: dict[str, partial[Tensor]] = {
    "noise-linf": partial(noise, **LINF, draws=6),
    "noise-l2": partial(noise, **L2, draws=6),
    "fgsm-linf": partial(fgsm, **LINF),
    "fgsm-l2": partial(fgsm, **L2),
    "fgsm-margin": partial(fgsm, **LINF, loss="margin"),
    "pgd-linf": partial(pgd, **LINF, steps=5),
    "pgd-l2": partial(pgd, **L2, steps=5),
    "pgd-linf-margin": partial(pgd, **LINF, steps=5, loss="margin"),
    "pgd-l2-margin": partial(pgd, **L2, steps=5, loss="margin"),
    "pgd-both": partial(pgd, **LINF, steps=3, restarts=2, loss="both"),
    "pgd-restarts": partial(pgd, **LINF, steps=3, restarts=3),
    "pgd-one-step": partial(pgd, **LINF, steps=1),
    "pgd-from-x": partial(pgd, **L2, steps=5, random_start=False),
    "pgd-transfer": partial(pgd, **LINF, steps=5, stop_early=False),
    "cw": partial(cw, **L2, steps=20, searches=3, initial_weight=10.0),
}
# Those that draw: another seed, another result.
SEEDED = [name for name in ATTACKS if name.startswith("noise") or ("pgd" in name and "from-x" not in name)]
every_attack = pytest.mark.parametrize("name", ATTACKS)
every_number_of_classes = pytest.mark.parametrize("classes", [2, 3, 5])


def network(classes: int, seed: int = 0) -> nn.Module:
    """With dropout and batch statistics, in train mode: an attack must see neither and change neither."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1),
            nn.BatchNorm2d(4),
            nn.LeakyReLU(),
            nn.Flatten(),
            nn.Dropout(0.5),
            nn.Linear(256, classes),
        )
    with torch.no_grad():
        model[-1].weight *= 4
        model[1].running_mean += 0.1
    return model


def images(n: int = 12, seed: int = 0) -> Tensor:
    """(N, 1, 8, 8) with many pixels exactly 0 or 1, as in real images."""
    return (torch.rand(n, 1, 8, 8, generator=torch.Generator().manual_seed(seed)) * 1.6 - 0.3).clamp(0, 1)


def logits_of(model: nn.Module, x: Tensor) -> Tensor:
    """(N, K) in eval mode."""
    with evaluation_mode(model), torch.no_grad():
        return model(x)


def problem(classes: int) -> tuple[nn.Module, Tensor, Tensor]:
    """Two thirds of the images are classified correctly, the rest wrongly."""
    model, x = network(classes), images()
    y = logits_of(model, x).argmax(1)
    y[8:] = (y[8:] + 1) % classes
    return model, x, y


def distance(name: str, x_adv: Tensor, x: Tensor) -> Tensor:
    """Of each perturbation, (N,), in the unit of the row's `eps`."""
    return sizes(ATTACKS[name].keywords["norm"], x_adv - x)


class Linear(nn.Module):
    """Logits (N, 2) whose difference `Z₁ − Z₀` is `scale (w·(x − ½) + m)`."""

    def __init__(self, m: float, scale: float = 1.0) -> None:
        super().__init__()
        self.w = torch.randn(1, 8, 8, generator=torch.Generator().manual_seed(2))
        self.m, self.scale = m, scale

    def forward(self, x: Tensor) -> Tensor:
        difference = self.scale * (((x - 0.5) * self.w).flatten(1).sum(1) + self.m)
        return torch.stack([-difference / 2, difference / 2], 1)


GREY = torch.full((3, 1, 8, 8), 0.5) + torch.linspace(-0.05, 0.05, 192).view(3, 1, 8, 8)
