"""A filter as torch treats modules: copied, compiled, replicated, pickled, differentiated as it cannot be."""

import copy
import pickle
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from manifold_defense import DefendedClassifier, ManifoldFilter, ProjectionConfig, project
from manifold_defense.projection import PRESETS
from tests.defence import projection_support
from tests.defence.projection_support import input_gradient

CONFIG = ProjectionConfig("lbfgs", "encoder", steps=5)
ORIGIN = ProjectionConfig("gd", "origin", restarts=2, steps=10)
images = partial(projection_support.images, dtype=torch.float32)


class Coarse(ManifoldFilter):
    """A filter of a user's own: what it draws is rounded to black and white."""

    def drawing(self, x: Tensor) -> Tensor:
        drawn = super().drawing(x)
        return drawn + (drawn.round() - drawn).detach()


def test_a_view_is_of_the_filters_own_kind(networks: Any) -> None:
    """An attack on another model than the one that is deployed would be judged by the wrong answers."""
    x, own, hooked = images(6), Coarse(*networks, CONFIG), ManifoldFilter(*networks, CONFIG)
    hooked.register_forward_hook(lambda module, given, drawn: 0.5 * drawn)
    assert set(own(x).unique().tolist()) == {0.0, 1.0}
    for filter in (own, hooked):
        for view in filter.views():
            assert torch.equal(filter.seen(view)(x), filter(x))
            assert torch.equal(DefendedClassifier(filter, nn.Identity()).view(view)(x), filter(x))
        assert type(filter.configured(PRESETS["robust"])) is type(filter)
    later = hooked.seen("identity")
    later.register_forward_hook(lambda module, given, drawn: 0 * drawn)
    assert torch.equal(hooked(x), hooked.seen("exact")(x))  # what a view gets later is its own
    assert later(x).count_nonzero() == 0


def test_a_compiled_filter_has_views_of_its_own(networks: Any) -> None:
    """What `compile` makes is bound to the module that it was made of."""
    plain, filter, x = ManifoldFilter(*networks, CONFIG), ManifoldFilter(*networks, CONFIG), images(3)
    filter.compile(backend="eager")
    robust = PRESETS["robust"]
    torch.testing.assert_close(filter.configured(robust)(x), plain.configured(robust)(x))
    gradients = [input_gradient(nn.Sequential(f.seen("identity"), nn.Flatten()), x) for f in (filter, plain)]
    torch.testing.assert_close(*gradients)
    for copied in (copy.deepcopy(filter), pickle.loads(pickle.dumps(filter))):
        torch.testing.assert_close(copied(x), plain(x))


@pytest.mark.filterwarnings("ignore:Using backward")
@pytest.mark.parametrize(
    ("config", "view"),
    [(CONFIG, "exact"), (CONFIG, "tangent"), (CONFIG, "implicit"), (ORIGIN, "soft"), (ORIGIN, "exact")],
)
def test_second_derivatives_are_refused(networks: Any, config: ProjectionConfig, view: Any) -> None:
    """They would be those of a part of it, and nobody would be told."""
    filter, x = ManifoldFilter(*networks, config, view), images(2).requires_grad_(True)
    with pytest.raises(RuntimeError, match=r"^a projection has first derivatives alone"):
        torch.autograd.grad(filter(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"^a projection has first derivatives alone"):
        filter(x).sum().backward(create_graph=True)


@pytest.mark.filterwarnings("ignore:.torch.jit.script")  # torch.func's own
@pytest.mark.parametrize("preset", ["robust", "accurate"])
def test_forward_mode_is_refused(networks: Any, preset: str) -> None:
    filter, x = ManifoldFilter(*networks, PRESETS[preset]), images(2)
    said = r"^images: a filter is differentiated by torch\.autograd in reverse mode alone"
    with pytest.raises(RuntimeError, match=said):
        torch.func.jvp(filter, (x,), (torch.ones_like(x),))
    with pytest.raises(RuntimeError, match=said), forward_ad.dual_level():
        filter(forward_ad.make_dual(x, torch.ones_like(x)))
    with pytest.raises(RuntimeError, match=said):
        torch.func.grad(lambda x: filter(x).sum())(x)


def test_a_generator_that_does_not_say_what_it_draws_is_named() -> None:
    with pytest.raises(
        TypeError, match=r"^generator: expected latent_dim and image_shape, it has no latent_d"
    ):
        ManifoldFilter(nn.Linear(3, 3), None, ORIGIN)


def test_a_generator_that_draws_something_else_is_named(networks: Any) -> None:
    class Grey(nn.Module):
        latent_dim, image_shape = 8, (3, 8, 8)

        def forward(self, z: Tensor) -> Tensor:
            return torch.zeros(len(z), 1, 8, 8)

    filter = ManifoldFilter(Grey(), None, ORIGIN)
    with pytest.raises(ValueError, match=r"^generator: expected images of shape \(1, 3, 8, 8\), as its"):
        filter(torch.rand(2, 3, 8, 8))


@pytest.mark.parametrize("change", [{"seed": 1}, {"bank": 30}, {"metric": "none"}])
def test_other_settings_have_a_bank_and_a_metric_of_their_own(networks: Any, change: Any) -> None:
    config = ProjectionConfig("gd", "bank", steps=2, bank=20)
    filter, x = ManifoldFilter(*networks, config), images(5)
    before = filter(x)
    after = filter.configured(replace(config, **change))(x)
    assert torch.equal(after, ManifoldFilter(*networks, replace(config, **change))(x))
    assert not torch.equal(before, after)


def test_a_replica_follows_its_weights() -> None:
    class Held(nn.Module):
        """As `DataParallel` copies it: with tensors where its parameters were."""

        latent_dim, image_shape, _is_replica = 4, (1, 8, 8), True

        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))

        def forward(self, z: Tensor) -> Tensor:
            return (z @ self.weight).sigmoid().unflatten(1, self.image_shape)

    generator, config, x = Held(), ProjectionConfig("gd", "bank", steps=1, bank=20), images(3)
    filter = ManifoldFilter(generator, None, config)
    before = filter(x)
    generator.weight *= 1.7
    assert torch.equal(filter(x), ManifoldFilter(generator, None, config)(x))
    assert not torch.equal(filter(x), before)


def test_what_is_made_of_the_weights_is_not_pickled(networks: Any) -> None:
    filter, x = ManifoldFilter(*networks, ProjectionConfig("gd", "bank", steps=2)), images(3)
    size, expected = len(pickle.dumps(filter)), filter(x)
    assert len(pickle.dumps(filter)) == size
    assert torch.equal(pickle.loads(pickle.dumps(filter))(x), expected)
    assert torch.equal(copy.deepcopy(filter)(x), expected)


@pytest.mark.parametrize("preset", ["robust", "accurate"])
@pytest.mark.parametrize("gradient", [False, True])
def test_a_filter_is_compiled_around(networks: Any, preset: str, gradient: bool) -> None:
    filter, x = ManifoldFilter(*networks, PRESETS[preset]), images(3).requires_grad_(gradient)
    compiled: Any = torch.compile(filter, backend="aot_eager")
    torch.testing.assert_close(compiled(x), filter(x))


@pytest.mark.parametrize("start", ["bank", "encoder"])
def test_a_filter_makes_its_bank_and_metric_once(networks: Any, start: Any) -> None:
    config = ProjectionConfig(start=start, others="bank", restarts=3, steps=3, bank=20, metric="mean")
    filter, calls = ManifoldFilter(*networks, config), []
    filter.generator.register_forward_hook(lambda *_: calls.append(1))
    x = images(4)
    expected = filter(x)
    first, _ = len(calls), calls.clear()
    assert torch.equal(filter(x), expected)
    assert torch.equal(project(networks[0], x, config, encoder=networks[1]).image, expected)
    # Three gradients, the last loss and the image; once the bank and two batches of the metric besides, and
    # of a filter one image to see its shape.
    assert (first, len(calls)) == (5 + 3 + 1, 5 + (5 + 3))
    calls.clear()
    assert torch.equal(filter.seen("tangent")(x), expected)
    assert len(calls) == 5
    torch.testing.assert_close(filter.double()(x.double()).float(), expected, atol=1e-4, rtol=0)


def test_bank_and_metric_follow_the_weights(networks: Any) -> None:
    generator, encoder = networks
    config = ProjectionConfig("lbfgs", "bank", bank=50, steps=2)
    filter, x = ManifoldFilter(generator, encoder, config), images(4)
    before = filter(x)
    assert torch.equal(filter(x), before)
    other = copy.deepcopy(generator)
    larger = {name: 1.5 * value for name, value in generator.state_dict().items()}
    for change in (
        lambda: generator.load_state_dict(larger),
        lambda: generator.load_state_dict({name: -value for name, value in larger.items()}, assign=True),
        lambda: setattr(filter, "generator", other),
    ):
        before = filter(x)
        change()
        assert not torch.equal(filter(x), before)
        assert torch.equal(filter(x), ManifoldFilter(filter.generator, encoder, config)(x))
        assert len(filter._made) == 1
