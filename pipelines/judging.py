"""How the training of a classifier is judged: on images held out of it, in all that it is trained for."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from manifold_defense.attacks import corruption, patch, pgd, pgd_l0
from manifold_defense.hardening import Objective
from manifold_defense.types import Attack, Classifier, Threat
from pipelines.data import DataError, ImageData, split

# Training images that classifiers never see.
_HELD_OUT_SHARE, _HELD_OUT_MOST = 0.1, 500


def held_out(data: ImageData) -> tuple[ImageData, ImageData]:
    """The images that classifiers are validated on, and those that they are trained on."""
    if int(data.labels.bincount().max()) < 2:
        raise DataError(
            f"training images: expected at least 2 of some class, one of which is held out, got "
            f"{len(data.labels)} of as many classes"
        )
    return split(data, min(max(int(_HELD_OUT_SHARE * len(data.labels)), 1), _HELD_OUT_MOST))


def quick_attack(threat: Threat, steps: int, seed: int = 0) -> Attack:
    """One of few gradients, far weaker than the evaluation's: it ranks trainings, and measures none."""
    norm, eps = threat.norm, threat.eps
    if norm == "patch":
        return partial(patch, eps=eps, steps=steps, locations=4, seed=seed)
    if norm == "corruption":
        return partial(corruption, eps=eps, draws=1, seed=seed)
    if norm == "l0":
        return partial(pgd_l0, eps=eps, steps=steps, seed=seed)
    return partial(pgd, norm=norm, eps=eps, steps=steps, seed=seed)


def accuracy(
    model: nn.Module, x: Tensor, y: Tensor, threats: tuple[Threat, ...] = (), *, steps: int = 0, seed: int = 0
) -> float:
    """Share of images (N, C, H, W) that are right clean and after a quick attack in each of the threats."""
    attacks = [quick_attack(threat, steps, seed) for threat in threats]
    hits = []
    for images, labels in zip(x.split(1000), y.split(1000), strict=True):
        with torch.no_grad():
            right = model(images).argmax(1) == labels
        for attack in attacks:
            x_adv = attack(model, images, labels)
            with torch.no_grad():
                right &= model(x_adv).argmax(1) == labels
        hits.append(right.float())
    return float(torch.cat(hits).mean())


def proved(objective: Objective, model: Classifier, x: Tensor, y: Tensor) -> float | None:
    """Share of images (N, C, H, W) that the objective itself proves; None if it proves nothing."""
    proofs = []
    for images, labels in zip(x.split(500), y.split(500), strict=True):
        proof = objective.proved(model, images, labels)
        if proof is None:
            return None
        proofs.append(proof)
    return float(torch.cat(proofs).float().mean())
