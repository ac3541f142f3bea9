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

from manifold_defense.attacks import (
    apgd,
    corruption,
    cw,
    ddn,
    deepfool,
    detector_aware,
    fab,
    feature_matching,
    fgsm,
    fmn,
    hop_skip_jump,
    jsma,
    mi_fgsm,
    noise,
    patch,
    pgd,
    pgd_l0,
    range_attack,
    sparse_rs,
    square,
    square_pgd,
    stroke_search,
    transfer_pgd,
    window_pgd,
)
from manifold_defense.attacks.norms import sizes
from manifold_defense.modes import evaluation_mode

LINF: dict[str, Any] = {"norm": "linf", "eps": 0.1}
L2: dict[str, Any] = {"norm": "l2", "eps": 0.8}


class Everything:
    """A generator (N, 64) -> (N, 1, 8, 8) that draws any image, in the type of its latents."""

    latent_dim, image_shape = 64, (1, 8, 8)

    def __call__(self, z: Tensor) -> Tensor:
        return (z / 4 + 0.5).unflatten(1, self.image_shape)


def filtered(x: Tensor) -> Tensor:
    """Features (N, 4, 8, 8), in the type of the images: the first layer of `network`."""
    first: nn.Module = network(3)[0]
    return nn.functional.conv2d(x, first.weight.to(x), first.bias.to(x), padding=1)


def brightness(x: Tensor) -> Tensor:
    """A residual (N,) that a detector might judge by."""
    return x.flatten(1).mean(1)


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
    "pgd-l1": partial(pgd, norm="l1", eps=4.0, steps=5),
    "pgd-dlr": partial(pgd, **LINF, steps=5, loss="dlr"),
    "fgsm-random": partial(fgsm, norm="linf", eps=0.15, random_step=0.3),
    "fgsm-l1": partial(fgsm, norm="l1", eps=6.0),
    "mi-fgsm": partial(mi_fgsm, **LINF, steps=5),
    "mi-fgsm-diverse": partial(mi_fgsm, norm="l2", eps=1.5, steps=10, diversity=0.5),
    "apgd-linf": partial(apgd, **LINF, steps=10),
    "apgd-l2-dlr": partial(apgd, **L2, steps=10, loss="dlr", restarts=2),
    "apgd-l1": partial(apgd, norm="l1", eps=4.0, steps=10, loss="margin"),
    "apgd-from-x": partial(apgd, **LINF, steps=10, random_start=False),
    "apgd-transfer": partial(apgd, **LINF, steps=10, stop_early=False),
    "corruption": partial(corruption, norm="corruption", eps=3, draws=2),
    "corruption-transfer": partial(corruption, norm="corruption", eps=5, draws=1, stop_early=False),
    "cw": partial(cw, **L2, steps=20, searches=3, initial_weight=10.0),
    "ddn": partial(ddn, **L2, steps=20),
    "fmn-l0": partial(fmn, norm="l0", eps=6, steps=20),
    "fmn-l1": partial(fmn, norm="l1", eps=4.0, steps=20),
    "fmn-l2": partial(fmn, **L2, steps=20),
    "fmn-linf": partial(fmn, **LINF, steps=20),
    "fmn-to-the-end": partial(fmn, **LINF, steps=20, stop_early=False),
    "fab-l1": partial(fab, norm="l1", eps=4.0, steps=20),
    "fab-l2": partial(fab, **L2, steps=20),
    "fab-linf": partial(fab, **LINF, steps=20, restarts=2),
    "deepfool-l2": partial(deepfool, **L2, steps=10),
    "deepfool-linf": partial(deepfool, **LINF, steps=10),
    "jsma": partial(jsma, norm="l0", eps=8),
    "square-linf": partial(square, **LINF, steps=100),
    "square-l2": partial(square, norm="l2", eps=1.2, steps=50, restarts=2),
    "search-then-pgd-linf": partial(square_pgd, **LINF, queries=50, steps=4),
    "search-then-pgd-l2": partial(square_pgd, **L2, queries=50, steps=4, loss="margin", stop_early=False),
    "transfer-then-pgd-l2": partial(transfer_pgd, norm="l2", eps=1.2, tries=3, steps=4),
    "transfer-then-pgd-linf": partial(
        transfer_pgd, **LINF, tries=2, steps=3, restarts=1, loss="ce", stop_early=False
    ),
    "hop-skip-jump-l2": partial(hop_skip_jump, **L2, queries=400, draws=40),
    "hop-skip-jump-linf": partial(hop_skip_jump, norm="linf", eps=0.15, queries=400, draws=40),
    "window-l2": partial(window_pgd, norm="l2", eps=1.2, steps=5, restarts=2, tries=3),
    "window-linf": partial(window_pgd, norm="linf", eps=0.2, steps=3, restarts=1, tries=2, loss="ce"),
    "window-l1": partial(window_pgd, norm="l1", eps=4.0, steps=15, restarts=2, tries=3, stop_early=False),
    "pgd-l0": partial(pgd_l0, norm="l0", eps=4, steps=5),
    "sparse-rs": partial(sparse_rs, norm="l0", eps=4, steps=40),
    "stroke-search": partial(
        stroke_search, norm="l0", eps=4, steps=3, restarts=2, strokes=2, tries=3, queries=20
    ),
    "patch": partial(patch, norm="patch", eps=3, steps=5, locations=4),
    "patch-transfer": partial(patch, norm="patch", eps=3, steps=5, locations=3, stop_early=False),
    "features-linf": partial(feature_matching, norm="linf", eps=0.3, steps=5, features=filtered),
    "features-l2": partial(feature_matching, norm="l2", eps=2.5, steps=5, features=filtered, restarts=2),
    "range-linf": partial(range_attack, **LINF, steps=30, generator=Everything(), learning_rate=0.3),
    "range-l2": partial(range_attack, **L2, steps=30, generator=Everything(), learning_rate=0.3, restarts=2),
    "detector-linf": partial(detector_aware, **LINF, steps=10, residual=brightness, threshold=0.6),
    "detector-l2": partial(
        detector_aware, **L2, steps=9, residual=brightness, threshold=0.6, restarts=2, stop_early=False
    ),
    "detector-orthogonal": partial(
        detector_aware, **L2, steps=10, residual=brightness, threshold=0.6, method="orthogonal"
    ),
}
# Those that draw: another seed, another result.
SEEDED = [
    name
    for name in ATTACKS
    if name.startswith(
        (
            "noise",
            "features",
            "window",
            "apgd-l",
            "apgd-t",
            "range",
            "square",
            "search",
            "hop-skip-jump",
            "sparse-rs",
            "stroke-search",
            "patch",
        )
    )
    or name in ("corruption", "detector-l2", "fgsm-random", "mi-fgsm-diverse")
    or "window" in name
    or ("pgd" in name and "from-x" not in name)
]
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


def gain(model: Linear, x_adv: Tensor, x: Tensor) -> Tensor:
    """How far `w·x` went down, the way from class 1 to class 0, (N,)."""
    return -((x_adv - x) * model.w).flatten(1).sum(1)


GREY = torch.full((3, 1, 8, 8), 0.5) + torch.linspace(-0.05, 0.05, 192).view(3, 1, 8, 8)
