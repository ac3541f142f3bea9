"""Stage `train-encoder`: fit the encoder to the finished generator, from the joint one if there is one.

Both come from stage `train-gan`, or from a finished filter; or the encoder begins as a classifier.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn

from gan.inversion import Agree, encoder_state, train_encoder
from gan.networks import Encoder, Generator
from gan.optimisation import seeded
from manifold_defense.artifact import OwnEncoder, load_classifier, load_gan, save_filter
from manifold_defense.classifiers import ImageClassifier
from manifold_defense.encoders import encoder_from
from manifold_defense.filter import ManifoldFilter
from manifold_defense.hardening.agreement import Agreement
from manifold_defense.types import Threat
from pipelines.board import grid
from pipelines.context import Context
from pipelines.defences import behind
from pipelines.own import blamed_on, load_own, load_own_classifier, load_own_filter
from pipelines.stage import StageError


def run(context: Context) -> dict[str, Any]:
    config, fabric, seed = context.config.encoder, context.fabric, context.config.seed
    generator, encoder, trained = _networks(context)
    generator = generator.eval().requires_grad_(False).to(fabric.device)
    if context.config.encoder_body:
        encoder = encoder_from(_classifier(context, context.config.encoder_body), generator, seed=seed)
        trained = ()  # by which the encoder that this one replaces was
    if encoder is None:
        if config.images == 0:
            raise StageError("encoder.images: expected at least 1, there is no encoder yet; got 0")
        encoder = seeded(seed, lambda: Encoder(generator.image_shape, generator.config))
    state = encoder_state(fabric, encoder, config)
    context.resume(state)

    average = state["encoder_average"]
    x, _ = context.test_images(500)

    @torch.no_grad()
    def picture(images: int) -> None:
        reconstructions = generator(average(x[:32]))
        pairs = torch.stack([x[:32], reconstructions], 1).flatten(0, 1)
        context.board.add_image("test images and G(E(x))", grid(pairs, 16), images)
        error = (generator(average(x)) - x).square().mean()
        context.board.add_scalar("test_reconstruction_error", float(error), images)

    batches = context.image_batches(config.batch_size)
    loop = train_encoder(
        fabric, state, generator, batches, config, seed, disturb=config.disturbance, agree=_agreement(context)
    )
    with blamed_on(config.own_classifier, "encoder.classifier"):
        context.train(loop, state, config.images, picture)
    if config.images and config.disturbance.kind == "adversarial":
        trained = tuple(dict.fromkeys((*trained, *config.disturbance.threats)))
    if context.main:
        save_filter(ManifoldFilter(generator, average, trained=trained), context.folder)
    with torch.no_grad():
        return {"encoder_error": float((generator(average(x)) - x).square().mean())}


def _agreement(context: Context) -> Agree | None:
    """That with the classifier whose answers the drawings are to keep, if there is one."""
    config = context.config.encoder
    if not config.agrees:
        return None
    device, own = context.fabric.device, config.own_classifier
    known: nn.Module
    if own:
        known = load_own(own, context.data, device, "encoder.classifier")
    else:
        variant = next((v for v in context.config.harden if v.name == config.classifier), None)
        known = behind(variant.behind if variant else "", _classifier(context, config.classifier), None)
    return partial(Agreement, known.requires_grad_(False), share=config.share)


def _classifier(context: Context, name: str) -> ImageClassifier:
    """That of a folder, of a variant of the run, or, without a name, of stage train-classifier."""
    if "/" in name:
        return load_own_classifier(name, context.data, context.fabric.device)
    folder = context.inputs["harden"] / name if name else context.inputs["train-classifier"]
    return load_classifier(folder).to(context.fabric.device)


def _networks(context: Context) -> tuple[Generator, OwnEncoder | None, tuple[Threat, ...]]:
    """Generator and encoder that the training starts from, and the threats that the latter has met."""
    folder = context.config.filter
    if not folder:
        return *load_gan(context.inputs["train-gan"]), ()
    filter = load_own_filter(folder, context.data.image_shape, context.fabric.device)
    generator, encoder = filter.generator, filter.encoder
    assert isinstance(generator, Generator)  # as in every folder of a filter
    assert isinstance(encoder, OwnEncoder | None)
    return generator, None if encoder is None else encoder.requires_grad_(True), filter.trained
