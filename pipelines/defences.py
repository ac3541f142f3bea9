"""The defences that are evaluated: classifiers bare, behind the filter, and behind the baselines."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from manifold_defense.artifact import load_classifier, load_gan
from manifold_defense.attacks import Expectation
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
from pipelines.context import Context
from pipelines.data import subset, to_float
from pipelines.own import load_own, load_own_filter

# Whose worst of all attacks is set beside whose.
PAIRS = (("undefended", "filter"), ("hardened", "hardened+filter"), ("own", "own+filter"))
_CALIBRATION = 500  # images on which a threshold is set
_DRAWS = 10  # of a randomised baseline, for each verdict and each averaged gradient


def load_parts(context: Context) -> tuple[ManifoldFilter, ImageClassifier]:
    """The filter of this run and the classifier, on this process's device."""
    generator, encoder = load_gan(context.inputs["train-encoder"])
    filter = ManifoldFilter(generator, encoder, context.config.projection)
    classifier = load_classifier(context.inputs["train-classifier"])
    device = context.fabric.device
    return filter.to(device), classifier.requires_grad_(False).to(device)


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
    hardened = load_classifier(context.inputs["harden"]).requires_grad_(False).to(device)
    harden = context.config.harden
    trained = (Threat(harden.norm, harden.eps),) if harden.objective == "pgd" else ()
    return [
        Defence.bare("undefended", classifier),
        *_baselines(context, classifier, filter),
        *_filtered("filter", context, classifier, filter),
        Defence.bare("hardened", hardened, trained),
        Defence.filtered("hardened+filter", DefendedClassifier(filter, hardened), trained),
    ]


def _own_defences(source: str, folder: str, context: Context) -> list[Defence]:
    device = context.fabric.device
    classifier = load_own(source, context.data.image_shape, device)
    filter = load_own_filter(folder, context.data.image_shape, device) if folder else None
    defences = [Defence.bare("own", classifier), *_baselines(context, classifier, filter)]
    if filter is not None:
        defences += _filtered("own+filter", context, classifier, filter)
    return defences


def _baselines(context: Context, classifier: nn.Module, filter: ManifoldFilter | None) -> list[Defence]:
    """Preprocessing that costs next to nothing, in front of the same classifier.

    Without a filter those that are parts of it are left out.
    """
    device = context.fabric.device
    made: dict[str, Callable[[], Preprocess]] = {
        "binarise": Binarise,
        "bit_depth": BitDepth,
        "jpeg": Jpeg,
        "blur": Blur,
        "noise": RandomNoise,
    }
    defences = []
    for name in context.config.evaluate.baselines:
        if name in made:
            preprocess = made[name]()
        elif filter is None:
            continue
        elif name == "nearest":
            preprocess = NearestBank(_bank_images(filter))
        else:  # the encoder alone
            defended = DefendedClassifier(filter.configured(PRESETS["single_shot"]), classifier)
            defences.append(Defence.filtered(name, defended))
            continue
        defence = Defence.preprocessed(name, Preprocessed(preprocess, classifier).to(device))
        defences.append(_averaged(defence) if isinstance(preprocess, RandomNoise) else defence)
    return defences


def _averaged(defence: Defence) -> Defence:
    """A defence that draws: its mean over draws is attacked, its score the share of draws that are right."""
    attacked = {
        view: model if view == "unaware" else Expectation(model, _DRAWS)
        for view, model in defence.attacked.items()
    }
    return replace(defence, attacked=attacked, draws=_DRAWS)


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
        yield _averaged(Defence.filtered(f"{name}+random", DefendedClassifier(drawing, classifier)))
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
