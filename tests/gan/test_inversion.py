"""The encoder's loop: it learns to invert, and to draw what images were before they were disturbed."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from lightning_fabric import Fabric
from torch import Tensor

from gan import Encoder, Generator, NetworkConfig
from gan.inversion import EncoderConfig, encoder_state, train_encoder
from gan.optimisation import seeded
from gan.sampling import batch_indices

NETWORK = NetworkConfig(latent_dim=6, generator_width=4, critic_width=4, encoder_width=4, max_width=8)
SHAPE = (1, 8, 8)


def batches_of(images: Tensor, size: int) -> Callable[[int], Tensor]:
    return lambda step: images[batch_indices(len(images), size, 5, step)]


def networks() -> tuple[Generator, Encoder]:
    return seeded(3, lambda: Generator(SHAPE, NETWORK)), seeded(4, lambda: Encoder(SHAPE, NETWORK))


def drawn_by(generator: Generator, n: int) -> Tensor:
    with torch.no_grad():
        return generator(torch.randn(n, 6, generator=torch.Generator().manual_seed(1)))


def test_an_encoder_learns_to_invert(fabric: Fabric) -> None:
    """Images that the generator drew, so that a perfect inverse exists."""
    generator = seeded(3, lambda: Generator(SHAPE, replace(NETWORK, generator_width=16, max_width=32)))
    before = [p.clone() for p in generator.parameters()]
    images = drawn_by(generator, 256)
    config = EncoderConfig(images=150 * 32, batch_size=32, lr=3e-3, average_half_life=300)
    encoder = seeded(0, lambda: Encoder(SHAPE, replace(NETWORK, encoder_width=8, max_width=32)))
    state = encoder_state(fabric, encoder, config)

    def error() -> float:
        with torch.no_grad():
            return float((generator(state["encoder_average"](images)) - images).square().mean())

    start = error()
    records = list(train_encoder(fabric, state, generator, batches_of(images, 32), config, 0))
    assert len(records) == 150
    assert error() < 0.3 * start
    assert records[-1].metrics["latent_error"] < 0.5 * records[0].metrics["latent_error"]
    assert all(torch.equal(a, b) for a, b in zip(generator.parameters(), before, strict=True))
    assert all(p.grad is None for p in generator.parameters())


def test_the_encoder_sees_what_is_made_of_the_images_and_draws_what_they_were(fabric: Fabric) -> None:
    """Each step asks once, for its own images, with the errors of the networks as they are then."""
    generator, encoder = networks()
    images = drawn_by(generator, 64)
    config = EncoderConfig(images=4 * 16, batch_size=16)
    state = encoder_state(fabric, encoder, config)
    asked: list[tuple[int, float]] = []

    def inverted(errors: Any, x: Tensor, step: int, done: float, rng: torch.Generator) -> Tensor:
        asked.append((step, done))
        with torch.no_grad():
            expected = (generator(encoder(x)) - x).square().flatten(1).sum(1)
        torch.testing.assert_close(errors(x).detach(), expected)
        return 1 - x

    batches = batches_of(images, 16)
    loop = train_encoder(fabric, state, generator, batches, config, 0, disturb=inverted)
    with torch.no_grad():
        first = batches(0)
        expected = float((generator(encoder(1 - first)) - first).square().mean())
    assert float(next(loop).metrics["reconstruction_error"]) == pytest.approx(expected, rel=1e-4)
    assert len(list(loop)) == 3
    assert asked == [(0, 0.0), (1, 0.25), (2, 0.5), (3, 0.75)]


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_networks_are_climbed_in_the_precision_they_are_trained_in(precision: Any) -> None:
    """The steps are taken in full, and so are the errors: which is larger may be a matter of digits."""
    fabric = Fabric(accelerator="cpu", devices=1, precision=precision)
    generator, encoder = networks()
    asked: list[bool] = []
    encoder.register_forward_pre_hook(lambda *_: asked.append(torch.is_autocast_enabled("cpu")))

    def stepped(errors: Any, x: Tensor, *rest: Any) -> Tensor:
        assert not torch.is_autocast_enabled("cpu")
        with torch.enable_grad():
            at = x.clone().requires_grad_(True)
            found = errors(at)
            (gradient,) = torch.autograd.grad(found.sum(), at)
        assert found.dtype == gradient.dtype == torch.float32
        return (x + 0.1 * gradient.sign()).clamp(0, 1)

    config = EncoderConfig(images=32, batch_size=16)
    state, images = encoder_state(fabric, encoder, config), drawn_by(generator, 16)
    for record in train_encoder(fabric, state, generator, lambda step: images, config, 0, disturb=stepped):
        assert record.metrics["reconstruction_error"].dtype == torch.float32
    assert len(asked) == 2 * 3
    assert set(asked) == {precision != "32-true"}


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_the_clean_images_have_their_share_of_the_loss(fabric: Fabric, share: float) -> None:
    generator, encoder = networks()
    images = drawn_by(generator, 16)
    config = EncoderConfig(images=16, batch_size=16, clean_share=share)
    state = encoder_state(fabric, encoder, config)
    with torch.no_grad():
        errors = [float((generator(encoder(x)) - images).square().mean()) for x in (1 - images, images)]
    loop = train_encoder(
        fabric, state, generator, lambda step: images, config, 0, disturb=lambda e, x, *rest: 1 - x
    )
    found = float(next(loop).metrics["reconstruction_error"])
    assert found == pytest.approx((1 - share) * errors[0] + share * errors[1], rel=1e-4)


class Brightness:
    """How much brighter or darker drawings are than the images x; an attack would have them brighter."""

    def __init__(self, x: Tensor) -> None:
        self.x = x

    def apart(self, images: Tensor, drawings: Tensor) -> Tensor:
        return (images + drawings - 2 * self.x).flatten(1).mean(1).square()

    def lead(self, images: Tensor, drawings: Tensor) -> Tensor:
        return (images + drawings).flatten(1).mean(1)


class LeftHalf(Brightness):
    def apart(self, images: Tensor, drawings: Tensor) -> Tensor:
        return (drawings - self.x)[..., :4].square().flatten(1).sum(1)


def test_drawings_agree_with_what_the_images_mean_under_attack_too(fabric: Fabric) -> None:
    """Their lead is what is climbed; error and agreement are what is descended."""
    generator, encoder = networks()
    images = drawn_by(generator, 16)
    config = EncoderConfig(images=32, batch_size=16, clean_share=0.25, agreement_weight=3 / 64)
    state, climbed = encoder_state(fabric, encoder, config), []

    def inverted(errors: Any, x: Tensor, *rest: Any) -> Tensor:
        climbed.append(errors(1 - x).detach())
        return 1 - x

    with torch.no_grad():
        drawings = [generator(encoder(x)) for x in (1 - images, images)]
        apart = [Brightness(images).apart(x, d) for x, d in zip((1 - images, images), drawings, strict=True)]
    loop = train_encoder(
        fabric, state, generator, lambda step: images, config, 0, disturb=inverted, agree=Brightness
    )
    metrics = next(loop).metrics
    torch.testing.assert_close(climbed[0], (1 - images + drawings[0]).flatten(1).mean(1))
    expected = 0.75 * apart[0].mean() + 0.25 * apart[1].mean()
    torch.testing.assert_close(metrics["disagreement"], expected)


def test_agreement_weighs_by_the_pixel(fabric: Fabric, monkeypatch: pytest.MonkeyPatch) -> None:
    losses: list[Tensor] = []
    monkeypatch.setattr("gan.inversion.descend", lambda fabric, optimizer, loss, lr: losses.append(loss))
    generator, encoder = networks()
    images = 1 - drawn_by(generator, 16)
    for weight in (0.0, 0.5):
        config = EncoderConfig(images=16, batch_size=16, agreement_weight=weight)
        state, agree = encoder_state(fabric, encoder, config), Brightness if weight else None
        next(train_encoder(fabric, state, generator, lambda step: images, config, 0, agree=agree))
    apart = Brightness(images).apart(images, generator(encoder(images))).mean()
    torch.testing.assert_close(losses[1] - losses[0], 0.5 * 64 * apart, rtol=1e-3, atol=1e-4)


def test_latents_weigh_as_they_are_told(fabric: Fabric, monkeypatch: pytest.MonkeyPatch) -> None:
    losses: list[Tensor] = []
    monkeypatch.setattr("gan.inversion.descend", lambda fabric, optimizer, loss, lr: losses.append(loss))
    generator, encoder = networks()
    images = drawn_by(generator, 16)
    for weight in (0.0, 0.5):
        config = EncoderConfig(images=16, batch_size=16, latent_weight=weight)
        state = encoder_state(fabric, encoder, config)
        record = next(train_encoder(fabric, state, generator, lambda step: images, config, 0))
    torch.testing.assert_close(losses[1] - losses[0], 0.5 * record.metrics["latent_error"])


def test_a_weight_on_agreement_makes_drawings_agree(fabric: Fabric) -> None:
    """Each half can be drawn, both at once cannot: what agreement asks for comes first."""
    apart = {}
    for weight in (0.0, 2.0):
        generator, encoder = networks()
        drawn = drawn_by(generator, 64)
        images = torch.cat([drawn[:32, ..., :4], drawn[32:, ..., 4:]], 3)
        config = EncoderConfig(images=150 * 32, batch_size=32, lr=3e-3, agreement_weight=weight)
        state = encoder_state(fabric, encoder, config)
        agree = LeftHalf if weight else None
        for _ in train_encoder(fabric, state, generator, lambda step, x=images: x, config, 0, agree=agree):
            pass
        with torch.no_grad():
            apart[weight] = float(LeftHalf(images).apart(images, generator(state["encoder"](images))).mean())
    assert apart[2.0] < 0.5 * apart[0.0]


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_agreement_has_both_a_weight_and_a_measure_or_neither(fabric: Fabric, weight: float) -> None:
    generator, encoder = networks()
    config = EncoderConfig(images=16, batch_size=16, agreement_weight=weight)
    state, images = encoder_state(fabric, encoder, config), drawn_by(generator, 16)
    agree = None if weight else Brightness
    with pytest.raises(ValueError, match="agree: expected if and only if"):
        next(train_encoder(fabric, state, generator, lambda step: images, config, 0, agree=agree))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("images", -1),
        *((key, 0) for key in ("batch_size", "average_half_life", "lr")),
        ("latent_weight", -0.1),
        ("agreement_weight", -0.1),
        *((key, bad) for key in ("latent_weight", "agreement_weight") for bad in (math.nan, math.inf)),
        ("clean_share", 1.1),
        ("clean_share", -0.1),
    ],
)
def test_a_config_names_its_bad_key(key: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"^{key}: expected"):
        EncoderConfig(**{key: value})
