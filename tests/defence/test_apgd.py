"""APGD and MI-FGSM on models whose strongest point is known, and the ratio of logits by hand."""

from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from manifold_defense.attacks import apgd, fgsm, geometry, mi_fgsm, pgd
from manifold_defense.attacks.apgd import _checkpoints
from manifold_defense.attacks.objective import attack_loss, fooled, logits_and_gradient, margins, towards
from manifold_defense.certification import linear_worst_margin
from tests.defence.attack_table import GREY, Linear, gain, images, logits_of, network

LOGITS = torch.tensor([[4.0, 1.0, 3.0, 0.0, -1.0], [0.0, 5.0, 2.0, 1.0, 1.0]])
Y = torch.tensor([0, 2])


@pytest.mark.parametrize(
    ("classes", "value"),
    [(5, [(3 - 4) / (4 - 1), (5 - 2) / (5 - 1)]), (3, [(3 - 4) / (4 - 1), (5 - 2) / (5 - 0)])],
)
def test_the_ratio_of_logits_by_hand(classes: int, value: list[float]) -> None:
    got = attack_loss(LOGITS[:, :classes], Y, "dlr", False)
    torch.testing.assert_close(got, torch.tensor(value))
    torch.testing.assert_close(attack_loss(LOGITS[:, :classes], Y, "dlr", True), -got)


def test_with_two_classes_the_ratio_is_the_margin() -> None:
    y = torch.tensor([0, 1])
    assert torch.equal(attack_loss(LOGITS[:, :2], y, "dlr", False), margins(LOGITS[:, :2], y, False))


def test_the_targeted_ratio_by_hand() -> None:
    got = towards(LOGITS, Y, torch.tensor([3, 0]))
    torch.testing.assert_close(got, torch.tensor([(0 - 4) / (4 - 0.5), (0 - 2) / (5 - 1)]))
    three = towards(LOGITS[:, :3], Y, torch.tensor([1, 0]))  # no ratio: to the least of three it is −1
    torch.testing.assert_close(three, torch.tensor([1.0 - 4, 0.0 - 2]))
    two = towards(LOGITS[:, :2], torch.tensor([0, 1]), torch.tensor([1, 0]))
    torch.testing.assert_close(two, torch.tensor([1.0 - 4, 0.0 - 5]))


@pytest.mark.parametrize("scale", [1e3, 1e-3])
def test_the_ratio_does_not_know_the_scale_of_the_logits(scale: float) -> None:
    torch.testing.assert_close(
        attack_loss(scale * LOGITS, Y, "dlr", False), attack_loss(LOGITS, Y, "dlr", False)
    )


def test_the_published_checkpoints() -> None:
    """Of 100 steps: 22, 41, 57, 70, 80, 87, 93, 99 (Croce & Hein 2020, section 3.1)."""
    assert sorted(_checkpoints(100))[:8] == [22, 41, 57, 70, 80, 87, 93, 99]


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("loss", ["ce", "margin"])
@pytest.mark.parametrize("targeted", [False, True])
def test_on_a_linear_model_apgd_ends_in_the_known_point(norm: Any, loss: str, targeted: bool) -> None:
    towards_one = 1 if targeted else -1
    model = Linear(m=-5.0 * towards_one)
    y, eps = torch.ones(3, dtype=torch.long), 0.05 if norm == "linf" else 0.4
    x_adv = apgd(model, GREY, y, norm=norm, eps=eps, steps=40, loss=loss, targeted=targeted)
    direction = model.w.sign() if norm == "linf" else model.w / model.w.norm()
    torch.testing.assert_close(x_adv, GREY + eps * towards_one * direction, atol=2e-3, rtol=0)


def test_in_l1_the_best_of_a_linear_model_fills_the_heaviest_pixels() -> None:
    """Greedy: the pixels of the largest weights go to their bounds until the radius is spent."""
    model, y, eps = Linear(m=30.0), torch.ones(3, dtype=torch.long), 3.2
    gain = torch.zeros(3)
    for i in range(3):
        left = eps
        for pixel in model.w.flatten().abs().argsort(descending=True):
            w, value = model.w.flatten()[pixel], GREY[i].flatten()[pixel]
            room = min(left, float(value if w > 0 else 1 - value))
            gain[i] += room * w.abs()
            left -= room
    before = margins(model(GREY), y, False)
    for attack in (apgd, pgd):
        x_adv = attack(model, GREY, y, norm="l1", eps=eps, steps=60, loss="margin")
        reached = margins(model(x_adv), y, False) - before
        assert (reached <= gain * (1 + 1e-5)).all()
        assert (reached >= 0.9 * gain).all()
    # One step along the single steepest coordinate would not do.
    one = GREY + eps * geometry("l1").steepest(-model.w.expand_as(GREY))
    assert (margins(model(one.clamp(0, 1)), y, False) - before < 0.5 * gain).all()


class Valley(nn.Module):
    """A loss whose slope is steep one way and shallow the other, where a fixed long step only jumps."""

    def forward(self, x: Tensor) -> Tensor:
        u, v = x[:, 0, 0, 0] - 0.6, x[:, 0, 0, 1] - 0.7
        height = -(100 * u.square() + v.square())
        return torch.stack([height, torch.full_like(height, 0.001)], 1)


def test_the_step_size_adapts() -> None:
    x, y = torch.full((1, 1, 1, 2), 0.5), torch.ones(1, dtype=torch.long)
    x_adv = apgd(Valley(), x, y, eps=0.3, steps=60, loss="margin", random_start=False)
    assert float(margins(Valley()(x_adv), y, False)) > -0.003
    fixed = [
        float(
            margins(Valley()(pgd(Valley(), x, y, eps=0.3, steps=2, step_size=0.6, loss="margin")), y, False)
        )
        for _ in range(1)
    ]
    assert fixed[0] < -0.003


def test_more_steps_and_restarts_never_lower_the_loss() -> None:
    model, x = network(5), images(40)
    y = logits_of(model, x).argmax(1)
    attack = partial(apgd, model, x, y, eps=0.03, loss="margin", stop_early=False, steps=8)
    one, four = (margins(logits_of(model, attack(restarts=n)), y, False) for n in (1, 4))
    assert (four >= one - 1e-6).all()
    assert four.sum() > one.sum()


@pytest.mark.parametrize("classes", [2, 3, 5])
def test_targets_find_at_least_what_one_direction_finds(classes: int) -> None:
    model, x = network(classes), images(60)
    y = logits_of(model, x).argmax(1)
    found = fooled(logits_of(model, apgd(model, x, y, eps=0.03, steps=20, target_classes=9)), y, False)
    plain = fooled(logits_of(model, apgd(model, x, y, eps=0.03, steps=20, loss="dlr")), y, False)
    assert found.float().mean() >= plain.float().mean() - 0.02
    assert 0.05 < found.float().mean() < 1


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@pytest.mark.parametrize("classes", [2, 3, 4])
@pytest.mark.parametrize("attack", [apgd, pgd])
def test_targets_leave_of_a_linear_model_what_can_be_left(attack: Any, classes: int, norm: Any) -> None:
    x, eps = images(80), {"linf": 0.05, "l2": 0.3, "l1": 0.8}[norm]
    rng = torch.Generator().manual_seed(classes)
    weight = torch.randn(classes, x[0].numel(), generator=rng)
    bias = -(weight @ x.flatten(1).mean(0))

    def model(x: Tensor) -> Tensor:
        return x.flatten(1) @ weight.T + bias

    y = model(x).argmax(1)
    x_adv = attack(model, x, y, norm=norm, eps=eps, steps=60, target_classes=9)
    left = (model(x_adv).argmax(1) == y).sum()
    best = (linear_worst_margin(weight, bias, x, y, norm=norm, eps=eps) > 0).sum()
    assert 8 < best < 72
    assert left <= best + 1


@pytest.mark.parametrize("attack", [apgd, pgd])
def test_of_three_classes_the_least_likely_is_reached(attack: Any) -> None:
    """Class 1 comes second, and no pixel makes it first; class 2 is first from 0.45 off on."""

    def forked(x: Tensor) -> Tensor:
        third = 0.2 + 4 * (x[:, 0, 1, 1] - 0.5)
        return torch.stack([torch.full_like(third, 2.0), third * 0 + 1.9, third], 1)

    x, y = torch.full((3, 1, 8, 8), 0.5), torch.zeros(3, dtype=torch.long)
    for norm in ("linf", "l2", "l1"):
        within = {"norm": norm, "eps": 0.48, "steps": 40, "random_start": False}
        assert (forked(attack(forked, x, y, target_classes=2, **within)).argmax(1) == 2).all()
        assert (forked(attack(forked, x, y, target_classes=1, **within)).argmax(1) == 0).all()


@pytest.mark.parametrize("attack", [apgd, pgd])
def test_targets_are_for_untargeted_attacks(attack: Any) -> None:
    with pytest.raises(ValueError, match=r"^target_classes: expected 0"):
        attack(network(3), images(), torch.zeros(12, dtype=torch.long), target_classes=2, targeted=True)


@pytest.mark.parametrize(
    ("attack", "values", "words"),
    [
        (apgd, {"steps": 0}, "steps ≥ 1"),
        (apgd, {"restarts": 0}, "restarts ≥ 1"),
        (apgd, {"eps": -1.0}, "^eps: expected"),
        (apgd, {"loss": "mse"}, "loss: expected ce, margin or dlr"),
        (apgd, {"norm": "l0"}, "norm: expected one of"),
        (mi_fgsm, {"steps": 0}, "steps ≥ 1"),
        (mi_fgsm, {"diversity": 2.0}, "diversity: expected in"),
        (fgsm, {"random_step": 1.5}, "random_step: expected in"),
    ],
)
def test_bad_arguments_are_refused(attack: Any, values: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        attack(network(3), images(), torch.zeros(12, dtype=torch.long), **values)


def test_momentum_by_hand() -> None:
    """Two steps: a step of eps/2 along the sign of what has gathered; on a linear model all one way."""
    model, y = Linear(m=30.0), torch.ones(3, dtype=torch.long)
    x_adv = mi_fgsm(model, GREY, y, eps=0.1, steps=2)
    torch.testing.assert_close(x_adv, GREY - 0.1 * model.w.sign(), atol=1e-6, rtol=0)


def test_momentum_spends_its_radius_where_pixels_are_at_their_bounds() -> None:
    """On a linear model the best image of the ball and the box, which PGD finds."""
    model = Linear(m=30.0)
    x = torch.where(torch.rand(1, 8, 8, generator=torch.Generator().manual_seed(0)) < 0.8, 0.0, 0.5)
    x, y = x.expand(3, 1, 8, 8), torch.ones(3, dtype=torch.long)
    found = [attack(model, x, y, norm="l2", eps=0.8, steps=20) for attack in (mi_fgsm, pgd)]
    assert ((found[0] - x).flatten(1).norm(dim=1) > 0.79).all()
    assert (gain(model, found[0], x) > 0.99 * gain(model, found[1], x)).all()


def scripted(
    heights: Callable[[int], float], monkeypatch: Any
) -> tuple[list[float], list[float], list[float]]:
    """APGD of 100 steps, each a bit to the right, on a loss that is `heights` of how often it was asked.

    Returns the lengths of its steps, where they began, and where the loss was asked.
    """
    lengths, begun, asked = list[float](), list[float](), list[float]()

    def step(clean: Tensor, at: Tensor, gradient: Tensor, length: Tensor, *rest: Any) -> Tensor:
        lengths.append(float(length))
        begun.append(float(at.mean()))
        return at + 0.001

    def model(at: Tensor) -> Tensor:
        height = at.sum((1, 2, 3)) * 0 + heights(len(asked)) - 1000
        asked.append(float(at.detach().mean()))
        return torch.stack([height, torch.zeros_like(height)], 1)

    module = import_module("manifold_defense.attacks.apgd")
    monkeypatch.setattr(module, "geometry", lambda norm: geometry(norm)._replace(step=step))
    x, y = torch.full((1, 1, 2, 2), 0.5), torch.ones(1, dtype=torch.long)
    apgd(model, x, y, eps=0.25, steps=100, loss="margin", random_start=False)
    # At first it is asked about the clean image.
    return lengths, begun, asked[1:]


@pytest.mark.parametrize(("rises", "halved"), [(16, True), (17, False)])
def test_a_start_is_no_rise(rises: int, halved: bool, monkeypatch: Any) -> None:
    """Of 22 moves before the first look 17 must raise the loss (0.75), or steps are halved."""
    lengths, _, _ = scripted(lambda k: k if k <= rises + 1 else -k, monkeypatch)
    assert lengths[:22] == [0.5] * 22
    assert lengths[22] == (0.25 if halved else 0.5)


def test_where_steps_are_halved_it_goes_back_to_the_best_point(monkeypatch: Any) -> None:
    """Croce & Hein 2020, algorithm 1, line 12."""
    lengths, begun, asked = scripted(lambda k: 0 if k == 6 else -k, monkeypatch)
    assert lengths[21:23] == [0.5, 0.25]
    assert begun[:22] == asked[:22]
    assert begun[22] == asked[5] < asked[22]


def test_steps_are_halved_where_a_whole_stretch_has_found_nothing_better(monkeypatch: Any) -> None:
    """Their condition 2: the loss rose often enough, and never beyond what it was at the look before."""
    lengths, _, _ = scripted(lambda k: k if k <= 23 else k - 500, monkeypatch)
    assert lengths[:41] == [0.5] * 41
    assert lengths[41:57] == [0.25] * 16


def test_momentum_carries_over_a_turn() -> None:
    """The gradient turns at 0.53: without memory the second step goes back, with it it goes on."""

    class Hill(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            height = -10 * (x.flatten(1).mean(1) - 0.53).abs() - 20
            return torch.stack([height, torch.zeros_like(height)], 1)

    x, y = torch.full((1, 1, 2, 2), 0.5), torch.ones(1, dtype=torch.long)
    seen: list[float] = []

    def watched(x: Tensor) -> Tensor:
        seen.append(float(x.detach().mean()))
        return Hill()(x)

    ends = []
    for decay in (0.0, 2.0):
        seen.clear()
        mi_fgsm(watched, x, y, eps=0.12, steps=3, decay=decay, loss="margin")
        ends.append(seen[-1])
    assert ends[0] == pytest.approx(0.54, abs=1e-5)  # up, back, up
    assert ends[1] == pytest.approx(0.62, abs=1e-5)  # on and on


def test_a_random_step_spends_its_share() -> None:
    model, y = Linear(m=30.0), torch.ones(3, dtype=torch.long)
    delta = fgsm(model, GREY, y, eps=0.1, random_step=0.4) - GREY
    sizes = delta.abs().flatten().sort().values
    # Every pixel moved by 0.06 against the weight, and by 0.04 more or back.
    assert ((sizes - 0.02).abs().minimum((sizes - 0.1).abs()) < 1e-5).all()
    assert (delta.sign() == -model.w.sign()).all()


def test_a_hidden_gradient_is_none_not_an_error() -> None:
    model = network(3).eval()

    def hidden(x: Tensor) -> Tensor:
        with torch.no_grad():
            return model(x)

    x, y = images(4), torch.zeros(4, dtype=torch.long)
    logits, gradient = logits_and_gradient(hidden, x, y, "ce", False)
    assert torch.equal(gradient, torch.zeros_like(x))
    assert torch.equal(logits, hidden(x))
    for attack in (apgd, pgd, fgsm, mi_fgsm):
        assert attack(hidden, x, y, eps=0.1).shape == x.shape
