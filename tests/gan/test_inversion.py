"""The encoder's loop: it learns to invert, and to withstand what it is trained on."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from gan import Encoder, Generator, NetworkConfig
from gan.inversion import EncoderConfig, _perturbed, _worst_change, encoder_state, train_encoder
from gan.optimisation import seeded
from gan.sampling import batch_indices, step_rng

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
    config = EncoderConfig(
        perturbation="none", images=150 * 32, batch_size=32, lr=3e-3, average_half_life=300
    )
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


@pytest.mark.parametrize("norm", ["linf", "l2", "both"])
def test_an_encoder_trained_on_attacks_resists_them(fabric: Fabric, norm: Any) -> None:
    """Under one gradient step up its error it beats the plain encoder, and pays for it on clean images."""
    generator = seeded(3, lambda: Generator(SHAPE, replace(NETWORK, generator_width=16, max_width=32)))
    images = drawn_by(generator, 256)
    plain = EncoderConfig(
        perturbation="none", attack_steps=1, images=200 * 32, batch_size=32, lr=3e-3, average_half_life=300
    )
    errors = {}
    for perturbation in ("none", "noise", "adversarial"):
        config = replace(plain, perturbation=perturbation, norm=norm, eps_linf=0.2, eps_l2=1.2, ramp=0.3)
        encoder = seeded(0, lambda: Encoder(SHAPE, replace(NETWORK, encoder_width=8, max_width=32)))
        state = encoder_state(fabric, encoder, config)
        assert len(list(train_encoder(fabric, state, generator, batches_of(images, 32), config, 0))) == 200
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
    generator, encoder = networks()
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


def test_attacks_begin_at_the_worst_change() -> None:
    """Of as many as are tried: with enough of four, at the worst of the four, and inside the ball."""
    generator, encoder = networks()
    x = drawn_by(generator, 30)

    def errors(at: Tensor) -> Tensor:
        with torch.no_grad():
            return (generator(encoder(at)) - x).square().flatten(1).sum(1)

    delta = _worst_change(errors, x, 1.2, [corners] * 60, step_rng(0, 0))
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
def test_the_climb_from_a_change_stays_in_the_ball_and_gains(steps: int) -> None:
    generator, encoder = networks()
    x = drawn_by(generator, 64)
    config = EncoderConfig(norm="both", eps_l2=1.2, windows=5, attack_steps=steps)
    for radius in (0.5, 1.0):
        got = _perturbed(encoder, generator, x, config, radius, 1, step_rng(0, 0), [corners] * 5)
        begun = _worst_change(
            lambda at: (generator(encoder(at)) - x).square().flatten(1).sum(1),
            x,
            1.2 * radius,
            [corners] * 5,
            step_rng(0, 0),
        )
        assert ((got - x).flatten(1).norm(dim=1) <= 1.2 * radius + 1e-5).all()
        with torch.no_grad():
            errors = [(generator(encoder(at)) - x).square().mean() for at in ((x + begun).clamp(0, 1), got)]
        assert errors[1] > errors[0]


@pytest.mark.parametrize(("windows", "pieces", "given"), [(3, 0, 0), (2, 3, 4), (0, 0, 1)])
def test_every_change_needs_someone_to_draw_it(fabric: Fabric, windows: int, pieces: int, given: int) -> None:
    generator, encoder = networks()
    config = EncoderConfig(windows=windows, pieces=pieces)
    state = encoder_state(fabric, encoder, config)
    batches = batches_of(torch.rand(8, *SHAPE), 8)
    loop = train_encoder(fabric, state, generator, batches, config, 0, changes=[corners] * given)
    with pytest.raises(ValueError, match=rf"^changes: expected {windows + pieces}, .*; got {given}$"):
        next(loop)


def test_a_change_replaces_the_random_start_at_l2_alone() -> None:
    """By turns: L∞ at even steps, whatever draws; L2 at odd ones, where every change has its try."""
    generator, encoder = networks()
    x = drawn_by(generator, 8)
    config = EncoderConfig(norm="both", windows=1, pieces=1)
    asked: list[str] = []

    def change(name: str) -> Callable[[Tensor, torch.Generator], Tensor]:
        def draw(images: Tensor, rng: torch.Generator) -> Tensor:
            asked.append(name)
            return corners(images, rng)

        return draw

    for step, expected in ((0, []), (1, ["window", "piece"])):
        _perturbed(
            encoder, generator, x, config, 1.0, step, step_rng(0, step), [change("window"), change("piece")]
        )
        assert asked == expected


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_more_steps_of_the_attack_on_an_encoder_raise_its_error_further(norm: Any) -> None:
    generator, encoder = networks()
    x = drawn_by(generator, 64)
    errors = []
    cases: list[tuple[Any, int]] = [("noise", 1), ("adversarial", 1), ("adversarial", 8)]
    for kind, steps in cases:
        config = EncoderConfig(perturbation=kind, attack_steps=steps, norm=norm, eps_linf=0.2, eps_l2=1.5)
        got = _perturbed(encoder, generator, x, config, 1.0, 0, step_rng(0, 0))
        with torch.no_grad():
            errors.append(float((generator(encoder(got)) - x).square().mean()))
    assert errors == sorted(errors)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("images", -1),
        ("windows", -1),
        ("pieces", -1),
        *((key, 0) for key in ("batch_size", "average_half_life", "attack_steps", "lr")),
        ("latent_weight", -0.1),
        ("perturbation", "fgsm"),
        ("norm", "l1"),
        *((key, 0.0) for key in ("eps_linf", "eps_l2")),
        *((key, 1.1) for key in ("ramp", "clean_share")),
    ],
)
def test_a_config_names_its_bad_key(key: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"^{key}: expected"):
        EncoderConfig(**{key: value})


@pytest.mark.parametrize("settings", [{"perturbation": "noise"}, {"perturbation": "none"}, {"norm": "linf"}])
@pytest.mark.parametrize("key", ["windows", "pieces"])
def test_changes_where_no_attack_begins_there_are_refused(key: str, settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=rf"^{key}: expected 0"):
        EncoderConfig(**{key: 4}, **settings)


def test_a_piece_of_another_image_needs_another_image() -> None:
    with pytest.raises(ValueError, match=r"^pieces: expected 0 in a batch of one"):
        EncoderConfig(pieces=1, batch_size=1)
