"""Descents in bfloat16: rounded where they are said to be, in full elsewhere and on devices without it."""

from dataclasses import replace
from types import MappingProxyType
from typing import Any

import pytest
import torch
from torch import Tensor

from manifold_defense import PRESETS, ManifoldFilter
from manifold_defense.projection import ProjectionConfig, project, project_exactly
from manifold_defense.projection.rounding import Rounded, has_bfloat16
from manifold_defense.projection.solvers import SOLVERS, State

FULL = ProjectionConfig("lbfgs", steps=8)
COARSE = replace(FULL, precision="bfloat16")


@pytest.fixture
def able(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device with bfloat16: any CPU computes in it, if slowly."""
    monkeypatch.setattr("manifold_defense.projection.descent.has_bfloat16", lambda device: True)


class Watched:
    """A generator that notes, call by call, whether it is asked for bfloat16."""

    def __init__(self, generator: Any) -> None:
        self.generator, self.rounded = generator, list[bool]()
        self.latent_dim, self.image_shape = generator.latent_dim, generator.image_shape

    def __call__(self, z: Tensor) -> Tensor:
        self.rounded.append(torch.is_autocast_enabled("cpu"))
        image: Tensor = self.generator(z)
        return image


@pytest.mark.usefixtures("able")
def test_only_the_descent_is_rounded(networks: Any, digits: Any) -> None:
    generator, encoder = networks
    watched, x = Watched(generator), digits[0][:5]
    config = replace(COARSE, metric="none")
    found = project(watched, x, config, encoder=encoder)
    assert watched.rounded == [True] * 9 + [False]  # eight gradients, the last loss; the drawing
    assert found.image.dtype == found.z.dtype == torch.float32
    torch.testing.assert_close(found.image, generator(found.z).detach())
    torch.testing.assert_close(found.error, (found.image - x).square().flatten(1).mean(1))


@pytest.mark.usefixtures("able")
@pytest.mark.parametrize("solver", ["gd", "adam", "lbfgs"])
def test_it_comes_about_as_near(networks: Any, solver: Any) -> None:
    """On images that the generator draws; what it cannot draw has many drawings as near."""
    generator = networks[0]
    z = torch.randn(50, generator.latent_dim, generator=torch.Generator().manual_seed(0))
    x = generator(z).detach()
    found = {
        name: project(generator, x, ProjectionConfig(solver, "prior", steps=steps, precision=precision))
        for name, steps, precision in (("start", 0, "full"), ("full", 8, "full"), ("coarse", 8, "bfloat16"))
    }
    start, full, coarse = (found[name].error.mean() for name in ("start", "full", "coarse"))
    assert not torch.equal(found["coarse"].z, found["full"].z)
    assert torch.equal(found["coarse"].steps, found["full"].steps)
    assert full < 0.4 * start
    assert coarse - full < 0.03 * start


@pytest.mark.usefixtures("able")
def test_the_exact_view_gives_the_deployed_image_and_a_gradient_in_full(networks: Any, digits: Any) -> None:
    generator, encoder = networks
    watched, x = Watched(generator), digits[0][:5].clone().requires_grad_(True)
    config = ProjectionConfig("adam", steps=2, metric="none", precision="bfloat16")
    image = project_exactly(watched, x, config, encoder=encoder)
    assert torch.equal(image, project(generator, x, config, encoder=encoder).image)
    watched.rounded.clear()
    weights = torch.rand(x.shape, generator=torch.Generator().manual_seed(0)) - 0.5
    (gradient,) = torch.autograd.grad((weights * image).sum(), x)
    assert watched.rounded
    assert not any(watched.rounded)
    full = project_exactly(generator, x, replace(config, precision="full"), encoder=encoder)
    (true,) = torch.autograd.grad((weights * full).sum(), x)
    assert torch.cosine_similarity(gradient.flatten(1), true.flatten(1)).min() > 0.99


@pytest.mark.usefixtures("able")
@pytest.mark.parametrize("solver", ["gd", "adam", "lbfgs"])
def test_backward_takes_the_steps_that_the_descent_took(
    networks: Any, digits: Any, solver: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In full, L-BFGS would accept other trial points than it did in bfloat16."""
    plain, taken = SOLVERS[solver], list[Tensor]()

    def noted(*arguments: Any) -> State:
        after = plain.step(*arguments)
        taken.append(after[0].detach().clone())
        return after

    monkeypatch.setitem(SOLVERS, solver, plain._replace(step=noted))
    config = ProjectionConfig(solver, steps=12, iterate="last", precision="bfloat16")
    x = digits[0][:50].clone().requires_grad_(True)
    image = project_exactly(networks[0], x, config, encoder=networks[1])
    forward = taken.copy()
    taken.clear()
    (gradient,) = torch.autograd.grad(image.sum(), x)
    assert gradient.isfinite().all()
    assert len(forward) == len(taken) == 12
    for there, back in zip(forward, reversed(taken), strict=True):
        torch.testing.assert_close(back, there, rtol=0, atol=1e-5)


@pytest.mark.usefixtures("able")
def test_double_precision_is_never_rounded(networks: Any, digits: Any) -> None:
    generator, encoder = (network.double() for network in networks)
    x = digits[0][:5].double()
    coarse, full = (project(generator, x, c, encoder=encoder) for c in (COARSE, FULL))
    assert torch.equal(coarse.z, full.z)


def test_a_device_without_it_computes_in_full(
    networks: Any, digits: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: MappingProxyType({"avx2": True}))
    generator, encoder = networks
    coarse, full = (project(generator, digits[0][:5], c, encoder=encoder) for c in (COARSE, FULL))
    assert torch.equal(coarse.z, full.z)


@pytest.mark.parametrize(
    ("device", "able", "expected"),
    [
        ("cpu", {"avx512_bf16": True}, True),
        ("cpu", {"avx512_f": True, "avx512_bf16": False, "amx_bf16": False}, False),
        ("cpu", {"avx512_bf16": False, "amx_bf16": True}, True),
        ("cpu", {"neon": True, "bf16": True}, True),
        ("cpu", {"neon": True, "bf16": False}, False),
        ("meta", {"avx512_bf16": True}, False),
    ],
)
def test_which_devices_have_it(
    device: str, able: dict[str, bool], expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: MappingProxyType(able))
    assert has_bfloat16(torch.device(device)) is expected


def test_a_rounded_generator_keeps_types_and_loses_digits(networks: Any) -> None:
    generator = networks[0]
    rounded, z = Rounded(generator), torch.randn(4, generator.latent_dim)
    image = rounded(z)
    assert image.dtype == z.dtype
    assert (rounded.latent_dim, rounded.image_shape) == (generator.latent_dim, generator.image_shape)
    assert 0 < (image - generator(z)).abs().max() < 0.02
    assert torch.equal(image, image.bfloat16().float())


def test_of_the_presets_the_drawing_ones_round() -> None:
    """What defends is computed in full, so that no rounding hides a gradient."""
    rounding = {name for name, config in PRESETS.items() if config.precision == "bfloat16"}
    assert rounding == {"accurate"}


@pytest.mark.usefixtures("able")
def test_a_filter_hands_it_on(networks: Any, digits: Any) -> None:
    filter = ManifoldFilter(*networks, config=COARSE)
    x = digits[0][:4]
    assert torch.equal(filter(x), project(networks[0], x, COARSE, encoder=networks[1]).image)
    assert not torch.equal(filter(x), filter.configured(FULL)(x))
