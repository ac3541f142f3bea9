"""FGSM, PGD and C&W: closed forms on linear models, where FGSM and PGD end in `x + eps·sign(w)` and
`x + eps·w/‖w‖`, C&W at the distance `|m|/‖w‖` of the decision boundary.
"""

from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from manifold_defense.attacks import GEOMETRIES, cw, fgsm, geometry, latent_attack, noise, pgd
from manifold_defense.attacks.objective import attack_loss, fooled
from tests.defence.attack_table import GREY, Linear, images, logits_of, network


@pytest.mark.parametrize("attack", [noise, fgsm, pgd])
def test_an_unknown_norm_is_refused(attack: Any) -> None:
    with pytest.raises(ValueError, match=r"^norm: expected one of linf, l2.*, got 'l3'"):
        attack(network(3), images(), torch.zeros(12, dtype=torch.long), norm="l3")


@pytest.mark.parametrize(
    ("attack", "keywords", "words"),
    [
        (cw, {"norm": "linf"}, "expected norm l2"),
        (pgd, {"eps": -0.1}, "^eps: expected at least 0"),
        (pgd, {"eps": float("nan")}, "^eps: expected at least 0"),
        (pgd, {"steps": 0}, "steps ≥ 1"),
        (pgd, {"step_size": -0.1}, "^step_size: expected at least 0, got -0.1"),
        (cw, {"steps": 0}, "steps ≥ 1"),
        (cw, {"searches": 0}, "searches ≥ 1"),
        (cw, {"initial_weight": 0.0}, "initial_weight > 0"),
        (cw, {"learning_rate": 0.0}, "learning_rate > 0"),
        (noise, {"draws": 0}, "draws ≥ 1"),
        (pgd, {"restarts": 0}, "restarts ≥ 1"),
        (pgd, {"loss": "mse"}, "loss: expected ce, margin or dlr"),
        (fgsm, {"loss": "mse"}, "loss: expected ce, margin or dlr"),
    ],
)
def test_bad_arguments_are_refused(attack: Any, keywords: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        attack(network(3), images(), torch.zeros(12, dtype=torch.long), **keywords)


@pytest.mark.parametrize("attack", [fgsm, pgd, cw])
def test_what_is_no_answer_and_what_are_no_labels_is_named(attack: Any) -> None:
    x, model = images(), network(3)
    with pytest.raises(TypeError, match=r"^model: expected logits \(N, K\), got tuple"):
        attack(lambda x: (model(x), x), x, torch.zeros(12, dtype=torch.long))
    with pytest.raises(ValueError, match=r"^labels: expected 12 of int64, got torch\.int32 of shape \(12,\)"):
        attack(model, x, torch.zeros(12, dtype=torch.int32))


def test_stronger_is_stronger() -> None:
    """noise ≥ fgsm ≥ pgd in images left, and more ε never helps the defender."""
    model, x = network(3), images(200)
    y = logits_of(model, x).argmax(1)

    def robust(attack: Any, **keywords: Any) -> float:
        return float((logits_of(model, attack(model, x, y, **keywords)).argmax(1) == y).float().mean())

    for norm, eps in (("linf", 0.03), ("l2", 0.2)):
        left = [robust(noise, norm=norm, eps=eps), robust(fgsm, norm=norm, eps=eps)]
        left += [robust(pgd, norm=norm, eps=eps, steps=20)]
        assert left[0] > left[1] + 0.02
        assert left[1] >= left[2]
        assert 0.05 < left[2] < 0.95
        radii = [robust(pgd, norm=norm, eps=scale * eps, steps=20) for scale in (0.5, 1, 2)]
        assert radii[0] > radii[1] > radii[2]
    assert robust(pgd, norm="linf", eps=1.0, steps=40) < 0.01


def test_restarts_never_lower_the_loss() -> None:
    model, x = network(3), images(40)
    y = logits_of(model, x).argmax(1)
    values = [
        attack_loss(
            logits_of(model, pgd(model, x, y, eps=0.03, steps=4, restarts=restarts, stop_early=False)),
            y,
            "margin",
            targeted=False,
        )
        for restarts in (1, 2, 4)
    ]
    assert (values[1] >= values[0] - 1e-6).all()
    assert (values[2] >= values[1] - 1e-6).all()
    assert values[2].sum() > values[0].sum()


# --- Closed forms ---


SETTINGS = {
    "fgsm": (fgsm, {}),
    "pgd": (pgd, {"random_start": False, "steps": 10}),
    "pgd-random": (pgd, {"step_size": 0.8, "steps": 60}),
    "pgd-transfer": (pgd, {"step_size": 0.8, "steps": 60, "stop_early": False}),
}


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("loss", ["ce", "margin"])
@pytest.mark.parametrize("label", [0, 1])
@pytest.mark.parametrize("targeted", [False, True])
def test_on_a_linear_model_the_ball_ends_in_the_known_point(
    name: str, norm: Any, loss: str, label: int, targeted: bool
) -> None:
    attack, keywords = SETTINGS[name]
    towards = 1 if label == int(targeted) else -1  # of the difference: up if class 1 is wanted
    model = Linear(m=-5.0 * towards)  # nothing in the ball reaches the boundary
    y, eps = torch.full((3,), label), 0.05 if norm == "linf" else 0.4
    x_adv = attack(model, GREY, y, norm=norm, eps=eps, loss=loss, targeted=targeted, **keywords)
    direction = model.w.sign() if norm == "linf" else model.w / model.w.norm()
    torch.testing.assert_close(x_adv, GREY + eps * towards * direction, atol=2e-4, rtol=0)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_confident_model_does_not_stop_cross_entropy(norm: Any) -> None:
    """At a margin of 30 its value is 0 in float32, but its gradient, 1e-13, still points somewhere."""
    model, y, eps = Linear(m=30.0), torch.ones(3, dtype=torch.long), 0.05 if norm == "linf" else 0.4
    direction = model.w.sign() if norm == "linf" else model.w / model.w.norm()
    for attack in (partial(pgd, random_start=False, stop_early=False), fgsm):
        x_adv = attack(model, GREY, y, norm=norm, eps=eps)
        torch.testing.assert_close(x_adv, GREY - eps * direction, atol=2e-3, rtol=0)


def test_a_sign_error_would_show() -> None:
    model = Linear(m=30.0)
    x_adv = pgd(model, GREY, torch.ones(3, dtype=torch.long), eps=0.2, random_start=False)
    assert not torch.allclose(x_adv, GREY + 0.2 * model.w.sign(), atol=1e-2)


def test_noise_on_a_linear_model_is_the_best_of_its_draws() -> None:
    model, y = Linear(m=30.0), torch.ones(3, dtype=torch.long)
    for norm in ("linf", "l2"):
        losses = [
            attack_loss(model(noise(model, GREY, y, norm=norm, eps=0.1, draws=draws)), y, "margin", False)
            for draws in (1, 3, 30)
        ]
        assert (losses[0] <= losses[1]).all()
        assert (losses[1] <= losses[2]).all()
        assert losses[0].sum() < losses[2].sum()
        moved = noise(model, GREY, y, norm=norm, eps=0.1) - GREY
        torch.testing.assert_close(geometry(norm).size(moved), torch.full((3,), 0.1), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("confidence", [0.0, 4.0])
def test_carlini_wagner_finds_the_distance_to_the_boundary(targeted: bool, confidence: float) -> None:
    model = Linear(m=5.0)
    y = torch.full((3,), 0 if targeted else 1)
    x_adv = cw(model, GREY, y, steps=150, searches=9, targeted=targeted, confidence=confidence)
    margin = model(GREY)[:, 1] - model(GREY)[:, 0]
    expected = (margin + confidence) / model.w.norm()
    found = (x_adv - GREY).flatten(1).norm(dim=1)
    assert fooled(model(x_adv), y, targeted).all()
    assert (found >= expected * (1 - 1e-4)).all()
    assert (found <= expected * 1.05).all()
    # The wrong distance would not pass.
    assert not (found <= expected * 0.95).any()


def test_more_searches_never_find_a_farther_image() -> None:
    model, y = Linear(m=5.0), torch.ones(3, dtype=torch.long)
    sizes = [
        (cw(model, GREY, y, steps=25, searches=searches, initial_weight=100.0) - GREY).flatten(1).norm(dim=1)
        for searches in (1, 2, 4, 8)
    ]
    for fewer, more in pairwise(sizes):
        assert (more <= fewer).all()
    assert (sizes[-1] < sizes[0]).all()


@pytest.mark.parametrize(
    ("model", "eps"),
    [
        (Linear(m=5.0), 0.05),  # the boundary is farther
        (Linear(m=1e4), float("inf")),  # there is none in [0, 1]
        (lambda x: torch.eye(2)[1] + 0 * x.flatten(1)[:, :2], float("inf")),  # never fooled, no gradient
    ],
)
def test_where_carlini_wagner_fails_the_image_comes_back(model: Any, eps: float) -> None:
    y = torch.ones(3, dtype=torch.long)
    assert (model(GREY).argmax(1) == 1).all()
    assert torch.equal(cw(model, GREY, y, eps=eps, steps=30), GREY)


def test_carlini_wagner_leaves_black_and_white_pixels() -> None:
    """tanh is flat there: the start must be off the boundary."""
    model = Linear(m=0.0)
    x = (model.w > 0).float().expand(3, 1, 8, 8)  # the farthest corner from class 0
    x_adv = cw(model, x, torch.ones(3, dtype=torch.long), steps=150, searches=6)
    assert fooled(model(x_adv), torch.ones(3, dtype=torch.long), False).all()


@pytest.mark.parametrize("scale", [1000.0, 0.001])
@pytest.mark.parametrize("loss", ["ce", "margin"])
def test_scaled_logits_do_not_weaken_an_attack(scale: float, loss: str) -> None:
    """The trap: cross-entropy itself underflows at a thousand, and its gradient with it."""
    x, y = GREY, torch.ones(3, dtype=torch.long)
    for norm, eps in (("linf", 0.2), ("l2", 1.0)):
        plain = pgd(Linear(5.0), x, y, norm=norm, eps=eps, loss=loss)
        scaled = pgd(Linear(5.0, scale), x, y, norm=norm, eps=eps, loss=loss)
        torch.testing.assert_close(plain, scaled)
        assert fooled(Linear(5.0)(plain), y, False).all()


def test_the_best_iterate_is_kept_not_the_last() -> None:
    """A step far too long jumps to and fro over a narrow band of class 0."""

    class Band(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            offset = x.flatten(1).mean(1) - 0.55
            return torch.stack([torch.full_like(offset, 0.02), offset.abs()], 1)

    x, y = torch.full((2, 1, 8, 8), 0.5), torch.ones(2, dtype=torch.long)
    settings = {"eps": 0.4, "step_size": 0.045, "random_start": False, "stop_early": False}
    for steps in (1, 2, 3, 4):
        assert fooled(Band()(pgd(Band(), x, y, steps=steps, **settings)), y, False).all()
    assert not fooled(Band()(x), y, False).any()


def test_a_fooled_image_leaves_the_batch_and_a_transfer_attack_presses_on() -> None:
    model, y = Linear(m=1.0), torch.ones(3, dtype=torch.long)
    early = pgd(model, GREY, y, eps=0.2, steps=40)
    late = pgd(model, GREY, y, eps=0.2, steps=40, stop_early=False)
    assert fooled(model(early), y, False).all()
    torch.testing.assert_close(late, GREY - 0.2 * model.w.sign(), atol=1e-5, rtol=0)
    assert (model(early)[:, 1] > model(late)[:, 1]).all()


# --- Latents ---


@pytest.mark.parametrize("restarts", [1, 2])
def test_a_latent_attack_stays_on_the_manifold_and_in_its_ball(linear: Any, restarts: int) -> None:
    generator, model, y = linear.float(), Linear(m=0.4), torch.ones(6, dtype=torch.long)
    z = torch.randn(6, 5, generator=torch.Generator().manual_seed(4)) / 2
    x_adv = latent_attack(model, generator, z, y, eps=0.3, steps=20, restarts=restarts)
    zeta = linear.double().solve(x_adv.double()) - z
    torch.testing.assert_close(linear((z + zeta).double()).float(), x_adv, atol=1e-5, rtol=0)
    assert (zeta.abs() <= 0.3 + 1e-5).all()
    assert not x_adv.requires_grad
    assert all(p.grad is None for p in linear.parameters())


@pytest.mark.parametrize("m", [6.0, 0.0])
def test_a_latent_attack_on_linear_models_reaches_the_corner(linear: Any, m: float) -> None:
    """It maximises the loss, whether the boundary is out of reach (6) or in the ball (0)."""
    generator, model, y = linear.float(), Linear(m), torch.ones(6, dtype=torch.long)
    z = torch.randn(6, 5, generator=torch.Generator().manual_seed(4)) / 2
    x_adv = latent_attack(model, generator, z, y, eps=0.3, steps=20)
    gradient = model.w.flatten() @ generator.matrix
    torch.testing.assert_close(x_adv, generator(z - 0.3 * gradient.sign()).detach(), atol=1e-5, rtol=0)


def test_a_latent_attack_leaves_models_and_rng_alone(networks: Any) -> None:
    model, z = network(3), torch.zeros(4, 6)
    seen = []
    networks[0].train().register_forward_hook(lambda module, *_: seen.append(module.training))
    before, weights = torch.get_rng_state(), [p.clone() for p in model.parameters()]
    first = latent_attack(model, networks[0], z, torch.zeros(4, dtype=torch.long))
    assert torch.equal(first, latent_attack(model, networks[0], z, torch.zeros(4, dtype=torch.long)))
    assert torch.equal(before, torch.get_rng_state())
    assert all(module.training for m in (model, networks[0]) for module in m.modules())
    assert seen
    assert not any(seen)
    assert all(torch.equal(p, w) for p, w in zip(model.parameters(), weights, strict=True))
    assert all(p.grad is None for m in (model, networks[0]) for p in m.parameters())


# --- Geometry ---


@st.composite
def deltas(draw: Any) -> Tensor:
    """(N, 1, 4, 4), from tiny to huge."""
    n, seed = draw(st.integers(1, 4)), draw(st.integers(0, 2**31))
    scale = draw(st.sampled_from([0.0, 1e-8, 1e-3, 1.0, 1e4]))
    return scale * torch.randn(n, 1, 4, 4, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(deltas(), st.sampled_from(["linf", "l2", "l1"]), st.floats(0, 100, width=32))
def test_projection_on_the_ball(delta: Tensor, norm: str, eps: float) -> None:
    shape = geometry(norm)
    inside = shape.project(delta, eps)
    assert (shape.size(inside) <= eps * (1 + 1e-6)).all()
    torch.testing.assert_close(shape.project(inside, eps), inside, rtol=2e-6, atol=0)
    kept = shape.size(delta) <= eps
    torch.testing.assert_close(inside[kept], delta[kept], rtol=2e-6, atol=0)
    # The nearest point of the ball: no other point of it makes an acute angle with the way back.
    other = shape.sample(delta, eps, torch.Generator().manual_seed(1))
    angle = ((delta - inside) * (other - inside)).flatten(1).sum(1)
    assert (angle <= 1e-5 * (1 + delta.flatten(1).square().sum(1) + eps**2)).all()


@settings(max_examples=30, deadline=None, derandomize=True)
@given(deltas(), st.sampled_from(["linf", "l2", "l1"]))
def test_the_steepest_direction_has_length_one_and_gains_most(gradient: Tensor, norm: str) -> None:
    shape = geometry(norm)
    direction = shape.steepest(gradient)
    live = gradient.flatten(1).norm(dim=1) > 1e-9
    torch.testing.assert_close(shape.size(direction)[live], torch.ones(int(live.sum())))
    other = shape.sample(gradient, 1.0, torch.Generator().manual_seed(1))
    gain = ((direction - other) * gradient).flatten(1).sum(1)
    assert (gain >= -1e-5 * gradient.flatten(1).norm(dim=1)).all()


@pytest.mark.parametrize("norm", GEOMETRIES)
@pytest.mark.parametrize("scale", [1e-6, 1e-13, 1e-30, 1e6])
def test_the_steepest_direction_does_not_depend_on_the_gradients_length(norm: str, scale: float) -> None:
    """A confident model's gradient is tiny, and points as well as any."""
    gradient = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    shape = geometry(norm)
    torch.testing.assert_close(shape.steepest(scale * gradient), shape.steepest(gradient))
    assert torch.equal(shape.steepest(0 * gradient), 0 * gradient)


@pytest.mark.parametrize("norm", GEOMETRIES)
def test_samples_fill_the_ball_uniformly(norm: str) -> None:
    """In d dimensions a share 2^−d lies within half the radius; here d = 2."""
    like = torch.zeros(4000, 1, 1, 2)
    sample = geometry(norm).sample(like, 0.3, torch.Generator().manual_seed(0))
    sizes = geometry(norm).size(sample)
    assert (sizes <= 0.3).all()
    assert float((sizes < 0.15).float().mean()) == pytest.approx(0.25, abs=0.03)
    assert sample.mean(0).abs().max() < 0.01


@pytest.fixture(autouse=True)
def _rng() -> Iterator[None]:
    """Tests that seed the global generator give it back."""
    with torch.random.fork_rng():
        yield
