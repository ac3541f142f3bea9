"""Images that trainings are judged on, and the worst of their threats, image by image."""

import pytest
import torch
from torch import nn

from manifold_defense.types import Threat
from pipelines.data import DataError, ImageData, load_data
from pipelines.judging import accuracy, held_out, quick_attack
from pipelines.settings import load_config

THREATS = (
    Threat("linf", 0.1),
    Threat("l2", 0.7),
    Threat("l1", 3),
    Threat("l0", 3),
    Threat("patch", 2),
    Threat("corruption", 2),
)


@pytest.fixture(scope="module")
def fitted(digits):
    """The nearest class mean, which is linear, and the digits: images and labels."""
    x, y = digits
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    means = torch.stack([x[y == digit].flatten(1).mean(0) for digit in range(10)])
    model[1].weight.data, model[1].bias.data = means, -0.5 * means.square().sum(1)
    return model, x, y


def kept(model, x, y, threat):
    with torch.no_grad():
        return model(quick_attack(threat, 5)(model, x, y)).argmax(1) == y


@pytest.mark.parametrize("threat", THREATS, ids=str)
def test_each_threat_counts(fitted, threat):
    model, x, y = fitted
    under = accuracy(model, x, y, (threat,), steps=5)
    assert 0 < under < accuracy(model, x, y) - 0.1
    assert under == pytest.approx(float(kept(model, x, y, threat).float().mean()))


def test_the_worst_counts_image_by_image(fitted):
    model, x, y = fitted
    each = [kept(model, x, y, threat) for threat in THREATS]
    together = torch.stack(each).all(0)
    assert together.sum() < min(one.sum() for one in each)  # each breaks some that the others do not
    assert accuracy(model, x, y, THREATS, steps=5) == pytest.approx(float(together.float().mean()))


def test_a_model_that_nothing_fools_keeps_all(digits):
    x, _ = digits
    constant = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    constant[1].weight.data.zero_()
    constant[1].bias.data = torch.arange(10.0)
    assert accuracy(constant, x, torch.full((len(x),), 9), THREATS, steps=2) == 1


def some(*labels):
    return ImageData(torch.zeros(len(labels), 1, 8, 8, dtype=torch.uint8), torch.tensor(labels))


def test_of_the_fewest_images_one_is_held_out():
    judged, rest = held_out(some(1, 0, 1))
    assert (judged.labels.tolist(), sorted(rest.labels.tolist())) == ([1], [0, 1])
    for none in (judged, some(0, 1, 2)):
        with pytest.raises(DataError, match="training images: expected at least 2 of some class"):
            held_out(none)


def test_a_class_of_one_image_is_trained_on():
    """The first image of each class stands first in the shuffle that held-out ones are taken from."""
    judged, rest = held_out(some(*[0] * 40, *[1] * 40, 2))
    assert judged.labels.bincount().tolist() == [4, 4]
    assert rest.labels.bincount().tolist() == [36, 36, 1]


def test_validation_images_are_not_trained_on():
    train = load_data(load_config().data).train
    judged, rest = held_out(train)
    assert len(judged.labels) == len(train.labels) // 10
    assert len(judged.labels) + len(rest.labels) == len(train.labels)
    assert sorted(set(judged.labels.tolist())) == list(range(10))
    seen = {image.numpy().tobytes() for image in rest.images}
    own = [image.numpy().tobytes() for image in judged.images]
    repeated = {image.numpy().tobytes() for image in train.images}
    # The data hold each image once, so none can be on both sides.
    assert len(repeated) == len(train.labels)
    assert not any(image in seen for image in own)
