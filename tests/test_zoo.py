"""The trained weights that come with the project: small, whole, as their cards say, and of use."""

import hashlib
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from manifold_defense import PRESETS, load_classifier, load_filter
from manifold_defense.certification import branching_certificates
from manifold_defense.evaluation.baselines import Binarise, Preprocessed

MNIST = Path(__file__).parents[1] / "zoo" / "mnist"
FILTERS = (
    "filter",
    *(f"filter-{kind}" for kind in ("windows", "fitted", "fitted-pgd", "trades", "union", "mixed")),
)
WEIGHTS = sorted(MNIST.glob("*/*.safetensors"))


def test_there_is_a_filter_and_its_classifiers() -> None:
    classifiers = {"undefended", "classifier"}
    classifiers |= {f"classifier-{kind}" for kind in ("behind", "pgd", "proved", "union")}
    assert {path.parent.name for path in WEIGHTS} == {*FILTERS, *classifiers}


@pytest.mark.parametrize("path", WEIGHTS, ids=lambda path: path.parent.name)
def test_weights_are_those_of_the_card(path: Path) -> None:
    assert path.stat().st_size < 4e6
    card = (path.parent / "README.md").read_text(encoding="utf-8")
    assert re.findall(r"\b[0-9a-f]{64}\b", card) == [hashlib.sha256(path.read_bytes()).hexdigest()]
    for word in ("Command", "Seed", "Minutes"):
        assert word in card


@pytest.mark.parametrize("name", FILTERS)
def test_a_filter_redraws_its_own_drawings_and_not_noise(name: str) -> None:
    filter = load_filter(MNIST / name)
    assert filter.config == PRESETS["robust"]
    assert filter.image_shape == (1, 28, 28)
    accurate = filter.configured(PRESETS["accurate"])
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        drawn = filter.generator(torch.randn(8, 64, generator=rng))
    noise = torch.rand(8, 1, 28, 28, generator=rng)
    assert accurate.project(drawn).error.mean() < 0.004
    assert accurate.project(noise).error.mean() > 0.1
    # Ink: the drawings are neither empty nor full.
    assert 0.05 < float(drawn.mean()) < 0.4


def test_the_filters_have_one_generator_and_an_encoder_each() -> None:
    first, *others = (load_filter(MNIST / name) for name in FILTERS)
    x = torch.rand(2, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    drawn = [first(x)]
    for other in others:
        pairs = zip(first.generator.parameters(), other.generator.parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
        assert not any(torch.equal(other(x), before) for before in drawn)
        drawn.append(other(x))


@pytest.mark.parametrize(
    ("before", "name", "strength"),
    [
        ("filter", "classifier", 1.0),
        ("filter", "classifier-behind", 0.3),
        ("filter", "classifier-pgd", 1.0),
        ("filter", "undefended", 1.0),
        ("filter-fitted", "undefended", 1.0),
        ("filter-fitted-pgd", "classifier-pgd", 1.0),
        ("filter-trades", "classifier", 1.0),
        ("filter-union", "undefended", 1.0),
        ("filter-union", "classifier", 1.0),
    ],
)
def test_a_classifier_sees_what_the_filter_keeps(before: str, name: str, strength: float) -> None:
    """Of confident drawings, most keep their class."""
    filter, classifier = load_filter(MNIST / before), load_classifier(MNIST / name)
    filter = filter.configured(replace(filter.config, strength=strength))
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        drawn = filter.generator(torch.randn(1000, 64, generator=rng))
        logits = classifier(drawn)
        sure = logits.softmax(1).amax(1) > 0.9
        kept = classifier(filter(drawn)).argmax(1) == logits.argmax(1)
    assert sure.sum() > 300
    assert kept[sure].float().mean() > 0.9


@pytest.mark.parametrize("name", ["classifier", "classifier-pgd", "classifier-union"])
def test_a_hardened_classifier_says_of_drawings_what_the_other_is_sure_of(name: str) -> None:
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        drawn = load_filter(MNIST / "filter").generator(torch.randn(60, 64, generator=rng))
        answers = load_classifier(MNIST / "undefended")(drawn).softmax(1)
        sure = answers.amax(1) > 0.99
        agreed = load_classifier(MNIST / name)(drawn).argmax(1) == answers.argmax(1)
    assert sure.sum() > 15
    assert agreed[sure].float().mean() > 0.9


def test_a_classifier_proves_its_answers_to_most_drawings() -> None:
    proved = Preprocessed(Binarise(), load_classifier(MNIST / "classifier-proved"))
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        drawn = load_filter(MNIST / "filter").generator(torch.randn(40, 64, generator=rng))
    sure = load_classifier(MNIST / "undefended")(drawn).softmax(1).amax(1) > 0.99
    found = branching_certificates(proved, drawn[sure][:8], radii=(0.3,), boxes=100)
    assert (found.radius == 0.3).sum() >= 4
    others = Preprocessed(Binarise(), load_classifier(MNIST / "classifier"))
    assert not (branching_certificates(others, drawn[sure][:2], radii=(0.3,), boxes=10).radius > 0).any()
