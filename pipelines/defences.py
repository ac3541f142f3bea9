"""The defences that are evaluated: classifiers bare, behind the filter, and behind the baselines."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from manifold_defense.artifact import load_classifier, load_filter
from manifold_defense.classifiers import ImageClassifier
from manifold_defense.evaluation import Defence
from manifold_defense.evaluation.baselines import (
    Binarise,
    BitDepth,
    Blur,
    Jpeg,
    NearestBank,
    Preprocess,
    Preprocessed,
    RandomNoise,
)
from manifold_defense.filter import DefendedClassifier, ManifoldFilter
from manifold_defense.projection import PRESETS, make_bank
from manifold_defense.randomised import RandomisedFilter
from manifold_defense.rejection import RejectingClassifier, threshold_at
from manifold_defense.types import Threat
from pipelines.config import Config, HardenConfig
from pipelines.context import Context
from pipelines.data import subset, to_float
from pipelines.own import load_own, load_own_filter

_CALIBRATION = 500  # images on which a threshold is set


def load_run_filter(context: Context) -> ManifoldFilter:
    """The filter of this run, on this process's device."""
    filter = load_filter(context.inputs["train-encoder"])
    return filter.configured(context.config.projection).to(context.fabric.device)


def load_parts(context: Context) -> tuple[ManifoldFilter, ImageClassifier]:
    """The filter of this run and the classifier, on this process's device."""
    classifier = load_classifier(context.inputs["train-classifier"])
    return load_run_filter(context), classifier.requires_grad_(False).to(context.fabric.device)


PREPROCESSING: dict[str, Callable[[], Preprocess]] = {
    "binarise": Binarise,
    "bit_depth": BitDepth,
    "jpeg": Jpeg,
    "blur": Blur,
    "noise": RandomNoise,
}


def behind(place: str, classifier: nn.Module, filter: ManifoldFilter | None) -> nn.Module:
    """The classifier where a variant is deployed: bare, behind the filter, or behind a preprocessing."""
    if not place:
        return classifier
    if place in PREPROCESSING:
        return Preprocessed(PREPROCESSING[place](), classifier)
    assert filter is not None
    return DefendedClassifier(filter, classifier)


def compared(config: Config) -> list[tuple[str, str]]:
    """Whose worst of all attacks is set beside whose: without the filter first.

    A variant that was trained behind the filter has the first that was not to beat.
    """
    kinds = ("filter", "mixed") if config.evaluate.mixed else ("filter",)
    if config.evaluate.classifier:
        return [("own", f"own+{kind}") for kind in kinds] if config.evaluate.filter else []
    static = next((v.name for v in config.harden if not v.behind), "undefended")
    pairs = [("undefended", "filter")]
    for variant in config.harden:
        if variant.behind in PREPROCESSING:
            continue
        before = static if variant.behind else variant.name
        pairs += [(before, f"{variant.name}+{kind}") for kind in kinds]
    return pairs


def make_defences(context: Context) -> list[Defence]:
    """The classifier and the hardened one, bare and behind the filter, and the baselines beside them.

    With `evaluate.classifier` set, that classifier takes the place of both, behind `evaluate.filter`
    if there is one.
    """
    device = context.fabric.device
    own = context.config.evaluate.classifier
    if own:
        return _own_defences(own, context.config.evaluate.filter, context)
    filter, classifier = load_parts(context)
    defences = [
        Defence.bare("undefended", classifier),
        *_baselines(context, classifier, filter),
        *_filtered("filter", context, classifier, filter),
    ]
    for variant in context.config.harden:
        hardened = load_classifier(context.inputs["harden"] / variant.name).requires_grad_(False).to(device)
        defences += _hardened(variant, hardened, filter, context.config.evaluate.mixed)
    return defences


def _hardened(
    variant: HardenConfig, classifier: nn.Module, filter: ManifoldFilter, mixed: float
) -> list[Defence]:
    """The rows of a variant: behind its preprocessing, or bare, behind the filter, and both at once."""
    trained = variant.objective.threats
    if variant.behind in PREPROCESSING:
        return [_preprocessed(variant.name, PREPROCESSING[variant.behind](), classifier, trained)]
    return [
        # What was trained behind the filter was not trained for the ball without it.
        Defence.bare(variant.name, classifier, () if variant.behind else trained),
        Defence.filtered(f"{variant.name}+filter", DefendedClassifier(filter, classifier), trained),
        *_mixed(variant.name, filter, classifier, mixed, trained),
    ]


def _mixed(
    name: str, filter: ManifoldFilter, classifier: nn.Module, share: float, trained: tuple[Threat, ...] = ()
) -> Iterator[Defence]:
    """The classifier asked of the image and of its drawing, if the latter is to have a share."""
    if share:
        yield Defence.filtered(f"{name}+mixed", DefendedClassifier(filter, classifier, share), trained)


def _preprocessed(
    name: str, preprocess: Preprocess, classifier: nn.Module, trained: tuple[Threat, ...] = ()
) -> Defence:
    return Defence.preprocessed(name, Preprocessed(preprocess, classifier), trained)


def _own_defences(source: str, folder: str, context: Context) -> list[Defence]:
    device = context.fabric.device
    classifier = load_own(source, context.data, device)
    filter = load_own_filter(folder, context.data.image_shape, device) if folder else None
    defences = [Defence.of("own", classifier), *_baselines(context, classifier, filter)]
    if filter is not None:
        defences += _filtered("own+filter", context, classifier, filter)
        defences += _mixed("own", filter, classifier, context.config.evaluate.mixed)
    return defences


def _baselines(context: Context, classifier: nn.Module, filter: ManifoldFilter | None) -> list[Defence]:
    """Preprocessing that costs next to nothing, in front of the same classifier.

    Without a filter those that are parts of it are left out.
    """
    defences = []
    for name in context.config.evaluate.baselines:
        if name in PREPROCESSING:
            defences.append(_preprocessed(name, PREPROCESSING[name](), classifier))
        elif filter is None:
            continue
        elif name == "nearest":
            defences.append(_preprocessed(name, NearestBank(_bank_images(filter)), classifier))
        elif filter.config != PRESETS["single_shot"]:  # the encoder alone, if the filter is not that
            defended = DefendedClassifier(filter.configured(PRESETS["single_shot"]), classifier)
            defences.append(Defence.filtered(name, defended))
    return defences


def _filtered(
    name: str, context: Context, classifier: nn.Module, filter: ManifoldFilter
) -> Iterator[Defence]:
    """The classifier behind the filter, behind one that draws some of its starts, and one that refuses.

    The last refuses what it cannot draw. Its threshold is set on images that are not reported: test
    images beyond those that are attacked, for the generator draws the training images better. Where
    too few are left, training images have to do, and more than `reject` will be refused.
    """
    config, data = context.config.evaluate, context.data
    yield Defence.filtered(name, DefendedClassifier(filter, classifier))
    if config.random:
        drawing = RandomisedFilter(filter.configured(replace(filter.config, restarts=1 + config.random)))
        yield Defence.filtered(f"{name}+random", DefendedClassifier(drawing, classifier))
    if not config.reject:
        return
    attacked = config.images or len(data.test.labels)
    rest = subset(data.test, len(data.test.labels)).images[attacked:]
    pixels = rest if len(rest) >= 100 else data.train.images
    images = to_float(pixels[:_CALIBRATION].to(context.fabric.device))
    errors = torch.cat([filter.project(part).error for part in images.split(100)])
    rejecting = RejectingClassifier(filter, classifier, threshold_at(errors, config.reject))
    yield Defence.filtered(f"{name}+reject", rejecting)


def _bank_images(filter: ManifoldFilter) -> Tensor:
    """Samples of the generator (M, C, H, W)."""
    like = next(filter.generator.parameters())[:0]
    bank = make_bank(filter.generator, like, 4096, seed=0)  # type: ignore[arg-type]
    return bank.image.view(-1, *filter.image_shape)
