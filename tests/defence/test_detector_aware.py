"""The attack that fools the classifier and passes the detector.

Oracles are linear: of `w·x` over a ball's cut with a half-space the maximum is known by `linprog`.
"""

import math
import sys
from typing import Any

import pytest
import torch
from scipy.optimize import linprog
from torch import Tensor

from manifold_defense.attacks import detector_aware, pgd, window
from manifold_defense.attacks.lagrange import raised, unit
from manifold_defense.attacks.objective import fooled, margins
from tests.defence.attack_table import GREY, Linear, gain

ONES = torch.ones(3, dtype=torch.long)
FOOLED = -40.0  # a bias that leaves every image misclassified: then the attack maximises, and stops nowhere


def test_a_multiplier_is_never_negative_and_never_leaps() -> None:
    multiplier = torch.tensor([0.0, 0.5, 2.0, 0.0])
    violation = torch.tensor([-5.0, -1e9, 1e9, math.nan])
    for _ in range(3):
        after = raised(multiplier, violation, 0.3)
        assert (after >= 0).all()
        assert ((after - multiplier).abs() <= 0.3 + 1e-6).all()
        multiplier = after
    assert multiplier.tolist() == pytest.approx([0.0, 0.0, 2.9, 0.9])


def test_a_unit_gradient_has_lost_its_length() -> None:
    gradient = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    for scale in (1e-30, 1.0, 1e30):
        torch.testing.assert_close(unit(scale * gradient), unit(gradient))
    torch.testing.assert_close(unit(gradient).flatten(1).norm(dim=1), torch.ones(4))
    assert torch.equal(unit(0 * gradient), 0 * gradient)
    assert torch.equal(unit(gradient * math.nan), 0 * gradient)


def leak(against: float) -> Tensor:
    """The direction (64,) of a linear residual that rises, the more so, where the attack gains."""
    noise = torch.rand(64, generator=torch.Generator().manual_seed(3))
    return (noise - against * Linear(0.0).w.flatten()) / 64


def half_space_optimum(norm: str, eps: float, a: Tensor, room: Tensor) -> Tensor:
    """`max −w·δ` s.t. `‖δ‖ ≤ eps` and `a·δ ≤ room` (N,), in closed form or by a linear programme, (N,)."""
    w = -Linear(0.0).w.flatten()
    if norm == "linf":
        box = [(-eps, eps)] * 64
        found = [linprog(-w.numpy(), a.numpy()[None], [float(c)], bounds=box) for c in room]
        return torch.tensor([-programme.fun for programme in found])
    offset = room / a.norm()
    across = w - (w @ a) / (a @ a) * a
    bound = offset * (w @ a) / a.norm() + (eps**2 - offset**2).sqrt() * across.norm()
    return torch.where(eps * (w @ a) / w.norm() <= room, eps * w.norm(), bound)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("against", [0.0, 1.0, 3.0])
@pytest.mark.parametrize("free", [0.0, 0.1, 0.4])
def test_past_a_linear_detector_it_ends_in_the_known_point(norm: Any, against: float, free: float) -> None:
    eps, a = 0.8 if norm == "l2" else 0.05, leak(against)
    largest = eps * float(a.norm() if norm == "l2" else a.abs().sum())

    def residual(x: Tensor) -> Tensor:
        return x.flatten(1) @ a

    threshold = float(residual(GREY).max()) + free * largest + 1e-3
    model = Linear(FOOLED)
    x_adv = detector_aware(
        model, GREY, ONES, residual=residual, threshold=threshold, norm=norm, eps=eps, stop_early=False
    )
    assert (residual(x_adv) <= threshold).all()
    best = half_space_optimum(norm, eps, a, threshold - residual(GREY))
    share = gain(model, x_adv, GREY) / best
    assert (share <= 1 + 1e-4).all(), share
    assert (share >= 0.95).all(), share


METHODS: Any = pytest.mark.parametrize("method", ["lagrangian", "orthogonal", "selective"])


@METHODS
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_who_knows_the_detector_passes_it_and_who_does_not_is_caught(norm: Any, method: Any) -> None:
    x, y, a = GREY[:1], ONES[:1], leak(1.0)
    eps = 0.8 if norm == "l2" else 0.05

    def residual(x: Tensor) -> Tensor:
        return x.flatten(1) @ a

    threshold = float(residual(x)) + 1e-3
    most = float(half_space_optimum(norm, eps, a, threshold - residual(x)))
    score = float(((x - 0.5) * Linear(0.0).w).sum())
    settings: dict[str, Any] = {"norm": norm, "eps": eps}
    knowing: dict[str, Any] = {"residual": residual, "threshold": threshold, "method": method, **settings}
    # Signs of one gradient or of the other, by turns, do not add up to those of their sum.
    share = 0.9 if method == "lagrangian" else 0.15
    within, beyond = Linear(share * most - score), Linear(1.05 * most - score)
    for model in (within, beyond):
        unaware = pgd(model, x, y, stop_early=False, **settings)
        assert fooled(model(unaware), y, False).all()
        assert (residual(unaware) > threshold).all()
    aware = detector_aware(within, x, y, **knowing)
    assert fooled(within(aware), y, False).all()
    assert (residual(aware) <= threshold).all()
    # Beyond what the half-space leaves there is nothing, and nothing is claimed.
    assert torch.equal(detector_aware(beyond, x, y, **knowing), x)


def test_a_clean_image_that_is_refused_is_brought_past_the_detector() -> None:
    def residual(x: Tensor) -> Tensor:
        return x.flatten(1).mean(1)

    model, x, y = Linear(FOOLED), torch.full((2, 1, 8, 8), 0.5), ONES[:2]
    x_adv = detector_aware(model, x, y, residual=residual, threshold=0.47, eps=0.05)
    assert (residual(x) > 0.47).all()
    assert (residual(x_adv) <= 0.47).all()
    assert fooled(model(x_adv), y, False).all()
    # Where nothing passes, nothing is claimed; NaN does not pass.
    for threshold in (0.4, -math.inf):
        assert torch.equal(detector_aware(model, x, y, residual=residual, threshold=threshold, eps=0.05), x)
    broken = detector_aware(model, x, y, residual=lambda x: residual(x) * math.nan, threshold=0.5, eps=0.05)
    assert torch.equal(broken, x)


@pytest.mark.parametrize(
    ("images", "given", "windows", "pieces"),
    [(1, None, 4, 0), (3, None, 2, 2), (1, 2, 2, 2), (3, 1, 2, 2), (3, 0, 2, 2), (1, 0, 4, 0)],
)
def test_restarts_begin_at_windows_and_at_pieces_of_other_images(
    images: int, given: int | None, windows: int, pieces: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of one image alone there are none but those given; once all are found, no model is asked about none."""
    drawn = list[str]()
    for draw in (window.draw_windows, window.draw_pieces):

        def noted(x: Tensor, *rest: Any, draw: Any = draw, **more: Any) -> Tensor:
            drawn.append(draw.__name__)
            return draw(x, *rest, **more)

        for module in (window, sys.modules[detector_aware.__module__]):
            monkeypatch.setattr(module, draw.__name__, noted, raising=False)

    def asked(x: Tensor) -> Tensor:
        assert len(x)
        return Linear(0.9)(x)

    x, y = torch.full((images, 1, 8, 8), 0.5), ONES[:images]
    settings: dict[str, Any] = {"residual": lambda x: x.flatten(1).mean(1), "threshold": 1.0, "tries": 1}
    settings["pieces"] = None if given is None else torch.rand(given, 1, 8, 8)
    assert torch.equal(detector_aware(asked, x, y, eps=1e-4, steps=2, restarts=7, **settings), x)
    assert (drawn.count("draw_windows"), drawn.count("draw_pieces")) == (windows, pieces)
    found = detector_aware(asked, x, y, eps=0.3, steps=5, restarts=7, **settings)
    assert fooled(asked(found), y, False).all()
    with pytest.raises(ValueError, match="tries: expected at least 1, got 0"):
        detector_aware(asked, x, y, **{**settings, "tries": 0})


def test_an_unbounded_detector_is_no_detector() -> None:
    settings: dict[str, Any] = {"eps": 0.05, "stop_early": False}
    free = detector_aware(
        Linear(FOOLED), GREY, ONES, residual=lambda x: x.flatten(1).mean(1), threshold=math.inf, **settings
    )
    plain = pgd(Linear(FOOLED), GREY, ONES, loss="margin", random_start=False, **settings)
    torch.testing.assert_close(free, plain, atol=1e-5, rtol=0)
    assert (margins(Linear(FOOLED)(free), ONES, False) > 0).all()
