"""The gradients that need no solver: against the closed form, the unrolled one and finite differences."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn

from manifold_defense.projection import (
    ProjectionConfig,
    attach_gradient,
    mean_metric,
    project,
    project_exactly,
    project_softly,
    stationarity,
)
from manifold_defense.projection.implicit import Formula, conjugate_gradients
from manifold_defense.projection.jacobian import Jacobian
from tests.defence.projection_support import Curved, images, projector

FORMULAS: tuple[Formula, ...] = get_args(Formula)
SHARP = {"iterations": 60, "tolerance": 1e-12, "damping": 0.0}
CONVERGED = ProjectionConfig("lbfgs", steps=120)


def near(generator: Curved, n: int = 3) -> Tensor:
    """Images a little off the range of a curved generator, (N, 1, 8, 8)."""
    rng = torch.Generator().manual_seed(2)
    z = torch.randn(n, generator.latent_dim, generator=rng, dtype=torch.float64) / 2
    noise = torch.randn(n, 1, 8, 8, generator=rng, dtype=torch.float64)
    return (generator(z) + 0.05 * noise).clamp(0.01, 0.99)


def product(image: Callable[[Tensor], Tensor], x: Tensor, v: Tensor) -> Tensor:
    x = x.detach().requires_grad_(True)
    return torch.autograd.grad(image(x), x, v)[0]


def test_products_with_the_jacobian() -> None:
    generator, z = Curved(), torch.randn(4, 3, dtype=torch.float64)
    dense = torch.stack([torch.func.jacrev(lambda a: generator(a[None])[0].flatten())(row) for row in z])
    products, d, w = Jacobian(generator, z), torch.randn_like(z), images(4)
    torch.testing.assert_close(products.along(d).flatten(1), torch.einsum("npd,nd->np", dense, d))
    torch.testing.assert_close(products.transposed(w), torch.einsum("npd,np->nd", dense, w.flatten(1)))
    exact = dense.square().sum((1, 2)) / 3
    torch.testing.assert_close(products.stretch(4000)[:, 0], exact, rtol=0.1, atol=0)


def test_conjugate_gradients_solve() -> None:
    rng = torch.Generator().manual_seed(0)
    root = torch.randn(5, 6, 6, generator=rng, dtype=torch.float64)
    matrix, right = root @ root.mT, torch.randn(5, 6, generator=rng, dtype=torch.float64)
    expected = torch.linalg.solve(matrix, right)
    inverse = torch.linalg.inv(matrix.mean(0))
    for precondition in (lambda r: r, lambda r: r @ inverse):
        solution = conjugate_gradients(
            lambda p: torch.einsum("nij,nj->ni", matrix, p),
            right,
            precondition=precondition,
            iterations=40,
            tolerance=1e-12,
        )
        torch.testing.assert_close(solution, expected, rtol=1e-6, atol=1e-8)
    rough = conjugate_gradients(
        lambda p: torch.einsum("nij,nj->ni", matrix, p), right, iterations=1, tolerance=0.0
    )
    assert not torch.allclose(rough, expected, rtol=1e-2)


@pytest.mark.parametrize("exponent", [-30, -15, 0, 20])
def test_conjugate_gradients_of_right_sides_of_any_size(exponent: int) -> None:
    """In float32, in which what is squared soon underflows: sure classifiers have such gradients."""
    rng = torch.Generator().manual_seed(0)
    root = torch.randn(4, 6, 6, generator=rng)
    matrix, right = root @ root.mT + torch.eye(6), torch.randn(4, 6, generator=rng)
    solutions = [
        conjugate_gradients(lambda p: torch.einsum("nij,nj->ni", matrix, p), b, iterations=30, tolerance=1e-5)
        for b in (right, right * 10.0**exponent)
    ]
    torch.testing.assert_close(solutions[1] / 10.0**exponent, solutions[0], rtol=1e-3, atol=1e-4)


def test_gauss_newton_of_a_linear_generator_with_a_prior_is_ridge_regression(linear: Any) -> None:
    x, v, mu = images(4), images(4, seed=20) - 0.5, 0.3
    config = ProjectionConfig("lbfgs", "prior", steps=60, prior_weight=mu)
    found, a = project(linear, x, config), linear.matrix.detach()
    ridge = a @ torch.linalg.solve(a.T @ a + mu * torch.eye(a.shape[1], dtype=a.dtype), a.T)
    for formula in ("gauss_newton", "implicit"):
        got = product(lambda x, f=formula: attach_gradient(linear, x, found.z, config, f, **SHARP), x, v)
        torch.testing.assert_close(got.flatten(1), v.flatten(1) @ ridge, atol=1e-6, rtol=0)


def test_a_metric_is_the_inverse_that_conjugate_gradients_need(linear: Any) -> None:
    """Of a linear generator it is the matrix itself: one iteration is enough, as good as any."""
    x, v = images(4), images(4, seed=20) - 0.5
    found = project(linear, x, ProjectionConfig("lbfgs", "prior", steps=60))
    once = {"iterations": 1, "tolerance": 0.0, "damping": 0.0}
    errors = []
    for metric in (mean_metric(linear, x), None):
        got = product(
            lambda x, m=metric: attach_gradient(linear, x, found.z, CONVERGED, "tangent", metric=m, **once),
            x,
            v,
        )
        errors.append(float((got.flatten(1) - v.flatten(1) @ projector(linear)).norm()))
    assert errors[0] < 0.05 * errors[1]


def test_damping_shortens_directions_that_the_generator_hardly_knows(linear: Any) -> None:
    x, v = images(4), images(4, seed=20) - 0.5
    found = project(linear, x, ProjectionConfig("lbfgs", "prior", steps=60))
    damped = {**SHARP, "damping": 0.5}
    a = linear.matrix.detach()
    scale = Jacobian(linear, found.z).stretch()[0]
    ridge = a @ torch.linalg.solve(a.T @ a + 0.5 * scale * torch.eye(a.shape[1], dtype=a.dtype), a.T)
    got = product(lambda x: attach_gradient(linear, x, found.z, CONVERGED, "tangent", **damped), x, v)
    torch.testing.assert_close(got.flatten(1), v.flatten(1) @ ridge, atol=1e-6, rtol=0)


def test_conjugate_gradients_stop_at_negative_curvature() -> None:
    solution = conjugate_gradients(lambda p: -p, torch.ones(2, 3), iterations=9, tolerance=0.0)
    assert torch.equal(solution, torch.ones(2, 3))
    assert torch.equal(
        conjugate_gradients(lambda p: p, torch.zeros(2, 3), iterations=9, tolerance=0.0), torch.zeros(2, 3)
    )


@pytest.mark.parametrize("formula", FORMULAS)
@pytest.mark.parametrize("preconditioned", [False, True])
def test_on_a_linear_generator_all_are_the_orthogonal_projector(
    linear: Any, formula: Formula, preconditioned: bool
) -> None:
    x, v = images(4), images(4, seed=20) - 0.5
    found = project(linear, x, ProjectionConfig("lbfgs", "prior", steps=60))
    metric = mean_metric(linear, x) if preconditioned else None
    got = product(
        lambda x: attach_gradient(linear, x, found.z, CONVERGED, formula, metric=metric, **SHARP), x, v
    )
    torch.testing.assert_close(got.flatten(1), v.flatten(1) @ projector(linear), atol=1e-6, rtol=0)


@pytest.mark.parametrize("mu", [0.0, 0.2])
def test_implicit_unrolled_and_finite_differences_agree_at_a_minimum(mu: float) -> None:
    generator = Curved()
    # Linear convergence carries the derivative along; L-BFGS arrives before its derivative does.
    config = replace(CONVERGED, solver="gd", metric="mean", steps=400, prior_weight=mu)
    x, v = near(generator), images(3, seed=20) - 0.5
    found = project(generator, x, config, encoder=generator.invert)
    assert (stationarity(generator, x, found.z, config) < 1e-6).all()
    implicit = product(lambda x: attach_gradient(generator, x, found.z, config, "implicit", **SHARP), x, v)
    unrolled = product(lambda x: project_exactly(generator, x, config, encoder=generator.invert), x, v)
    step = 1e-5 * (images(3, seed=9) - 0.5)
    ends = [project(generator, x + s * step, config, encoder=generator.invert).image for s in (1, -1)]
    slope = (v * (ends[0] - ends[1])).flatten(1).sum(1) / 2
    torch.testing.assert_close((implicit * step).flatten(1).sum(1), slope, rtol=1e-3, atol=1e-12)
    torch.testing.assert_close(implicit, unrolled, rtol=1e-3, atol=1e-6)
    # Without the curvature of the range it is another, near to it.
    gauss = product(lambda x: attach_gradient(generator, x, found.z, config, "gauss_newton", **SHARP), x, v)
    assert not torch.allclose(gauss, implicit, rtol=1e-3, atol=1e-6)
    assert torch.nn.functional.cosine_similarity(gauss.flatten(), implicit.flatten(), 0) > 0.8


@pytest.mark.parametrize("loss", ["huber", "dead_zone_linf", "dead_zone_l2"])
def test_the_implicit_gradient_of_other_losses(loss: Any) -> None:
    """With a prior term, which makes the minimum unique where the loss is flat."""
    generator = Curved()
    config = replace(CONVERGED, loss=loss, radius=0.03, prior_weight=0.01)
    x, v = near(generator), images(3, seed=20) - 0.5
    found = project(generator, x, config, encoder=generator.invert)
    implicit = product(lambda x: attach_gradient(generator, x, found.z, config, "implicit", **SHARP), x, v)
    step = 1e-6 * (images(3, seed=9) - 0.5)
    longer = replace(config, steps=300)
    ends = [project(generator, x + s * step, longer, encoder=generator.invert).image for s in (1, -1)]
    slope = (v * (ends[0] - ends[1])).flatten(1).sum(1) / 2
    torch.testing.assert_close((implicit * step).flatten(1).sum(1), slope, rtol=2e-2, atol=1e-11)


def test_stationarity_tells_an_unfinished_projection() -> None:
    generator = Curved()
    x = near(generator)
    far = [
        stationarity(
            generator,
            x,
            project(generator, x, replace(CONVERGED, steps=k), encoder=generator.invert).z,
            CONVERGED,
        )
        for k in (0, 5, 80)
    ]
    assert (far[0] > 0.1).any()
    assert far[0].mean() > far[1].mean() > far[2].mean()
    assert (far[2] < 1e-5).all()


def test_stationarity_by_hand() -> None:
    class Line(nn.Module):
        """`G(z) = (z, z)`: the gradient of the squared error is `2 (r₁ + r₂)`, and the stretch s² is 2."""

        latent_dim, image_shape = 1, (1, 1, 2)

        def forward(self, z: Tensor) -> Tensor:
            return z.expand(-1, 2).view(-1, 1, 1, 2)

    x, z = torch.tensor([0.1, 0.7]).view(1, 1, 1, 2), torch.tensor([[0.9]])
    config = replace(CONVERGED, metric="none")
    r = (0.9 - x).flatten()
    expected = 2 * r.sum() / (2 * 2**0.5 * r.norm())
    torch.testing.assert_close(stationarity(Line(), x, z, config)[0], expected)


SEVERAL = ProjectionConfig("gd", "prior", restarts=3, steps=4)


def test_the_soft_mixture_of_restarts_against_finite_differences() -> None:
    generator = Curved()
    x = near(generator).requires_grad_(True)
    assert torch.autograd.gradcheck(lambda a: project_softly(generator, a, SEVERAL), (x,), atol=1e-6)


def test_a_cold_mixture_is_the_winner_and_a_warm_one_sees_the_others() -> None:
    generator, v = Curved(), images(3)
    x = near(generator)
    exact = product(lambda a: project_exactly(generator, a, SEVERAL), x, v)
    cold = product(lambda a: project_softly(generator, a, SEVERAL, temperature=1e-4), x, v)
    torch.testing.assert_close(cold, exact)
    warm = product(lambda a: project_softly(generator, a, SEVERAL), x, v)
    assert not torch.allclose(warm, exact, rtol=0.01)
    alone = replace(SEVERAL, restarts=1)
    torch.testing.assert_close(
        product(lambda a: project_softly(generator, a, alone), x, v),
        product(lambda a: project_exactly(generator, a, alone), x, v),
    )


class Cracked(Curved):
    """Without an image where the first latent is above 0.3."""

    def __init__(self, beyond: float) -> None:
        super().__init__()
        self.beyond = beyond

    def forward(self, z: Tensor) -> Tensor:
        return super().forward(z) + torch.where(z[:, :1] > 0.3, self.beyond, 0.0).view(-1, 1, 1, 1)


@pytest.mark.parametrize("beyond", [torch.nan, torch.inf])
def test_a_restart_that_diverged_has_no_weight(beyond: float) -> None:
    config = ProjectionConfig("gd", "prior", metric="none", restarts=8, steps=3, step_size=0.01)
    x, mixtures = near(Curved()).requires_grad_(True), []
    for generator in (Curved(), Cracked(beyond)):
        mixtures.append(project_softly(generator, x, config, temperature=1e-4))
    deployed = project(Cracked(beyond), x.detach(), config)
    assert deployed.image.isfinite().all()
    torch.testing.assert_close(mixtures[1].detach(), deployed.image, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(mixtures[0], mixtures[1])  # where it is whole, one beyond the crack wins
    (gradient,) = torch.autograd.grad(mixtures[1].sum(), x)
    exact = torch.autograd.grad(project_exactly(Cracked(beyond), x, config).sum(), x)[0]
    torch.testing.assert_close(gradient, exact, rtol=1e-2, atol=1e-3)
