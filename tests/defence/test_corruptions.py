"""Corruptions against what is known of them by hand, by formula or by another implementation."""

import io
import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from manifold_defense.attacks import CORRUPTIONS, corruption, jpeg
from manifold_defense.attacks.corruptions import _variants
from manifold_defense.attacks.jpeg import compress, straight_through
from manifold_defense.attacks.objective import margins
from manifold_defense.attacks.resampling import blur, rotate, translate
from tests.defence.attack_table import GREY, Linear, images, logits_of, problem

every_corruption = pytest.mark.parametrize("name", CORRUPTIONS)
RANDOM = ("gaussian_noise", "salt_and_pepper", "elastic", "fog", "shift", "rotation")
SIZES = [(1, 8, 8), (1, 28, 28), (3, 32, 32), (3, 64, 64), (2, 12, 20)]


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def scenes(n: int, shape: tuple[int, int, int], seed: int = 0) -> Tensor:
    """Smooth images (N, C, H, W), a quarter of the side to a detail."""
    coarse = torch.rand(n, shape[0], 5, 5, generator=rng(seed))
    return F.interpolate(coarse, shape[1:], mode="bicubic").clamp(0, 1)


@every_corruption
@pytest.mark.parametrize("shape", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_shape_type_and_range(name: str, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    for x in (scenes(3, shape), torch.zeros(1, *shape), torch.ones(1, *shape), torch.zeros(0, *shape)):
        for severity in (1, 5):
            changed = CORRUPTIONS[name](x.to(dtype), severity, rng())
            assert changed.shape == x.shape
            assert changed.dtype == dtype
            assert (changed >= 0).all()
            assert (changed <= 1).all()


@every_corruption
@pytest.mark.parametrize("shape", SIZES)
def test_a_higher_severity_changes_more(name: str, shape: tuple[int, int, int]) -> None:
    x = scenes(20, shape)
    change = [(CORRUPTIONS[name](x, s, rng()) - x).square().mean() for s in range(1, 6)]
    assert all(low <= high for low, high in pairwise(change))
    assert 0 < change[-1] > change[0]


@pytest.mark.parametrize("name", ["gaussian_blur", "elastic", "shift", "rotation"])
def test_a_severity_means_the_same_at_any_size(name: str) -> None:
    """Of the same scene drawn larger, so that pixels themselves do not matter."""
    large = scenes(20, (1, 64, 64))
    small = F.interpolate(large, (32, 32), mode="area")
    pair = [(CORRUPTIONS[name](x, 3, rng(1)) - x).square().mean() for x in (small, large)]
    ratio = pair[0] / pair[1]
    # Elastic draws another field at another size.
    assert 0.5 < ratio < 2 if name == "elastic" else 0.8 < ratio < 1.25


@every_corruption
def test_an_image_is_changed_as_if_alone(name: str) -> None:
    x = scenes(6, (1, 28, 28))
    together = CORRUPTIONS[name](x, 3, rng())
    for i in (0, 5):
        torch.testing.assert_close(CORRUPTIONS[name](x[i : i + 1], 3, rng())[0], together[i])


@every_corruption
def test_what_is_random_follows_the_seed_alone(name: str) -> None:
    x, state = scenes(4, (1, 28, 28)), torch.get_rng_state()
    results = [CORRUPTIONS[name](x, 3, rng(seed)) for seed in (0, 0, *range(1, 9))]
    assert torch.equal(results[0], results[1])
    assert any(not torch.equal(results[0], other) for other in results[2:]) == (name in RANDOM)
    assert torch.equal(state, torch.get_rng_state())


@every_corruption
@pytest.mark.parametrize("severity", [0, 6, 2.5])
def test_a_severity_out_of_range(name: str, severity: Any) -> None:
    with pytest.raises(ValueError, match="severity: expected 1 to 5"):
        CORRUPTIONS[name](images(), severity, rng())


def test_light_by_hand() -> None:
    x = torch.tensor([[0.2, 0.4], [0.6, 0.8]]).view(1, 1, 2, 2)
    expected = torch.tensor([[0.5, 0.7], [0.9, 1.0]]).view(1, 1, 2, 2)
    torch.testing.assert_close(CORRUPTIONS["brightness"](x, 3, rng()), expected)
    expected = torch.tensor([[0.44, 0.48], [0.52, 0.56]]).view(1, 1, 2, 2)
    torch.testing.assert_close(CORRUPTIONS["contrast"](x, 3, rng()), expected)


def test_noise_has_its_size() -> None:
    grey = torch.full((1, 3, 64, 64), 0.5)
    noise = CORRUPTIONS["gaussian_noise"](grey, 1, rng()) - grey
    assert abs(noise.std() - 0.08) < 0.002
    speckled = CORRUPTIONS["salt_and_pepper"](grey, 5, rng())
    assert ((speckled == speckled[:, :1]).all(1)).all()  # whole pixels, in all channels
    for value in (0, 1):
        assert abs((speckled == value).float().mean() - 0.135) < 0.02


def test_fog_is_smooth_and_white() -> None:
    """`h = x' (1 + t) / t` on black: from 0 to 1, alike in all channels, without jumps."""
    haze = CORRUPTIONS["fog"](torch.zeros(1, 3, 64, 64), 5, rng())[0] * 2.5 / 1.5
    torch.testing.assert_close(haze[0], haze[2])
    assert haze.amin() == 0
    assert haze.amax() == pytest.approx(1)
    assert haze.diff(dim=1).abs().amax() < 0.1
    assert haze.std() > 0.1


def test_elastic_moves_without_shifting() -> None:
    """On a ramp, whose values are its columns, the change is the displacement, on average none."""
    ramp = torch.linspace(0, 1, 64, dtype=torch.float64).expand(1, 1, 64, 64)
    moved = (CORRUPTIONS["elastic"](ramp, 5, rng()) - ramp)[..., 8:-8, 8:-8] * 63
    assert 1 < moved.square().mean().sqrt() < 6  # 0.05 · 64 = 3.2 over both directions and all pixels
    assert moved.mean().abs() < 1.5
    assert moved.diff(dim=-1).abs().amax() < 1  # nothing is folded over


def test_shift_by_hand() -> None:
    x = torch.arange(6.0).view(1, 1, 2, 3)
    assert translate(x, 1, 0).tolist() == [[[[0, 1, 2], [0, 1, 2]]]]
    assert translate(x, 0, -1).tolist() == [[[[1, 2, 2], [4, 5, 5]]]]
    assert translate(x, 0, 9).tolist() == [[[[0, 0, 0], [3, 3, 3]]]]
    dot = torch.zeros(1, 1, 28, 28)
    dot[..., 14, 14] = 1
    places = {tuple(change(dot)[0, 0].nonzero()[0].tolist()) for change in _variants("shift", 3, 1, 0, 28)}
    assert places == {(14 + i, 14 + j) for i in (-3, 0, 3) for j in (-3, 0, 3)} - {(14, 14)}


@pytest.mark.parametrize("shape", [(1, 8, 8), (2, 9, 14)])
def test_rotation_by_right_angles(shape: tuple[int, int, int]) -> None:
    x = scenes(2, shape).double()
    torch.testing.assert_close(rotate(x, 0), x)
    torch.testing.assert_close(rotate(x, 180), x.flip(-2, -1))
    if shape[1] == shape[2]:
        torch.testing.assert_close(rotate(x, 90), x.rot90(1, (-2, -1)))
    else:  # about the centre, what stays inside
        inner = slice(3, 11)
        square = x[..., :8, inner]
        torch.testing.assert_close(rotate(square, 90), square.rot90(1, (-2, -1)))


def test_rotations_are_opposite() -> None:
    x = scenes(1, (1, 65, 65))
    back = rotate(rotate(x, 18), -18)
    assert (back - x)[..., 20:-20, 20:-20].abs().amax() < 0.01
    assert (rotate(rotate(x, 18), 18) - x)[..., 20:-20, 20:-20].abs().amax() > 0.1


def gaussian(distance: Tensor, sigma: float) -> Tensor:
    return torch.exp(-(distance**2) / (2 * sigma**2)) / (2 * math.pi * sigma**2)


@pytest.mark.parametrize("sigma", [0.3, 1.0, 4.0, 20.0])
def test_blur_conserves_the_mean(sigma: float) -> None:
    x = images(4).double()
    blurred = blur(x, sigma)
    torch.testing.assert_close(blurred.mean((-2, -1)), x.mean((-2, -1)))
    torch.testing.assert_close(blur(torch.full_like(x, 0.7), sigma), torch.full_like(x, 0.7))
    assert blurred.var() < x.var()


def test_blur_of_a_point_is_the_gaussian() -> None:
    point = torch.zeros(1, 1, 41, 41, dtype=torch.float64)
    point[..., 20, 20] = 1
    rows, columns = torch.meshgrid(torch.arange(41.0) - 20, torch.arange(41.0) - 20, indexing="ij")
    expected = gaussian((rows**2 + columns**2).sqrt().double(), 2.0)
    torch.testing.assert_close(blur(point, 2.0)[0, 0], expected, atol=1e-5, rtol=0)


def cosine(u: int, v: int) -> Tensor:
    """The basis image of coefficient (u, v), of length 1 (T.81, A.3.3, written out)."""
    basis = torch.empty(8, 8, dtype=torch.float64)
    for i in range(8):
        for j in range(8):
            c = (2**-0.5 if u == 0 else 1) * (2**-0.5 if v == 0 else 1) / 4
            basis[i, j] = (
                c * math.cos((2 * i + 1) * u * math.pi / 16) * math.cos((2 * j + 1) * v * math.pi / 16)
            )
    return basis


# Coefficient, its step at quality 50, and what (its value 100) becomes.
WAVES = [((0, 1), 11, 99), ((1, 0), 12, 96), ((3, 4), 51, 102), ((7, 7), 99, 99), ((4, 6), 103, 103)]


def wave_error() -> float:
    error = 0.0
    for (u, v), _, kept in WAVES:
        wave = cosine(u, v)
        got = 255 * compress(((128 + 100 * wave) / 255).view(1, 1, 8, 8), 50) - 128
        error = max(error, float((got - kept * wave).abs().amax()))
    return error


def test_jpeg_of_a_cosine() -> None:
    for _, step, kept in WAVES:
        assert round(100 / step) * step == kept
    assert wave_error() < 1e-6


def as_a_file(x: Tensor, quality: int) -> Tensor:
    """A grey image (H, W) of whole levels, through an encoder and a decoder that are not ours."""
    file = io.BytesIO()
    Image.fromarray(x.mul(255).round().byte().numpy()).save(file, "JPEG", quality=quality)
    return torch.from_numpy(np.array(Image.open(file))).float() / 255


def file_error(quality: int, size: tuple[int, int]) -> float:
    """Mean distance to the file's pixels in levels of 255; the median of seven images.

    Where a coefficient falls halfway between two steps, either is right: such an image is no oracle.
    """
    scene = (scenes(7, (1, *size)) * 255).round() / 255
    ours = compress(scene, quality)[:, 0].clamp(0, 1)
    files = torch.stack([as_a_file(x, quality) for x in scene[:, 0]])
    return float((ours - files).abs().mean((1, 2)).median()) * 255


@pytest.mark.parametrize("size", [(8, 8), (28, 28), (32, 32), (21, 45)])
@pytest.mark.parametrize("quality", [10, 50, 75, 95, 100])
def test_jpeg_is_that_of_a_file(quality: int, size: tuple[int, int]) -> None:
    """But for the rounding of pixels, which is a quarter of a level on average."""
    assert file_error(quality, size) < 0.6


@pytest.mark.parametrize(
    "wrong",
    [
        lambda right: right * 2,
        lambda right: right.clone().index_fill_(0, torch.tensor([0]), 8**-0.5 * 2**0.5),
        lambda right: right.T,
    ],
    ids=["scaled", "constant-not-halved", "transposed"],
)
def test_another_normalisation_is_noticed(
    wrong: Callable[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = jpeg._dct_matrix()
    monkeypatch.setattr(jpeg, "_dct_matrix", lambda: wrong(right))
    assert wave_error() > 1
    assert file_error(50, (32, 32)) > 0.6


def test_jpeg_at_full_quality_is_nearly_the_identity() -> None:
    x = scenes(2, (3, 28, 20)).double()
    assert (compress(x, 100) - x).abs().amax() < 4 / 255  # 64 coefficients, each off by half a level
    assert (compress(x, 10) - x).abs().amax() > 10 / 255


def test_the_gradient_of_rounding() -> None:
    v = torch.tensor([-1.6, 0.4, 2.5], requires_grad=True)
    assert straight_through(v).tolist() == [-2, 0, 2]
    assert torch.autograd.grad(straight_through(v).sum(), v)[0].tolist() == [1, 1, 1]
    x, w = scenes(2, (1, 12, 20)).double().requires_grad_(True), scenes(2, (1, 12, 20), seed=1).double()
    assert torch.equal(compress(x, 30, straight_through), compress(x, 30))
    (through,) = torch.autograd.grad(compress(x, 30, straight_through), x, w)
    torch.testing.assert_close(through, w)
    (none,) = torch.autograd.grad(compress(x, 30), x, w)
    assert (none == 0).all()


class Light(nn.Module):
    """Logits (N, 2) whose difference is the mean of the image less `threshold`."""

    def __init__(self, threshold: float) -> None:
        super().__init__()
        self.threshold = threshold

    def forward(self, x: Tensor) -> Tensor:
        difference = x.flatten(1).mean(1) - self.threshold
        return torch.stack([-difference / 2, difference / 2], 1)


def test_the_brightest_image_is_found() -> None:
    """Nothing raises the mean of a mid-grey image as brightness does: by 0.3 at severity 3."""
    grey, zeros = GREY * 0.8, torch.zeros(3, dtype=torch.long)
    lighter = corruption(Light(0.9), grey, zeros)
    torch.testing.assert_close(lighter.mean((1, 2, 3)), grey.mean((1, 2, 3)) + 0.3)
    torch.testing.assert_close(lighter, grey + 0.3)
    assert torch.equal(corruption(Light(0.9), grey, zeros + 1, targeted=True), lighter)


@pytest.mark.parametrize("stop_early", [False, True])
def test_the_worst_of_all_that_is_tried(stop_early: bool) -> None:
    model, x, y = problem(3)
    tried = [x] + [
        change(x) for name in CORRUPTIONS for s in (1, 2) for change in _variants(name, s, 2, 0, 8)
    ]
    assert len(tried) == 1 + 2 * (4 * 1 + 4 * 2 + 0 + 2)
    worst = torch.stack([margins(logits_of(model, t), y, False) for t in tried]).amax(0)
    got = margins(logits_of(model, corruption(model, x, y, eps=2, draws=2, stop_early=stop_early)), y, False)
    robust = worst <= 0
    if not stop_early:
        torch.testing.assert_close(got, worst)
    assert torch.equal(got <= 0, robust)
    torch.testing.assert_close(got[robust], worst[robust])


def test_more_of_everything_is_never_weaker() -> None:
    model, x, y = problem(3)

    def margin(**settings: Any) -> Tensor:
        return margins(logits_of(model, corruption(model, x, y, stop_early=False, **settings)), y, False)

    small = {"eps": 2, "draws": 2, "names": ("fog", "gaussian_noise")}
    for more in ({"eps": 3}, {"draws": 4}, {"names": ("elastic", "gaussian_noise", "jpeg", "fog")}):
        assert (margin(**(small | more)) >= margin(**small) - 1e-5).all()


def test_an_image_is_attacked_as_if_alone() -> None:
    model, x, y = problem(3)
    together = corruption(model, x, y, draws=2)
    for i in range(4):
        torch.testing.assert_close(corruption(model, x[i : i + 1], y[i : i + 1], draws=2)[0], together[i])


def test_a_fooled_image_leaves_the_batch() -> None:
    seen = []

    def model(x: Tensor) -> Tensor:
        seen.append(len(x))
        return Linear(0.0)(x)

    model_of_none = Linear(1e6)
    corruption(model, images(), torch.zeros(12, dtype=torch.long), draws=1)
    assert seen[0] == 12
    assert seen[-1] < 12
    assert seen == sorted(seen, reverse=True)
    # And one that nothing fools is returned with what it came to, unharmed by those that left.
    robust = corruption(model_of_none, GREY, torch.ones(3, dtype=torch.long), draws=1)
    assert (logits_of(model_of_none, robust).argmax(1) == 1).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"norm": "linf"}, "norm: expected one of corruption, got 'linf'"),
        ({"eps": 0.5}, "of 1 to 5"),
        ({"eps": 6}, "of 1 to 5"),
        ({"eps": math.nan}, "eps: expected at least 0, got nan"),
        ({"draws": 0}, "draws ≥ 1"),
        ({"names": ("snow",)}, "names: expected some of gaussian_noise"),
        ({"names": ()}, "names: expected some of gaussian_noise"),
    ],
)
def test_bad_arguments(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        corruption(Linear(0.0), GREY, torch.zeros(3, dtype=torch.long), **settings)


def test_bad_lengths() -> None:
    for quality in (0, 101):
        with pytest.raises(ValueError, match="quality: expected 1 to 100"):
            compress(GREY, quality)
    with pytest.raises(ValueError, match="sigma: expected above 0"):
        blur(GREY, 0.0)
