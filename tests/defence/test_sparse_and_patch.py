"""L0 and patch attacks: the best pixels and window of a linear model, exhaustive search on others."""

from functools import partial
from itertools import combinations, product
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from manifold_defense.attacks import patch, pgd_l0, sparse_rs, stroke_search
from manifold_defense.attacks.norms import sizes
from manifold_defense.attacks.objective import fooled, margins
from manifold_defense.attacks.patch import _candidates
from manifold_defense.attacks.sparse import _exchange, _nearest_sparse, _propose, draw_strokes
from tests.defence.attack_table import GREY, Linear, images, logits_of, network

ONES = torch.ones(3, dtype=torch.long)


def linear(m: float, shape: tuple[int, int, int]) -> tuple[Linear, Tensor]:
    """A linear model for images of any shape (C, H, W), and three of them, (3, C, H, W)."""
    model = Linear(m)
    model.w = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    return model, torch.rand(3, *shape, generator=torch.Generator().manual_seed(4))


def rise(model: Linear, x: Tensor, x_adv: Tensor, towards: int) -> Tensor:
    """By how much `Z₁ − Z₀` moved in the wanted direction, (N,)."""
    return towards * (model(x_adv) - model(x)).diff(dim=1).squeeze(1)


def pixel_gains(model: Linear, x: Tensor, towards: int) -> Tensor:
    """What the best colour of each pixel gains, (N, H, W): `Σ_c max(w (1 − x), −w x)`."""
    w = towards * model.w
    return torch.maximum(w * (1 - x), -w * x).sum(1)


SHAPES = pytest.mark.parametrize("shape", [(1, 8, 8), (3, 6, 9)])
WANTED = pytest.mark.parametrize(("label", "targeted"), [(0, False), (1, False), (0, True), (1, True)])


def direction(label: int, targeted: bool) -> int:
    return 1 if label == int(targeted) else -1


# --- L0 ---


@SHAPES
@WANTED
@pytest.mark.parametrize("count", [1, 5, 20, 100])
def test_the_best_pixels_of_a_linear_model(shape: Any, label: int, targeted: bool, count: int) -> None:
    towards = direction(label, targeted)
    model, x = linear(-100.0 * towards, shape)
    gains = pixel_gains(model, x, towards).flatten(1).sort(descending=True).values
    best = gains[:, :count].sum(1)
    y, threat = torch.full((3,), label), {"eps": count, "targeted": targeted}
    # Cross-entropy at a margin of 100 is flat.
    x_adv = pgd_l0(model, x, y, loss="margin", **threat)
    assert (sizes("l0", x_adv - x) <= count).all()
    assert (rise(model, x, x_adv, towards) >= 0.99 * best).all()
    assert (rise(model, x, x_adv, towards) <= best * 1.0001).all()
    x_adv = stroke_search(model, x, y, restarts=1, strokes=1, tries=2, queries=1, **threat)
    assert (sizes("l0", x_adv - x) <= count).all()
    # Of a pixel that is kept the colour is kept as well.
    assert (rise(model, x, x_adv, towards) >= (0.9999 if shape[0] == 1 else 0.9) * best).all()
    assert (rise(model, x, x_adv, towards) <= best * 1.0001).all()
    if label == 0:
        x_adv = sparse_rs(model, x, y, steps=600, **threat)
        assert (sizes("l0", x_adv - x) <= count).all()
        assert (rise(model, x, x_adv, towards) >= (0.93 if shape[0] == 1 else 0.75) * best).all()
        assert (rise(model, x, x_adv, towards) <= best * 1.0001).all()


def test_the_wrong_pixels_would_not_pass() -> None:
    model, x = linear(100.0, (1, 8, 8))
    gains = pixel_gains(model, x, -1).flatten(1).sort(descending=True).values
    assert (gains[:, 5:10].sum(1) < 0.9 * gains[:, :5].sum(1)).all()


@pytest.mark.parametrize(
    "attack",
    [
        partial(pgd_l0, restarts=5, loss="both"),
        partial(sparse_rs, steps=600),
        partial(stroke_search, queries=600),
        partial(patch, locations=64, restarts=2),
    ],
)
def test_one_pixel_on_a_network_is_as_good_as_trying_all(attack: Any) -> None:
    """One pixel is also a patch of side 1; the best value need not be 0 or 1."""
    model, x = network(3).eval(), images()
    y = logits_of(model, x).argmax(1)
    best = torch.full((12,), -torch.inf)
    with torch.no_grad():
        for place, value in product(range(64), torch.linspace(0, 1, 11)):
            tried = x.clone()
            tried.flatten(1)[:, place] = value
            best = torch.maximum(best, margins(model(tried), y, False))
        norm = "patch" if attack.func is patch else "l0"
        found = margins(model(attack(model, x, y, norm=norm, eps=1, stop_early=False)), y, False)
    assert (found >= best - 1e-2 * best.abs()).float().mean() > 0.8
    assert found.sum() >= best.sum() - 0.03 * best.abs().sum()
    with torch.no_grad():
        weak = margins(model(sparse_rs(model, x, y, eps=1, steps=10, stop_early=False)), y, False)
    assert weak.sum() < best.sum() - 0.1 * best.abs().sum()


def test_the_nearest_sparse_image_by_trying_all() -> None:
    rng = torch.Generator().manual_seed(0)
    clean = torch.rand(20, 2, 2, 3, generator=rng)
    moved = clean + 2 * torch.randn(clean.shape, generator=rng)
    for count in (0, 1, 2, 6, 7):
        nearest = torch.full((20,), torch.inf)
        for places in combinations(range(6), min(count, 6)):
            tried = clean.clone()
            tried.flatten(2)[..., list(places)] = moved.clamp(0, 1).flatten(2)[..., list(places)]
            nearest = torch.minimum(nearest, (tried - moved).square().flatten(1).sum(1))
        found = _nearest_sparse(moved, clean, count)
        assert (sizes("l0", found - clean) <= count).all()
        torch.testing.assert_close((found - moved).square().flatten(1).sum(1), nearest)


def test_random_search_changes_exactly_so_many_pixels_to_corners() -> None:
    model, x = linear(100.0, (3, 6, 9))
    for steps in (1, 2, 50):
        x_adv = sparse_rs(model, x, ONES, eps=7, steps=steps, restarts=5)
        changed = (x_adv != x).any(1)
        assert (changed.flatten(1).sum(1) == 7).all()
        values = x_adv.movedim(1, -1)[changed]
        assert ((values == 0) | (values == 1)).all()


@pytest.mark.parametrize(
    ("query", "divisor"),
    [(1, 2), (51, 4), (201, 5), (501, 6), (1001, 8), (2001, 10), (4001, 12), (6001, 15), (8001, 20)],
)
def test_random_search_exchanges_fewer_and_fewer_pixels(query: int, divisor: int) -> None:
    """As published for L0, of 10,000 queries."""
    rng = torch.Generator().manual_seed(0)
    clean, count = torch.full((2, 1, 12, 12), 0.4), 60
    changed = torch.zeros(2, 144, dtype=torch.bool)
    changed[:, torch.randperm(144, generator=rng)[:count]] = True
    current = torch.where(changed.view_as(clean), 0.7, clean)  # no corner: what is drawn anew differs

    def draw(*shape: int) -> Tensor:
        return torch.rand(2, *shape, generator=rng)

    tried = _propose(current, clean, query / 10_000, draw, count=count, initial_share=0.8)
    assert (tried != clean).flatten(1).sum(1).tolist() == [count] * 2
    assert (tried == 0.7).flatten(1).sum(1).tolist() == [count - round(0.8 * count / divisor)] * 2


def test_without_pixels_nothing_changes() -> None:
    for attack in (pgd_l0, sparse_rs, stroke_search):
        assert torch.equal(attack(Linear(1.0), GREY, ONES, eps=0, steps=5), GREY)


class Lines(nn.Module):
    """Logits (N, 2) that see five white pixels in a row or a column alone, and are flat for less."""

    def forward(self, x: Tensor) -> Tensor:
        sums = [F.avg_pool2d(x, window, stride=1).flatten(1).amax(1) for window in ((1, 5), (5, 1))]
        seen = (torch.stack(sums).amax(0) - 0.95).clamp(min=0)
        return torch.stack([100 * seen, torch.ones_like(seen)], 1)


def test_a_stroke_finds_what_pixels_drawn_one_by_one_do_not() -> None:
    for attack in (partial(pgd_l0, restarts=5, loss="both"), partial(sparse_rs, steps=2500)):
        assert torch.equal(Lines()(attack(Lines(), GREY, ONES, eps=5)).argmax(1), ONES)
    x_adv = stroke_search(Lines(), GREY, ONES, eps=5)
    assert (Lines()(x_adv).argmax(1) != ONES).all()
    assert (sizes("l0", x_adv - GREY) == 5).all()


def test_random_search_goes_on_from_the_best_stroke() -> None:
    """Without a gradient the exchanges of the climb are as good as none."""
    model = Linear(m=7.0)

    def cut(x: Tensor) -> Tensor:
        return model(x.detach()) + 0 * x.sum()

    few, many = (
        stroke_search(cut, GREY, ONES, eps=6, steps=1, restarts=1, queries=queries, stop_early=False)
        for queries in (1, 1500)
    )
    risen = [rise(model, GREY, x_adv, -1) for x_adv in (few, many)]
    best = pixel_gains(model, GREY, -1).flatten(1).topk(6).values.sum(1)
    assert (risen[0] < 0.9 * best).all()
    assert (risen[1] > 0.95 * best).all()


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 6, 9), (1, 1, 1)])
def test_a_stroke_is_a_line_of_so_many_pixels(shape: Any) -> None:
    x = torch.full((60, *shape), 0.5)
    count = min(8, shape[1] * shape[2])
    changed = draw_strokes(x, torch.Generator().manual_seed(0), count=count) - x
    assert set(changed.unique().tolist()) <= {-0.5, 0.0, 0.5}
    assert (sizes("l0", changed) == count).all()
    where = (changed != 0).any(1)
    for own, image in zip(where, changed, strict=True):
        assert all(len(channel[own].unique()) == 1 for channel in image)
    if shape[1] == 28:
        assert len({tuple(own.flatten().tolist()) for own in where}) > 50
        for own in where:
            at = own.nonzero().float()
            spread = torch.linalg.svdvals(at - at.mean(0))
            assert spread[1] < spread[0]  # longer than wide
            near = torch.cdist(at, at).fill_diagonal_(torch.inf).amin(1)
            assert (near < 2).all()  # and in one place


def test_exchanged_pixels_are_the_lowest_of_both_scores() -> None:
    rng = torch.Generator().manual_seed(0)
    clean, corners = torch.full((30, 2, 3, 4), 0.5), torch.ones(30, 2, 3, 4)
    at = torch.where(torch.rand(30, 1, 3, 4, generator=rng) < 0.3, 0.0, clean)
    returned, drawn = (torch.rand(30, 3, 4, generator=rng) for _ in range(2))
    for count, many in ((8, 1), (8, 8), (12, 2), (20, 3)):
        found = _exchange(at, clean, corners, returned, drawn, many, count)
        for own, before, back, scores in zip(found, at, returned, drawn, strict=True):
            old = [i for i in back.flatten().argsort().tolist() if before.flatten(1)[0, i] == 0]
            kept = set(old[many:])
            free = [i for i in scores.flatten().argsort().tolist() if i not in kept]
            expected = clean[0].clone().flatten(1)
            expected[:, list(kept)] = 0
            expected[:, free[: max(count - len(kept), 0)]] = 1
            assert torch.equal(own.flatten(1), expected)


# --- Patches ---


@SHAPES
@WANTED
@pytest.mark.parametrize("side", [1, 3, 6, 12])
@pytest.mark.parametrize("locations", [1, 5])
def test_the_best_window_of_a_linear_model(
    shape: Any, label: int, targeted: bool, side: int, locations: int
) -> None:
    towards = direction(label, targeted)
    model, x = linear(-100.0 * towards, shape)
    window = (min(side, shape[1]), min(side, shape[2]))
    sums = F.avg_pool2d(pixel_gains(model, x, towards), window, stride=1) * (window[0] * window[1])
    best, y = sums.amax((1, 2)), torch.full((3,), label)
    x_adv = patch(model, x, y, eps=side, steps=20, locations=locations, loss="margin", targeted=targeted)
    assert (sizes("patch", x_adv - x) <= side).all()
    torch.testing.assert_close(rise(model, x, x_adv, towards), best, rtol=1e-4, atol=1e-4)
    # The window in the middle, with the best content, would not pass.
    if side < 6:
        assert (sums[:, sums.shape[1] // 2, sums.shape[2] // 2] < 0.99 * best).all()


class Bait(nn.Module):
    """A weak slope in the left half; in the lower right corner a strong one, but flat on clean images."""

    def forward(self, x: Tensor) -> Tensor:
        bait = 0.1 * x[:, 0, :, :4].sum((1, 2)).clamp(max=2)
        trigger = 4 * (x[:, 0, 6:, 6:].sum((1, 2)) - 0.8).clamp(min=0)
        return torch.stack([torch.full_like(bait, 3.0), bait + trigger], 1)


def test_random_places_find_what_the_first_gradient_does_not_show() -> None:
    x, y = torch.full((8, 1, 8, 8), 0.1), torch.zeros(8, dtype=torch.long)
    deceived = patch(Bait(), x, y, eps=2, locations=1)
    assert not fooled(Bait()(deceived), y, False).any()
    x_adv = patch(Bait(), x, y, eps=2, locations=49, restarts=2)
    assert fooled(Bait()(x_adv), y, False).all()


def test_candidates_are_distinct_and_lead_with_the_best_window() -> None:
    gains = torch.rand(4, 6, 7, generator=torch.Generator().manual_seed(0))
    for locations, expected in ((1, 1), (2, 2), (9, 9), (42, 42), (100, 42)):
        corners = _candidates(gains, locations, torch.Generator().manual_seed(0))
        assert corners.shape == (4, expected, 2)
        flat = corners[..., 0] * 7 + corners[..., 1]
        assert all(len(set(row.tolist())) == expected for row in flat)
        assert torch.equal(flat[:, 0], gains.flatten(1).argmax(1))
    top = _candidates(gains, 4, torch.Generator().manual_seed(0))[:, :2]
    assert ((top[:, 0] - top[:, 1]).abs().amax(1) > 1).all()


def test_more_restarts_never_lower_the_margin() -> None:
    model, x = network(3).eval(), images()
    y = logits_of(model, x).argmax(1)
    for attack in (
        partial(pgd_l0, eps=3, steps=4),
        partial(sparse_rs, eps=3, steps=4),
        partial(stroke_search, eps=3, steps=2, strokes=1, tries=2, queries=3),
        partial(patch, eps=2, steps=4, locations=2),
    ):
        one, four = (
            margins(logits_of(model, attack(model, x, y, restarts=n, stop_early=False)), y, False)
            for n in (1, 4)
        )
        assert (four >= one - 1e-6).all()
        assert four.sum() > one.sum()


# --- Both ---


def test_a_hidden_gradient_stops_all_but_random_search() -> None:
    model = Linear(m=7.0)

    def cut(x: Tensor) -> Tensor:
        return model(x.detach()) + 0 * x.sum()

    def left(attacked: Any, attack: Any) -> int:
        return int((~fooled(model(attack(attacked, GREY, ONES)), ONES, False)).sum())

    for attack in (partial(pgd_l0, eps=12), partial(patch, eps=5, locations=1)):
        assert left(model, attack) == 0
        assert left(cut, attack) == 3
    assert left(cut, partial(sparse_rs, eps=12)) == 0


@pytest.mark.parametrize("attack", [partial(pgd_l0, eps=30), partial(patch, eps=6)])
def test_scaled_logits_do_not_weaken_the_margin_loss(attack: Any) -> None:
    plain = attack(Linear(5.0), GREY, ONES, loss="margin")
    scaled = attack(Linear(5.0, 1000.0), GREY, ONES, loss="margin")
    torch.testing.assert_close(plain, scaled)
    assert fooled(Linear(5.0)(plain), ONES, False).all()


def test_gradients_that_are_not_finite_are_no_direction() -> None:
    def broken(x: Tensor) -> Tensor:
        return Linear(5.0)(x) + 0 * (x - x.detach()).abs().sqrt().sum()

    for attack in (partial(pgd_l0, eps=5), partial(patch, eps=3)):
        x_adv = attack(broken, GREY, ONES)
        assert x_adv.isfinite().all()
        assert (margins(Linear(5.0)(x_adv), ONES, False) >= margins(Linear(5.0)(GREY), ONES, False)).all()


@pytest.mark.parametrize(
    ("attack", "keywords", "words"),
    [
        (pgd_l0, {"norm": "l2"}, "norm: expected l0, got 'l2'"),
        (sparse_rs, {"norm": "l2"}, "norm: expected l0, got 'l2'"),
        (patch, {"norm": "l0"}, "norm: expected patch, got 'l0'"),
        (pgd_l0, {"eps": 2.5}, "whole number"),
        (sparse_rs, {"eps": -1}, "eps: expected at least 0"),
        (patch, {"eps": 0}, "whole number"),
        (patch, {"eps": float("nan")}, "eps: expected at least 0"),
        (pgd_l0, {"eps": float("inf")}, "eps: expected a finite number"),
        (pgd_l0, {"steps": 0}, "steps"),
        (sparse_rs, {"restarts": 0}, "restarts"),
        (patch, {"locations": 0}, "locations"),
        (pgd_l0, {"loss": "mse"}, "loss: expected ce, margin or dlr"),
        (patch, {"loss": "mse"}, "loss: expected ce, margin or dlr"),
        (sparse_rs, {"initial_share": 2.0}, "initial_share"),
        (stroke_search, {"norm": "l2"}, "norm: expected l0, got 'l2'"),
        (stroke_search, {"queries": 0}, "queries ≥ 1"),
        (stroke_search, {"restarts": 0}, "restarts"),
    ],
)
def test_bad_arguments_are_refused(attack: Any, keywords: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words) as error:
        attack(Linear(1.0), GREY, ONES, **keywords)
    assert "\n" not in str(error.value)
