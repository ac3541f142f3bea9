"""Stages `train-classifier` and `harden`: one loop, two objectives."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gan.optimisation import seeded
from manifold_defense.artifact import load_classifier, load_gan, save_classifier
from manifold_defense.attacks import pgd
from manifold_defense.classifiers import ImageClassifier
from manifold_defense.hardening import Clean, Latent, Objective, Pgd
from manifold_defense.hardening.training import TrainingConfig, classifier_state, train_classifier
from pipelines.config import HardenConfig
from pipelines.context import Context
from pipelines.data import to_float


def train(context: Context) -> dict[str, Any]:
    """A classifier on clean images."""
    config, data = context.config.classifier, context.data
    mean, std = _channel_statistics(data.train.images)

    def build() -> ImageClassifier:
        return ImageClassifier(data.image_shape, len(data.classes), config.architecture, mean, std)

    model = seeded(context.config.seed, build)
    return _train(context, model, config.training, Clean())


def _channel_statistics(images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (C,) of uint8 images (N, C, H, W) scaled to [0, 1], in bounded memory."""
    total = square = torch.zeros(images.shape[1], dtype=torch.float64)
    for part in images.split(1000):
        values = to_float(part).double()
        total, square = total + values.sum((0, 2, 3)), square + values.square().sum((0, 2, 3))
    count = images.numel() / images.shape[1]
    mean, square = total / count, square / count
    return mean, (square - mean.square()).clamp(min=0).sqrt().clamp(min=1e-3)


def harden(context: Context) -> dict[str, Any]:
    """The same classifier, trained on against an attack."""
    config = context.config.harden
    model = load_classifier(context.inputs["train-classifier"])
    metrics = _train(context, model, config.training, _objective(context, config))
    hardened = load_classifier(context.folder).to(context.fabric.device)
    x, y = context.test_images(500)
    x_adv = pgd(hardened, x, y, norm=config.norm, eps=config.eps, steps=20, seed=context.config.seed)
    return {**metrics, "pgd20_accuracy": _accuracy(hardened, x_adv, y)}


def _objective(context: Context, config: HardenConfig) -> Objective:
    if config.objective == "clean":
        return Clean()
    if config.objective == "pgd":
        return Pgd(config.norm, config.eps, config.steps, config.clean_share, config.ramp)
    generator, encoder = load_gan(context.inputs["train-encoder"])
    assert encoder is not None  # train-encoder always writes one
    for network in (generator, encoder):
        network.requires_grad_(False).eval().to(context.fabric.device)
    return Latent(generator, encoder, config.eps, config.steps, config.clean_share)


def _train(
    context: Context, model: ImageClassifier, config: TrainingConfig, objective: Objective
) -> dict[str, Any]:
    state = classifier_state(context.fabric, model, config)
    context.resume(state)
    average = state["average"]
    x, y = context.test_images(500)

    def picture(images: int) -> None:
        context.board.add_scalar("test_accuracy", _accuracy(average, x, y), images)

    batches = context.batches(config.batch_size, shift=True)
    loop = train_classifier(context.fabric, state, batches, config, objective, context.config.seed)
    context.train(loop, state, config.images, picture)
    if context.main:
        save_classifier(average, context.folder, class_names=context.data.classes)
    context.fabric.barrier()
    x, y = context.test_images(0)
    return {"test_accuracy": _accuracy(average, x, y), "n": len(y)}


@torch.no_grad()
def _accuracy(model: ImageClassifier, x: Tensor, y: Tensor) -> float:
    hits = [(model(a).argmax(1) == b).float() for a, b in zip(x.split(1000), y.split(1000), strict=True)]
    return float(torch.cat(hits).mean())
