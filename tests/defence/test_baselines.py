"""Preprocessing baselines: what they do by hand, and every view's gradient against the stated stand-in."""

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from manifold_defense.attacks import pgd
from manifold_defense.attacks.jpeg import compress
from manifold_defense.attacks.resampling import blur
from manifold_defense.evaluation.baselines import (
    Binarise,
    BitDepth,
    Blur,
    Jpeg,
    NearestBank,
    Preprocess,
    Preprocessed,
    RandomNoise,
)
from tests.defence.attack_table import Linear, images, logits_of

BANK = images(20, seed=5)
BASELINES: dict[str, tuple[Preprocess, tuple[str, ...]]] = {
    "binarise": (Binarise(), ("identity", "soft", "sharp")),
    "bit_depth": (BitDepth(bits=3), ("identity", "soft", "sharp")),
    "jpeg": (Jpeg(quality=50), ("identity", "soft", "sharp")),
    "blur": (Blur(sigma=1.0), ("exact", "identity")),
    "nearest_bank": (NearestBank(BANK), ("identity", "soft", "sharp")),
    "random_noise": (RandomNoise(sigma=0.1), ("exact", "identity")),
}
every_baseline = pytest.mark.parametrize("name", BASELINES)
every_view = pytest.mark.parametrize(
    ("name", "view"), [(name, view) for name, (_, views) in BASELINES.items() for view in views]
)
# Steps or a choice: flat almost everywhere.
STEPPED = ("binarise", "bit_depth", "jpeg", "nearest_bank")


def fresh(name: str) -> Preprocess:
    module = copy.deepcopy(BASELINES[name][0])
    if isinstance(module, RandomNoise):
        module.reseed(0)
    return module


def pulled(function: Any, x: Tensor, w: Tensor) -> Tensor:
    """The product of w with the Jacobian of `function` at x."""
    x = x.detach().requires_grad_(True)
    return torch.autograd.grad(function(x), x, w)[0]


def numerical(function: Any, x: Tensor, w: Tensor) -> Tensor:
    """The same by central differences, pixel by pixel, of one image (1, C, H, W)."""
    gradient = torch.zeros_like(x)
    for i in range(x.numel()):
        step = torch.zeros_like(x)
        step.view(-1)[i] = 1e-5
        gradient.view(-1)[i] = ((function(x + step) - function(x - step)) * w).sum() / 2e-5
    return gradient


@every_baseline
def test_the_views_are_those_listed(name: str) -> None:
    module, views = BASELINES[name]
    assert module.views() == views
    assert module.view == views[0]
    for bad in ("exact" if name in STEPPED else "soft", "unaware"):
        with pytest.raises(ValueError, match=f"view: expected one of {', '.join(views)}, got '{bad}'"):
            module.seen(bad)


@every_view
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_view_changes_the_gradient_alone(name: str, view: str, dtype: torch.dtype) -> None:
    module = fresh(name)
    x = images(6).to(dtype)
    deployed = module(x)
    assert deployed.shape == x.shape
    assert deployed.dtype == dtype
    assert (deployed >= 0).all()
    assert (deployed <= 1).all()
    seen = fresh(name).seen(view)
    assert type(seen) is type(module)
    assert torch.equal(seen(x.clone().requires_grad_(True)), deployed)
    assert module.view == module.views()[0]
    assert seen(x[:0]).shape == (0, 1, 8, 8)


@every_baseline
def test_images_of_any_size(name: str) -> None:
    module, x = fresh(name), torch.rand(2, 3, 30, 21)
    if isinstance(module, NearestBank):
        module = NearestBank(torch.rand(5, 3, 30, 21))
    for view in module.views():
        assert pulled(module.seen(view), x, torch.rand_like(x)).shape == x.shape


@every_baseline
def test_the_identity_is_the_identity(name: str) -> None:
    x, w = images(6), images(6, seed=1) - 0.5
    assert torch.equal(pulled(fresh(name).seen("identity"), x, w), w)


@every_view
def test_every_gradient_says_something(name: str, view: str) -> None:
    gradient = pulled(fresh(name).seen(view), images(6), images(6, seed=1) - 0.5)
    assert gradient.isfinite().all()
    assert (gradient.flatten(1).abs().amax(1) > 1e-4).all()


@pytest.mark.parametrize("name", STEPPED)
def test_what_is_deployed_has_no_gradient(name: str) -> None:
    """The reason for stand-ins, and the mistake that they undo."""
    x = images(4).double()
    step = 1e-9 * (images(4, seed=1).double() - 0.5)
    module = fresh(name)
    change = (module(x + step) - module(x)).abs().flatten(1).amax(1)
    assert (change < 1e-12).all()
    # Jpeg rounds, whose gradient is 0; the others cut the graph.
    deployed = module.deployed(x.requires_grad_(True))
    if deployed.requires_grad:
        assert (torch.autograd.grad(deployed.sum(), x)[0] == 0).all()


@pytest.mark.parametrize(("view", "slope"), [("soft", 5), ("sharp", 20)])
def test_stand_in_of_steps(view: str, slope: float) -> None:
    """`k s (1 − s)` at the distance to the threshold, for each step of its own."""
    x, w = images(3).double(), images(3, seed=1).double() - 0.5

    def bump(distance: Tensor) -> Tensor:
        s = 1 / (1 + torch.exp(-slope * distance))
        return slope * s * (1 - s)

    torch.testing.assert_close(pulled(Binarise(0.4, view), x, w), w * bump(x - 0.4))
    # Thresholds of 3 bits: halfway between neighbours of 0, 1/7 … 1.
    expected = w * bump((7 * x) % 1 - 0.5)
    torch.testing.assert_close(pulled(BitDepth(3, view), x, w), expected)
    torch.testing.assert_close(
        pulled(BitDepth(1, view), x[x < 1].view(1, 1, 1, -1), w[x < 1].view(1, 1, 1, -1)),
        pulled(Binarise(0.5, view), x[x < 1].view(1, 1, 1, -1), w[x < 1].view(1, 1, 1, -1)),
    )


def test_binarise() -> None:
    assert Binarise()(torch.tensor([0.0, 0.49, 0.5, 0.51, 1.0])).tolist() == [0, 0, 0, 1, 1]
    binary = (images() > 0.6).float()
    assert torch.equal(Binarise()(binary), binary)
    assert torch.equal(Binarise(0.1)(binary), binary)
    assert not torch.equal(Binarise()(images()), images())
    x = images()
    assert torch.equal(BitDepth(1)(x), Binarise()(x))


def test_bit_depth() -> None:
    x = torch.tensor([0.0, 0.2, 0.4, 0.6, 1.0])
    torch.testing.assert_close(BitDepth(2)(x), torch.tensor([0, 1 / 3, 1 / 3, 2 / 3, 1]))
    x = images()
    for bits in (1, 3, 8):
        coarse = BitDepth(bits)(x)
        assert len(coarse.unique()) <= 2**bits
        assert (coarse - x).abs().amax() <= 0.5 / (2**bits - 1) + 1e-6
        assert torch.equal(BitDepth(bits)(coarse), coarse)
    with pytest.raises(ValueError, match="bits: expected at least 1"):
        BitDepth(0)


def test_jpeg_is_the_jpeg_of_the_corruptions() -> None:
    x = images()
    assert torch.equal(Jpeg(30)(x), compress(x, 30).clamp(0, 1))
    with pytest.raises(ValueError, match="quality: expected 1 to 100"):
        Jpeg(0)


def test_stand_ins_of_jpeg() -> None:
    """On a block of known coefficients: 0.4 of a step is lost, 2.3 are kept."""
    dct = torch.cos(torch.arange(8).double()[:, None] * (2 * torch.arange(8).double() + 1) * torch.pi / 16)
    waves = [torch.outer(dct[0], dct[v]) / (32**0.5) for v in (1, 2)]  # of length 1; steps 11 and 10
    x = ((128 + 0.4 * 11 * waves[0] + 2.3 * 10 * waves[1]) / 255).view(1, 1, 8, 8)
    torch.testing.assert_close(Jpeg(50)(x), ((128 + 20 * waves[1]) / 255).view(1, 1, 8, 8))
    for view, factors in {"soft": (3 * 0.4**2, 3 * 0.3**2), "sharp": (0, 1)}.items():
        for wave, factor in zip(waves, factors, strict=True):
            w = wave.view(1, 1, 8, 8)
            torch.testing.assert_close(pulled(Jpeg(50, view), x, w), factor * w, atol=1e-7, rtol=0)


def test_blur_is_differentiated_exactly() -> None:
    x, w = images(1).double(), images(1, seed=1).double() - 0.5
    module = Blur(0.8)
    torch.testing.assert_close(module(x), blur(x, 0.8))
    torch.testing.assert_close(pulled(module, x, w), numerical(module, x.clamp(0.01, 0.99), w))
    # White stays white, and keeps its gradient where rounding was clipped.
    white, clipped = torch.ones(1, 1, 8, 8), False
    for sigma in (0.5, 1.0, 2.0):
        assert 1 - 1e-6 < Blur(sigma)(white).amin() <= Blur(sigma)(white).amax() <= 1
        gradient = pulled(Blur(sigma), white, white)
        torch.testing.assert_close(gradient, white, rtol=1e-5, atol=0)
        clipped |= bool((blur(white, sigma) > 1).any())
    assert clipped
    with pytest.raises(ValueError, match="sigma: expected above 0"):
        Blur(0)


def test_nearest_of_a_bank() -> None:
    module = NearestBank(BANK)
    x = images(9, seed=8)
    by_hand = torch.stack([BANK[(image - BANK).square().sum((1, 2, 3)).argmin()] for image in x])
    assert torch.equal(module(x), by_hand)
    assert torch.equal(module(BANK), BANK)
    assert torch.equal(module(BANK.flip(0) + 0.01), BANK.flip(0))
    for bad in (BANK[:0], BANK[0], (BANK * 255).byte()):
        with pytest.raises(ValueError, match="bank: expected images"):
            NearestBank(bad)
    with pytest.raises(ValueError, match=r"expected images \(N, 1, 8, 8\)"):
        module(torch.rand(2, 1, 9, 9))
    assert torch.equal(NearestBank(BANK[:1])(x), BANK[:1].expand_as(x))


@pytest.mark.parametrize(("view", "share"), [("soft", 0.5), ("sharp", 0.05)])
def test_stand_in_of_the_nearest(view: str, share: float) -> None:
    """The softmax mean written out, by differences; τ from the bank's own distances."""
    bank, x, w = BANK.double(), images(1, seed=8).double(), images(1, seed=1).double() - 0.5
    own = torch.cdist(bank.flatten(1), bank.flatten(1)) ** 2 + torch.eye(20) * 1e9
    tau = share * own.amin(1).mean()

    def mean(x: Tensor) -> Tensor:
        weights = torch.softmax(-(x - bank).square().sum((1, 2, 3)) / tau, 0)
        return torch.einsum("m,mchw->chw", weights, bank).unsqueeze(0)

    expected = numerical(mean, x, w)
    torch.testing.assert_close(pulled(NearestBank(bank, view), x, w), expected, rtol=1e-4, atol=1e-8)
    other = pulled(NearestBank(bank, "sharp" if view == "soft" else "soft"), x, w)
    assert not torch.allclose(other, expected, rtol=0.1, atol=0)


def test_random_noise() -> None:
    x = torch.full((4, 1, 32, 32), 0.5)
    module, state = RandomNoise(0.1, seed=3), torch.get_rng_state()
    first, second = module(x), module.seen("identity")(x)
    assert not torch.equal(first, second)
    assert abs((first - x).std() - 0.1) < 0.005
    module.reseed(3)
    assert torch.equal(module.seen("exact")(x), first)
    assert torch.equal(module(x), second)  # one stream for all views
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(RandomNoise(0.0)(x), x)
    with pytest.raises(ValueError, match="sigma: expected at least 0"):
        RandomNoise(-1)


def test_noise_that_was_clipped_has_no_gradient() -> None:
    x, ones = images(4), torch.ones(4, 1, 8, 8)
    module = RandomNoise(0.3)
    noisy = module(x)
    module.reseed(0)
    inside = (noisy > 0) & (noisy < 1)
    assert torch.equal(pulled(module, x, ones), inside.float())
    assert not inside.all()


@every_baseline
def test_copies_and_files(name: str) -> None:
    """A copy goes on from the same state; a view shares it."""
    module, x = fresh(name), images(3)
    twin = copy.deepcopy(module)
    assert torch.equal(twin(x), module(x))
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(x), module(x))
    double = module.seen("identity").double()
    for buffer in (*double.buffers(), *module.buffers()):
        assert buffer.dtype == torch.float64


@pytest.mark.parametrize("name", [*STEPPED, "blur", "random_noise"])
def test_the_classifier_behind_it(name: str) -> None:
    classifier, x = Linear(0.3), images(6)
    model = Preprocessed(fresh(name), classifier)
    assert torch.equal(model(x), classifier(fresh(name)(x)))
    assert model.views() == BASELINES[name][1]
    for view in model.views():
        seen = model.view(view)
        assert seen.preprocess.view == view
        assert seen.classifier is classifier
    assert model.preprocess.view == model.views()[0]
    with pytest.raises(ValueError, match="view: expected one of"):
        model.view("unaware")


def robust(attacked: nn.Module, model: nn.Module, x: Tensor, y: Tensor, eps: float) -> float:
    """Share of images that `model` still gets right after PGD on `attacked`."""
    x_adv = pgd(attacked, x, y, eps=eps, steps=20, stop_early=attacked is not model)
    return float((logits_of(model, x_adv).argmax(1) == y).float().mean())


@pytest.mark.parametrize("name", STEPPED)
def test_stand_ins_find_what_the_flat_gradient_hides(name: str) -> None:
    """PGD through every view beats the gradient of what is deployed, which goes nowhere."""

    class Hidden(nn.Module):
        """The mistake: differentiated as deployed, where its gradient is 0."""

        def __init__(self, model: Preprocessed) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor) -> Tensor:
            return self.model(x.detach()) + 0 * x.sum()

    model, x = Preprocessed(fresh(name), Linear(0.0)), images(60)
    y = logits_of(model, x).argmax(1)
    left = {view: robust(model.view(view), model, x, y, 0.15) for view in model.views()}
    hidden = robust(Hidden(model), model, x, y, 0.15)
    assert max(left.values()) < hidden - 0.2, (left, hidden)


def test_a_hook_of_a_view_is_its_own() -> None:
    baseline, x = Blur(sigma=1.0), images(2)
    baseline.seen("identity").register_forward_hook(lambda *given: given[-1] * 0)
    assert torch.equal(baseline(x), fresh("blur")(x))
