"""What the images of an encoder's training suffer: inside the threat, by turns, and up the error."""

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
from manifold_defense.attacks.norms import sizes
from manifold_defense.hardening.disturbance import Disturbance
from manifold_defense.types import Threat

NETWORK = NetworkConfig(latent_dim=6, generator_width=8, critic_width=4, encoder_width=4, max_width=16)
SHAPE = (1, 8, 8)
LINF, L2, L1 = Threat("linf", 0.2), Threat("l2", 1.5), Threat("l1", 4.0)
PIXELS, PATCH, CORRUPTION = Threat("l0", 5), Threat("patch", 3), Threat("corruption", 4)
THREATS = (LINF, L2, L1, PIXELS, PATCH, CORRUPTION)
every_threat = pytest.mark.parametrize("threat", THREATS, ids=lambda threat: threat.norm)


class Inverted:
    """A generator, an encoder that knows nothing yet, images of the one and the errors of the other."""

    def __init__(self, n: int = 40, shape: tuple[int, int, int] = SHAPE) -> None:
        self.generator = seeded(3, lambda: Generator(shape, NETWORK))
        self.encoder = seeded(4, lambda: Encoder(shape, NETWORK))
        with torch.no_grad():
            self.x = self.generator(torch.randn(n, 6, generator=torch.Generator().manual_seed(1)))

    def errors(self, at: Tensor) -> Tensor:
        return (self.generator(self.encoder(at)) - self.x).square().flatten(1).sum(1)

    def disturbed(self, disturbance: Disturbance, step: int = 0, done: float = 1.0, seed: int = 0) -> Tensor:
        rng = torch.Generator().manual_seed(seed)
        return disturbance(self.errors, self.x, step, done, rng)

    def mean_error(self, at: Tensor) -> float:
        with torch.no_grad():
            return float(self.errors(at).mean())


@every_threat
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 8, 8)])
@pytest.mark.parametrize(("kind", "steps"), [("noise", 1), ("adversarial", 1), ("adversarial", 5)])
def test_disturbed_images_stay_within_the_threat(threat: Threat, shape: Any, kind: Any, steps: int) -> None:
    inverted = Inverted(shape=shape)
    begun = {"windows": 2, "pieces": 2} if kind == "adversarial" and threat.norm in ("l2", "l1") else {}
    got = inverted.disturbed(Disturbance(kind, (threat,), steps, ramp=0.0, **begun))
    assert got.shape == inverted.x.shape
    assert not got.requires_grad
    assert got.min() >= 0
    assert got.max() <= 1
    assert not torch.equal(got, inverted.x)
    if threat != CORRUPTION:
        size = sizes(threat.norm, got - inverted.x)
        assert (size <= threat.eps + 1e-5).all()
        assert (size > 0.3 * threat.eps).any()


@every_threat
def test_an_attack_raises_the_error_further_than_noise(threat: Threat) -> None:
    inverted = Inverted(64)
    cases: list[tuple[Any, int]] = [("none", 1), ("noise", 1), ("adversarial", 8)]
    found = [
        inverted.mean_error(inverted.disturbed(Disturbance(kind, (threat,), steps, ramp=0.0)))
        for kind, steps in cases
    ]
    assert found == sorted(found)
    assert found[2] > 1.05 * found[1]


def test_an_image_by_itself_has_no_pieces_of_others() -> None:
    inverted = Inverted(1)
    got = inverted.disturbed(Disturbance(threats=(L2,), pieces=2, ramp=0.0))
    assert 0 < sizes("l2", got - inverted.x) <= L2.eps + 1e-5


def test_threats_come_by_turns() -> None:
    """One that is named twice has two of them."""
    inverted = Inverted(8)
    disturbance = Disturbance(threats=(LINF, PATCH, LINF, PIXELS), ramp=0.0)
    for step in range(8):
        threat = disturbance.threats[step % 4]
        alone = replace(disturbance, threats=(threat,))
        assert torch.equal(inverted.disturbed(disturbance, step), inverted.disturbed(alone))


def test_the_same_draws_give_the_same_images() -> None:
    inverted = Inverted(8)
    for threat in THREATS:
        disturbance = Disturbance(threats=(threat,))
        first, again, other = (inverted.disturbed(disturbance, seed=seed) for seed in (0, 0, 1))
        assert torch.equal(first, again)
        assert not torch.equal(first, other)


@pytest.mark.parametrize(
    ("done", "ramp", "share"), [(0.0, 0.5, 0.0), (0.25, 0.5, 0.5), (0.5, 0.5, 1), (0, 0, 1)]
)
def test_balls_grow(done: float, ramp: float, share: float) -> None:
    """And reach their size when the ramp is over; what counts pixels has its size from the start."""
    inverted = Inverted(30)
    for threat in (LINF, L2, L1):
        got = inverted.disturbed(Disturbance(threats=(threat,), ramp=ramp), done=done)
        size = sizes(threat.norm, got - inverted.x)
        assert (size <= share * threat.eps + 1e-5).all()
        assert share == 0 or (size > 0.8 * share * threat.eps).any()
    for threat in (PIXELS, PATCH):
        got = inverted.disturbed(Disturbance(threats=(threat,), ramp=ramp), done=done)
        assert sizes(threat.norm, got - inverted.x).max() == threat.eps


@pytest.mark.parametrize("threat", [PATCH, CORRUPTION], ids=lambda threat: threat.norm)
def test_more_tries_are_worse(threat: Threat) -> None:
    inverted = Inverted(64)
    found = [
        inverted.mean_error(inverted.disturbed(Disturbance(threats=(threat,), tries=tries)))
        for tries in (1, 12)
    ]
    assert found[1] > 1.05 * found[0]


def test_the_worst_is_each_images_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of four quarters that turn white, by the errors of all four."""
    inverted = Inverted(30)
    quarters = [
        (rows, columns) for rows in (slice(0, 4), slice(4, 8)) for columns in (slice(0, 4), slice(4, 8))
    ]
    asked = iter(quarters)

    def quarter(x: Tensor, rng: torch.Generator) -> Tensor:
        changed = x.clone()
        changed[(..., *next(asked))] = 1
        return changed

    monkeypatch.setattr("manifold_defense.hardening.disturbance.draw_windows", quarter)

    def flat(at: Tensor) -> Tensor:
        return inverted.errors(at).detach()

    got = Disturbance(threats=(Threat("l2", 100.0),), windows=4, ramp=0.0)(
        flat, inverted.x, 0, 1.0, torch.Generator().manual_seed(0)
    )
    each = [inverted.x.clone() for _ in quarters]
    for image, at in zip(each, quarters, strict=True):
        image[(..., *at)] = 1
    worst = torch.stack([flat(image) for image in each]).amax(0)
    torch.testing.assert_close(flat(got), worst)


def test_a_flat_error_is_no_fault() -> None:
    """No gradient leads anywhere: the images stay where they were drawn."""
    x = torch.rand(6, *SHAPE, generator=torch.Generator().manual_seed(0))
    for threat in THREATS:
        got = Disturbance(threats=(threat,))(
            lambda at: torch.zeros(len(at)), x, 0, 1.0, torch.Generator().manual_seed(0)
        )
        assert torch.isfinite(got).all()
    empty = Disturbance()(lambda at: torch.zeros(len(at)), x[:0], 0, 1.0, torch.Generator())
    assert empty.shape == (0, *SHAPE)


@pytest.mark.parametrize(
    "threats", [(LINF,), (L2,), (LINF, L2), (PIXELS,)], ids=lambda t: "+".join(a.norm for a in t)
)
def test_an_encoder_trained_on_attacks_resists_them(fabric: Fabric, threats: tuple[Threat, ...]) -> None:
    """Under a longer attack it beats the plain encoder, and pays for it on clean images."""
    network = replace(NETWORK, generator_width=16, encoder_width=8, max_width=32)
    generator = seeded(3, lambda: Generator(SHAPE, network))
    with torch.no_grad():
        images = generator(torch.randn(256, 6, generator=torch.Generator().manual_seed(1)))
    config = EncoderConfig(images=200 * 32, batch_size=32, lr=3e-3, average_half_life=300)
    longer = Disturbance(threats=threats[-1:], steps=10, ramp=0.0)
    errors = {}
    disturbances = {
        "none": Disturbance("none", threats),
        "adversarial": Disturbance("adversarial", threats, steps=2, ramp=0.3),
    }

    def batches(step: int) -> Tensor:
        return images[batch_indices(len(images), 32, 5, step)]

    for kind, disturbance in disturbances.items():
        state = encoder_state(fabric, seeded(0, lambda: Encoder(SHAPE, network)), config)
        for _ in train_encoder(fabric, state, generator, batches, config, 0, disturb=disturbance):
            pass
        average = state["encoder_average"]

        def error(at: Tensor, average: Any = average) -> Tensor:
            return (generator(average(at)) - images).square().flatten(1).sum(1)

        attacked = longer(error, images, 0, 1.0, torch.Generator().manual_seed(2))
        errors[kind] = [float(error(at).detach().mean()) for at in (images, attacked)]
    assert errors["adversarial"][1] < 0.8 * errors["none"][1]
    assert errors["adversarial"][0] > errors["none"][0]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"kind": "fgsm"}, "kind: expected one of none, noise, adversarial"),
        ({"threats": ()}, "threats: expected at least one"),
        ({"steps": 0}, "steps: expected at least 1"),
        ({"tries": 0}, "tries: expected at least 1"),
        ({"windows": -1}, "windows: expected at least 0"),
        ({"pieces": -1}, "pieces: expected at least 0"),
        ({"ramp": 1.1}, r"ramp: expected in \[0, 1\]"),
        ({"ramp": -0.1}, r"ramp: expected in \[0, 1\]"),
        *(
            ({key: 4, **other}, f"{key}: expected 0, for only adversarial")
            for key in ("windows", "pieces")
            for other in ({"kind": "noise"}, {"threats": (LINF, PATCH)})
        ),
    ],
)
def test_a_bad_setting_is_named(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=f"^{words}"):
        Disturbance(**change)
