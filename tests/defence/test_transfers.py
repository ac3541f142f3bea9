"""What broke one defence is tried on the others, and within the larger threats of its own."""

from importlib import import_module
from typing import Any

import pytest

from manifold_defense import Threat
from manifold_defense.evaluation import Defence, evaluate
from tests.defence.evaluation_support import FAR, A, Push, Table, numbered


def test_what_breaks_one_defence_is_tried_on_the_others() -> None:
    x, y = numbered(5)
    a, b = Defence.bare("a", Table(A)), Defence.bare("b", Table([0.2, 0.2, 0.2, 0.6, 0.3]))

    class OnlyA(Push):
        """Leaves every defence but the first alone."""

        def bind(self, threat: Threat, *, seed: int, press: bool, **more: Any) -> Any:
            attack = super().bind(threat, seed=seed, press=press)
            return attack if more["model"] is a.model else lambda model, x, y: x

    found = evaluate([a, b], [OnlyA.of(0.3)], [FAR], x, y, checks=0)
    # Images 1, 2 and 3 of a are broken at 0.3; of them b gives way on 1 and 2.
    assert found.worst["a", FAR].tolist() == [0, 0, 0, 0, 1]
    assert found.worst["b", FAR].tolist() == [1, 0, 0, 1, 1]
    (transfer,) = found.transfers()
    assert (transfer["source"], transfer["target"], transfer["images"]) == ("a", "b", 3)
    assert transfer["fooled"] == pytest.approx(2 / 3)
    rows = [r for r in found.rows if r.view == "transfer"]
    assert {r.attack for r in rows} == {"transfer from a", "transfer from b"}


def test_what_breaks_within_a_smaller_threat_breaks_within_a_larger_one() -> None:
    """Also where attacks fail there: more ε never helps the defender."""
    x, y = numbered(5)
    a, near = Defence.bare("a", Table(A)), Threat("linf", 0.25)

    class OnlyNear(Push):
        def bind(self, threat: Threat, *, seed: int, press: bool, **more: Any) -> Any:
            attack = super().bind(threat, seed=seed, press=press)
            return attack if threat == near else lambda model, x, y: x

    for threats in ([FAR, near], [near, Threat("l2", 5.0), FAR]):
        found = evaluate([a], [OnlyNear.of(0.2)], threats, x, y, checks=0)
        assert found.worst["a", near].tolist() == found.worst["a", FAR].tolist() == [0, 0, 0, 1, 1]
        (row,) = (r for r in found.rows if r.view == "transfer")
        assert (row.attack, row.norm, row.eps, row.robust_accuracy) == ("smaller threat", "linf", 0.5, 0.4)
        assert found.transfers() == []  # nobody else is fooled


def test_what_a_transfer_breaks_is_carried_on() -> None:
    """To larger threats, and to the other defences; so is what the checks broke."""
    x, y = numbered(5)
    a, b, near = Defence.bare("a", Table(A)), Defence.bare("b", Table(A)), Threat("linf", 0.25)

    class OnlyNearA(Push):
        def bind(self, threat: Threat, *, seed: int, press: bool, **more: Any) -> Any:
            attack = super().bind(threat, seed=seed, press=press)
            weak = threat == near and more["model"] is a.model
            return attack if weak else lambda model, x, y: x

    for mode in ("standard", "full"):
        for defences in ([a, b], [b, a]):
            found = evaluate(defences, [OnlyNearA.of(0.2)], [FAR, near], x, y, checks=0, mode=mode)
            assert {tuple(score.tolist()) for score in found.worst.values()} == {(0, 0, 0, 1, 1)}
            # What b gave way to came from a: that it breaks a as well is no news.
            assert [r["source"] for r in found.transfers()] == ["a"] * len(found.transfers())


def test_what_the_checks_broke_is_tried_on_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = numbered(5)
    a, b, far = Defence.bare("a", Table(A)), Defence.bare("b", Table(A)), Threat("linf", 0.6)

    def examine(defence: Defence, threat: Threat, *given: Any, keep: Any, **more: Any) -> list[Any]:
        if defence is a and threat == FAR:
            moved = x[(found := ~(x.flatten(1) > 1).any(1))][1:].clone()
            assert found.all()
            moved[:, 0, 0, 0] = 0.2
            keep(moved)
        return []

    monkeypatch.setattr(import_module("manifold_defense.evaluation.course"), "examine", examine)
    found = evaluate([a, b], [Push.of(0.05)], [FAR, far], x, y, checks=4)
    assert {tuple(score.tolist()) for score in found.worst.values()} == {(0, 0, 0, 1, 1)}
