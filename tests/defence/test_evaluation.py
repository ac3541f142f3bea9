"""The evaluation: what counts as robust, and what becomes of the images."""

import math
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from manifold_defense import DefendedClassifier, ManifoldFilter, Threat
from manifold_defense.attacks import Expectation
from manifold_defense.evaluation import (
    AttackConfig,
    Defence,
    Job,
    ModelError,
    Outcome,
    attack_images,
    evaluate,
    in_batches,
    run_job,
    wilson,
)
from manifold_defense.evaluation.course import spread
from manifold_defense.evaluation.meter import Meter
from manifold_defense.evaluation.outcome import judge
from manifold_defense.rejection import REJECTED
from tests.defence.evaluation_support import (
    FAR,
    L2,
    LINF,
    SUITE,
    A,
    Coin,
    Push,
    Table,
    labelled,
    numbered,
)

# --- Attacks and outcomes ---


def test_each_view_hands_the_attack_the_right_model(defended: DefendedClassifier) -> None:
    attacked = Defence.filtered("inc", defended).attacked
    assert attacked["unaware"] is defended.classifier
    assert attacked["identity"].filter.view == "identity"
    assert attacked["exact"].filter.view == "exact"
    assert all(attacked[view].classifier is defended.classifier for view in ("identity", "exact"))


@pytest.mark.parametrize(("view", "aware"), [("unaware", False), ("identity", True), ("exact", True)])
def test_an_unaware_attack_never_touches_the_filter(
    defended: DefendedClassifier, view: str, aware: bool
) -> None:
    x, y = labelled(defended)
    projections = []
    defended.filter.generator.register_forward_hook(lambda *_: projections.append(1))
    job = Job(Defence.filtered("inc", defended), AttackConfig("pgd", steps=3), view, LINF)
    x_adv = attack_images(job, x, y, seed=0)
    assert bool(projections) == aware
    assert not torch.equal(x_adv, x)
    projections.clear()
    outcome = run_job(job, x, y, seed=0)
    assert projections  # but the deployed model judges
    with torch.no_grad():
        assert torch.equal(outcome.prediction, defended(x_adv).argmax(1))
    assert torch.equal(outcome.score, (outcome.prediction == y).float())
    assert torch.equal(outcome.adversarial, x_adv[outcome.score == 0])
    torch.testing.assert_close(outcome.size, (x_adv - x).flatten(1).abs().amax(1))


def test_clean_images_are_not_touched(defended: DefendedClassifier) -> None:
    x, y = labelled(defended)
    job = Job(Defence.filtered("inc", defended), None, None, None)
    assert torch.equal(attack_images(job, x, y, 0), x)
    outcome = run_job(job, x, y, 0)
    assert outcome.score.tolist() == [0] * 3 + [1] * 9
    assert outcome.size.tolist() == [0.0] * 12
    assert outcome.broken.tolist() == [0, 1, 2]
    clean = evaluate([job.defence], [AttackConfig("fgsm")], [LINF], x, y, checks=0).rows[0]
    assert (clean.defence, clean.attack, clean.view, clean.norm, clean.eps) == ("inc", "clean", None, None, 0)
    assert (clean.n, clean.robust_accuracy) == (12, 0.75)
    assert (clean.ci_low, clean.ci_high) == wilson(9, 12)
    assert clean.as_dict()["robust_accuracy"] == 0.75


class Cheat(AttackConfig):
    """Adds what it is told to, whatever the threat."""

    delta: float = 0.0

    def bind(self, threat: Threat, *, seed: int, press: bool, **more: Any) -> Any:
        return lambda model, x, y: x + self.delta


@pytest.mark.parametrize(
    ("threat", "delta", "void"),
    [
        (LINF, 0.099, False),
        (LINF, 0.101, True),
        (L2, 0.0624, False),
        (L2, 0.063, True),
        (Threat("linf", 1.0), 0.5, True),
        (Threat("linf", 1.0), -0.5, True),
        (LINF, math.nan, True),
    ],
)
def test_an_attack_that_leaves_its_ball_voids_the_figure(
    classifier: nn.Module, threat: Threat, delta: float, void: bool
) -> None:
    x, y = labelled(classifier)
    cheat = Cheat("pgd")
    object.__setattr__(cheat, "delta", delta)
    job = Job(Defence.bare("cnn", classifier), cheat, "exact", threat)
    if void:
        with pytest.raises(RuntimeError, match=r"^cnn pgd exact .*: the attack left"):
            run_job(job, x, y, 0)
    else:
        run_job(job, x, y, 0)


@pytest.mark.parametrize("eps", [1e-4, 1e-3, 0.1, 1.0])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_an_honest_attack_of_any_size_is_not_void(classifier: nn.Module, norm: Any, eps: float) -> None:
    x, y = labelled(classifier, n=40)
    for attack in SUITE:
        if attack.applies_to(Threat(norm, eps)):
            run_job(Job(Defence.bare("cnn", classifier), attack, "exact", Threat(norm, eps)), x, y, 0)


def test_an_evaluation_does_not_depend_on_the_models_mode() -> None:
    """An attack sees the model in eval mode; so must the verdict, and statistics must stay."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64), nn.Dropout(0.8), nn.Linear(64, 3))
    x, y = labelled(model.eval(), 40)
    job = Job(Defence.bare("cnn", model), AttackConfig("pgd", steps=3), "exact", LINF)
    expected = run_job(job, x, y, 0)
    buffers = [buffer.clone() for buffer in model.buffers()]
    model.train()
    assert torch.equal(run_job(job, x, y, 0).prediction, expected.prediction)
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), buffers, strict=True))
    assert model.training


# --- The evaluation ---


@pytest.mark.parametrize(("mode", "met"), [("standard", [1, 2, 3, 4]), ("full", [1, 2, 3, 4])])
def test_the_worst_is_over_all_attacks_and_the_clean_images(mode: Any, met: list[int]) -> None:
    x, y = numbered(5)
    weak, strong = Push.of(0.1), Push.of(0.2, loss="margin")
    found = evaluate([Defence.bare("a", Table(A))], [weak, strong], [FAR], x, y, mode=mode, checks=0)
    assert [(r.attack, r.robust_accuracy) for r in found.rows] == [
        ("clean", 0.8),
        ("pgd", 0.6),
        ("pgd-margin", 0.4),
        ("worst", 0.4),
    ]
    assert weak.seen == [met]  # what is wrong when clean is met by nobody
    assert strong.seen == [[2, 3, 4] if mode == "standard" else met]
    assert found.worst["a", FAR].tolist() == [0, 0, 0, 1, 1]


@pytest.mark.parametrize("mode", ["standard", "full"])
def test_a_weaker_attack_after_a_stronger_one(mode: Any) -> None:
    """In mode standard a row is what is left so far, in mode full what the attack leaves alone."""
    x, y = numbered(5)
    attacks = [Push.of(0.3), Push.of(0.1, loss="margin")]
    rows = evaluate([Defence.bare("a", Table(A))], attacks, [FAR], x, y, mode=mode, checks=0).rows
    assert [r.robust_accuracy for r in rows] == [0.8, 0.2, 0.2 if mode == "standard" else 0.6, 0.2]


def test_the_least_of_the_rows_is_not_the_worst() -> None:
    x, y = numbered(4)

    class Either(nn.Module):
        """Images 0 and 1 fall to 0.1 exactly, 2 and 3 to 0.2 exactly."""

        def forward(self, x: Tensor) -> Tensor:
            which, strength = (x[:, 0, 0, 1] * 100).round().long(), x[:, 0, 0, 0]
            wrong = (strength - torch.where(which < 2, 0.1, 0.2)).abs() < 1e-6
            return torch.stack([wrong, ~wrong], 1).float()

    attacks = [Push.of(0.1), Push.of(0.2, loss="margin")]
    rows = evaluate([Defence.bare("a", Either())], attacks, [FAR], x, y, mode="full", checks=0).rows
    assert [r.robust_accuracy for r in rows] == [1, 0.5, 0.5, 0]


def test_threats_are_kept_apart_and_their_union_is_the_worst() -> None:
    x, y = numbered(5)
    defence = Defence.bare("a", Table(A), trained=(FAR,))
    near = Threat("linf", 0.1)
    found = evaluate([defence], [Push.of(0.2)], [FAR, near], x, y, checks=0)
    worst = {(r.norm, r.eps): r for r in found.rows if r.attack == "worst"}
    assert {key: r.robust_accuracy for key, r in worst.items()} == {
        ("linf", 0.5): 0.4,
        ("linf", 0.1): 0.6,
        ("union", 0.0): 0.4,
    }
    # What lies within a threat that it was trained for is nothing new.
    assert [r.trained for r in worst.values()] == [True, True, False]
    small = Defence.bare("a", Table(A), trained=(near,))
    rows = evaluate([small], [Push.of(0.2)], [FAR, near], x, y, checks=0).rows
    assert [r.trained for r in rows if r.attack == "worst"] == [False, True, False]


def test_a_defence_was_trained_for_what_its_filter_was(networks: Any, classifier: nn.Module) -> None:
    filter = ManifoldFilter(*networks, trained=(LINF, FAR))
    defence = Defence.of("a", DefendedClassifier(filter, classifier), (FAR, Threat("l2", 1.0)))
    assert defence.trained == (FAR, Threat("l2", 1.0), LINF)
    assert filter.seen("identity").trained == filter.trained


def test_two_defences_are_compared_image_by_image() -> None:
    x, y = numbered(5)
    a, b = Defence.bare("a", Table(A)), Defence.bare("b", Table([*A[:2], 1.0, *A[3:]]))
    found = evaluate([a, b], [Push.of(0.3)], [FAR, Threat("linf", 0.4)], x, y, checks=0)
    lines = found.comparisons("a", "b")
    assert [(line["norm"], line["eps"]) for line in lines] == [("linf", 0.5), ("linf", 0.4), ("union", 0.0)]
    for line in lines:
        assert (line["before"], line["after"], line["gained"], line["lost"]) == ("a", "b", 1, 0)


def test_no_two_jobs_draw_the_same_and_defences_do(classifier: nn.Module) -> None:
    """A start that another attack had, or queries that it asked, would be lost passes."""
    x, y = labelled(classifier)
    seeds: dict[str, list[int]] = {}

    def noted(job: Job, x: Tensor, y: Tensor, seed: int, others: Any = None) -> Outcome:
        seeds.setdefault(job.defence.name, []).append(seed)
        return run_job(job, x, y, seed, others)

    attacks = [AttackConfig("pgd", 2), AttackConfig("apgd", 2), AttackConfig("square_pgd", 2, queries=2)]
    attacks += [AttackConfig("square", 2)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(import_module("manifold_defense.evaluation.course"), "run_job", noted)
        defences = [Defence.bare(name, classifier) for name in ("a", "b")]
        evaluate(defences, attacks, [LINF, FAR], x, y, checks=0, mode="full", compute=in_batches(30))
    assert len(set(seeds["a"])) == len(seeds["a"]) > 8
    assert seeds["a"] == seeds["b"]


def test_of_a_model_that_draws_every_draw_is_paid_for_and_its_mean_is_asked() -> None:
    """By attacks with gradients and by those without."""
    passed = []

    class Noisy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            passed.append(len(x))
            return (x + 0.01 * torch.randn_like(x)).flatten(1)[:, :2]

    x, y = (
        torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0)),
        torch.zeros(4, dtype=torch.long),
    )
    drawing = Defence("a", Noisy(), {"exact": Expectation(Noisy(), 5)}, draws=2)
    for attack, view in ((AttackConfig("pgd", 2), "exact"), (AttackConfig("square", 3), "deployed")):
        passed.clear()
        meter = Meter(drawing)
        attack_images(Job(drawing, attack, view, LINF), x, y, seed=0, meter=meter)
        assert meter.forward == sum(passed) > 0
        assert len(passed) % 5 == 0


def test_a_randomised_defence_counts_by_its_share_of_right_answers() -> None:
    x, y = numbered(4)
    coin = Coin()
    found = evaluate(
        [Defence("coin", coin, {"exact": coin}, draws=10)], [Push.of(0.2)], [FAR], x, y, checks=0
    )
    assert [r.robust_accuracy for r in found.rows] == [1.0, 0.5, 0.5]


def test_batches_and_a_store_change_nothing(defended: DefendedClassifier, classifier: nn.Module) -> None:
    x, y = labelled(defended)
    defences = [Defence.bare("cnn", classifier), Defence.filtered("inc", defended)]
    suite = [AttackConfig("fgsm"), AttackConfig("pgd", steps=4, views=("exact",))]
    whole = evaluate(defences, suite, [LINF], x, y, checks=0)

    class Memory(dict[str, Any]):
        hits = 0

        def get(self, job: Job, met: Tensor) -> Outcome | None:  # type: ignore[override]
            found = super().get(job.name)
            Memory.hits += found is not None
            return found

        def put(self, job: Job, outcome: Outcome) -> None:
            self[job.name] = outcome

    memory, progress = Memory(), []
    first = evaluate(defences, suite, [LINF], x, y, checks=0, store=memory)
    again = evaluate(
        defences, suite, [LINF], x, y, checks=0, store=memory, on_progress=lambda *at: progress.append(at)
    )
    assert Memory.hits == len(again.outcomes) == len(first.outcomes)
    assert first.rows == again.rows == whole.rows
    assert progress[-1] == (len(again.outcomes), len(again.outcomes))
    fgsm_alone = evaluate(defences, suite[:1], [LINF], x, y, checks=0)
    in_parts = evaluate(defences, suite[:1], [LINF], x, y, checks=0, compute=in_batches(5))
    assert in_parts.rows == fgsm_alone.rows


def test_costs_are_counted(defended: DefendedClassifier) -> None:
    x, y = labelled(defended)
    job = Job(Defence.filtered("inc", defended), AttackConfig("fgsm"), "exact", LINF)
    forward, backward, drawn = run_job(job, x, y, 0).cost.sum(0).tolist()
    assert (forward, backward) == pytest.approx((12, 12))
    assert drawn > 12 * 30  # every step of the projection draws
    unaware = run_job(job._replace(view="unaware"), x, y, 0).cost.sum(0).tolist()
    assert unaware == pytest.approx([12, 12, 0])
    assert not defended.filter.generator._forward_hooks


def test_a_model_is_judged_on_other_draws_than_any_that_it_was_attacked_on(
    classifier: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, y = labelled(classifier)
    drawn: list[tuple[int, bool]] = []
    module = import_module("manifold_defense.evaluation.outcome")
    seeded = module.seeded

    def noted(model: Any, seed: int) -> Any:
        drawn.append((seed, model is classifier))
        return seeded(model, seed)

    monkeypatch.setattr(module, "seeded", noted)
    defence = Defence("a", classifier, {"exact": nn.Sequential(classifier)}, draws=2)
    for seed in range(6):
        run_job(Job(defence, AttackConfig("fgsm"), "exact", LINF), x, y, seed)
    seeds = {judged: {seed for seed, deployed in drawn if deployed == judged} for judged in (False, True)}
    assert len(seeds[False]) == len(seeds[True]) == 6
    assert not seeds[False] & seeds[True]


def test_an_attack_presses_on_where_another_model_or_other_draws_judge() -> None:
    """One lucky draw is not the end, nor is a surrogate fooled."""
    seen: list[bool] = []

    class Asked(Push):
        def bind(self, threat: Threat, *, seed: int, press: bool, **more: Any) -> Any:
            seen.append(press)
            return super().bind(threat, seed=seed, press=press)

    x, y = numbered(2)
    for given in ({}, {"draws": 3}, {"surrogates": frozenset({"exact"})}):
        defence = Defence("a", Coin(), {"exact": Coin()}, **given)
        evaluate([defence], [Asked.of(0.2)], [FAR], x, y, checks=0)
    assert seen == [False, True, True]


class Drawing(nn.Module):
    """Logits with noise of a generator that nobody knows of."""

    rng = np.random.default_rng(0)

    def forward(self, logits: Tensor) -> Tensor:
        return logits + torch.from_numpy(self.rng.normal(size=logits.shape)).to(logits)


def test_a_view_that_answers_otherwise_is_no_view(classifier: nn.Module) -> None:
    """An attack that fools it stops, though it did not fool what is deployed."""
    x, y = labelled(classifier)

    def other(x: Tensor) -> Tensor:
        logits: Tensor = 2 * classifier(x)
        return logits

    def shifted(x: Tensor) -> Tensor:
        logits: Tensor = classifier(x) + 5
        return logits.double()

    assert evaluate([Defence("a", classifier, {"exact": shifted})], SUITE, [LINF], x, y, checks=0).rows
    drawing = nn.Sequential(classifier, Drawing())
    same = Defence("a", drawing, {"exact": nn.Sequential(classifier, Drawing())})
    assert evaluate([same], SUITE, [LINF], x, y, checks=0).rows  # nobody can compare

    def nothing(x: Tensor) -> Any:
        return None

    with pytest.raises(ModelError, match=r"^a: view exact: expected float logits .* got NoneType"):
        evaluate([Defence("a", classifier, {"exact": nothing})], SUITE, [LINF], x, y)
    views = {"exact": classifier, "identity": other}
    with pytest.raises(ModelError, match=r"^a: view identity: expected the logits of the deployed model, or"):
        evaluate([Defence("a", classifier, views)], SUITE, [LINF], x, y)
    assert evaluate(
        [Defence("a", classifier, views, surrogates=frozenset({"identity"}))], SUITE, [LINF], x, y, checks=0
    ).rows


def test_two_defences_of_one_name_are_refused(classifier: nn.Module) -> None:
    x, y = labelled(classifier)
    with pytest.raises(ValueError, match=r"^defences: expected different names"):
        evaluate([Defence.bare("a", classifier)] * 2, SUITE, [LINF], x, y)


def test_evaluate_end_to_end(defended: DefendedClassifier, classifier: nn.Module) -> None:
    x, y = labelled(defended)
    defences = [Defence.bare("cnn", classifier), Defence.filtered("inc", defended)]
    rows = evaluate(defences, SUITE, [LINF, L2], x, y, checks=0).rows
    assert rows == evaluate(defences, SUITE, [LINF, L2], x, y, checks=0).rows
    for worst in (r for r in rows if r.attack == "worst" and r.norm != "union"):
        others = [
            r.robust_accuracy
            for r in rows
            if r.defence == worst.defence and (r.norm, r.eps) in ((worst.norm, worst.eps), (None, 0.0))
        ]
        assert worst.robust_accuracy == min(others)
    for r in rows:
        assert r.n == 12
        assert r.ci_low <= r.robust_accuracy <= r.ci_high
    assert all(p.grad is None for p in defended.parameters())


def test_an_answer_that_is_not_a_number_is_wrong() -> None:
    def broken(x: Tensor) -> Tensor:
        return torch.full((len(x), 2), torch.nan)

    x, y = torch.rand(2, 1, 8, 8), torch.tensor([0, 1])
    outcome = run_job(Job(Defence.bare("broken", broken), None, None, None), x, y, 0)
    assert outcome.score.tolist() == [0, 0]


def answering(forward: Callable[[Tensor], Any]) -> dict[str, Any]:
    class Model(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return forward(x)

    return {"defences": [Defence.bare("a", Model())]}


def predicting(predict: Callable[[Tensor], Tensor]) -> Defence:
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    return replace(Defence.bare("a", model), predict=predict)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"threats": []}, "threats: expected at least one"),
        ({"threats": [LINF, Threat("patch", 2)]}, "attacks: expected one that is no noise for patch 2 on a"),
        ({"attacks": [AttackConfig("noise", 3)]}, "attacks: expected one that is no noise for linf 0.1 on a"),
        ({"attacks": [AttackConfig("range", 3)]}, "attacks: expected one that is no noise for linf 0.1 on a"),
        ({"checks": -1}, "checks: expected at least 0, got -1"),
        ({"defences": [predicting(lambda x: x)]}, r"a: predict: expected 2 labels of int64, got .*float32"),
        ({"defences": [predicting(lambda x: x[:, 0, 0, :1].long())]}, r"of int64, got .* of shape \(2, 1\)"),
        ({"mode": "fulll"}, "mode: expected one of standard, full, got 'fulll'"),
        ({"attacks": [AttackConfig("pgd"), AttackConfig("pgd", 3)]}, "attacks: expected different names"),
        ({"x": torch.full((4, 1, 2, 2), 1.5)}, r"images: expected values in \[0, 1\]"),
        ({"x": torch.zeros(4, 1, 2, 2, dtype=torch.long)}, "images: expected floats"),
        ({"x": torch.zeros(4, 1, 2, 2).half()}, "images: expected float32 or float64, .* got torch.float16"),
        ({"x": torch.zeros(4, 4)}, r"images: expected shape \(N, C, H, W\), got \(4, 4\)"),
        ({"y": torch.zeros(3, dtype=torch.long)}, "labels: expected 4 of int64"),
        ({"y": torch.zeros(4, dtype=torch.int32)}, "labels: expected 4 of int64, got torch.int32"),
        ({"y": torch.full((4,), -1)}, "labels: expected at least 0, got -1"),
        ({"y": torch.full((4,), 2)}, "labels: expected below 2, the classes of a, got 2"),
        (answering(lambda x: (x, x)), r"a: expected float logits \(N, K\) of 2 images, got tuple"),
        (answering(lambda x: x), r"a: expected .*, got torch.float32 of shape \(2, 1, 2, 2\)"),
        (answering(lambda x: x.flatten(1).log()), "a: expected .*, got some that are not finite"),
        (answering(lambda x: x.flatten(1)[:, :1]), r"a: expected .*, got torch.float32 of shape \(2, 1\)"),
        (answering(lambda x: x[:1].flatten(1)), r"a: expected .*, got torch.float32 of shape \(1, 4\)"),
        (answering(lambda x: x.flatten(1).long()), r"a: expected .*, got torch.int64 of shape \(2, 4\)"),
        (answering(lambda x: x.add_(0.1).flatten(1)), "a: expected a model that leaves its images alone"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(change: dict[str, Any], words: str) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    given: dict[str, Any] = {
        "defences": [Defence.bare("a", model)],
        "attacks": [AttackConfig("pgd")],
        "threats": [Threat("linf", 0.1)],
        "x": torch.zeros(4, 1, 2, 2),
        "y": torch.zeros(4, dtype=torch.long),
    }
    with pytest.raises(ValueError, match=words):
        evaluate(**{**given, **change})


def test_a_defence_without_views_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^attacked: expected at least one view of a, got none"):
        Defence("a", Table(A), {})


def test_of_a_random_model_that_refuses_every_draw_counts() -> None:
    def predict(x: Tensor) -> Tensor:
        return torch.where(torch.rand(len(x)) < 0.25, REJECTED, 0)

    x, y = torch.zeros(200, 1, 2, 2), torch.zeros(200, dtype=torch.long)
    drawing = replace(predicting(predict), draws=50)
    for attacked, expected in ((False, 0.75), (True, 1.0)):
        _, score = judge(drawing, x, y, attacked=attacked, seed=0)
        assert float(score.mean()) == pytest.approx(expected, abs=0.02)
        assert attacked or 0.5 < score.min() < score.max() < 1


def test_what_is_looked_at_is_spread_over_all_images() -> None:
    assert spread(torch.tensor([3, 5, 7, 9, 11, 13, 15]), 3).tolist() == [3, 7, 11]
    assert spread(torch.tensor([3, 5]), 3).tolist() == [3, 5]
    assert spread(torch.tensor([3, 5]), 0).tolist() == []


@pytest.mark.parametrize(
    ("place", "entry", "words"),
    [
        (0, nn.Identity(), r"defences: expected each as Defence.of\(name, model\) makes it, got Identity"),
        (1, "pgd", "attacks: expected each as AttackConfig.* makes it, got str"),
        (2, ("linf", 0.1), "threats: expected each as Threat.* makes it, got tuple"),
    ],
)
def test_what_is_no_defence_attack_or_threat_is_named(place: int, entry: Any, words: str) -> None:
    x, y = numbered(5)
    given: list[Any] = [[Defence.bare("a", Table(A))], [Push.of(0.1)], [FAR]]
    given[place] = [*given[place], entry]
    with pytest.raises(TypeError, match=words):
        evaluate(*given, x, y)


@pytest.mark.parametrize("calls", [1, 3, 8, 30])
def test_a_model_that_changes_its_images_is_refused_whenever_it_does(
    classifier: nn.Module, calls: int
) -> None:
    """In the words of what is wrong with it, not of the attack that came back with other images."""

    class Blackens(nn.Module):
        asked = 0

        def forward(self, x: Tensor) -> Tensor:
            self.asked += 1
            if self.asked >= calls:
                with torch.no_grad():
                    x.fill_(0.0)
            logits: Tensor = classifier(x)
            return logits

    x, y = labelled(classifier)
    attacks = [AttackConfig("pgd", 5), AttackConfig("square", 20)]
    with pytest.raises(ModelError, match=r"^mine: expected a model that leaves its images alone"):
        evaluate([Defence.bare("mine", Blackens())], attacks, [LINF], x, y)
