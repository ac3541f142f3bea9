"""Fréchet distance against scipy and closed forms; precision and recall on sets with a known answer."""

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor

from gan.quality import frechet_distance, precision_recall


def normal(n: int, features: int, seed: int = 0) -> Tensor:
    return torch.randn(n, features, generator=torch.Generator().manual_seed(seed))


def by_scipy(a: Tensor, b: Tensor) -> float:
    a, b = a.double().numpy(), b.double().numpy()
    one, two = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = scipy.linalg.sqrtm(one @ two).real
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(one + two - 2 * root))


@pytest.mark.parametrize("features", [2, 5, 20])
def test_the_frechet_distance_is_that_of_scipy(features: int) -> None:
    mix = normal(features, features, 7)
    a, b = normal(300, features, 1) @ mix, 0.5 * normal(200, features, 2) + 0.3
    assert frechet_distance(a, b) == pytest.approx(by_scipy(a, b), rel=1e-8)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-8)


@pytest.mark.parametrize("features", [1, 3, 20])
def test_identical_features_have_no_distance(features: int) -> None:
    a = normal(100, features)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(a, a.flip(0)) == pytest.approx(0, abs=1e-9)


def test_a_shift_costs_its_square_and_a_spread_its_square() -> None:
    a = normal(400, 4)
    shift = torch.tensor([3.0, 0.0, -4.0, 0.0])
    assert frechet_distance(a, a + shift) == pytest.approx(25, rel=1e-5)
    # Of N(0, σ²) in one dimension: (σ₁ − σ₂)².
    line = normal(400, 1)
    assert frechet_distance(line, 3 * line) == pytest.approx(
        float(4 * line.var() + 4 * line.mean() ** 2), rel=1e-5
    )
    # Independent samples of shifted Gaussians: about the square.
    assert frechet_distance(normal(20_000, 4, 1), normal(20_000, 4, 2) + shift) == pytest.approx(25, rel=0.02)


def test_fewer_samples_than_features() -> None:
    """Covariances without full rank, where a plain square root goes complex."""
    a, b = normal(5, 20, 1), normal(6, 20, 2)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(a, b) > 1
    constant = torch.ones(5, 20)
    assert frechet_distance(constant, constant) == 0
    assert frechet_distance(constant, constant + 1) == pytest.approx(20)


@pytest.mark.parametrize("n", [10, 25, 26, 200])
@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_identical_sets_cover_each_other(n: int, offset: float) -> None:
    features = normal(n, 8) + offset
    assert precision_recall(features, features) == (1.0, 1.0)
    assert precision_recall(features, features.flip(0)) == (1.0, 1.0)


def test_where_the_features_lie_does_not_matter() -> None:
    real, fake = normal(200, 5), 0.4 * normal(200, 5, seed=1)
    expected = precision_recall(real, fake)
    assert 0.1 < expected.recall < 0.95
    far = precision_recall(real + 4096, fake + 4096)
    assert far.recall == pytest.approx(expected.recall, abs=0.02)
    assert far.precision == pytest.approx(expected.precision, abs=0.02)


def test_far_sets_cover_nothing() -> None:
    assert precision_recall(normal(50, 8, 1), normal(60, 8, 2) + 100) == (0.0, 0.0)


def test_a_set_of_repeated_points_covers_itself() -> None:
    """A point repeated more often than there are neighbours has a ball of radius 0, and lies in it."""
    features = (normal(10, 8) + 5).repeat(5, 1)
    assert precision_recall(features, features) == (1.0, 1.0)


def test_dropped_and_invented_modes() -> None:
    """Precision falls with what is invented, recall with what is dropped."""
    left, right = normal(100, 4, 1) / 10, normal(100, 4, 2) / 10 + 50
    both = torch.cat([left, right])
    assert precision_recall(both, left) == (1.0, pytest.approx(0.5))
    assert precision_recall(left, both) == (pytest.approx(0.5), 1.0)


def test_a_collapsed_generator_is_precise_and_recalls_little() -> None:
    real = normal(100, 4)
    precision, recall = precision_recall(real, real[:1].expand(100, -1) + 1e-3 * normal(100, 4, 3))
    assert precision == 1.0
    assert recall < 0.05


def test_hand_drawn_balls() -> None:
    """On a line, with k = 1: real at 0, 1, 3 have radii 1, 1, 2."""
    real = torch.tensor([[0.0], [1.0], [3.0]])
    fake = torch.tensor([[-0.9], [-1.1], [4.9], [5.1]])
    found = precision_recall(real, fake, neighbours=1)
    assert found.precision == pytest.approx(2 / 4)  # −0.9 and 4.9
    # fake radii 0.2, 0.2, 0.2, 0.2: no real point within.
    assert found.recall == 0
    assert precision_recall(real, fake + 1.0, neighbours=1).recall == pytest.approx(
        1 / 3
    )  # 0 near −0.1 and 0.1


def test_more_neighbours_cover_more() -> None:
    real, fake = normal(100, 8, 1), normal(100, 8, 2)
    found = [precision_recall(real, fake, neighbours=k) for k in (1, 3, 10, 1000)]
    for part in zip(*found, strict=True):
        assert list(part) == sorted(part)
    assert found[-1] == (1.0, 1.0)
    assert found[0].precision < 0.9
