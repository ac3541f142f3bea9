"""Stages `train-classifier` and `harden`: one loop, whatever the objective."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from typing import Any, get_args

import torch
from torch import Tensor, nn

from gan.optimisation import seeded
from manifold_defense.artifact import load_classifier, save_classifier
from manifold_defense.attacks import pgd
from manifold_defense.classifiers import ArchitectureConfig, ImageClassifier
from manifold_defense.filter import ManifoldFilter
from manifold_defense.hardening import Clean, Objective
from manifold_defense.hardening.training import TrainingConfig, classifier_state, train_classifier
from manifold_defense.types import Ball, Classifier, Threat
from pipelines.config import HardenConfig
from pipelines.context import STATE, Context
from pipelines.data import ImageData, data_digest, split, to_float
from pipelines.defences import behind, load_run_filter
from pipelines.own import load_own_classifier
from pipelines.stage import FACTS, Plan, figures, settings_of, write_json

VARIANT = "variant.json"
# Training images that classifiers never see, on which their trainings are judged.
_HELD_OUT_SHARE, _HELD_OUT_MOST = 0.1, 500
_VALIDATION_STEPS = 10


def held_out(data: ImageData) -> tuple[ImageData, ImageData]:
    """The images that classifiers are validated on, and those that they are trained on."""
    return split(data, min(int(_HELD_OUT_SHARE * len(data.labels)), _HELD_OUT_MOST))


def train(context: Context) -> dict[str, Any]:
    """A classifier on clean images."""
    config = context.config.classifier
    return _train(context, _untrained(context, config.architecture), config.training, Clean())


def _untrained(context: Context, architecture: ArchitectureConfig) -> ImageClassifier:
    data = context.data
    mean, std = _channel_statistics(data.train.images)

    def build() -> ImageClassifier:
        return ImageClassifier(data.image_shape, len(data.classes), architecture, mean, std)

    return seeded(context.config.seed, build)


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
    """Every variant of the classifier, in its own subfolder.

    One that an earlier run made under the same settings is taken over as it is, whatever became of the
    others.
    """
    found = {}
    for variant in context.config.harden:
        own = replace(context, stage=f"harden {variant.name}", folder=context.folder / variant.name)
        facts = _taken_over(own, variant)
        if facts is None:
            if context.main:
                own.folder.mkdir(exist_ok=True)
            context.fabric.barrier()
            if len(context.config.harden) > 1:
                context.say(f"{own.stage} …")
            try:
                metrics = _harden(own, context, variant)
            finally:
                own.close()
            facts = {"fingerprint": _fingerprint(context, variant), "metrics": metrics}
            own.say(f"{own.stage}: {', '.join(figures(metrics))}")
            if context.main:
                write_json(own.folder / VARIANT, facts)
                (own.folder / STATE).unlink(missing_ok=True)
            context.fabric.barrier()
        found[variant.name] = facts["metrics"]
    return {"variants": found}


def _taken_over(own: Context, variant: HardenConfig) -> dict[str, Any] | None:
    """What a finished variant says of itself, copied here if it was finished by an earlier run."""
    fingerprint = _fingerprint(own, variant)
    for folder in (own.folder, own.previous and own.previous / variant.name):
        try:
            facts: dict[str, Any] = json.loads((folder / VARIANT).read_text()) if folder else {}
        except (OSError, ValueError):
            continue
        if folder is None or facts.get("fingerprint") != fingerprint:
            continue
        if folder != own.folder and own.main:
            partial = own.folder.with_suffix(".partial")
            shutil.rmtree(partial, ignore_errors=True)
            shutil.copytree(folder, partial)
            shutil.rmtree(own.folder, ignore_errors=True)
            partial.replace(own.folder)
            own.say(f"{own.stage}: cached")
        own.fabric.barrier()
        return facts
    return None


def _fingerprint(context: Context, variant: HardenConfig) -> str:
    """Of all that a variant is made of: its settings, the variants that it builds on, its inputs."""
    lineage, wanted = [variant], {variant.start, variant.teacher}
    for earlier in reversed(context.config.harden[: context.config.harden.index(variant)]):
        if earlier.name in wanted:
            lineage.insert(0, earlier)
            wanted |= {earlier.start, earlier.teacher}
    config = replace(context.config, harden=tuple(lineage))
    on_filter = any(member.needs_filter for member in lineage)
    sections = ("seed", "data", "harden", *(("projection",) if on_filter else ()))
    needed = ("train-classifier", *(("train-encoder",) if on_filter else ()))
    inputs = {}
    for name in needed:
        facts = context.inputs[name] / FACTS
        inputs[name] = json.loads(facts.read_text())["fingerprint"] if facts.exists() else ""
    return Plan("harden", 2, settings_of(config, sections, data_digest(config.data)), inputs).fingerprint


def _harden(own: Context, context: Context, variant: HardenConfig) -> dict[str, Any]:
    """Train one variant; the finished ones before it lie beside its folder."""

    device = context.fabric.device

    def earlier(name: str) -> ImageClassifier:
        if "/" in name:
            return load_own_classifier(name, context.data, device)
        folder = context.folder / name if name else context.inputs["train-classifier"]
        return load_classifier(folder).to(device)

    architecture = variant.architecture
    start = _untrained(context, architecture) if architecture else earlier(variant.start)
    filter = load_run_filter(context) if variant.needs_filter else None
    teacher = earlier(variant.teacher).requires_grad_(False) if variant.teacher else None
    metrics = _train(own, start, variant.training, variant.objective, variant, filter, teacher)

    hardened = load_classifier(own.folder).requires_grad_(False).to(device)
    x, y = context.test_images(500)
    balls = _balls(variant.objective) or (Threat("linf", 0.15),)
    deployed = behind(variant.behind, hardened, filter)
    proved = _proved(variant.objective, deployed, x, y)
    return {
        **metrics,
        **({} if proved is None else {"proved_accuracy": proved}),
        "pgd20_balls": [[ball.norm, ball.eps] for ball in balls],
        "pgd20_accuracy": _accuracy(deployed, x, y, balls, steps=20, seed=context.config.seed),
    }


def _train(
    context: Context,
    model: ImageClassifier,
    config: TrainingConfig,
    objective: Objective,
    variant: HardenConfig | None = None,
    filter: ManifoldFilter | None = None,
    teacher: Classifier | None = None,
) -> dict[str, Any]:
    place = variant.behind if variant else ""
    state = classifier_state(context.fabric, model, config)
    context.resume(state)
    judged, data = held_out(context.data.train)
    x, y = to_float(judged.images).to(context.fabric.device), judged.labels.to(context.fabric.device)
    if place == "reconstructions":
        assert filter is not None
        data = _reconstructed(context, data, filter)

    def through(model: nn.Module) -> nn.Module:
        # On reconstructions the images are already what the filter makes of them.
        return model if place == "reconstructions" else behind(place, model, filter)

    def validate(model: nn.Module) -> tuple[float, float]:
        deployed = behind(place, model, filter)
        clean = _accuracy(deployed, x, y)
        proved = _proved(objective, deployed, x, y)
        if proved is not None:
            return clean, proved
        return clean, _accuracy(deployed, x, y, _balls(objective), steps=_VALIDATION_STEPS, seed=0)

    loop = train_classifier(
        context.fabric,
        state,
        context.batches(config.batch_size, shift=True, data=data),
        config,
        objective,
        context.config.seed,
        through=through,
        validate=validate,
        manifold=filter,
        teacher=teacher,
    )
    context.train(loop, state, config.images)
    best = state["best"]
    if context.main:
        save_classifier(best, context.folder, class_names=context.data.classes)
    context.fabric.barrier()
    x_test, y_test = context.test_images(0)
    return {
        "test_accuracy": _accuracy(behind(place, best, filter), x_test, y_test),
        "n": len(y_test),
        "validations": [list(validation) for validation in state["validations"]],
    }


def _reconstructed(context: Context, data: ImageData, filter: ManifoldFilter) -> ImageData:
    """What the filter makes of all images, in the 256 grey levels that images are kept in."""
    device = context.fabric.device

    @torch.no_grad()
    def reconstruct(_: int, chosen: slice) -> tuple[Tensor, ...]:
        images = filter(to_float(data.images[chosen]).to(device))
        return ((255 * images).round().to(torch.uint8).cpu(),)

    (images,) = context.map_images(reconstruct, len(data.labels), 500)
    return ImageData(images, data.labels)


def _proved(objective: Objective, model: Classifier, x: Tensor, y: Tensor) -> float | None:
    """Share of images (N, C, H, W) that the objective itself proves; None if it proves nothing."""
    proofs = []
    for images, labels in zip(x.split(500), y.split(500), strict=True):
        proof = objective.proved(model, images, labels)
        if proof is None:
            return None
        proofs.append(proof)
    return float(torch.cat(proofs).float().mean())


def _balls(objective: Objective) -> tuple[Threat, ...]:
    """Those of its threats that PGD attacks."""
    return tuple(threat for threat in objective.threats if threat.norm in get_args(Ball))


def _accuracy(
    model: nn.Module, x: Tensor, y: Tensor, balls: tuple[Threat, ...] = (), *, steps: int = 0, seed: int = 0
) -> float:
    """Share of images (N, C, H, W) that are right, clean and after PGD in each of the balls."""
    hits = []
    for images, labels in zip(x.split(1000), y.split(1000), strict=True):
        with torch.no_grad():
            right = model(images).argmax(1) == labels
        for ball in balls:
            x_adv = pgd(model, images, labels, norm=ball.norm, eps=ball.eps, steps=steps, seed=seed)
            with torch.no_grad():
                right &= model(x_adv).argmax(1) == labels
        hits.append(right.float())
    return float(torch.cat(hits).mean())
