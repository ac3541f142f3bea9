"""Attacks that are tried in rounds: when these end, whom they meet, and which figures have settled."""

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from manifold_defense import Threat
from manifold_defense.evaluation import AttackConfig, Defence, Job, checks, evaluate, in_batches, run_job
from manifold_defense.evaluation.checks import examine
from manifold_defense.evaluation.defence import CHECKED
from manifold_defense.evaluation.ledger import Ledger
from tests.defence.evaluation_support import FAR, A, Coin, Push, Table, numbered


class Rising(Push):
    """An attack whose rounds have these strengths; `seeds` are theirs, `others` what it may borrow from."""

    strengths: Iterator[float]
    seeds: list[int]
    others: list[Tensor]

    @classmethod
    def rounds_of(cls, *strengths: float) -> "Rising":
        made = cls("pgd", rounds=len(strengths))
        for name, value in (
            ("strengths", itertools.cycle(strengths)),
            ("seen", []),
            ("seeds", []),
            ("others", []),
        ):
            object.__setattr__(made, name, value)
        return made

    def bind(self, threat: Threat, *, seed: int, press: bool, **more: Any) -> Any:
        object.__setattr__(self, "strength", next(self.strengths))
        self.seeds.append(seed)
        self.others.append(more["others"])
        return super().bind(threat, seed=seed, press=press)


@pytest.mark.parametrize(
    ("strengths", "met", "left", "settled"),
    [
        # The second and the third find nothing more: there it ends.
        ((0.1, 0.1, 0.1, 0.3), [[1, 2, 3, 4], [2, 3, 4], [2, 3, 4]], 0.6, True),
        # So do the first two, if they find nothing at all.
        ((0.05, 0.05, 0.3), [[1, 2, 3, 4], [1, 2, 3, 4]], 0.8, True),
        # One that finds nothing is not enough: this might have been chance.
        ((0.1, 0.1, 0.2, 0.2, 0.2, 0.3), [[1, 2, 3, 4], [2, 3, 4], [2, 3, 4], [3, 4], [3, 4]], 0.4, True),
        # The last one that it may have still finds one: who knows what another would.
        ((0.1, 0.2, 0.3), [[1, 2, 3, 4], [2, 3, 4], [3, 4]], 0.2, False),
        # Or the last but one.
        ((0.1, 0.2, 0.2), [[1, 2, 3, 4], [2, 3, 4], [3, 4]], 0.4, False),
        ((0.1, 0.1), [[1, 2, 3, 4], [2, 3, 4]], 0.6, False),
        # A single round says nothing of that.
        ((0.3,), [[1, 2, 3, 4]], 0.2, True),
    ],
)
def test_rounds_go_on_until_two_in_a_row_break_none(
    strengths: Any, met: Any, left: float, settled: bool
) -> None:
    x, y = numbered(5)
    attack = Rising.rounds_of(*strengths)
    found = evaluate([Defence.bare("a", Table(A))], [attack], [FAR], x, y, checks=0)
    assert attack.seen == met
    assert len(set(attack.seeds)) == len(met)
    assert [r.robust_accuracy for r in found.rows] == [0.8, left, left]
    assert [r.settled for r in found.rows] == [True, settled, settled]
    (outcome,) = (outcome for job, outcome in found.outcomes if job.attack)
    # Of every image what became of it in the round that broke it, or in the first.
    for i, at, score in zip(outcome.met.tolist(), outcome.size.tolist(), outcome.score.tolist(), strict=True):
        broke = next(s for s in strengths if s >= A[i] - 1e-6) if score == 0 else strengths[0]
        assert at == pytest.approx(broke)
    assert len(outcome.adversarial) == len(outcome.broken) == (outcome.score == 0).sum()


def test_what_was_broken_before_is_no_sign_that_an_attack_has_not_settled() -> None:
    """In mode full it meets those as well; of a union each threat counts."""
    x, y = numbered(5)
    once, again = Push.of(0.3, loss="margin"), Rising.rounds_of(0.1, 0.2, 0.2)
    near = Threat("linf", 0.15)  # too near for its second round
    for attacks, settled in (([once, again], True), ([again, once], False)):
        found = evaluate([Defence.bare("a", Table(A))], attacks, [FAR, near], x, y, mode="full", checks=0)
        worst = {(r.norm, r.eps): r.settled for r in found.rows if r.attack == "worst"}
        assert worst == {("linf", 0.5): settled, ("linf", 0.15): True, ("union", 0.0): settled}


def test_in_mode_full_a_row_says_of_its_own_attack_whether_it_has_settled() -> None:
    x, y = numbered(5)
    attacks = [Push.of(0.3, loss="margin"), Rising.rounds_of(0.1, 0.2, 0.2)]
    found = evaluate([Defence.bare("a", Table(A))], attacks, [FAR], x, y, mode="full", checks=0)
    settled = {(r.attack, r.robust_accuracy): r.settled for r in found.rows}
    assert settled == {
        ("clean", 0.8): True,
        ("pgd-margin", 0.2): True,
        ("pgd", 0.4): False,
        ("worst", 0.2): True,
    }


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_rounds_are_of_all_images_whatever_the_batches(size: int) -> None:
    """A batch in which a round breaks nothing meets the next with the others, on draws of its own."""
    x, y = numbered(5)
    strengths = (0.05, 0.1, 0.1, 0.2, 0.2)
    whole, parts = Rising.rounds_of(*strengths), Rising.rounds_of(*strengths)
    met = [[1, 2, 3, 4], [1, 2, 3, 4], [2, 3, 4], [2, 3, 4], [3, 4]]
    # One of them is met a batch at a time, each of the same strength.
    times = [-(-len(images) // size) for images in met]
    strengths_of_parts = [s for s, times in zip(strengths, times, strict=True) for _ in range(times)]
    object.__setattr__(parts, "strengths", iter(strengths_of_parts))
    given: dict[str, Any] = {"checks": 0, "seed": 3}
    together = evaluate([Defence.bare("a", Table(A))], [whole], [FAR], x, y, **given)
    apart = evaluate([Defence.bare("a", Table(A))], [parts], [FAR], x, y, **given, compute=in_batches(size))
    assert whole.seen == met
    assert [i for images in parts.seen for i in images] == [i for images in met for i in images]
    assert len(set(parts.seeds)) == len(parts.seeds)
    assert apart.rows == together.rows
    for one, other in zip(together.outcomes[-1][1], apart.outcomes[-1][1], strict=True):
        assert torch.equal(one, other)


def test_the_checks_draw_what_no_round_drew(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = numbered(5)
    defence, longer = Defence.bare("a", Table(A)), Rising.rounds_of(0.3)
    attack = Rising.rounds_of(*[0.1, 0.2] * 10)
    evaluate([defence], [attack], [FAR], x, y, checks=0, seed=7, compute=in_batches(1))
    monkeypatch.setattr(checks, "_LAST", {"linf": (longer,)})
    left = (x[3:], y[3:], torch.ones(2))
    examine(defence, FAR, x, y, left=left, seed=7, checks=(checks.convergence,))
    assert len(attack.seeds) > 4
    assert len(longer.seeds) == 1
    assert longer.seeds[0] not in attack.seeds
    assert torch.equal(longer.others[0], x[1:])  # those that are right, not those left alone


def test_a_model_that_draws_meets_one_round() -> None:
    """Tried again and again it would be judged by its least lucky draws."""
    x, y = numbered(2)
    attack = Rising.rounds_of(0.2, 0.2, 0.2)
    defence = Defence("a", Coin(), {"exact": Coin()}, draws=4)
    found = evaluate([defence], [attack], [FAR], x, y, checks=0)
    assert (attack.seen, found.rows[-1].robust_accuracy) == ([[0, 1]], 0.5)
    assert not found.rows[-1].settled  # by fewer tries than others meet


def test_others_are_all_images_also_when_few_are_left() -> None:
    x, y = numbered(5)
    attack = Rising.rounds_of(0.1, 0.2, 0.2)
    evaluate([Defence.bare("a", Table(A))], [attack], [FAR], x, y, checks=0, compute=in_batches(3))
    assert len(attack.seen) > 3
    assert all(torch.equal(others, x) for others in attack.others)


def test_where_nothing_is_left_nothing_is_open() -> None:
    x, y = numbered(4)
    found = evaluate([Defence.bare("a", Table(A))], [Rising.rounds_of(0.2, 0.3)], [FAR], x, y, checks=0)
    assert [(r.robust_accuracy, r.settled) for r in found.rows if r.attack == "worst"] == [(0.0, True)]


def test_what_the_checks_broke_is_open_for_that_defence_alone() -> None:
    x, y = numbered(5)
    ledger, defences = Ledger("standard"), [Defence.bare(name, Table(A)) for name in ("a", "b")]
    for defence in defences:
        for attack, view in ((None, None), (Push.of(0.1), "exact")):
            job = Job(defence, attack, view, FAR if attack else None)
            ledger.enter(job, run_job(job, x, y, 0)._replace(met=torch.arange(5)))
    left = torch.tensor([2, 3, 4])
    job = Job(defences[0], Push.of(0.2), CHECKED, FAR)
    broken = run_job(job._replace(view="exact"), x[left], y[left], 0)._replace(met=left)
    ledger.enter(job, broken)
    found = [(r.defence, r.robust_accuracy, r.settled) for r in ledger.worst_rows(defences)]
    assert found == [("a", 0.4, False), ("b", 0.6, True)]
    # Of a model that draws a lower share is enough.
    job, before = Job(defences[1], Push.of(0.2), CHECKED, FAR), ledger.worst["b", FAR].clone()
    none = broken._replace(score=before[left], adversarial=x[:0])
    ledger.enter(job, none)
    assert [r.settled for r in ledger.worst_rows(defences)] == [False, True]
    ledger.enter(job, none._replace(score=before[left] - torch.tensor([0.1, 0.0, 0.0])))
    assert [r.settled for r in ledger.worst_rows(defences)] == [False, False]


def test_an_attack_that_draws_nothing_has_one_round() -> None:
    for name in ("fgsm", "mi_fgsm", "fmn", "cw", "ddn", "deepfool", "jsma"):
        with pytest.raises(ValueError, match=f"rounds of {name}: expected 1, it draws nothing; got 2"):
            AttackConfig(name, rounds=2)  # type: ignore[arg-type]
    for rounds in (0, -1, 1.5):
        with pytest.raises(ValueError, match="rounds: expected a whole number of at least 1"):
            AttackConfig("pgd", rounds=rounds)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "loss", "least"),
    [
        ("pgd", "", 1),
        ("pgd", "both", 2),
        ("apgd", "", 1),
        ("fab", "", 2),  # the first draws nothing
        ("range", "", 2),
        ("window_pgd", "ce", 4),  # two of windows, two of pieces
        ("transfer_pgd", "", 4),
        ("detector_aware", "", 4),
        ("stroke_search", "", 1),  # each begins in every way
        ("square_pgd", "", 2),
        ("feature_matching", "", 1),
        ("corruption", "", 1),
    ],
)
def test_a_round_begins_in_every_way_that_an_attack_has(name: Any, loss: Any, least: int) -> None:
    """Each round begins anew: with fewer restarts some would never be tried, and yet it would settle."""
    for restarts in range(1, least):
        words = f"^rounds of {name}: expected 1 unless it has {least} restarts, .* got 2 with {restarts}$"
        with pytest.raises(ValueError, match=words):
            AttackConfig(name, rounds=2, restarts=restarts, loss=loss)
    AttackConfig(name, rounds=2, restarts=least if least > 1 else 0, loss=loss)
    if name == "transfer_pgd":  # its own number is two
        with pytest.raises(ValueError, match="got 2 with 2"):
            AttackConfig(name, rounds=2)
    if name == "window_pgd":
        AttackConfig(name, rounds=2)
