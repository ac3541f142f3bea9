"""Windows: what they are, and that PGD from them breaks what is flat to small changes."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from manifold_defense.attacks import apgd, pgd, window_pgd
from manifold_defense.attacks.norms import sizes
from manifold_defense.attacks.window import draw_pieces, draw_windows
from tests.defence.attack_table import GREY, Linear

ONES = torch.ones(3, dtype=torch.long)


class Flat(nn.Module):
    """Logits (N, 2) that do not see a change of less than 0.4 in a pixel, as a net hardened at L∞ 0.4."""

    def forward(self, x: Tensor) -> Tensor:
        seen = ((x - 0.5).abs() - 0.42).clamp(min=0).flatten(1).sum(1)
        return torch.stack([8 * seen, torch.ones_like(seen)], 1)


def test_a_flat_place_is_left_by_windows_alone() -> None:
    """Within L2 0.8 two pixels may turn white: 8 · 2 · 0.08 is above 1. Spread out, no pixel gets so far."""
    y, ball = ONES, {"norm": "l2", "eps": 0.8}
    for spread in (pgd, apgd):
        assert (Flat()(spread(Flat(), GREY, y, steps=40, restarts=5, **ball)).argmax(1) == y).all()
    x_adv = window_pgd(Flat(), GREY, y, steps=10, restarts=3, tries=20, **ball)
    assert (Flat()(x_adv).argmax(1) != y).all()


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 6, 9), (1, 1, 1), (2, 28, 3)])
def test_a_window_is_one_rectangle_of_extreme_pixels(shape: Any) -> None:
    x = torch.full((40, *shape), 0.5)
    changed = draw_windows(x, torch.Generator().manual_seed(0)) - x
    assert set(changed.abs().unique().tolist()) <= {0.0, 0.5}
    where = changed[:, 0] != 0
    assert all(torch.equal(where, changed[:, channel] != 0) for channel in range(shape[0]))
    for own, colours in zip(where, changed, strict=True):
        rows, columns = own.any(1), own.any(0)
        assert torch.equal(own, rows.unsqueeze(1) & columns.unsqueeze(0))
        for line in (rows, columns):
            places = line.nonzero().squeeze(1)
            assert len(places) == int(places[-1] - places[0]) + 1 <= max(1, -(-3 * len(line) // 10))
        assert all(len(channel[own].unique()) == 1 for channel in colours)
    if shape[1] > 1:
        assert len({tuple(own.flatten().tolist()) for own in where}) > 10
    assert {-0.5, 0.5} <= set(changed.unique().tolist())


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 6, 9), (1, 1, 1)])
def test_a_piece_is_of_another_image(shape: Any) -> None:
    """Images of one number each say whose it is."""
    x = torch.arange(1.0, 31.0).view(30, 1, 1, 1).expand(30, *shape) / 30
    drawn = draw_pieces(x, torch.Generator().manual_seed(0))
    where = (drawn != x)[:, 0]
    for own, image in zip(where, drawn, strict=True):
        rows, columns = own.any(1), own.any(0)
        assert torch.equal(own, rows.unsqueeze(1) & columns.unsqueeze(0))
        assert own.any()
        pieces = image[:, own].unique()
        assert len(pieces) == 1
        assert (pieces == x[:, 0, 0, 0]).any()
    longest = max(int(own.any(1).sum()) for own in where)
    assert longest == max(1, -(-6 * shape[1] // 10))
    # Or of one that is given.
    given = 2 + x[:7]
    drawn = draw_pieces(x, torch.Generator().manual_seed(0), given)
    changed = drawn[drawn != x]
    assert set(changed.tolist()) == set(given[:, 0, 0, 0].tolist())
    assert torch.equal((drawn != x).flatten(1).any(1), torch.ones(30, dtype=torch.bool))
    # Of those that it is itself among, of another.
    for rows in (slice(0, 1), slice(1, 2), slice(0, 2)):
        for seed in range(20):
            drawn = draw_pieces(x[rows], torch.Generator().manual_seed(seed), x[:2])
            assert (drawn != x[rows]).flatten(1).any(1).all()


class Texture(nn.Module):
    """Logits (N, 2) that see a chequered place alone; of one colour, none has any contrast of that kind."""

    def forward(self, x: Tensor) -> Tensor:
        kernel = torch.tensor([[1.0, -1.0], [-1.0, 1.0]]).view(1, 1, 2, 2)
        contrast = nn.functional.conv2d(x, kernel).abs().flatten(1).amax(1)
        seen = (contrast - 1.2).clamp(min=0)
        return torch.stack([8 * seen, torch.ones_like(seen)], 1)


def test_pieces_break_what_plain_windows_do_not() -> None:
    chequered = (torch.arange(8).view(8, 1) + torch.arange(8)) % 2
    x = torch.cat([torch.full((2, 1, 8, 8), 0.5), chequered.view(1, 1, 8, 8).float()])
    ball: dict[str, Any] = {"norm": "l2", "eps": 1.2, "steps": 5, "tries": 100}
    plain = window_pgd(Texture(), x, ONES, restarts=2, **ball)
    assert (Texture()(plain).argmax(1) == ONES).tolist() == [True, True, False]
    with_pieces = window_pgd(Texture(), x, ONES, restarts=4, **ball)
    assert (Texture()(with_pieces).argmax(1) != ONES).all()
    alone = window_pgd(Texture(), x[:1], ONES[:1], restarts=4, **ball)  # of no other image
    assert torch.equal(Texture()(alone).argmax(1), ONES[:1])
    itself = window_pgd(Texture(), x[:1], ONES[:1], restarts=4, pieces=x[:1], **ball)
    assert torch.equal(itself, alone)
    given = window_pgd(Texture(), x[:1], ONES[:1], restarts=4, pieces=x[2:], **ball)
    assert (Texture()(given).argmax(1) != ONES[:1]).all()
    with pytest.raises(ValueError, match=r"^pieces: expected images \(1, 8, 8\), got \(3, 8, 8\)$"):
        window_pgd(Texture(), x, ONES, pieces=torch.zeros(2, 3, 8, 8))


@pytest.mark.parametrize(("norm", "eps"), [("l2", 0.3), ("linf", 0.2), ("l1", 0.7)])
def test_the_best_window_spends_the_ball(norm: Any, eps: float) -> None:
    """One that cannot move is the start itself: steps of no length keep it."""
    model = Linear(m=3.0)
    x_adv = window_pgd(model, GREY, ONES, norm=norm, eps=eps, steps=1, restarts=1, step_size=0.0)
    torch.testing.assert_close(sizes(norm, x_adv - GREY), torch.full((3,), eps), rtol=1e-4, atol=0)
    more = window_pgd(model, GREY, ONES, norm=norm, eps=eps, steps=1, restarts=1, step_size=0.0, tries=500)
    gained = [model(x).diff(dim=1).squeeze(1) for x in (x_adv, more)]
    assert (gained[1] <= gained[0] + 1e-6).all()
    assert (gained[1] < gained[0] - 1e-3).any()


def test_windows_do_not_depend_on_who_is_left() -> None:
    model, ball = Linear(m=30.0), {"norm": "l2", "eps": 0.5}
    together = window_pgd(model, GREY, ONES, steps=3, restarts=4, tries=4, **ball)
    left = window_pgd(model, GREY, torch.tensor([0, 0, 1]), steps=3, restarts=4, tries=4, **ball)
    assert torch.equal(left[:2], GREY[:2])
    torch.testing.assert_close(left[2], together[2])


@pytest.mark.parametrize(
    ("bad", "words"),
    [({"eps": -1.0}, "^eps: expected"), ({"tries": 0}, "tries ≥ 1"), ({"restarts": 0}, "restarts ≥ 1")],
)
def test_bad_arguments_are_refused(bad: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        window_pgd(Linear(1.0), GREY, ONES, **bad)
