"""Proofs: closed forms and oracles, and no attack inside any radius."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.nn import functional as F

from gan.optimisation import seeded
from manifold_defense.attacks import apgd, pgd
from manifold_defense.certification import (
    ABSTAINED,
    Certificates,
    PatchClassifier,
    certified_accuracy,
    decide,
    fit_patches,
    interval_certificates,
    interval_logits,
    intervals_prove,
    linear_certificates,
    linear_worst_margin,
    lipschitz_certificates,
    lipschitz_constant,
)
from manifold_defense.certification.intervals import Box, hidden_boxes
from manifold_defense.certification.lipschitz import convolution_norm
from manifold_defense.classifiers import ArchitectureConfig, ImageClassifier
from manifold_defense.evaluation.baselines import Binarise, BitDepth, Blur, Preprocess, Preprocessed
from manifold_defense.hardening import IntervalBounds
from tests.defence.hardening_support import trained


@pytest.fixture(scope="module")
def bounded(fabric: Fabric, digits: Any) -> ImageClassifier:
    return trained(fabric, digits, IntervalBounds(eps=0.05, ramp=0.4))


# --- The result ---


def test_certified_accuracy_counts_what_is_right_and_proved() -> None:
    found = Certificates(torch.tensor([1, 1, 0, ABSTAINED]), torch.tensor([0.5, 0.2, 0.9, 0.0]))
    shares = certified_accuracy(found, torch.tensor([1, 1, 1, 1]), (0.0, 0.2, 0.3, 0.6))
    assert shares.tolist() == [0.5, 0.5, 0.25, 0.0]
    assert certified_accuracy(found, torch.tensor([1, 1, 1, 1]), ()).shape == (0,)


# --- Lipschitz constants ---


@pytest.mark.parametrize(
    ("kernel", "stride", "padding"), [(3, 1, 1), (4, 2, 1), (3, 2, 0), (5, 3, 2), (1, 1, 0), (2, 2, 0)]
)
def test_the_norm_of_a_convolution_is_bounded_and_closely(kernel: int, stride: int, padding: int) -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(2, 3, kernel, stride, padding, bias=False).double()
    eye = torch.eye(2 * 10 * 9, dtype=torch.float64).view(-1, 2, 10, 9)
    matrix = layer(eye).flatten(1)
    exact = float(torch.linalg.matrix_norm(matrix, 2).detach())
    bound = convolution_norm(layer, (2, 10, 9))
    assert exact * (1 - 1e-12) <= bound <= 1.25 * exact


def test_no_two_images_stretch_more_than_the_constant(hardened: ImageClassifier, digits: Any) -> None:
    constant = lipschitz_constant(hardened)
    x = digits[0][:100]
    for scale in (1.0, 1e-2):
        y = x + scale * torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            stretch = (hardened(x) - hardened(y)).norm(dim=1) / (x - y).flatten(1).norm(dim=1)
        assert float(stretch.max()) <= constant


def test_a_lipschitz_radius_is_at_least_the_margin_over_two_constants(
    hardened: ImageClassifier, digits: Any
) -> None:
    found = lipschitz_certificates(hardened, digits[0])
    with torch.no_grad():
        top = hardened(digits[0]).double().topk(2).values
    least = (top[:, 0] - top[:, 1]) / (2 * lipschitz_constant(hardened))
    assert (found.radius >= least * (1 - 1e-6)).all()
    assert (found.radius > 0).all()


def test_of_a_linear_network_the_lipschitz_radius_is_exact(digits: Any) -> None:
    """Its body the identity, its normalisation none."""
    model = ImageClassifier((1, 8, 8), 10, ArchitectureConfig(width=4), torch.zeros(1), torch.ones(1))
    torch.manual_seed(0)
    model.body, model.head = nn.Flatten(), nn.Linear(64, 10)
    found = lipschitz_certificates(model, digits[0])
    exact = linear_certificates(model.head.weight, model.head.bias, digits[0], norm="l2")
    torch.testing.assert_close(found.radius, exact.radius, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("certify", [lipschitz_certificates, interval_certificates])
def test_a_network_that_a_proof_cannot_follow_is_refused(certify: Any) -> None:
    model = ImageClassifier((1, 8, 8), 10, ArchitectureConfig(width=4))
    model.body = nn.Sequential(model.body, nn.GELU())
    with pytest.raises(TypeError, match="layer of kind GELU"):
        certify(model, torch.rand(2, 1, 8, 8))
    # What a box spreads to through a border that is not of zeros no convolution of its radius says.
    model.body = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1, padding_mode="circular"), nn.Flatten())
    model.head = nn.Linear(256, 10)
    with pytest.raises(TypeError, match="padded with zeros, got circular padding"):
        certify(model, torch.rand(2, 1, 8, 8))


# --- Interval bounds ---


def test_interval_bounds_hold_and_are_exact_without_hidden_layers(digits: Any) -> None:
    x, y = digits[0][:50], digits[1][:50]
    model = ImageClassifier((1, 8, 8), 10, ArchitectureConfig(width=4))
    model.body, model.head = nn.Flatten(), nn.Linear(64, 10)
    bounds = interval_logits(model, x, y, 0.1).double()
    worst = -bounds.scatter(1, y.unsqueeze(1), -torch.inf).amax(1)
    weight = (model.head.weight / 0.5).detach()
    bias = (model.head.bias - 0.5 * weight.sum(1)).detach()
    torch.testing.assert_close(
        worst.detach(), linear_worst_margin(weight, bias, x, y, eps=0.1), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("eps", [0.0, 0.02, 0.1])
def test_nothing_in_the_box_exceeds_the_bounds(bounded: ImageClassifier, digits: Any, eps: float) -> None:
    x, y = digits[0][:50], digits[1][:50]
    with torch.no_grad():
        bounds = interval_logits(bounded, x, y, eps)
        corners = [(x + eps * torch.randn(x.shape).sign()).clamp(0, 1) for _ in range(20)]
        corners.append(pgd(bounded, x, y, eps=eps, steps=10, stop_early=False))
        for moved in corners:
            logits = bounded(moved)
            assert (logits - logits.gather(1, y.unsqueeze(1)) <= bounds + 1e-4).all()
    assert (bounds.gather(1, y.unsqueeze(1)) == 0).all()


@pytest.mark.parametrize("preprocess", [Binarise(), BitDepth(2), Blur(0.7)], ids=lambda p: type(p).__name__)
def test_bounds_follow_a_monotone_preprocessing(
    bounded: ImageClassifier, digits: Any, preprocess: Preprocess
) -> None:
    """Nothing that an attack through any view makes of the images exceeds them; and they are no looser than
    the box behind the preprocessing."""
    assert preprocess.monotone
    x, y = digits[0][:30], digits[1][:30]
    model = Preprocessed(preprocess, bounded)
    with torch.no_grad():
        bounds = interval_logits(model, x, y, 0.1)
        for view in model.views():
            moved = pgd(model.view(view), x, y, eps=0.1, steps=10, stop_early=False)
            logits = model(moved)
            assert (logits - logits.gather(1, y.unsqueeze(1)) <= bounds + 1e-4).all()
    found = interval_certificates(model, x)
    for i in found.radius.argsort(descending=True)[:5].tolist():
        image, label = x[i : i + 1], found.prediction[i : i + 1]
        for view in model.views():
            eps = 0.999 * float(found.radius[i])
            moved = pgd(model.view(view), image, label, eps=eps, steps=20, loss="margin")
            assert (model(moved).argmax(1) == label).all()


def test_pixels_far_from_the_threshold_cannot_be_moved(digits: Any) -> None:
    """A black and white image behind a threshold is proved up to a half, whatever the network."""
    model = Preprocessed(
        Binarise(), seeded(0, lambda: ImageClassifier((1, 8, 8), 10, ArchitectureConfig(width=4)))
    )
    found = interval_certificates(model, (digits[0][:10] > 0.5).float())
    assert ((found.radius > 0.499) & (found.radius <= 0.5)).all()


def test_the_radius_is_the_last_that_the_bounds_prove(bounded: ImageClassifier, digits: Any) -> None:
    x = digits[0]
    found = interval_certificates(bounded, x)
    assert float(found.radius.median()) > 0.01

    def safe(radius: Tensor) -> Tensor:
        with torch.no_grad():
            bounds = interval_logits(bounded, x, found.prediction, radius)
        return bounds.scatter(1, found.prediction.unsqueeze(1), -torch.inf).amax(1) < 0

    assert safe(found.radius)[found.radius > 0].all()
    assert not safe(found.radius + 1 / 2**11).any()


def test_a_proof_behind_a_threshold_holds_what_rounding_leaves_out() -> None:
    """Grey 51 of 255 and 0.3 make a hair more than a half, in float32 a half: black."""

    def model() -> Preprocessed:
        made = ImageClassifier((1, 1, 1), 2, ArchitectureConfig("shallow", width=1))
        first, made.head = nn.Linear(1, 1), nn.Linear(1, 2)
        made.body = nn.Sequential(nn.Flatten(), first, nn.ReLU())
        first.weight.data.fill_(1.0), first.bias.data.fill_(0.0)
        made.head.weight.data, made.head.bias.data = torch.tensor([[1.0], [-1.0]]), torch.tensor([-0.5, 0.5])
        return Preprocessed(Binarise(), made).requires_grad_(False)

    x, y = torch.full((1, 1, 1, 1), 51 / 255), torch.tensor([1])
    assert float(x) + 0.3 > 0.5
    assert not bool(x + 0.3 > 0.5)
    assert not intervals_prove(model(), x, y, 0.3)
    assert not decide(model(), x, y, 0.3).proved
    assert intervals_prove(model(), x, y, 0.299999)
    assert decide(model(), x, y, 0.299999).proved


def test_a_layer_that_writes_over_its_input_changes_no_bound(bounded: ImageClassifier, digits: Any) -> None:
    x, own = digits[0][:20], copy.deepcopy(bounded)
    box = Box((x - 0.05).clamp(0, 1), (x + 0.05).clamp(0, 1))
    for layer in own.body.modules():
        if isinstance(layer, nn.ReLU):
            layer.inplace = True
    for expected, found in zip(hidden_boxes(bounded, box), hidden_boxes(own, box), strict=True):
        assert torch.equal(expected.lower, found.lower)
        assert torch.equal(expected.upper, found.upper)


def test_a_proof_is_of_full_precision(bounded: ImageClassifier, digits: Any) -> None:
    x = digits[0][:50]
    expected = lipschitz_certificates(bounded, x), interval_certificates(bounded, x)
    with torch.autocast("cpu", torch.bfloat16):
        found = lipschitz_certificates(bounded, x), interval_certificates(bounded, x)
        assert torch.equal(found[0].radius, expected[0].radius)
        assert torch.equal(found[1].radius, expected[1].radius)


def test_no_radius_below_zero_is_proved(bounded: ImageClassifier, digits: Any) -> None:
    x, wrong = digits[0][:5], (digits[1][:5] + 1) % 10
    for eps in (-0.5, torch.tensor([0.1, -0.1, 0.1, 0.1, 0.1]), float("nan")):
        with pytest.raises(ValueError, match=r"^eps: expected at least 0"):
            intervals_prove(bounded, x, wrong, eps)


# --- No certified image is broken inside its radius ---


@pytest.mark.parametrize("method", ["lipschitz", "intervals", "distance"])
def test_no_attack_contradicts_a_proof(
    hardened: ImageClassifier, bounded: ImageClassifier, digits: Any, method: str
) -> None:
    x = digits[0][150:]
    model: Any
    if method == "distance":
        model = fit_patches(digits[0][:150], digits[1][:150], patches=3, directions=2)
        x = x.double()
        found, norm = model.certify(x), "l2"
    elif method == "lipschitz":
        model, found, norm = hardened, lipschitz_certificates(hardened, x), "l2"
    else:
        model, found, norm = bounded, interval_certificates(bounded, x), "linf"
    order = found.radius.argsort(descending=True)
    assert float(found.radius[order[0]]) > 0.01
    for i in order[:12].tolist():  # each at its own radius, and the same images a good way beyond it
        image, label, radius = x[i : i + 1], found.prediction[i : i + 1], float(found.radius[i])
        for attack in (pgd, apgd):
            moved = attack(
                model, image, label, norm=norm, eps=0.999 * radius, steps=30, restarts=2, loss="margin"
            )
            assert (model(moved).argmax(1) == label).all()
    beyond = pgd(
        model, x, found.prediction, norm=norm, eps=30 * float(found.radius.median()), steps=30, loss="margin"
    )
    assert (model(beyond).argmax(1) != found.prediction).float().mean() > 0.5


# --- Distances to a manifold a class ---


def test_the_distance_to_points_and_to_patches_is_that_of_least_squares() -> None:
    rng = torch.Generator().manual_seed(0)
    means = torch.rand(5, 12, generator=rng, dtype=torch.float64)
    bases = torch.linalg.qr(torch.randn(5, 12, 2, generator=rng, dtype=torch.float64)).Q.transpose(1, 2)
    labels = torch.tensor([0, 1, 1, 0, 2])
    x = torch.rand(4, 1, 3, 4, generator=rng, dtype=torch.float64)
    for directions in (0, 2):
        found = PatchClassifier(means, bases[:, :directions], labels).distances(x)
        for i, image in enumerate(x.flatten(1)):
            for label in range(3):
                rest = [
                    float(np.linalg.norm(gap - basis.T @ np.linalg.lstsq(basis.T, gap)[0]))
                    for mean, basis, own in zip(means, bases[:, :directions].numpy(), labels, strict=True)
                    if own == label
                    for gap in [(image - mean).numpy()]
                ]
                assert float(found[i, label]) == pytest.approx(min(rest), rel=1e-9)


def test_a_distance_classifier_finds_the_digits_and_is_one_lipschitz(digits: Any) -> None:
    x, y = digits[0].double(), digits[1]
    for patches, directions in ((0, 0), (4, 3)):
        model = fit_patches(x[:150], y[:150], patches=patches, directions=directions)
        assert (model(x[150:]).argmax(1) == y[150:]).double().mean() > 0.85
        other = (x + 0.3 * torch.randn(x.shape, dtype=torch.float64)).clamp(0, 1)
        change = (model.distances(x) - model.distances(other)).abs().amax(1)
        assert (change <= (x - other).flatten(1).norm(dim=1) + 1e-9).all()


def test_a_distance_classifier_that_is_filled_is_the_one_whose_weights_it_has() -> None:
    rng = torch.Generator().manual_seed(0)
    x, y = torch.rand(2, 40, 1, 3, 3, generator=rng), torch.arange(40) % 2
    one, other = (fit_patches(images, y, patches=2, directions=3) for images in x)
    expected = one.certify(x[0])
    other.load_state_dict(one.state_dict())
    found = other.certify(x[0])
    assert torch.equal(found.prediction, expected.prediction)
    assert torch.equal(found.radius, expected.radius)


def test_a_patch_has_no_more_directions_than_there_are_pixels() -> None:
    x, y = torch.rand(40, 1, 2, 2, generator=torch.Generator().manual_seed(0)), torch.arange(40) % 2
    distances = fit_patches(x, y, patches=1, directions=9).distances(x)
    assert (distances < 1e-5).all()  # all of space


def test_a_distance_classifier_says_what_it_expects() -> None:
    with pytest.raises(ValueError, match="bases: expected rows of length 1"):
        PatchClassifier(torch.rand(2, 3), torch.full((2, 1, 3), 3.0), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="bases: expected"):
        PatchClassifier(torch.rand(3, 4), torch.rand(3, 1, 5), torch.tensor([0, 1, 2]))
    with pytest.raises(ValueError, match="labels: expected"):
        PatchClassifier(torch.rand(2, 4), torch.rand(2, 0, 4), torch.tensor([0, 2]))
    with pytest.raises(ValueError, match="at least two classes"):
        fit_patches(torch.rand(3, 1, 2, 2), torch.tensor([0, 0, 0]))


def test_the_loss_of_the_bounds_is_above_that_of_every_attack(bounded: ImageClassifier, digits: Any) -> None:
    x, y = digits[0][:50], digits[1][:50]
    with torch.no_grad():
        upper = F.cross_entropy(interval_logits(bounded, x, y, 0.05), y, reduction="none")
        attacked = F.cross_entropy(
            bounded(pgd(bounded, x, y, eps=0.05, steps=10, stop_early=False)), y, reduction="none"
        )
    assert (attacked <= upper + 1e-5).all()
