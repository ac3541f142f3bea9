"""The exact gradient of the projection: that of what is deployed, chunk by chunk, and nothing kept.

Oracles: finite differences in float64; the orthogonal projector, the Jacobian on a linear generator.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from manifold_defense.projection import ProjectionConfig, project, project_exactly
from manifold_defense.projection.solvers import SOLVERS
from tests.defence.projection_support import Curved, images, projector

EXACT = [
    ProjectionConfig(solver, start, restarts, steps=5, iterate=iterate)
    for solver in SOLVERS
    for start, restarts in (("encoder", 1), ("encoder", 2), ("prior", 2), ("origin", 1))
    for iterate in ("best", "last")
]


def identify(config: ProjectionConfig) -> str:
    return f"{config.solver}-{config.start}-{config.restarts}-{config.iterate}"


@pytest.mark.parametrize("config", EXACT, ids=identify)
def test_the_exact_gradient_is_that_of_what_is_deployed(config: ProjectionConfig) -> None:
    """Against central differences of `project` itself, along three directions."""
    generator, x = Curved(), images(3, seed=5).mul(0.8).add(0.1)
    x.requires_grad_(True)
    image = project_exactly(generator, x, config, encoder=generator.invert)
    assert torch.equal(image, project(generator, x, config, encoder=generator.invert).image)
    weights = images(3, seed=6) - 0.5
    (gradient,) = torch.autograd.grad((weights * image).sum(), x)

    def value(x: Tensor) -> Tensor:
        found = project(generator, x, config, encoder=generator.invert)
        return (weights * found.image).sum()

    for seed in range(3):
        step = 1e-6 * (images(3, seed=10 + seed) - 0.5)
        with torch.no_grad():
            slope = (value(x + step) - value(x - step)) / 2
        assert slope.abs() > 1e-12
        torch.testing.assert_close((gradient * step).sum(), slope, rtol=2e-4, atol=0)


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_converged_descent_and_one_that_stays_at_its_start(solver: Any) -> None:
    """The best iterate may be any: the start (steps too long) or a middle one."""
    generator, x = Curved(), images(6, seed=5).mul(0.8).add(0.1).requires_grad_(True)
    for config in (
        ProjectionConfig(solver, steps=4, step_size=1e3),
        ProjectionConfig(solver, steps=0),
        ProjectionConfig(solver, steps=1),
    ):
        image = project_exactly(generator, x, config, encoder=generator.invert)
        (gradient,) = torch.autograd.grad(image.sum(), x)
        step = 1e-6 * (images(6, seed=10) - 0.5)
        with torch.no_grad():
            ends = [
                project(generator, x + s * step, config, encoder=generator.invert).image.sum()
                for s in (1, -1)
            ]
        torch.testing.assert_close((gradient * step).sum(), (ends[0] - ends[1]) / 2, rtol=2e-4, atol=1e-14)


@pytest.mark.parametrize("solver", SOLVERS)
def test_gradcheck(solver: Any) -> None:
    generator = Curved(2)
    x = images(2, seed=5).mul(0.8).add(0.1).requires_grad_(True)
    config = ProjectionConfig(solver, steps=4)
    assert torch.autograd.gradcheck(
        lambda x: project_exactly(generator, x, config, encoder=generator.invert),
        (x,),
        atol=1e-6,
        fast_mode=True,
    )


@pytest.mark.parametrize(("steps", "equal"), [(40, True), (2, False)])
def test_the_jacobian_of_a_converged_projection_is_the_orthogonal_projector(
    linear: Any, steps: int, equal: bool
) -> None:
    x = images(4).requires_grad_(True)
    image = project_exactly(linear, x, ProjectionConfig("lbfgs", "prior", steps=steps))
    for seed in range(5):
        cotangent = images(4, seed=20 + seed) - 0.5
        (product,) = torch.autograd.grad(image, x, cotangent, retain_graph=True)
        expected = (cotangent.flatten(1) @ projector(linear)).view_as(x)
        assert torch.allclose(product, expected, atol=1e-6) == equal


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_start_at_the_minimum_has_a_finite_gradient(linear: Any, solver: Any) -> None:
    """The gradient of the error is zero there, and square roots of it lurk in two solvers."""
    inverse = torch.linalg.pinv(linear.matrix.detach())
    x = linear(torch.ones(2, 5, dtype=torch.float64)).detach().requires_grad_(True)
    image = project_exactly(
        linear,
        x,
        ProjectionConfig(solver, steps=3, metric="none", iterate="last"),
        encoder=lambda x: (x.flatten(1) - linear.offset) @ inverse.T,
    )
    cotangent = images(2) - 0.5
    (product,) = torch.autograd.grad(image, x, cotangent)
    # Adam's steps are as long however small the gradient: rounding moves it.
    expected = (cotangent.flatten(1) @ projector(linear)).view_as(x)
    torch.testing.assert_close(product, expected, atol=1e-2 if solver == "adam" else 1e-8, rtol=0)


def test_the_gradient_of_an_image_does_not_depend_on_its_chunk(networks: Any) -> None:
    generator, encoder = (network.double() for network in networks)
    x = images(5).requires_grad_(True)
    config = ProjectionConfig("adam", "encoder", restarts=2, steps=15)
    gradients = [
        torch.autograd.grad(
            project_exactly(generator, x, replace(config, chunk=chunk), encoder=encoder).square().sum(), x
        )[0]
        for chunk in (0, 1, 4, 512)
    ]
    for gradient in gradients[1:]:
        torch.testing.assert_close(gradient, gradients[0], atol=1e-8, rtol=1e-6)


def graph(node: Any) -> set[Any]:
    """All autograd nodes below `node`."""
    seen, waiting = set(), [node]
    while waiting:
        if (node := waiting.pop()) is not None and node not in seen:
            seen.add(node)
            waiting += [above for above, _ in node.next_functions]
    return seen


@pytest.mark.parametrize("solver", SOLVERS)
def test_what_is_kept_for_backward_holds_no_graph(solver: Any) -> None:
    generator, x = Curved(), images(2).requires_grad_(True)
    sizes = []
    for steps in (2, 12):
        config = ProjectionConfig(solver, restarts=3, steps=steps)
        nodes = graph(project_exactly(generator, x, config, encoder=generator.invert).grad_fn)
        (unrolled,) = (node for node in nodes if "Unrolled" in node.name())
        assert len(unrolled.states) == steps
        entries = [entry for state in unrolled.states for entry in state]
        assert all(entry.grad_fn is None and not entry.requires_grad for entry in entries)
        assert all(len(entry) <= len(x) for entry in entries)  # of the winning restart alone
        sizes.append(len(nodes))
    assert sizes[0] == sizes[1]
