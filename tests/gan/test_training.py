"""The loops of GAN and encoder: they spend what they say and resume bit for bit; the GAN learns to draw."""

import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning_fabric import Fabric
from state_support import tensors
from torch import Tensor

import gan.training
from gan import Encoder, Generator, NetworkConfig
from gan.inversion import EncoderConfig, encoder_state, train_encoder
from gan.optimisation import seeded
from gan.sampling import batch_indices
from gan.training import GanConfig, gan_state, train_gan

NETWORK = NetworkConfig(latent_dim=6, generator_width=4, critic_width=4, encoder_width=4, max_width=8)
R3 = GanConfig("r3gan", images=20 * 16, batch_size=16, critic_steps=2, network=NETWORK, average_half_life=100)
WGAN = replace(R3, loss="wgan_gp", beta1=0.5, beta2=0.9, penalty_weight=10.0, penalty_every=1)
ALONE = replace(R3, reconstruction_weight=0.0, critic_steps=1)
GANS = {"r3gan": R3, "wgan_gp": WGAN, "without-encoder": ALONE}
ENCODER = EncoderConfig(images=20 * 16, batch_size=16, average_half_life=100)
SHAPE = (1, 8, 8)


def batches_of(images: Tensor, size: int = 16) -> Callable[[int], Tensor]:
    return lambda step: images[batch_indices(len(images), size, 5, step)]


def exhaust(iterator: Iterable[Any], steps: int) -> list[Any]:
    records = list(islice(iterator, steps))
    assert len(records) == steps
    return records


def different(a: dict[str, Tensor], b: dict[str, Tensor]) -> list[str]:
    assert a.keys() == b.keys()
    return [key for key in a if not torch.equal(a[key], b[key])]


class Loop:
    """A way to make a fresh state and to run some steps of it."""

    def __init__(
        self, fabric: Fabric, images: Tensor, config: GanConfig | EncoderConfig, seed: int = 0
    ) -> None:
        self.fabric, self.images, self.config, self.seed = fabric, images, config, seed

    def fresh(self) -> dict[str, Any]:
        if isinstance(self.config, GanConfig):
            return gan_state(self.fabric, SHAPE, self.config, self.seed)
        encoder = seeded(self.seed, lambda: Encoder(SHAPE, NETWORK))
        return encoder_state(self.fabric, encoder, self.config)

    def run(self, state: dict[str, Any], steps: int) -> list[Any]:
        batches = batches_of(self.images)
        if isinstance(self.config, GanConfig):
            return exhaust(train_gan(self.fabric, state, batches, self.config, self.seed), steps)
        generator = seeded(9, lambda: Generator(SHAPE, NETWORK))
        return exhaust(train_encoder(self.fabric, state, generator, batches, self.config, self.seed), steps)


LOOPS = {**GANS, "encoder": ENCODER}
every_loop = pytest.mark.parametrize("name", LOOPS)


@every_loop
def test_resumes_bit_for_bit(fabric: Fabric, digits: Any, tmp_path: Path, name: str) -> None:
    loop = Loop(fabric, digits[0], LOOPS[name])
    straight = loop.fresh()
    loop.run(straight, 20)

    first = loop.fresh()
    loop.run(first, 10)
    fabric.save(tmp_path / "state.ckpt", first)
    loop.run(first, 3)  # what came after the saving is lost

    def resumed() -> dict[str, Any]:
        state = loop.fresh()
        fabric.load(tmp_path / "state.ckpt", state, weights_only=True)
        return state

    second = resumed()
    assert (second["step"], second["images"]) == (10, 160)
    loop.run(second, 10)
    assert (second["step"], second["images"]) == (straight["step"], straight["images"]) == (20, 320)
    assert different(tensors(straight), tensors(second)) == []

    # A forgotten counter or a forgotten optimiser would show.
    forgetful = resumed()
    forgetful["step"] = 0
    loop.run(forgetful, 10)
    assert different(tensors(straight), tensors(forgetful)) != []
    for key in [key for key in second if key.endswith("optimizer")]:
        forgetful = resumed()
        forgetful[key].optimizer.state.clear()
        loop.run(forgetful, 10)
        assert different(tensors(straight), tensors(forgetful)) != []


@every_loop
def test_the_seed_decides(fabric: Fabric, digits: Any, name: str) -> None:
    before = torch.get_rng_state()
    runs = []
    for seed in (0, 0, 1):
        loop = Loop(fabric, digits[0], LOOPS[name], seed)
        state = loop.fresh()
        loop.run(state, 3)
        runs.append(tensors(state))
    assert torch.equal(before, torch.get_rng_state())
    assert different(runs[0], runs[1]) == []
    assert different(runs[0], runs[2]) != []


@every_loop
def test_a_run_ends_when_its_images_are_seen_and_then_does_nothing(
    fabric: Fabric, digits: Any, name: str
) -> None:
    loop = Loop(fabric, digits[0], replace(LOOPS[name], images=50))
    state = loop.fresh()
    records = loop.run(state, 4)
    assert [record.images for record in records] == [16, 32, 48, 64]
    assert all(torch.isfinite(value) for record in records for value in record.metrics.values())
    assert not any(value.requires_grad for record in records for value in record.metrics.values())
    before = tensors(state)
    assert loop.run(state, 0) == []
    with pytest.raises(AssertionError):
        loop.run(state, 1)
    assert different(before, tensors(state)) == []


@pytest.mark.parametrize("name", GANS)
def test_a_gan_sees_every_batch_once(fabric: Fabric, digits: Any, name: str) -> None:
    asked: list[int] = []

    def batches(step: int) -> Tensor:
        asked.append(step)
        return batches_of(digits[0])(step)

    state = gan_state(fabric, SHAPE, GANS[name], 0)
    for _ in range(3):  # as if resumed after every step
        exhaust(train_gan(fabric, state, batches, GANS[name], 0), 1)
    assert asked == list(range(3 * GANS[name].critic_steps))


@pytest.mark.parametrize("name", GANS)
def test_who_is_trained(fabric: Fabric, digits: Any, name: str) -> None:
    loop = Loop(fabric, digits[0], GANS[name])
    state, start = loop.fresh(), loop.fresh()
    loop.run(state, 2)
    moved = {
        key: any(
            not torch.equal(a, b)
            for a, b in zip(state[key].parameters(), start[key].parameters(), strict=True)
        )
        for key in ("generator", "critic", "encoder", "generator_average", "encoder_average")
    }
    joint = name != "without-encoder"
    assert moved == {
        "generator": True,
        "critic": True,
        "encoder": joint,
        "generator_average": True,
        "encoder_average": joint,
    }
    for key in ("generator_average", "encoder_average"):
        assert not state[key].training
        assert not any(p.requires_grad for p in state[key].parameters())


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_the_penalty_is_seldom_and_stronger_by_as_much(
    digits: Any, monkeypatch: pytest.MonkeyPatch, precision: Any
) -> None:
    """And of real and drawn images of one type, for it is of gradients at them."""
    losses: list[Tensor] = []

    def penalty(critic: Any, real: Tensor, fake: Tensor, rng: torch.Generator) -> Tensor:
        assert real.dtype == fake.dtype == torch.float32
        return torch.ones(len(real))

    flat = gan.training.LOSSES["r3gan"]._replace(critic=lambda real, fake: 0 * real, penalty=penalty)
    monkeypatch.setitem(gan.training.LOSSES, "r3gan", flat)
    monkeypatch.setattr("gan.training.descend", lambda fabric, optimizer, loss, lr: losses.append(loss))
    fabric = Fabric(accelerator="cpu", devices=1, precision=precision)
    config = replace(R3, critic_steps=1, penalty_weight=0.5, penalty_every=3)
    exhaust(train_gan(fabric, gan_state(fabric, SHAPE, config, 0), batches_of(digits[0]), config, 0), 4)
    assert [loss.item() for loss in losses[::2]] == [1.5, 0.0, 0.0, 1.5]


def test_latents_are_for_the_encoder_alone_to_find(
    fabric: Fabric, digits: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What inverts its own drawings would have the generator draw what is easily inverted."""
    gradients: list[list[Tensor]] = []
    for weight in (0.0, 10.0):
        config = replace(R3, critic_steps=1, latent_weight=weight)
        state = gan_state(fabric, SHAPE, config, 0)

        def noted(fabric: Fabric, optimizer: Any, loss: Tensor, lr: float, state: Any = state) -> None:
            networks = (*state["generator"].parameters(), *state["encoder"].parameters())
            if optimizer is state["generator_optimizer"]:
                gradients.append(list(torch.autograd.grad(loss, networks)))

        monkeypatch.setattr("gan.training.descend", noted)
        next(train_gan(fabric, state, batches_of(digits[0]), config, 0))
    own = len(list(state["generator"].parameters()))
    assert all(torch.equal(a, b) for a, b in zip(*(g[:own] for g in gradients), strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(*(g[own:] for g in gradients), strict=True))


@every_loop
def test_the_rate_falls_along_a_cosine(fabric: Fabric, digits: Any, name: str) -> None:
    loop = Loop(fabric, digits[0], LOOPS[name])
    state, rates = loop.fresh(), []
    key = "optimizer" if "optimizer" in state else "generator_optimizer"
    for _ in range(20):
        loop.run(state, 1)
        rates.append(state[key].param_groups[0]["lr"])
    shape = [0.05 + 0.95 * (1 + math.cos(math.pi * k / 20)) / 2 for k in range(20)]
    assert rates == pytest.approx([LOOPS[name].lr * share for share in shape])


@pytest.mark.parametrize("name", ["r3gan", "wgan_gp"])
def test_a_gan_learns_to_draw(fabric: Fabric, digits: Any, name: str) -> None:
    """Its samples come nearer to the mean and the spread of the digits, its encoder inverts better."""
    x = digits[0]
    wider = NetworkConfig(latent_dim=6, generator_width=8, critic_width=8, encoder_width=8, max_width=16)
    config = replace(
        GANS[name],
        images=120 * 32,
        batch_size=32,
        critic_steps=1,
        lr=2e-3,
        network=wider,
        average_half_life=300,
    )
    state = gan_state(fabric, SHAPE, config, 0)
    z = torch.randn(200, 6, generator=torch.Generator().manual_seed(0))

    def distances() -> tuple[float, float]:
        with torch.no_grad():
            drawn = state["generator_average"](z)
            error = (state["generator_average"](state["encoder_average"](x)) - x).square().mean()
        return float((drawn.mean(0) - x.mean(0)).square().mean()), float(error)

    before = distances()
    records = exhaust(train_gan(fabric, state, batches_of(x, 32), config, 0), 120)
    after = distances()
    assert after[0] < 0.5 * before[0]
    assert after[1] < 0.6 * before[1]
    assert {"critic_loss", "generator_loss", "reconstruction_error"} == records[-1].metrics.keys()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *((key, 0) for key in ("images", "batch_size", "critic_steps", "penalty_every")),
        ("average_half_life", 0),
        ("lr", 0.0),
        ("lr", float("nan")),
        *((key, -0.1) for key in ("penalty_weight", "reconstruction_weight", "latent_weight")),
        ("beta1", 1.0),
        ("beta2", -0.1),
        ("loss", "hinge"),
    ],
)
def test_a_config_names_its_bad_key(key: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"^{key}: expected"):
        GanConfig(**{key: value})
