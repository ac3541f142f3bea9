"""The projection: what it finds, what it costs, whom it depends on, and whether its gradient is true.

Oracles: on a linear generator `lstsq`, and the orthogonal projector as its Jacobian; Defense-GAN's
loop written out by hand; finite differences in float64.
"""

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import scipy.linalg
import torch
from torch import Tensor, nn

from manifold_defense.projection import REFERENCE, ProjectionConfig, check_images, project, project_exactly
from manifold_defense.projection.starts import starts

SOLVERS = {
    "gd": ProjectionConfig("gd", "origin", steps=250),
    "adam": ProjectionConfig("adam", "prior", steps=400, step_size=0.5),
    "lbfgs": ProjectionConfig("lbfgs", "prior", steps=40),
}
SHORT = ProjectionConfig(start="prior", steps=6, metric="none")


def images(n: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """(N, 1, 8, 8), uniform and so far from any range."""
    return torch.rand(n, 1, 8, 8, generator=torch.Generator().manual_seed(seed), dtype=dtype)


class Curved(nn.Module):
    """A smooth generator in float64, and with `invert` an encoder that needs no training."""

    def __init__(self, latent_dim: int = 3) -> None:
        super().__init__()
        self.latent_dim, self.image_shape = latent_dim, (1, 8, 8)
        rng = torch.Generator().manual_seed(3)
        self.inner = torch.randn(latent_dim, 12, generator=rng, dtype=torch.float64)
        self.outer = torch.randn(12, 64, generator=rng, dtype=torch.float64) / 2

    def forward(self, z: Tensor) -> Tensor:
        return torch.sigmoid(torch.tanh(z @ self.inner) @ self.outer).unflatten(1, self.image_shape)

    def invert(self, x: Tensor) -> Tensor:
        return torch.sin(x.flatten(1) @ self.outer.T @ self.inner.T / 8)


@pytest.mark.parametrize("name", SOLVERS)
def test_a_solver_finds_what_least_squares_finds(linear: Any, name: str) -> None:
    x = images(4)
    found = project(linear, x, SOLVERS[name])
    right = (x.flatten(1) - linear.offset).detach().numpy()
    z = torch.from_numpy(scipy.linalg.lstsq(linear.matrix.detach().numpy(), right.T)[0].T)
    torch.testing.assert_close(found.z, z, atol=1e-4, rtol=0)
    torch.testing.assert_close(found.image, linear(z).detach(), atol=1e-5, rtol=0)
    torch.testing.assert_close(found.error, (linear(z) - x).square().flatten(1).mean(1).detach())
    assert not found.z.requires_grad
    assert not found.image.requires_grad


@pytest.mark.parametrize("name", SOLVERS)
def test_one_step_is_not_enough_for_that(linear: Any, name: str) -> None:
    x = images(4)
    found = project(linear, x, replace(SOLVERS[name], steps=1))
    assert not torch.allclose(found.z, linear.solve(x), atol=1e-2)


def defense_gan(generator: nn.Module, x: Tensor, starts: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """METHODS 1, for one image (C, H, W) and its starts (R, D): z and mean squared error."""
    ends = []
    for start in starts:
        z = start.clone().requires_grad_(True)
        velocity = torch.zeros_like(z)
        for k in range(steps):
            loss = (generator(z[None])[0] - x).square().mean()
            (gradient,) = torch.autograd.grad(loss, z)
            velocity = 0.7 * velocity + gradient
            z = (z - (10 if k < 0.8 * steps else 1) * velocity).detach().requires_grad_(True)
        z = z.detach()
        ends.append((float((generator(z[None])[0] - x).detach().square().mean()), z))
    error, z = min(ends, key=lambda end: end[0])
    return z, torch.tensor(error, dtype=x.dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_reference_is_defense_gan(networks: Any, dtype: torch.dtype) -> None:
    generator = networks[0].to(dtype)
    config = replace(REFERENCE, steps=30, restarts=3)
    x = images(3, dtype=dtype)
    found = project(generator, x, config)
    for i, start in enumerate(starts(x, generator.latent_dim, config, None)):
        z, error = defense_gan(generator, x[i], start, 30)
        tolerance = 1e-10 if dtype == torch.float64 else 2e-4
        torch.testing.assert_close(found.z[i], z, atol=tolerance, rtol=tolerance)
        torch.testing.assert_close(found.error[i], error, rtol=1e-5, atol=0)


def test_adam_is_that_of_torch_with_a_falling_rate() -> None:
    generator, x = Curved(), images(3)
    config = ProjectionConfig("adam", "prior", steps=30, metric="none", iterate="last")
    z = starts(x, 3, config, None)[:, 0].clone().requires_grad_(True)
    adam = torch.optim.Adam([z], lr=0.1, betas=(0.9, 0.99))
    rate = torch.optim.lr_scheduler.LambdaLR(adam, lambda k: 1 - k / 30)
    for _ in range(30):
        adam.zero_grad()
        (generator(z) - x).square().sum().backward()
        adam.step()
        rate.step()
    torch.testing.assert_close(project(generator, x, config).z, z.detach(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("step_size", [0.3, 1.0, 5.0])
def test_lbfgs_takes_back_steps_that_are_too_long(linear: Any, step_size: float) -> None:
    x = images(4)
    found = project(linear, x, ProjectionConfig("lbfgs", "prior", steps=150, step_size=step_size))
    torch.testing.assert_close(found.z, linear.solve(x), atol=1e-4, rtol=0)
    generator = Curved()
    found = project(generator, x, ProjectionConfig("lbfgs", "prior", steps=150, step_size=step_size))
    z = found.z.requires_grad_(True)
    (gradient,) = torch.autograd.grad((generator(z) - x).square().sum(), z)
    assert gradient.abs().max() < 1e-4


def test_the_reference_is_as_published() -> None:
    assert (REFERENCE.restarts, REFERENCE.steps, REFERENCE.step_size, REFERENCE.momentum) == (
        10,
        200,
        10,
        0.7,
    )
    draws = starts(images(2), 400, REFERENCE, None)
    assert draws.std() == pytest.approx(400**-0.5, rel=0.05)
    assert starts(images(2), 400, replace(REFERENCE, start="prior"), None).std() == pytest.approx(1, rel=0.05)


CONFIGS = [
    ProjectionConfig("gd", "origin", restarts=3, steps=20),
    ProjectionConfig("adam", "encoder", restarts=2, steps=15),
    ProjectionConfig("lbfgs", "encoder", restarts=2, steps=15),
]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.solver)
def test_an_image_is_projected_as_if_alone(networks: Any, digits: Any, config: ProjectionConfig) -> None:
    """In float64: where an activation has its kink, a solver may make a visible step of float32's rounding,
    which differs with the size of a batch and from machine to machine."""
    generator, encoder = (network.double() for network in networks)
    x = digits[0][:20].double()
    together = project(generator, x, config, encoder=encoder)
    for chunk in (0, 1, 3, 4, 512):
        parts = project(generator, x, replace(config, chunk=chunk), encoder=encoder)
        torch.testing.assert_close(parts.image, together.image, atol=1e-9, rtol=0)
    for i in range(len(x)):
        alone = project(generator, x[i : i + 1], config, encoder=encoder)
        torch.testing.assert_close(alone.image[0], together.image[i], atol=1e-9, rtol=0)
    shuffled = project(generator, x.flip(0), config, encoder=encoder)
    torch.testing.assert_close(shuffled.image.flip(0), together.image, atol=1e-9, rtol=0)


def test_a_coupled_generator_would_be_noticed(digits: Any) -> None:
    class Coupled(Curved):
        def forward(self, z: Tensor) -> Tensor:
            return super().forward(z - z.mean(0))

    x = digits[0][:7].double()
    alone = project(Coupled(), x[:1], SHORT).image
    assert not torch.allclose(alone, project(Coupled(), x, SHORT).image[:1], atol=1e-5)


@pytest.mark.parametrize("start", ["prior", "origin"])
def test_the_seed_decides(start: Any) -> None:
    x, config = images(3), replace(SHORT, start=start)
    torch.manual_seed(1)
    first = project(Curved(), x, config)
    torch.manual_seed(2)
    assert torch.equal(first.z, project(Curved(), x, config).z)
    assert not torch.equal(first.z, project(Curved(), x, replace(config, seed=1)).z)


def test_the_global_rng_is_left_alone() -> None:
    before = torch.get_rng_state()
    project(Curved(), images(2), SHORT)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("step_size", [0.0, 30.0])
def test_the_best_iterate_is_no_worse_than_the_last(solver: Any, step_size: float) -> None:
    config = ProjectionConfig(solver, "prior", steps=7, step_size=step_size, metric="none")
    x = images(20)
    best = project(Curved(), x, config).error
    last = project(Curved(), x, replace(config, iterate="last")).error
    assert (best <= last).all()
    # The start counts as an iterate.
    assert (best <= project(Curved(), x, replace(config, steps=0)).error).all()
    if step_size:
        assert (best < last).any()


@pytest.mark.parametrize(("steps", "restarts"), [(0, 1), (0, 3), (5, 1), (5, 3)])
def test_steps_are_the_gradients_spent(steps: int, restarts: int) -> None:
    evaluated = []

    class Counted(Curved):
        def forward(self, z: Tensor) -> Tensor:
            evaluated.append(len(z) if z.requires_grad else 0)
            return super().forward(z)

    x = images(4)
    found = project(Counted(), x, replace(SHORT, steps=steps, restarts=restarts))
    assert found.steps.tolist() == [steps * restarts] * 4
    assert sum(evaluated) == steps * restarts * 4


@pytest.mark.parametrize("start", ["encoder", "prior", "origin"])
@pytest.mark.parametrize("iterate", ["best", "last"])
def test_restarts_never_raise_the_error(start: Any, iterate: Any) -> None:
    generator, x = Curved(), images(20)
    errors = [
        project(
            generator,
            x,
            replace(SHORT, start=start, iterate=iterate, restarts=restarts),
            encoder=generator.invert,
        ).error
        for restarts in (1, 2, 3, 6, 11)
    ]
    for fewer, more in pairwise(errors):
        assert (more <= fewer + 1e-12).all()
    assert (errors[-1] < errors[0]).any()


def test_a_start_without_a_number_does_not_win() -> None:
    class Cracked(Curved):
        """Not a number in half of the latent space."""

        def forward(self, z: Tensor) -> Tensor:
            return super().forward(z) + torch.where(z[:, :1] > 0, torch.nan, 0.0).view(-1, 1, 1, 1)

    for iterate in ("best", "last"):
        config = ProjectionConfig("gd", "prior", restarts=8, steps=3, step_size=0.01, iterate=iterate)
        assert torch.isfinite(project(Cracked(), images(3), config).error).all(), iterate


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.solver)
def test_the_callers_gradient_mode_does_not_matter(networks: Any, config: ProjectionConfig) -> None:
    generator, encoder = networks
    x = images(3, dtype=torch.float32)
    expected = project(generator, x, config, encoder=encoder)
    with torch.no_grad():
        assert torch.equal(project(generator, x, config, encoder=encoder).image, expected.image)
    with torch.inference_mode():
        assert torch.equal(project(generator, x + 0, config, encoder=encoder).image, expected.image)
    x.requires_grad_(True)
    found = project(generator, x, config, encoder=encoder)
    assert torch.equal(found.image, expected.image)
    assert not found.image.requires_grad
    assert x.grad is None
    assert all(p.grad is None for p in [*generator.parameters(), *encoder.parameters()])


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.solver)
def test_an_empty_batch_stays_empty(networks: Any, config: ProjectionConfig) -> None:
    generator, encoder = networks
    found = project(generator, torch.empty(0, 1, 8, 8), config, encoder=encoder)
    assert [part.shape[0] for part in found] == [0, 0, 0, 0]
    assert found.image.shape == (0, 1, 8, 8)
    x = torch.empty(0, 1, 8, 8, requires_grad=True)
    image = project_exactly(generator, x, config, encoder=encoder)
    assert image.shape == (0, 1, 8, 8)
    assert torch.autograd.grad(image.sum(), x)[0].shape == x.shape


def changed(value: float) -> Tensor:
    x = torch.full((2, 1, 8, 8), 0.5)
    x[1, 0, 3, 4] = value
    return x


@pytest.mark.parametrize(
    ("x", "words"),
    [
        (torch.zeros(2, 1, 8, 8, dtype=torch.uint8), ["expected floats in [0, 1]", "uint8", "255"]),
        (torch.zeros(2, 1, 8, 8, dtype=torch.bool), ["expected floats", "bool"]),
        (torch.zeros(1, 8, 8), ["expected shape (N, 1, 8, 8)", "(1, 8, 8)"]),
        (torch.zeros(2, 3, 8, 8), ["expected shape (N, 1, 8, 8)", "(2, 3, 8, 8)"]),
        (torch.zeros(2, 1, 8, 9), ["expected shape (N, 1, 8, 8)", "(2, 1, 8, 9)"]),
        (torch.zeros(2, 64), ["expected shape (N, 1, 8, 8)", "(2, 64)"]),
        (torch.zeros(0, 3, 8, 8), ["expected shape (N, 1, 8, 8)", "(0, 3, 8, 8)"]),
        (changed(torch.nan), ["expected finite values", "NaN"]),
        (changed(torch.inf), ["expected finite values", "infinity"]),
        (changed(-torch.inf), ["expected finite values", "infinity"]),
        (changed(1.01), ["expected values in [0, 1]", "1.01"]),
        (changed(255.0), ["expected values in [0, 1]", "255"]),
        (changed(-0.01), ["expected values in [0, 1]", "-0.01"]),
    ],
)
@pytest.mark.parametrize("refuse", [check_images, project, project_exactly], ids=lambda f: f.__name__)
def test_bad_images_are_refused(
    networks: Any, refuse: Callable[..., Any], x: Tensor, words: list[str]
) -> None:
    generator = networks[0]
    arguments = (x, generator.image_shape) if refuse is check_images else (generator, x, SHORT)
    with pytest.raises(ValueError, match=r"^images: expected") as error:
        refuse(*arguments)
    message = str(error.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


@pytest.mark.parametrize("x", [torch.zeros(2, 1, 8, 8), torch.ones(2, 1, 8, 8), torch.empty(0, 1, 8, 8)])
def test_good_images_are_not(x: Tensor) -> None:
    check_images(x, (1, 8, 8))


@pytest.mark.parametrize("function", [project, project_exactly])
def test_a_missing_encoder_is_named(networks: Any, function: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match="needs an encoder"):
        function(networks[0], images(2, dtype=torch.float32), ProjectionConfig(start="encoder"))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("solver", "newton"),
        ("start", "nearest"),
        ("loss", "l1"),
        ("metric", "local"),
        ("others", "origin"),
        ("radius", -0.1),
        ("prior_weight", float("inf")),
        ("clip", -1.0),
        ("halve_every", -1),
        ("target_error", float("nan")),
        ("tolerance", -1.0),
        ("bank", 0),
        ("iterate", "first"),
        ("restarts", 0),
        ("steps", -1),
        ("chunk", -1),
        ("seed", -1),
        ("step_size", -0.1),
        ("step_size", float("nan")),
        ("momentum", 1.0),
        ("strength", 0.0),
        ("strength", 1.5),
        ("strength", float("nan")),
    ],
)
def test_a_config_names_its_bad_key(key: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"^{key}: expected"):
        ProjectionConfig(**{key: value})


# --- The exact gradient ---

EXACT = [
    ProjectionConfig(solver, start, restarts, steps=5, iterate=iterate)
    for solver in ("gd", "adam", "lbfgs")
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


def projector(linear: Any) -> Tensor:
    """`A (AᵀA)⁻¹ Aᵀ` (P, P)."""
    a = linear.matrix.detach()
    return a @ torch.linalg.solve(a.T @ a, a.T)


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
    gradients = [
        torch.autograd.grad(
            project_exactly(generator, x, replace(CONFIGS[1], chunk=chunk), encoder=encoder).square().sum(), x
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
