"""The filter as a module: what its views share, what differs, and that none masks by accident."""

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from manifold_defense import DefendedClassifier, ManifoldFilter, ProjectionConfig, project
from manifold_defense.filter import VIEWS
from manifold_defense.projection import PRESETS, check_images
from tests.defence.projection_support import input_gradient

CONFIG = ProjectionConfig("lbfgs", "encoder", steps=5)
ORIGIN = ProjectionConfig("gd", "origin", restarts=2, steps=10)


@pytest.fixture
def filter(networks: Any) -> ManifoldFilter:
    return ManifoldFilter(*networks, CONFIG)


@pytest.fixture
def classifier() -> nn.Module:
    """With dropout and batch statistics, so that its mode is seen; in eval mode."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        layers = (
            nn.Conv2d(1, 4, 3),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Flatten(),
            nn.Dropout(),
            nn.Linear(144, 3),
        )
    return nn.Sequential(*layers).eval()


def images(n: int, seed: int = 0) -> Tensor:
    return torch.rand(n, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("config", [CONFIG, ORIGIN], ids=["lbfgs", "gd"])
def test_a_view_never_changes_the_result(networks: Any, config: ProjectionConfig) -> None:
    x = images(20)
    expected = project(networks[0], x, config, encoder=networks[1]).image
    views = ManifoldFilter(*networks, config).views()
    assert set(VIEWS) - set(views) == ({"soft"} if config.uses_encoder else {"start"})
    for view in views:
        filter = ManifoldFilter(*networks, config, view)
        assert torch.equal(filter(x), expected)
        assert torch.equal(filter(x.clone().requires_grad_(True)), expected), view
        assert torch.equal(filter.project(x).image, expected)


@pytest.mark.parametrize("view", [view for view in VIEWS if view != "start"])
def test_a_filter_gives_images_that_a_filter_takes(view: Any) -> None:
    """Black and white exactly: rounding must not leave [0, 1]."""

    class Extreme(nn.Module):
        latent_dim, image_shape = 2, (1, 8, 8)

        def forward(self, z: Tensor) -> Tensor:
            return z.sum(1).view(-1, 1, 1, 1).sigmoid().round().expand(-1, 1, 8, 8)

    filter = ManifoldFilter(Extreme(), config=ProjectionConfig(start="prior", restarts=4, steps=0), view=view)
    out = filter(images(50).requires_grad_(True))
    check_images(out, (1, 8, 8))
    assert set(out.flatten().tolist()) <= {0.0, 1.0}


@pytest.mark.parametrize("share", [0.3, 0.75])
def test_a_classifier_that_is_asked_twice_says_the_mean_of_what_it_says(
    filter: ManifoldFilter, classifier: nn.Module, share: float
) -> None:
    x = images(7)
    mixed = DefendedClassifier(filter, classifier, share)
    expected = (1 - share) * classifier(x).softmax(1) + share * classifier(filter(x)).softmax(1)
    assert torch.allclose(mixed(x).exp(), expected, atol=1e-6)
    for view in filter.views():
        assert torch.equal(mixed.view(view)(x), mixed(x))
    assert torch.equal(DefendedClassifier(filter, classifier, 1.0)(x), classifier(filter(x)))


def test_the_gradient_of_one_that_is_asked_twice_has_both_ways(networks: Any, classifier: nn.Module) -> None:
    """Finite differences in float64, through image and drawing; and it is alive where both are so sure
    that in float32 the other class has no probability left.
    """
    generator, encoder = (copy.deepcopy(network).double() for network in networks)
    mixed = DefendedClassifier(ManifoldFilter(generator, encoder, CONFIG), classifier.double(), 0.4)
    x = images(2).double()
    found, direction = input_gradient(mixed, x), images(2, seed=1).double() - 0.5
    ends = [mixed((x + sign * 1e-6 * direction).clamp(0, 1))[:, 0].sum() for sign in (1, -1)]
    assert torch.allclose((found * direction).sum(), (ends[0] - ends[1]) / 2e-6, rtol=1e-4)

    class Sure(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 240 * torch.stack([x.flatten(1).mean(1), -x.flatten(1).mean(1)], 1)

    sure = DefendedClassifier(ManifoldFilter(*networks, CONFIG), Sure(), 0.4)
    x = images(3).requires_grad_(True)
    assert (sure(x).exp()[:, 1] == 0).all()
    lead = (sure(x)[:, 1] - sure(x)[:, 0]).sum()
    alive = torch.autograd.grad(lead, x)[0].flatten(1)
    assert alive.isfinite().all()
    assert (alive.abs().amax(1) > 0).all()


@pytest.mark.parametrize("given", [None, [[0.5]], images(2).numpy()])
@pytest.mark.parametrize("call", ["__call__", "project"])
def test_what_is_no_tensor_is_no_image(filter: ManifoldFilter, given: Any, call: str) -> None:
    with pytest.raises(ValueError, match=rf"^images: expected a tensor .* got {type(given).__name__}"):
        getattr(filter, call)(given)


def test_a_filter_and_a_classifier_the_other_way_round_are_refused(defended: DefendedClassifier) -> None:
    filter, classifier = defended.filter, defended.classifier
    for given in ((classifier, filter), ("zoo/mnist/filter", classifier), (nn.Identity(), classifier)):
        with pytest.raises(TypeError, match=r"^expected DefendedClassifier\(filter, classifier\) of a Manif"):
            DefendedClassifier(*given)  # type: ignore[arg-type]


@pytest.mark.parametrize("share", [0.0, 1.5, -0.1, float("nan"), True, "half"])
def test_a_share_that_is_none_is_refused(filter: ManifoldFilter, classifier: nn.Module, share: Any) -> None:
    with pytest.raises(ValueError, match=r"share: expected a number in \(0, 1\], got"):
        DefendedClassifier(filter, classifier, share)


def test_the_identity_view_is_the_classifiers_gradient_at_the_projection(
    filter: ManifoldFilter, classifier: nn.Module
) -> None:
    x, defended = images(5), DefendedClassifier(filter, classifier)
    at_projection = input_gradient(classifier, filter.project(x).image)
    assert torch.equal(input_gradient(defended.view("identity"), x), at_projection)
    exact = input_gradient(defended.view("exact"), x)
    assert (exact.flatten(1).norm(dim=1) > 0).all()
    assert not torch.allclose(exact, at_projection, rtol=0.1)
    assert torch.equal(input_gradient(defended, x), exact)


@pytest.mark.parametrize("strength", [0.2, 0.5, 1.0])
@pytest.mark.parametrize("view", VIEWS)
def test_a_filter_of_less_strength_goes_part_of_the_way(networks: Any, view: Any, strength: float) -> None:
    """And so does its gradient, whatever the view makes of the drawing's."""
    config = replace(CONFIG, restarts=2, seed=3)
    whole = ManifoldFilter(*networks, config, view)
    part = whole.configured(replace(config, strength=strength))
    x, weights = images(4).requires_grad_(True), images(4, seed=1)
    torch.testing.assert_close(part(x), x + strength * (whole(x) - x))
    assert torch.equal(part(x), part(x.detach()))
    assert torch.equal(part.project(x.detach()).image, whole(x))
    drawn, given = ((weights * filter(x)).sum() for filter in (whole, part))
    expected = (1 - strength) * weights + strength * torch.autograd.grad(drawn, x)[0]
    torch.testing.assert_close(torch.autograd.grad(given, x)[0], expected)


def test_settings_of_a_filter_are_no_name(networks: Any) -> None:
    name: Any = "fast"
    with pytest.raises(TypeError, match=r"expected a ProjectionConfig, such as PRESETS.* got 'fast'"):
        ManifoldFilter(*networks, name)
    with pytest.raises(TypeError, match=r"expected a ProjectionConfig, such as PRESETS.* got 'fast'"):
        ManifoldFilter(*networks).configured(name)


_SOLVED = ProjectionConfig(steps=3, seed=3)


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize(
    "config",
    [
        ProjectionConfig(steps=0, strength=0.3),
        replace(_SOLVED, restarts=2),
        replace(_SOLVED, solver="lbfgs", restarts=3, others="bank", bank=20),
    ],
)
def test_the_autocast_of_a_caller_changes_nothing(networks: Any, config: ProjectionConfig, view: Any) -> None:
    """Neither what is drawn, nor its gradient, nor the metric and the bank that are kept."""
    rounded, plain = ManifoldFilter(*networks, config, view), ManifoldFilter(*networks, config, view)
    x, weights = images(3).requires_grad_(True), images(3, seed=1)
    with torch.autocast("cpu", torch.bfloat16):
        given, unrecorded = rounded(x), rounded(x.detach())
    gradient = torch.autograd.grad((weights * given).sum(), x)[0]
    assert given.dtype == torch.float32
    assert torch.equal(given, plain(x))
    assert torch.equal(unrecorded, plain(x))
    assert torch.equal(rounded(x), plain(x))
    assert torch.equal(gradient, torch.autograd.grad((weights * plain(x)).sum(), x)[0])


@pytest.mark.parametrize("view", ["", "bpda", "unaware"])
def test_an_unknown_view_is_refused(networks: Any, view: Any) -> None:
    with pytest.raises(ValueError, match=r"^view: expected one of exact, implicit, .*identity, got"):
        ManifoldFilter(*networks, CONFIG, view)
    with pytest.raises(ValueError, match=r"^view: expected"):
        DefendedClassifier(ManifoldFilter(*networks, CONFIG), nn.Flatten()).view(view)


def test_the_start_view_is_the_gradient_of_the_encoder_alone(
    filter: ManifoldFilter, classifier: nn.Module
) -> None:
    x = images(5)
    found = filter.project(x).image

    def surrogate(x: Tensor) -> Tensor:
        short = filter.generator(filter.encoder(x))
        return classifier(short + (found - short).detach())

    expected = torch.autograd.grad(surrogate(x.requires_grad_(True))[:, 0].sum(), x)[0]
    got = input_gradient(DefendedClassifier(filter, classifier).view("start"), x)
    torch.testing.assert_close(got, expected)
    with pytest.raises(ValueError, match=r"^view 'start' needs start='encoder', got start='origin'"):
        ManifoldFilter(filter.generator, filter.encoder, ORIGIN, "start")


def test_nothing_is_masked_by_accident(filter: ManifoldFilter, classifier: nn.Module) -> None:
    """An ordinary Sequential has a gradient, and it is the true slope of the logits."""
    model = nn.Sequential(filter, classifier).double()
    x = images(4).double()
    gradient = input_gradient(model, x)
    assert (gradient.flatten(1).abs().amax(1) > 0).all()
    step = 1e-6 * (images(4, seed=1).double() - 0.5)
    with torch.no_grad():
        slope = (model(x + step)[:, 0] - model(x - step)[:, 0]).sum() / 2
    torch.testing.assert_close((gradient * step).sum(), slope, rtol=1e-3, atol=0)


def test_a_filter_stays_in_eval_mode_and_frozen(networks: Any, classifier: nn.Module) -> None:
    generator = nn.Sequential(nn.Dropout(), networks[0])
    generator.latent_dim, generator.image_shape = 6, (1, 8, 8)
    filter = ManifoldFilter(generator.train(), networks[1].train(), CONFIG)
    defended = DefendedClassifier(filter, classifier)
    x = images(3)
    expected = filter(x)
    for model in (filter, defended, nn.Sequential(filter, classifier)):
        assert model.train() is model
        assert not any(module.training for module in filter.modules())
        assert torch.equal(filter(x), expected)
    assert classifier.training
    assert not any(p.requires_grad for p in filter.parameters())
    assert all(p.requires_grad for p in classifier.parameters())
    assert len(list(filter.parameters())) == len([p for n in networks for p in n.parameters()])


@pytest.mark.parametrize("view", VIEWS)
def test_training_behind_a_filter_moves_the_classifier_alone(
    filter: ManifoldFilter, classifier: nn.Module, view: Any
) -> None:
    defended = DefendedClassifier(filter, classifier).view(view)
    for x in (images(3), images(3).requires_grad_(True)):
        defended.zero_grad()
        defended(x).square().sum().backward()
        assert all(p.grad is not None for p in classifier.parameters())
        assert all(p.grad is None for p in filter.parameters())


@pytest.mark.parametrize("view", VIEWS)
def test_one_image_without_a_batch(networks: Any, view: Any) -> None:
    filter, x = ManifoldFilter(*networks, CONFIG, view), images(2)
    assert filter(x[0]).shape == (1, 8, 8)
    assert torch.equal(filter(x[0]), filter(x[:1])[0])
    single = x[0].clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(filter(single).sum(), single)
    batch = x[:1].clone().requires_grad_(True)
    (batched,) = torch.autograd.grad(filter(batch).sum(), batch)
    torch.testing.assert_close(gradient, batched[0])


@pytest.mark.parametrize("view", VIEWS)
def test_the_hosts_gradient_mode(networks: Any, classifier: nn.Module, view: Any) -> None:
    filter = ManifoldFilter(*networks, CONFIG, view)
    x = images(3)
    expected = classifier(filter(x)).detach()
    model = DefendedClassifier(filter, classifier)
    for x_in in (x, x.clone().requires_grad_(True)):
        with torch.no_grad():
            assert torch.equal(model(x_in), expected)
            assert not model(x_in).requires_grad
        with torch.inference_mode():
            assert torch.equal(model(x_in), expected)
            assert torch.equal(model(x_in + 0), expected)


@pytest.mark.parametrize(
    "config",
    [ProjectionConfig(steps=3), ProjectionConfig(steps=3, start="bank"), ProjectionConfig("lbfgs", steps=3)],
    ids=["metric", "bank", "lbfgs"],
)
def test_a_first_call_in_inference_mode(networks: Any, config: ProjectionConfig) -> None:
    """What it makes for itself there serves the calls of other modes after it."""
    expected = ManifoldFilter(*networks, config)(images(3))
    filter = ManifoldFilter(*networks, config)
    with torch.inference_mode():
        torch.testing.assert_close(filter(images(3)), expected)
    x = images(3).requires_grad_(True)
    image = filter(x)
    torch.testing.assert_close(image.detach(), expected)
    assert torch.autograd.grad(image.sum(), x)[0].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_images_of_another_type_than_the_weights_are_refused(networks: Any, dtype: torch.dtype) -> None:
    """A division of numpy's gives float64."""
    filter = ManifoldFilter(*networks, CONFIG)
    for call in (filter, filter.project):
        with pytest.raises(ValueError, match=f"images: expected torch.float32.*got {dtype}"):
            call(images(3).to(dtype))


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("shape", [(64,), (3, 64), (3, 3, 8, 8), (8, 8), (3, 8, 8), (1, 1, 1, 8, 8)])
def test_other_shapes_are_refused(networks: Any, view: Any, shape: tuple[int, ...]) -> None:
    filter = ManifoldFilter(*networks, CONFIG, view)
    for x in (torch.zeros(shape), torch.zeros(shape, requires_grad=True)):
        with pytest.raises(ValueError, match=r"images: expected shape \(N, 1, 8, 8\)"):
            filter(x)


@pytest.mark.parametrize("view", VIEWS)
def test_values_out_of_range_are_refused_with_a_gradient_too(networks: Any, view: Any) -> None:
    for value in (1.5, -1.0, torch.nan):
        with pytest.raises(ValueError, match=r"^images: expected"):
            ManifoldFilter(*networks, CONFIG, view)(torch.full((1, 1, 8, 8), value, requires_grad=True))


def test_the_start_follows_the_encoder(networks: Any) -> None:
    generator, encoder = networks
    assert ManifoldFilter(generator, encoder).config == PRESETS["robust"]
    assert ManifoldFilter(generator).config.start == "prior"
    assert ManifoldFilter(generator).image_shape == (1, 8, 8)
    with pytest.raises(ValueError, match="needs an encoder"):
        ManifoldFilter(generator, None, ProjectionConfig(start="encoder"))


def test_views_share_all_weights(filter: ManifoldFilter, classifier: nn.Module) -> None:
    defended = DefendedClassifier(filter, classifier)
    other = defended.view("identity")
    assert (defended.filter.view, other.filter.view) == ("exact", "identity")
    assert [p.data_ptr() for p in other.parameters()] == [p.data_ptr() for p in defended.parameters()]
    assert other.filter.config == filter.config
