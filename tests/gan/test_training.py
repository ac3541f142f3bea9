"""The loops of GAN and encoder: they learn, spend what they say, and resume bit for bit."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning_fabric import Fabric
from state_support import tensors
from torch import Tensor, nn

from gan import Encoder, Generator, NetworkConfig
from gan.inversion import EncoderConfig, _perturbed, _worst_window, encoder_state, train_encoder
from gan.optimisation import seeded
from gan.sampling import batch_indices, step_rng
from gan.training import GanConfig, gan_state, train_gan

NETWORK = NetworkConfig(latent_dim=6, generator_width=4, critic_width=4, encoder_width=4, max_width=8)
R3 = GanConfig("r3gan", images=20 * 16, batch_size=16, critic_steps=2, network=NETWORK, average_half_life=100)
WGAN = replace(R3, loss="wgan_gp", beta1=0.5, beta2=0.9, penalty_weight=10.0, penalty_every=1)
ALONE = replace(R3, reconstruction_weight=0.0, critic_steps=1)
GANS = {"r3gan": R3, "wgan_gp": WGAN, "without-encoder": ALONE}
ENCODER = EncoderConfig(perturbation="none", images=20 * 16, batch_size=16, average_half_life=100)
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


def test_an_encoder_learns_to_invert(fabric: Fabric) -> None:
    """Images that the generator drew, so that a perfect inverse exists."""
    generator = seeded(3, lambda: Generator(SHAPE, replace(NETWORK, generator_width=16, max_width=32)))
    before = [p.clone() for p in generator.parameters()]
    with torch.no_grad():
        images = generator(torch.randn(256, 6, generator=torch.Generator().manual_seed(1)))
    config = EncoderConfig(
        perturbation="none", images=150 * 32, batch_size=32, lr=3e-3, average_half_life=300
    )
    encoder = seeded(0, lambda: Encoder(SHAPE, replace(NETWORK, encoder_width=8, max_width=32)))
    state = encoder_state(fabric, encoder, config)

    def error() -> float:
        with torch.no_grad():
            return float((generator(state["encoder_average"](images)) - images).square().mean())

    start = error()
    records = exhaust(train_encoder(fabric, state, generator, batches_of(images, 32), config, 0), 150)
    assert error() < 0.3 * start
    assert records[-1].metrics["latent_error"] < 0.5 * records[0].metrics["latent_error"]
    assert all(torch.equal(a, b) for a, b in zip(generator.parameters(), before, strict=True))
    assert all(p.grad is None for p in generator.parameters())


@pytest.mark.parametrize("norm", ["linf", "l2", "both"])
def test_an_encoder_trained_on_attacks_resists_them(fabric: Fabric, norm: Any) -> None:
    """Under one gradient step up its error it beats the plain encoder, and pays for it on clean images."""
    generator = seeded(3, lambda: Generator(SHAPE, replace(NETWORK, generator_width=16, max_width=32)))
    with torch.no_grad():
        images = generator(torch.randn(256, 6, generator=torch.Generator().manual_seed(1)))
    plain = EncoderConfig(
        perturbation="none", attack_steps=1, images=200 * 32, batch_size=32, lr=3e-3, average_half_life=300
    )
    errors = {}
    for perturbation in ("none", "noise", "adversarial"):
        config = replace(plain, perturbation=perturbation, norm=norm, eps_linf=0.2, eps_l2=1.2, ramp=0.3)
        encoder = seeded(0, lambda: Encoder(SHAPE, replace(NETWORK, encoder_width=8, max_width=32)))
        state = encoder_state(fabric, encoder, config)
        exhaust(train_encoder(fabric, state, generator, batches_of(images, 32), config, 0), 200)
        average = state["encoder_average"]
        errors[perturbation] = [
            float((generator(average(x)) - images).square().mean())
            for x in (images, attacked(average, generator, images, config))
        ]
    assert errors["adversarial"][1] < 0.8 * errors["none"][1]
    assert errors["adversarial"][0] > errors["none"][0]
    assert errors["noise"] != errors["none"]


def attacked(encoder: nn.Module, generator: nn.Module, x: Tensor, config: EncoderConfig) -> Tensor:
    """Ten steps up the error of the reconstruction, inside the ball (the L2 one for `both`)."""
    delta = torch.zeros_like(x)
    for _ in range(10):
        at = (x + delta).clamp(0, 1).requires_grad_(True)
        (gradient,) = torch.autograd.grad((generator(encoder(at)) - x).square().sum(), at)
        if config.norm == "linf":
            delta = (delta + 0.25 * config.eps_linf * gradient.sign()).clamp(
                -config.eps_linf, config.eps_linf
            )
        else:
            length = torch.linalg.vector_norm(gradient, dim=(1, 2, 3), keepdim=True)
            delta = delta + 0.25 * config.eps_l2 * gradient / length
            size = torch.linalg.vector_norm(delta, dim=(1, 2, 3), keepdim=True)
            delta = delta * (config.eps_l2 / size).clamp(max=1)
    return (x + delta).clamp(0, 1).detach()


@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.3), ("l2", 2.0)])
@pytest.mark.parametrize(("kind", "steps"), [("noise", 1), ("adversarial", 1), ("adversarial", 5)])
def test_perturbed_images_stay_in_the_ball(norm: Any, eps: float, kind: Any, steps: int) -> None:
    generator = seeded(3, lambda: Generator(SHAPE, NETWORK))
    encoder = seeded(4, lambda: Encoder(SHAPE, NETWORK))
    config = EncoderConfig(perturbation=kind, attack_steps=steps, norm=norm, eps_linf=0.3, eps_l2=2.0)
    x = torch.rand(20, *SHAPE, generator=torch.Generator().manual_seed(0))
    for radius in (0.0, 0.5, 1.0):
        got = _perturbed(encoder, generator, x, config, radius, 0, step_rng(0, 0))
        delta = (got - x).flatten(1)
        size = delta.abs().amax(1) if norm == "linf" else delta.norm(dim=1)
        assert (size <= radius * eps + 1e-5).all()
        assert got.min() >= 0
        assert got.max() <= 1
        if radius and kind == "adversarial":
            assert (size > 0.5 * radius * eps).any()


def corners(x: Tensor, rng: torch.Generator) -> Tensor:
    """Images in which one of the four quarters is white."""
    marked, rows, columns = x.clone(), SHAPE[1] // 2, SHAPE[2] // 2
    for image, corner in zip(marked, torch.randint(4, (len(x),), generator=rng).tolist(), strict=True):
        down, right = (corner // 2) * rows, (corner % 2) * columns
        image[:, down : down + rows, right : right + columns] = 1
    return marked


def test_attacks_begin_at_the_worst_window() -> None:
    """Of as many as are tried: with enough of four, at the worst of the four, and inside the ball."""
    generator, encoder = (
        seeded(3, lambda: Generator(SHAPE, NETWORK)),
        seeded(4, lambda: Encoder(SHAPE, NETWORK)),
    )
    with torch.no_grad():
        x = generator(torch.randn(30, 6, generator=torch.Generator().manual_seed(1)))

    def errors(at: Tensor) -> Tensor:
        with torch.no_grad():
            return (generator(encoder(at)) - x).square().flatten(1).sum(1)

    delta = _worst_window(errors, x, 1.2, 60, corners, step_rng(0, 0))
    assert (delta.flatten(1).norm(dim=1) <= 1.2 + 1e-5).all()
    each = torch.stack([x, x, x, x])
    for corner, image in enumerate(each):
        down, right = (corner // 2) * SHAPE[1] // 2, (corner % 2) * SHAPE[2] // 2
        image[:, :, down : down + SHAPE[1] // 2, right : right + SHAPE[2] // 2] = 1
    moved = each - x
    moved = moved * (1.2 / moved.flatten(2).norm(dim=2)[..., None, None, None]).clamp(max=1)
    worst = torch.stack([errors(x + part) for part in moved]).amax(0)
    torch.testing.assert_close(errors(x + delta), worst)


@pytest.mark.parametrize("steps", [1, 4])
def test_the_climb_from_a_window_stays_in_the_ball_and_gains(steps: int) -> None:
    generator, encoder = (
        seeded(3, lambda: Generator(SHAPE, NETWORK)),
        seeded(4, lambda: Encoder(SHAPE, NETWORK)),
    )
    with torch.no_grad():
        x = generator(torch.randn(64, 6, generator=torch.Generator().manual_seed(1)))
    config = EncoderConfig(norm="both", eps_l2=1.2, windows=5, attack_steps=steps)
    for radius in (0.5, 1.0):
        got = _perturbed(encoder, generator, x, config, radius, 1, step_rng(0, 0), corners)
        begun = _worst_window(
            lambda at: (generator(encoder(at)) - x).square().flatten(1).sum(1),
            x,
            1.2 * radius,
            5,
            corners,
            step_rng(0, 0),
        )
        assert ((got - x).flatten(1).norm(dim=1) <= 1.2 * radius + 1e-5).all()
        with torch.no_grad():
            errors = [(generator(encoder(at)) - x).square().mean() for at in ((x + begun).clamp(0, 1), got)]
        assert errors[1] > errors[0]


def test_windows_need_someone_to_draw_them(fabric: Fabric) -> None:
    generator = seeded(3, lambda: Generator(SHAPE, NETWORK))
    config = EncoderConfig(windows=3)
    state = encoder_state(fabric, seeded(4, lambda: Encoder(SHAPE, NETWORK)), config)
    loop = train_encoder(fabric, state, generator, batches_of(torch.rand(8, *SHAPE), 8), config, 0)
    with pytest.raises(ValueError, match=r"^windows: expected `draw_windows`"):
        next(loop)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_more_steps_of_the_attack_on_an_encoder_raise_its_error_further(norm: Any) -> None:
    generator = seeded(3, lambda: Generator(SHAPE, NETWORK))
    encoder = seeded(4, lambda: Encoder(SHAPE, NETWORK))
    with torch.no_grad():
        x = generator(torch.randn(64, 6, generator=torch.Generator().manual_seed(1)))
    errors = []
    cases: list[tuple[Any, int]] = [("noise", 1), ("adversarial", 1), ("adversarial", 8)]
    for kind, steps in cases:
        config = EncoderConfig(perturbation=kind, attack_steps=steps, norm=norm, eps_linf=0.2, eps_l2=1.5)
        got = _perturbed(encoder, generator, x, config, 1.0, 0, step_rng(0, 0))
        with torch.no_grad():
            errors.append(float((generator(encoder(got)) - x).square().mean()))
    assert errors == sorted(errors)


@pytest.mark.parametrize(
    ("config", "key", "value"),
    [
        *((GanConfig, key, 0) for key in ("images", "batch_size", "critic_steps", "penalty_every")),
        (GanConfig, "average_half_life", 0),
        (GanConfig, "lr", 0.0),
        (GanConfig, "lr", float("nan")),
        *((GanConfig, key, -0.1) for key in ("penalty_weight", "reconstruction_weight", "latent_weight")),
        (GanConfig, "beta1", 1.0),
        (GanConfig, "beta2", -0.1),
        (GanConfig, "loss", "hinge"),
        (EncoderConfig, "images", -1),
        (EncoderConfig, "windows", -1),
        *((EncoderConfig, key, 0) for key in ("batch_size", "average_half_life", "attack_steps", "lr")),
        (EncoderConfig, "latent_weight", -0.1),
        (EncoderConfig, "perturbation", "fgsm"),
        (EncoderConfig, "norm", "l1"),
        *((EncoderConfig, key, 0.0) for key in ("eps_linf", "eps_l2")),
        *((EncoderConfig, key, 1.1) for key in ("ramp", "clean_share")),
    ],
)
def test_a_config_names_its_bad_key(config: Any, key: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"^{key}: expected"):
        config(**{key: value})


@pytest.mark.parametrize("settings", [{"perturbation": "noise"}, {"perturbation": "none"}, {"norm": "linf"}])
def test_windows_where_no_attack_begins_there_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"^windows: expected 0"):
        EncoderConfig(windows=4, **settings)
