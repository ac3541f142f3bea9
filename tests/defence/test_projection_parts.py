"""Losses, starts, metric and schedule: each against its closed form or a count."""

import copy
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from manifold_defense.projection import (
    PRESETS,
    ProjectionConfig,
    make_bank,
    mean_metric,
    project,
    project_exactly,
)
from manifold_defense.projection.losses import LOSSES
from manifold_defense.projection.starts import starts
from tests.defence.projection_support import Curved, images

# --- Losses ---


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("squared", [0.25 + 0.01 + 0.0, 0.04]),
        ("huber", [0.2 * (1.0 - 0.2) + 0.01, 0.04]),
        ("dead_zone_linf", [0.09, 0.0]),
        ("dead_zone_l2", [(0.26**0.5 - 0.2) ** 2, 0.0]),
    ],
)
def test_a_loss_by_hand(name: str, expected: list[float]) -> None:
    r = torch.tensor([[0.5, -0.1, 0.0], [0.0, 0.0, -0.2]], dtype=torch.float64)
    torch.testing.assert_close(LOSSES[name](r, 0.2), torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_has_its_minimum_where_nothing_is_left(name: str) -> None:
    zero = torch.zeros(2, 5, dtype=torch.float64, requires_grad=True)
    value = LOSSES[name](zero, 0.1)
    assert (value == 0).all()
    (slope,) = torch.autograd.grad(value.sum(), zero)
    assert (slope == 0).all()
    r = (torch.rand(3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64) - 0.5) * 2
    assert torch.autograd.gradcheck(lambda r: LOSSES[name](r, 0.1), (r.requires_grad_(True),))
    assert (LOSSES[name](r, 0.1) > 0).all()
    if name != "squared":
        assert (LOSSES[name](r, 0.3) <= LOSSES[name](r, 0.1) + (name == "huber")).all()


def test_a_dead_zone_leaves_alone_what_the_ball_explains(linear: Any) -> None:
    """Within 0.1 of the start's image nothing moves; a little beyond, only as far as needed."""
    start = torch.zeros(2, 5, dtype=torch.float64)
    near = linear(start).detach()
    inside, outside = near + 0.09, near + 0.15
    for loss, radius in (("dead_zone_linf", 0.1), ("dead_zone_l2", 0.8)):
        config = ProjectionConfig("lbfgs", steps=60, loss=loss, radius=radius, clip=50.0)  # type: ignore[arg-type]
        assert torch.equal(project(linear, inside, config, encoder=lambda x: start).z, start)
        moved = project(linear, outside, config, encoder=lambda x: start)
        squared = project(linear, outside, replace(config, loss="squared"), encoder=lambda x: start)
        assert (moved.z != 0).all()
        assert (moved.error >= squared.error).all()


@pytest.mark.parametrize("metric", ["none", "mean"])
def test_the_prior_term_is_ridge_regression(linear: Any, metric: Any) -> None:
    x, mu = images(4), 0.05
    config = ProjectionConfig("lbfgs", "prior", steps=60, prior_weight=mu, metric=metric)
    a = linear.matrix.detach()
    right = (x.flatten(1) - linear.offset.detach()) @ a
    expected = torch.linalg.solve(a.T @ a + mu * torch.eye(5, dtype=torch.float64), right.T).T
    torch.testing.assert_close(project(linear, x, config).z, expected, atol=1e-6, rtol=0)
    assert not torch.allclose(project(linear, x, replace(config, prior_weight=0)).z, expected, atol=1e-2)


@pytest.mark.parametrize("solver", ["gd", "adam", "lbfgs"])
def test_latents_stay_in_the_clip(linear: Any, solver: Any) -> None:
    x = images(6)
    config = ProjectionConfig(solver, "origin", steps=15, metric="mean")
    free = project(linear, x, config).z.square().mean(1).sqrt()
    held = project(linear, x, replace(config, clip=0.5)).z.square().mean(1).sqrt()
    assert (free > 0.5).any()
    assert (held <= 0.5 + 1e-9).all()
    assert (held > 0.49).any()
    # What lies within is left alone.
    torch.testing.assert_close(project(linear, x, replace(config, clip=9.0)).z, project(linear, x, config).z)
    begun = replace(config, start="encoder", clip=0.5, steps=0)
    found = project(linear, x, begun, encoder=lambda x: torch.full((len(x), 5), 3.0, dtype=x.dtype))
    assert (found.z.square().mean(1).sqrt() <= 0.5 + 1e-9).all()


def test_of_equal_losses_the_earliest_wins() -> None:
    class Flat(Curved):
        """Draws the same whatever it is asked."""

        def forward(self, z: Tensor) -> Tensor:
            return super().forward(0 * z) + 0 * z.sum()

    found = project(Flat(), images(3), ProjectionConfig("gd", "prior", metric="none", steps=4, restarts=3))
    assert found.restart.tolist() == [0, 0, 0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_metric_of_a_filter_of_few_digits(networks: Any, dtype: torch.dtype) -> None:
    like = torch.zeros(0, 1, 8, 8)
    full = mean_metric(networks[0], like)
    short = mean_metric(copy.deepcopy(networks[0]).to(dtype), like.to(dtype))
    assert short.factor.dtype == short.inverse.dtype == dtype
    scale = float(full.factor.abs().max())
    torch.testing.assert_close(short.factor.float(), full.factor, atol=0.1 * scale, rtol=0)


def test_a_generator_without_a_slope_is_named() -> None:
    class Broken(Curved):
        def forward(self, z: Tensor) -> Tensor:
            return super().forward(z) * torch.nan

    with pytest.raises(ValueError, match=r"^generator: expected a finite Jacobian"):
        mean_metric(Broken(), images(0))


# --- Starts ---


def test_a_bank_gives_the_nearest_samples() -> None:
    generator, x = Curved(), images(5)
    bank = make_bank(generator, x, size=300, seed=1)
    nearest = torch.cdist(x.flatten(1), generator(bank.z).flatten(1)).argsort(1)[:, :4]
    torch.testing.assert_close(bank.nearest(x, 4), bank.z[nearest])
    config = ProjectionConfig(start="bank", restarts=4, bank=300, seed=1)
    assert torch.equal(starts(x, 3, config, bank=bank), bank.z[nearest])
    mixed = starts(x, 3, replace(config, start="encoder", others="bank"), generator.invert, bank)
    assert torch.equal(mixed[:, 1:], bank.z[nearest[:, :3]])
    assert torch.equal(mixed[:, 0], generator.invert(x))
    found = project(generator, x, replace(config, steps=0))
    torch.testing.assert_close(found.z, bank.z[nearest[:, 0]])
    with pytest.raises(ValueError, match="need a bank of at least 4 samples"):
        starts(x, 3, config, bank=make_bank(generator, x, size=3, seed=0))


# --- Metric ---


def test_the_metric_of_a_linear_generator_is_exact(linear: Any) -> None:
    metric = mean_metric(linear, images(1))
    a = linear.matrix.detach()
    expected = a.T @ a
    ridge = 0.01 * expected.diagonal().mean() * torch.eye(5, dtype=torch.float64)
    torch.testing.assert_close(metric.factor @ metric.factor.T, expected + ridge)
    torch.testing.assert_close(metric.factor @ metric.inverse, torch.eye(5, dtype=torch.float64))
    # w = z @ factor, so that ‖J z‖ is ‖w‖ but for the ridge.
    z = torch.ones(1, 5, dtype=torch.float64)
    assert float((z @ metric.factor).norm()) == pytest.approx(float((a @ z[0]).norm()), rel=0.05)


@pytest.mark.parametrize(("metric", "solved"), [("mean", True), ("none", False)])
def test_one_step_in_the_metric_is_newtons(linear: Any, metric: Any, solved: bool) -> None:
    x = images(4)
    found = project(linear, x, ProjectionConfig("lbfgs", "prior", steps=1, metric=metric))
    optimum = (linear(linear.solve(x)) - x).square().flatten(1).mean(1).detach()
    assert bool((found.error < 1.02 * optimum).all()) == solved


# --- Schedule ---


def test_halving_counts() -> None:
    config = ProjectionConfig("adam", "prior", restarts=8, steps=10, halve_every=2)
    found = project(Curved(), images(5), config)
    # 8 rows for 2 steps, then 4, 2, 1 and 1.
    assert found.steps.tolist() == [2 * (8 + 4 + 2 + 1 + 1)] * 5
    odd = project(Curved(), images(2), replace(config, restarts=5, halve_every=3))
    assert odd.steps.tolist() == [3 * (5 + 3 + 2) + 1] * 2


@pytest.mark.parametrize("solver", ["gd", "adam", "lbfgs"])
def test_halving_keeps_the_better_half(solver: Any) -> None:
    """Cheaper than all restarts to the end, and no worse than one."""
    generator, x = Curved(), images(40)
    whole = ProjectionConfig(solver, "prior", restarts=8, steps=12)
    halved = project(generator, x, replace(whole, halve_every=3))
    one = project(generator, x, replace(whole, restarts=1))
    assert halved.steps.float().mean() < 0.6 * project(generator, x, whole).steps.float().mean()
    assert halved.error.mean() < one.error.mean()
    assert (halved.error >= project(generator, x, whole).error - 1e-12).all()


def test_an_image_stops_at_its_target() -> None:
    generator, x = Curved(), images(40)
    config = ProjectionConfig("adam", "prior", restarts=3, steps=40, metric="none")
    full = project(generator, x, config)
    target = float(full.error.median())
    found = project(generator, x, replace(config, target_error=target))
    reached = full.error <= target
    assert (found.error[reached] <= target).all()
    assert (found.steps[reached] < 120).all()
    assert (found.steps[~reached] == 120).all()
    # The first restart that is there stops the others of its image: all have taken as many steps.
    assert (found.steps % 3 == 0).all()
    torch.testing.assert_close(found.error[~reached], full.error[~reached])
    assert (project(generator, x, replace(config, target_error=10.0)).steps == 3).all()


def test_a_restart_stops_where_its_gradient_ends(linear: Any) -> None:
    x = images(4)
    config = ProjectionConfig("lbfgs", "prior", steps=200, tolerance=1e-6)
    found = project(linear, x, config)
    assert (found.steps < 60).all()
    torch.testing.assert_close(found.z, linear.solve(x), atol=1e-4, rtol=0)


SCHEDULES = [
    ProjectionConfig("adam", "encoder", restarts=4, steps=6, halve_every=2),
    ProjectionConfig("lbfgs", "encoder", restarts=4, steps=6, others="bank", bank=30, halve_every=2),
    ProjectionConfig("lbfgs", "bank", restarts=2, steps=6, bank=30, target_error=0.052, metric="mean"),
    ProjectionConfig("gd", "prior", restarts=2, steps=6, tolerance=0.3, metric="mean", iterate="last"),
    ProjectionConfig("adam", "encoder", steps=6, loss="dead_zone_linf", radius=0.2, prior_weight=0.1),
    ProjectionConfig("lbfgs", "encoder", steps=6, loss="dead_zone_l2", radius=0.5, metric="mean"),
    ProjectionConfig("adam", "encoder", steps=6, loss="huber", radius=0.1, metric="mean", clip=0.9),
]


@pytest.mark.parametrize("config", SCHEDULES, ids=lambda c: f"{c.solver}-{c.start}-{c.loss}")
def test_a_schedule_does_not_couple_images(config: ProjectionConfig) -> None:
    generator, x = Curved(), images(6)
    together = project(generator, x, config, encoder=generator.invert)
    for i in range(6):
        alone = project(generator, x[i : i + 1], replace(config, chunk=1), encoder=generator.invert)
        torch.testing.assert_close(alone.image[0], together.image[i], atol=1e-9, rtol=0)
        assert alone.steps[0] == together.steps[i]


@pytest.mark.parametrize("config", SCHEDULES, ids=lambda c: f"{c.solver}-{c.start}-{c.loss}")
def test_the_exact_gradient_follows_every_schedule_and_loss(config: ProjectionConfig) -> None:
    generator, x = Curved(), images(6, seed=5).mul(0.8).add(0.1).requires_grad_(True)
    image = project_exactly(generator, x, config, encoder=generator.invert)
    assert torch.equal(image, project(generator, x, config, encoder=generator.invert).image)
    weights = images(6, seed=6) - 0.5
    (gradient,) = torch.autograd.grad((weights * image).sum(), x)
    step = 1e-6 * (images(6, seed=10) - 0.5)

    def value(x: Tensor) -> Tensor:
        return (weights * project(generator, x, config, encoder=generator.invert).image).sum()

    slope = (value((x + step).detach()) - value((x - step).detach())) / 2
    assert slope.abs() > 1e-12
    torch.testing.assert_close((gradient * step).sum(), slope, rtol=5e-4, atol=1e-13)


# --- Presets ---


def test_every_preset_projects(networks: Any, digits: Any) -> None:
    generator, encoder = networks
    x = digits[0][:3]
    errors = {}
    for name, config in PRESETS.items():
        short = replace(config, steps=min(config.steps, 12), restarts=min(config.restarts, 2))
        found = project(generator, x, short, encoder=encoder)
        errors[name] = float(found.error.mean())
        assert (found.steps <= short.steps * short.restarts).all()
    assert errors["accurate"] < errors["robust"] == errors["fast"] == errors["single_shot"]
    for cheaper, dearer in pairwise(("fast", "accurate", "reference")):
        assert PRESETS[cheaper].steps < PRESETS[dearer].steps
