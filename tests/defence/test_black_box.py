"""Attacks without gradients: known losses and distances on a linear model, and models that hide theirs."""

import math
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from manifold_defense.attacks import hop_skip_jump, pgd, sparse_rs, square, square_pgd, transfer_pgd
from manifold_defense.attacks.norms import sizes
from manifold_defense.attacks.objective import fooled
from manifold_defense.attacks.square import _bump, _side
from tests.defence.attack_table import GREY, Linear, images, logits_of, network

ONES = torch.ones(3, dtype=torch.long)


def lost(model: Linear, x_adv: Tensor) -> Tensor:
    """By how much `Z₁ − Z₀` fell from GREY's, (N,)."""
    return (model(GREY) - model(x_adv)) @ torch.tensor([-1.0, 1.0])


# --- Square ---


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("label", [0, 1])
@pytest.mark.parametrize("targeted", [False, True])
def test_square_nears_the_best_loss_on_a_linear_model(norm: Any, label: int, targeted: bool) -> None:
    """`eps ‖w‖₁` in L∞; in L2 squares are slow at `eps ‖w‖₂`, for which every pixel needs its own height."""
    towards = 1 if label == int(targeted) else -1
    model, eps = Linear(m=-30.0 * towards), 0.05 if norm == "linf" else 0.4
    best = eps * float(model.w.abs().sum() if norm == "linf" else model.w.norm())
    y = torch.full((3,), label)
    x_adv = square(model, GREY, y, norm=norm, eps=eps, steps=500, targeted=targeted)
    gain = -towards * lost(model, x_adv)
    assert (gain >= (0.98 if norm == "linf" else 0.65) * best).all()
    assert (gain <= best * (1 + 1e-4)).all()


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_more_queries_and_restarts_never_lower_the_margin(norm: Any) -> None:
    model, run = Linear(m=30.0), partial(square, norm=norm, eps=0.1)
    few, many = (lost(model, run(model, GREY, ONES, steps=steps)) for steps in (5, 300))
    assert (many > few).all()
    again = lost(model, run(model, GREY, ONES, steps=5, restarts=4))
    assert (again >= few - 1e-6).all()
    assert again.sum() > few.sum()


def test_a_gradient_goes_on_where_queries_stop_short() -> None:
    """A corner turns bright by steps without a slope, which queries climb; then all pixels must agree."""
    eps, w = 0.1, torch.randn(1, 8, 8, generator=torch.Generator().manual_seed(2))
    w[:, :4, :4] = 0.2 * w.abs().mean()

    def model(x: Tensor) -> Tensor:
        delta = (x - GREY[:1]) / eps
        steps = (10 * delta[:, :, :4, :4].mean((1, 2, 3))).floor() / 10
        lead = torch.where(steps > 0.5, (delta * w).sum((1, 2, 3)) / w.abs().sum() - 0.98, steps - 3)
        return torch.stack([lead, torch.zeros_like(lead)], 1)

    bound: dict[str, Any] = {"model": model, "x": GREY[:1], "y": ONES[:1], "eps": eps}
    for alone in (partial(square, steps=200), partial(pgd, steps=40, restarts=4, loss="both")):
        assert not fooled(model(alone(**bound)), ONES[:1], False).any()
    assert fooled(model(square_pgd(queries=200, **bound)), ONES[:1], False).all()


def test_a_surrogate_leads_to_where_the_models_own_gradient_begins() -> None:
    """Off a bright corner the model is flat; the surrogate climbs to it, and knows nothing of the rest."""
    eps, w = 0.1, torch.randn(1, 8, 8, generator=torch.Generator().manual_seed(2))
    w[:, :4, :4] = 0.2 * w.abs().mean()

    def corner(x: Tensor) -> Tensor:
        return ((x - GREY[:1]) / eps)[:, :, :4, :4].mean((1, 2, 3))

    def model(x: Tensor) -> Tensor:
        lead = ((x - GREY[:1]) / eps * w).sum((1, 2, 3)) / w.abs().sum() - 0.98
        lead = torch.where(corner(x) > 0.9, lead, -3.0)
        return torch.stack([lead, torch.zeros_like(lead)], 1)

    def surrogate(x: Tensor) -> Tensor:
        return torch.stack([corner(x), torch.zeros_like(corner(x))], 1)

    bound: dict[str, Any] = {"model": model, "x": GREY[:1], "y": ONES[:1], "eps": eps, "norm": "linf"}
    for alone in (partial(pgd, steps=40, restarts=4, loss="both"), transfer_pgd):
        assert not fooled(model(alone(**bound)), ONES[:1], False).any()
    assert fooled(model(transfer_pgd(surrogate=surrogate, **bound)), ONES[:1], False).all()


def test_square_starts_with_stripes_of_full_size() -> None:
    x_adv = square(Linear(m=30.0), GREY, ONES, eps=0.1, steps=1, restarts=20)
    delta = x_adv - GREY
    torch.testing.assert_close(delta.abs(), torch.full_like(delta, 0.1))
    assert (delta.sign() == delta[:, :, :1].sign()).all()
    assert not (delta.sign() == delta[..., :1].sign()).all()


def test_square_spends_the_whole_ball_in_l2() -> None:
    size = sizes("l2", square(Linear(m=30.0), GREY, ONES, norm="l2", eps=0.4, steps=200) - GREY)
    torch.testing.assert_close(size, torch.full((3,), 0.4), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("spent", "side"), [(0.0, 25), (0.001, 25), (0.0011, 18), (0.006, 13), (0.5, 3), (0.81, 2), (1.0, 2)]
)
def test_the_squares_shrink_by_the_published_schedule(spent: float, side: int) -> None:
    """0.8 of 28 × 28 pixels at first, halved after 10, 50, 200, 1,000, 2,000, … of 10,000 queries."""
    assert _side(0.8, spent, torch.zeros(1, 1, 28, 28)) == side


def test_a_bump_by_hand() -> None:
    edge, middle = 1 / 4, 1 / 4 + 1
    expected = torch.tensor([[edge] * 3, [edge, middle, edge], [edge] * 3])
    torch.testing.assert_close(_bump(3, 3, GREY), expected)
    inner = 1 / 9 + 1 / 4
    torch.testing.assert_close(_bump(5, 5, GREY)[2], torch.tensor([1 / 9, inner, inner + 1, inner, 1 / 9]))


@pytest.mark.parametrize("attack", [square, sparse_rs])
def test_random_numbers_do_not_depend_on_who_is_left(attack: Any) -> None:
    """The third image draws what it draws, whether or not the first two leave the batch at once."""
    model = Linear(m=30.0)
    threat = {"norm": "l0", "eps": 4} if attack is sparse_rs else {"norm": "linf", "eps": 0.1}
    together = attack(model, GREY, ONES, steps=30, **threat)
    left = attack(model, GREY, torch.tensor([0, 0, 1]), steps=30, **threat)
    assert torch.equal(left[:2], GREY[:2])
    torch.testing.assert_close(left[2], together[2])


# --- HopSkipJump ---


@pytest.mark.parametrize(("norm", "factor"), [("l2", 1.06), ("linf", 1.2)])
@pytest.mark.parametrize("targeted", [False, True])
def test_hop_skip_jump_nears_the_distance_to_the_boundary(norm: Any, factor: float, targeted: bool) -> None:
    """`|m| / ‖w‖` in L2, `|m| / ‖w‖₁` in L∞."""
    model = Linear(m=5.0)
    y = torch.full((3,), 0 if targeted else 1)
    x_adv = hop_skip_jump(model, GREY, y, norm=norm, targeted=targeted)
    margin = model(GREY) @ torch.tensor([-1.0, 1.0])
    expected = margin / (model.w.norm() if norm == "l2" else model.w.abs().sum())
    found = sizes(norm, x_adv - GREY)
    assert fooled(model(x_adv), y, targeted).all()
    assert (found >= expected * (1 - 1e-4)).all()
    assert (found <= expected * factor).all()
    # The start alone, without a direction, would not pass.
    start = hop_skip_jump(model, GREY, y, norm=norm, targeted=targeted, queries=1)
    assert fooled(model(start), y, targeted).all()
    assert (sizes(norm, start - GREY) > 2 * expected).all()


def test_more_queries_find_nearer_images() -> None:
    found = [
        sizes("l2", hop_skip_jump(Linear(5.0), GREY, ONES, queries=queries) - GREY)
        for queries in (1, 300, 1000, 4000)
    ]
    assert all((more < fewer).all() for fewer, more in pairwise(found))


def test_hop_skip_jump_sees_labels_only() -> None:
    model, x = network(3).eval(), images()
    y = logits_of(model, x).argmax(1)

    def labels(x: Tensor) -> Tensor:
        return torch.eye(3)[model(x).argmax(1)]

    run = partial(hop_skip_jump, queries=500)
    assert torch.equal(run(labels, x, y), run(model, x, y))
    assert fooled(labels(run(labels, x, y)), y, False).all()


@pytest.mark.parametrize("queries", [300, 1000])
def test_hop_skip_jump_keeps_its_budget(queries: int) -> None:
    model, asked = Linear(m=5.0), 0

    def counted(x: Tensor) -> Tensor:
        nonlocal asked
        asked += len(x)
        return model(x)

    x_adv = hop_skip_jump(counted, GREY[:1], ONES[:1], queries=queries)
    assert not torch.equal(x_adv, GREY[:1])
    assert 0.5 * queries < asked <= queries + 2  # and the clean image


@pytest.mark.parametrize(
    ("model", "eps"),
    [
        (Linear(m=5.0), 0.05),  # the boundary is farther
        (Linear(m=1e4), math.inf),  # there is none in [0, 1]
    ],
)
def test_where_hop_skip_jump_fails_the_image_comes_back(model: Any, eps: float) -> None:
    assert torch.equal(hop_skip_jump(model, GREY, ONES, eps=eps, queries=500), GREY)


def test_another_image_of_the_batch_is_a_start() -> None:
    """No noise is of class 0 here, but the corner nearest to it is."""
    model = Linear(m=14.0)
    corner = (model.w < 0).float().unsqueeze(0)
    assert model(corner).argmax(1) == 0
    assert torch.equal(hop_skip_jump(model, GREY, ONES, queries=500), GREY)
    x, y = torch.cat([GREY, corner]), torch.tensor([1, 1, 1, 0])
    x_adv = hop_skip_jump(model, x, y, queries=3000)[:3]
    assert fooled(model(x_adv), ONES, False).all()
    margin = model(GREY) @ torch.tensor([-1.0, 1.0])
    assert (sizes("l2", x_adv - GREY) <= 1.15 * margin / model.w.norm()).all()


@pytest.mark.parametrize(("norm", "eps"), [("l2", 1.2), ("linf", 0.2)])
def test_within_the_ball_a_found_image_goes_to_its_edge(norm: Any, eps: float) -> None:
    """On the boundary another batch's rounding could bring it back."""
    model = Linear(m=5.0)
    x_adv = hop_skip_jump(model, GREY, ONES, norm=norm, eps=eps)
    torch.testing.assert_close(sizes(norm, x_adv - GREY), torch.full((3,), eps), atol=1e-5, rtol=0)
    assert (model(x_adv).diff(dim=1) < -0.1).all()


# --- Both ---


def cut(model: Any) -> Any:
    """The model with its gradient hidden: zero everywhere."""
    return lambda x: model(x.detach()) + 0 * x.sum()


@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.1), ("l2", 1.0)])
def test_what_needs_no_gradient_works_without_one(norm: Any, eps: float) -> None:
    """PGD does not get beyond its random start."""
    model = cut(Linear(m=2.0))
    assert not fooled(model(pgd(model, GREY, ONES, norm=norm, eps=eps)), ONES, False).any()
    for attack in (square, hop_skip_jump):
        assert fooled(model(attack(model, GREY, ONES, norm=norm, eps=eps)), ONES, False).all()


def test_labels_alone_give_square_nothing_to_climb() -> None:
    """The other way about: its margin is flat, so it stays a blind search."""
    model = Linear(m=3.0)

    def labels(x: Tensor) -> Tensor:
        return torch.eye(2)[model(x).argmax(1)]

    assert not fooled(labels(square(labels, GREY, ONES, eps=0.08)), ONES, False).any()
    assert fooled(labels(square(model, GREY, ONES, eps=0.08)), ONES, False).all()


@pytest.mark.parametrize(
    ("attack", "keywords", "words"),
    [
        (square, {"norm": "l0"}, "norm: expected one of linf, l2, got 'l0'"),
        (square, {"eps": -0.1}, "eps"),
        (square, {"eps": math.inf}, "eps"),
        (square, {"steps": 0}, "steps ≥ 1"),
        (square, {"restarts": 0}, "restarts ≥ 1"),
        (square, {"initial_share": 0.0}, "initial_share"),
        (hop_skip_jump, {"norm": "l1"}, "norm: expected one of linf, l2, got 'l1'"),
        (hop_skip_jump, {"eps": math.nan}, "eps"),
        (hop_skip_jump, {"queries": 0}, "queries"),
        (hop_skip_jump, {"draws": 0}, "draws"),
        (hop_skip_jump, {"restarts": 0}, "restarts"),
    ],
)
def test_bad_arguments_are_refused(attack: Any, keywords: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words) as error:
        attack(Linear(1.0), GREY, ONES, **keywords)
    assert "\n" not in str(error.value)
