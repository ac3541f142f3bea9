"""An encoder that begins as a classifier: whose body it has, and what its last layer solves."""

from typing import Any

import pytest
import scipy.linalg
import torch
from torch import nn

from gan.optimisation import seeded
from manifold_defense.classifiers import ArchitectureConfig, ImageClassifier
from manifold_defense.encoders import encoder_from


def make_classifier(name: Any = "cnn", shape: tuple[int, int, int] = (1, 8, 8)) -> ImageClassifier:
    def build() -> ImageClassifier:
        mean, std = torch.full(shape[:1], 0.3), torch.full(shape[:1], 0.4)
        return ImageClassifier(shape, 10, ArchitectureConfig(name, width=4), mean, std)

    return seeded(0, build).eval()


def test_of_a_linear_generator_it_is_the_inverse(linear: Any) -> None:
    """Features that are pixels determine z, whatever the normalisation before them."""
    classifier = make_classifier().double()
    classifier.body, classifier.head = nn.Flatten(), nn.Linear(64, 10).double()
    encoder = encoder_from(classifier, linear, samples=300)
    z = torch.randn(20, linear.latent_dim, generator=torch.Generator().manual_seed(1)).double()
    torch.testing.assert_close(encoder(linear(z)), z)
    x = torch.rand(20, 1, 8, 8, generator=torch.Generator().manual_seed(2)).double()
    x = linear(linear.solve(x))  # the nearest image that it can draw
    torch.testing.assert_close(encoder(x), linear.solve(x))


@pytest.mark.parametrize("name", ["cnn", "shallow", "resnet18"])
def test_its_last_layer_is_that_of_least_squares(networks: Any, name: str) -> None:
    generator, classifier = networks[0], make_classifier(name)
    encoder = encoder_from(classifier, generator, samples=600, seed=5)
    assert encoder.classes == generator.latent_dim
    z = torch.randn(600, 6, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        features = classifier.features(generator(z)).double()
    rows = torch.cat([features, torch.ones(600, 1)], 1)
    solution = torch.from_numpy(scipy.linalg.lstsq(rows.numpy(), z.double().numpy(), cond=1e-5)[0])
    with torch.no_grad():
        error = (encoder(generator(z)) - z).square().sum()
    assert float(error) == pytest.approx(float((rows @ solution - z).square().sum()), rel=1e-3)
    assert error < 0.9 * z.square().sum()


def test_it_takes_the_body_and_leaves_the_classifier(networks: Any) -> None:
    classifier = make_classifier().requires_grad_(False)
    before = {name: value.clone() for name, value in classifier.state_dict().items()}
    state = torch.random.get_rng_state()
    encoder = encoder_from(classifier, networks[0], samples=50)
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(parameter.requires_grad for parameter in encoder.parameters())
    with torch.no_grad():
        for parameter in encoder.body.parameters():
            parameter += 1
    after = classifier.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert classifier.classes == 10
    again = encoder_from(classifier, networks[0], samples=50)
    assert torch.equal(again.head.weight, encoder.head.weight)
    body = again.body.state_dict()
    assert all(torch.equal(value, body[name]) for name, value in classifier.body.state_dict().items())


def test_a_feature_that_no_sample_has_weighs_nothing(networks: Any) -> None:
    classifier = make_classifier()
    with torch.no_grad():
        classifier.body[-2].bias[:100] = -1e6  # before its ReLU
    encoder = encoder_from(classifier, networks[0], samples=200)
    assert encoder.head.weight.isfinite().all()
    assert encoder.head.weight[:, :100].abs().max() < 1e-6 < encoder.head.weight[:, 100:].abs().max()


def test_a_classifier_of_other_images_is_refused(networks: Any) -> None:
    with pytest.raises(ValueError, match=r"expected one of images \(1, 8, 8\), got \(3, 8, 8\)"):
        encoder_from(make_classifier(shape=(3, 8, 8)), networks[0])
