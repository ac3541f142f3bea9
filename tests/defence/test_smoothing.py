"""Randomized smoothing: closed forms, a half-space, and what its radius promises."""

from typing import Any

import pytest
import torch
from scipy.stats import norm as gaussian
from torch import Tensor, nn

from manifold_defense.attacks import pgd
from manifold_defense.certification import (
    ABSTAINED,
    SmoothingConfig,
    smoothed_certify,
    smoothed_predict,
)
from manifold_defense.certification.smoothing import Clipped, certified_radius
from manifold_defense.classifiers import ImageClassifier


@pytest.mark.parametrize(("draws", "sigmas"), [(100, 1.500), (100_000, 3.811)])
def test_the_radius_when_every_vote_is_right(draws: int, sigmas: float) -> None:
    for sigma in (0.25, 1.0):
        found = certified_radius(draws, SmoothingConfig(sigma=sigma, draws=draws, alpha=0.001))
        assert found == pytest.approx(sigma * sigmas, abs=sigma * 5e-4)
        assert found == pytest.approx(sigma * gaussian.ppf(0.001 ** (1 / draws)))


def test_no_radius_below_a_majority() -> None:
    config = SmoothingConfig(draws=1000)
    assert certified_radius(500, config) == certified_radius(540, config) == 0
    assert certified_radius(560, config) > 0


def half_space(x: Tensor) -> Tensor:
    """Class 1 where the mean of the pixels is above a half: of it, all about smoothing is known."""
    score = x.flatten(1).mean(1) - 0.5
    return torch.stack([-score, score], 1)


def test_a_half_space_keeps_its_distance() -> None:
    """The true radius of the vote is the distance to the plane, whatever σ (Cohen et al. 2019, app. B)."""
    config = SmoothingConfig(sigma=0.5, draws=20_000)
    x = torch.stack([torch.full((1, 4, 4), v) for v in (0.3, 0.45, 0.62)])
    found = smoothed_certify(half_space, x, config)
    distance = (x.flatten(1).mean(1) - 0.5).abs() * 4  # of a mean of 16 pixels
    assert found.prediction.tolist() == [0, 0, 1]
    assert (found.radius <= distance).all()
    assert (found.radius >= distance - 0.06).all()


def test_smoothing_abstains_where_the_vote_is_open() -> None:
    x = torch.full((1, 1, 4, 4), 0.5)
    config = SmoothingConfig(sigma=0.5, draws=500)
    found = smoothed_certify(half_space, x, config)
    assert found.prediction.tolist() == [ABSTAINED]
    assert found.radius.tolist() == [0]
    assert smoothed_predict(half_space, x, config).tolist() == [ABSTAINED]
    assert smoothed_predict(half_space, x + 0.3, config).tolist() == [1]


def test_smoothing_does_not_depend_on_the_batch_and_leaves_nothing_behind(
    hardened: ImageClassifier, digits: Any
) -> None:
    x, config = digits[0][:6], SmoothingConfig(draws=150, batch_size=64)
    hardened.train()
    state = torch.random.get_rng_state()
    whole = smoothed_certify(hardened, x, config)
    assert hardened.training
    hardened.eval()
    assert torch.equal(state, torch.random.get_rng_state())
    alone = smoothed_certify(hardened, x[4:5], config)
    assert whole.prediction[4] == alone.prediction[0]
    assert whole.radius[4] == alone.radius[0]
    other = smoothed_certify(hardened, x, SmoothingConfig(draws=150, batch_size=64), seed=1)
    assert not torch.equal(whole.radius, other.radius)


def test_no_draw_that_chose_the_class_is_counted_again_as_its_proof() -> None:
    """Chosen and proved on the same draws the most frequent class would look more frequent than it is."""
    asked: list[Tensor] = []

    def model(x: Tensor) -> Tensor:
        asked.append(x.flatten(1))
        return torch.stack([x.flatten(1).sum(1), torch.zeros(len(x))], 1)

    smoothed_certify(model, torch.full((1, 1, 2, 2), 0.5), SmoothingConfig(selection=20, draws=30))
    assert [len(draws) for draws in asked] == [20, 30]
    assert len(torch.cat(asked).unique(dim=0)) == 50


def test_a_smoothed_model_keeps_its_answer_inside_the_radius(hardened: ImageClassifier, digits: Any) -> None:
    """Attacked through the mean of its own noise; the vote is taken anew on what comes out."""
    x, config = digits[0][:20], SmoothingConfig(sigma=0.25, draws=2_000, batch_size=2_000)
    found = smoothed_certify(hardened, x, config)
    noise = 0.25 * torch.randn(32, *x.shape[1:], generator=torch.Generator().manual_seed(9))

    def vote(x: Tensor) -> Tensor:
        noisy = (x.unsqueeze(1) + noise).flatten(0, 1)
        return hardened(noisy).softmax(1).view(len(x), -1, 10).mean(1).clamp(min=1e-9).log()

    kept = found.radius > 0.2
    assert int(kept.sum()) >= 5
    for i in kept.nonzero().squeeze(1).tolist()[:8]:
        label = found.prediction[i : i + 1]
        moved = pgd(
            vote,
            x[i : i + 1],
            label,
            norm="l2",
            eps=0.99 * float(found.radius[i]),
            steps=10,
            stop_early=False,
            bounds=(-9.0, 9.0),
        )
        assert smoothed_predict(hardened, moved, config, seed=5).item() in (label.item(), ABSTAINED)


def test_votes_that_are_not_finite_count_for_no_class() -> None:
    def broken(x: Tensor) -> Tensor:
        return torch.full((len(x), 3), float("nan"))

    config = SmoothingConfig(draws=50)
    x = torch.rand(2, 1, 2, 2)
    assert smoothed_certify(broken, x, config).prediction.tolist() == [ABSTAINED] * 2
    assert smoothed_predict(broken, x, config).tolist() == [ABSTAINED] * 2


def test_clipping_leaves_the_mode_of_a_model_alone() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(4, 2))
    smoothed_certify(Clipped(model), torch.rand(2, 1, 2, 2), SmoothingConfig(draws=20))
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize(("key", "value"), [("sigma", 0.0), ("draws", 0), ("selection", 0), ("alpha", 1.0)])
def test_a_smoothing_config_names_its_bad_key(key: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"^{key}: expected"):
        SmoothingConfig(**{key: value})
