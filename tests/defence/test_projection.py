"""The projection: what it finds, what it costs, and whom it depends on.

Oracles: on a linear generator `lstsq`; Defense-GAN's loop written out by hand.
"""

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import scipy.linalg
import torch
from torch import Tensor, nn

from manifold_defense.projection import (
    REFERENCE,
    ProjectionConfig,
    attach_gradient,
    check_images,
    project,
    project_exactly,
    project_softly,
)
from manifold_defense.projection.starts import starts
from tests.defence.projection_support import Curved, images

SOLVERS = {
    "gd": ProjectionConfig("gd", "origin", steps=250),
    "adam": ProjectionConfig("adam", "prior", steps=400, step_size=0.5),
    "lbfgs": ProjectionConfig("lbfgs", "prior", steps=40),
}
SHORT = ProjectionConfig(start="prior", steps=6, metric="none")


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


@pytest.mark.parametrize("beyond", [torch.nan, torch.inf])
def test_lbfgs_takes_back_steps_to_where_nothing_is_drawn(beyond: float) -> None:
    class Line(nn.Module):
        """`G(z) = z` on one pixel, above -2; beyond it, what is no image."""

        latent_dim, image_shape = 1, (1, 1, 1)

        def forward(self, z: Tensor) -> Tensor:
            return (z + torch.where(z > -2, 0.0, beyond)).view(-1, 1, 1, 1)

    x = torch.full((1, 1, 1, 1), 0.9, dtype=torch.float64)
    config = ProjectionConfig("lbfgs", "origin", metric="none", steps=30, step_size=10.0)
    assert float(project(Line(), x, config).error) < 1e-8
    # A trial that was rejected has no part in the result, nor in its gradient.
    short, step = replace(config, steps=6), 1e-6
    drawn = project_exactly(Line(), x.requires_grad_(True), short)
    (gradient,) = torch.autograd.grad(drawn.sum(), x)
    ends = [float(project(Line(), (x + s * step).detach(), short).image) for s in (1, -1)]
    torch.testing.assert_close(float(gradient), (ends[0] - ends[1]) / (2 * step), rtol=1e-4, atol=1e-8)


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


class Normalising(Curved):
    """Ends in batch statistics, by which images would be coupled in train mode, and which it would change."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(64, affine=False).double()
        self.norm.running_mean.fill_(0.5)

    def forward(self, z: Tensor) -> Tensor:
        return torch.sigmoid(self.norm(super().forward(z).flatten(1))).unflatten(1, self.image_shape)


@pytest.mark.parametrize("call", [project, project_exactly, project_softly, attach_gradient])
def test_networks_are_asked_in_eval_mode_and_keep_their_own(call: Any) -> None:
    """Also where the gradient is taken, later."""
    generator, x = Normalising(), images(3)
    config = ProjectionConfig("lbfgs", "prior", restarts=2, steps=3)
    z = torch.zeros(3, 3, dtype=torch.float64)

    def ask() -> list[Tensor]:
        moved = x.clone().requires_grad_(True)
        if call is attach_gradient:
            image = call(generator, moved, z, config, "implicit")
        else:
            image = call(generator, moved, config)
        if call is project:
            return [image.image]
        return [image.detach(), torch.autograd.grad(image.square().sum(), moved)[0]]

    generator.eval()
    expected, before = ask(), generator.norm.running_mean.clone()
    generator.train()
    for found, wanted in zip(ask(), expected, strict=True):
        assert torch.equal(found, wanted)
    assert generator.training
    assert torch.equal(generator.norm.running_mean, before)


def test_an_encoder_alone_draws_each_image_once(networks: Any) -> None:
    """One restart and no steps leave nothing to choose from."""
    generator, encoder = networks
    drawn = []
    generator.register_forward_hook(lambda module, z, image: drawn.append(len(image)))
    x = images(5, dtype=torch.float32)
    for call in (project, project_exactly):
        drawn.clear()
        call(generator, x, ProjectionConfig(steps=0), encoder=encoder)
        assert drawn == [5]
    drawn.clear()
    found = project(generator, x, ProjectionConfig(steps=0, restarts=2), encoder=encoder)
    assert drawn == [10, 5]  # the better of two has to be found
    assert (found.error <= project(generator, x, ProjectionConfig(steps=0), encoder=encoder).error).all()


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
    assert [part.shape[0] for part in found] == [0, 0, 0, 0, 0]
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
        (changed(1.0001), ["expected values in [0, 1]", "1.0001]"]),
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
        ("step_size", "wide"),
        ("momentum", "much"),
        ("strength", None),
        ("clip", None),
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
