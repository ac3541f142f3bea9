"""Stages `train-classifier` and `harden`: one loop, whatever the objective."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from gan.optimisation import seeded
from manifold_defense.artifact import load_classifier, save_classifier
from manifold_defense.certification.lipschitz import chain
from manifold_defense.classifiers import ArchitectureConfig, ImageClassifier
from manifold_defense.filter import ManifoldFilter
from manifold_defense.hardening import Clean
from manifold_defense.hardening.training import classifier_state, train_classifier
from manifold_defense.types import Classifier, Threat
from pipelines.config import EncoderStageConfig, HardenConfig
from pipelines.context import Context
from pipelines.data import ImageData, to_float
from pipelines.defences import behind, load_run_filter
from pipelines.files import write_json
from pipelines.judging import accuracy, held_out, proved
from pipelines.own import load_own_classifier
from pipelines.stage import FACTS, STATE, Plan, StageError, figures, settings_of

VERSION = 7  # of `harden` and of each of its variants
VARIANT = "variant.json"
_VALIDATION_STEPS = 10
_CUSTOMARY = (Threat("linf", 0.15),)  # for what is trained for no threat


def train(context: Context) -> dict[str, Any]:
    """A classifier on clean images."""
    config = context.config.classifier
    plain = HardenConfig(objective=Clean(), training=config.training)
    return _train(context, _untrained(context, config.architecture), plain)


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
    for folder in (own.folder, *([own.previous / variant.name] if own.previous else ())):
        try:
            facts: dict[str, Any] = json.loads((folder / VARIANT).read_text())
        except (OSError, ValueError):
            continue
        if facts.get("fingerprint") != fingerprint:
            continue
        if own.main:
            (folder / STATE).unlink(missing_ok=True)
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
    # The encoder may begin as a variant that is none of these.
    config = replace(context.config, harden=tuple(lineage), encoder=EncoderStageConfig())
    on_filter = any(member.needs_filter for member in lineage)
    projects = any(member.projects for member in lineage)
    sections = ("seed", "data", "harden", *(("projection",) if projects else ()))
    needed = ("train-classifier", *(("train-encoder",) if on_filter else ()))
    inputs = {}
    for name in needed:
        facts = context.inputs[name] / FACTS
        inputs[name] = json.loads(facts.read_text())["fingerprint"] if facts.exists() else ""
    made_of = settings_of(config, sections, context.data.digest)
    return Plan("harden", VERSION, made_of, inputs).fingerprint


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
    if variant.objective.name == "interval_bounds":
        try:
            chain(start.body)
        except TypeError as error:
            raise StageError(f"harden.{variant.name}.start: {error}") from None
    taught = next((other for other in context.config.harden if other.name == variant.teacher), None)
    on_filter = variant.needs_filter or (taught is not None and taught.needs_filter)
    filter = load_run_filter(context) if on_filter else None
    teacher: Classifier | None = None
    if taught is not None:
        # Where it is deployed; on reconstructions the images are already what the filter makes of them.
        drawn = variant.behind == "reconstructions" and taught.projects
        place = "" if drawn else taught.behind
        teacher = behind(place, earlier(taught.name).requires_grad_(False), filter)
    metrics = _train(own, start, variant, filter, teacher)

    hardened = load_classifier(own.folder).requires_grad_(False).to(device)
    x, y = context.test_images(500)
    threats = variant.objective.threats or _CUSTOMARY
    deployed = behind(variant.behind, hardened, filter)
    proofs = proved(variant.objective, deployed, x, y)
    return {
        **metrics,
        **({} if proofs is None else {"proved_accuracy": proofs}),
        "quick_threats": [[threat.norm, threat.eps] for threat in threats],
        "quick_accuracy": accuracy(deployed, x, y, threats, steps=20, seed=context.config.seed),
    }


def _train(
    context: Context,
    model: ImageClassifier,
    variant: HardenConfig,
    filter: ManifoldFilter | None = None,
    teacher: Classifier | None = None,
) -> dict[str, Any]:
    config, objective, place = variant.training, variant.objective, variant.behind
    state = classifier_state(context.fabric, model, config)
    context.resume(state)
    judged, data = held_out(context.data.train)
    x, y = to_float(judged.images).to(context.fabric.device), judged.labels.to(context.fabric.device)
    if place == "reconstructions":
        assert filter is not None
        data = _reconstructed(context, data, filter)

    def through(model: nn.Module) -> nn.Module:
        # On reconstructions the images are already what the filter makes of them.
        if place == "reconstructions":
            return model
        return behind(place, model, filter.seen(variant.view) if filter else None)

    def validate(model: nn.Module) -> tuple[float, float]:
        deployed = behind(place, model, filter)
        clean = accuracy(deployed, x, y)
        proofs = proved(objective, deployed, x, y)
        if proofs is not None:
            return clean, proofs
        return clean, accuracy(deployed, x, y, objective.threats, steps=_VALIDATION_STEPS)

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
        "test_accuracy": accuracy(behind(place, best, filter), x_test, y_test),
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
