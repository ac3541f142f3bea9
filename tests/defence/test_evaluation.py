"""The evaluation: what counts as robust, which attacks meet which model, and whether masking is seen."""

import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from manifold_defense import DefendedClassifier, ManifoldFilter, ProjectionConfig, Threat
from manifold_defense.attacks.norms import sizes
from manifold_defense.evaluation import (
    AttackConfig,
    Defence,
    Job,
    Outcome,
    Row,
    attack_images,
    checks,
    evaluate,
    jobs,
    run_job,
    wilson,
    worst_rows,
)
from manifold_defense.evaluation.evaluate import row

LINF, L2 = Threat("linf", 0.1), Threat("l2", 0.5)
SUITE = [
    AttackConfig("noise", steps=3),
    AttackConfig("fgsm"),
    AttackConfig("pgd", steps=5),
    AttackConfig("pgd", steps=5, loss="margin"),
    AttackConfig("cw", steps=10, restarts=2, views=("exact",)),
]


@pytest.fixture
def classifier() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.LeakyReLU(), nn.Linear(16, 3)).eval()


@pytest.fixture
def defended(linear: Any, classifier: nn.Module) -> DefendedClassifier:
    filter = ManifoldFilter(linear.float(), config=ProjectionConfig("gd", "origin", steps=30))
    return DefendedClassifier(filter, classifier)


def labelled(model: nn.Module, n: int = 12) -> tuple[Tensor, Tensor]:
    """Images (N, 1, 8, 8) and labels, a quarter of them wrong."""
    x = torch.rand(n, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 0.6 + 0.2
    with torch.no_grad():
        y = model(x).argmax(1)
    y[: n // 4] = (y[: n // 4] + 1) % 3
    return x, y


# --- Statistics ---


@pytest.mark.parametrize(("successes", "n"), [(8, 10), (0, 10), (10, 10), (490, 1000), (1, 1)])
@pytest.mark.parametrize(("confidence", "z"), [(0.95, 1.959963984540054), (0.99, 2.5758293035489004)])
def test_wilson_is_the_closed_form(successes: int, n: int, confidence: float, z: float) -> None:
    p = successes / n
    centre = p + z**2 / (2 * n)
    half = z * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    low, high = wilson(successes, n, confidence)
    assert low == pytest.approx((centre - half) / (1 + z**2 / n), abs=1e-9)
    assert high == pytest.approx((centre + half) / (1 + z**2 / n), abs=1e-9)


def test_wilson_as_published() -> None:
    """Newcombe 1998, table I: 81 of 263 and 0 of 20."""
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)
    assert wilson(0, 0) == (0.0, 1.0)


# --- Jobs ---


def cells(defence: Defence, attacks: list[AttackConfig], threats: list[Threat]) -> list[str]:
    return [job.name.removeprefix(f"{defence.name} ") for job in jobs([defence], attacks, threats)]


def test_the_jobs_of_a_filter(defended: DefendedClassifier) -> None:
    assert cells(Defence.filtered("inc", defended), SUITE, [LINF, L2]) == [
        "clean",
        "noise exact linf 0.1",
        *(f"fgsm {view} linf 0.1" for view in ("unaware", "identity", "exact")),
        *(f"pgd {view} linf 0.1" for view in ("unaware", "identity", "exact")),
        *(f"pgd-margin {view} linf 0.1" for view in ("unaware", "identity", "exact")),
        "noise exact l2 0.5",
        *(f"fgsm {view} l2 0.5" for view in ("unaware", "identity", "exact")),
        *(f"pgd {view} l2 0.5" for view in ("unaware", "identity", "exact")),
        *(f"pgd-margin {view} l2 0.5" for view in ("unaware", "identity", "exact")),
        "cw exact l2 0.5",
    ]


def test_the_jobs_of_a_bare_classifier(classifier: nn.Module) -> None:
    """Every attack once, also one whose views name the filter's alone."""
    attacks = [*SUITE, AttackConfig("pgd", views=("identity",))]
    assert cells(Defence.bare("cnn", classifier), attacks, [LINF]) == [
        "clean",
        "noise exact linf 0.1",
        "fgsm exact linf 0.1",
        "pgd exact linf 0.1",
        "pgd-margin exact linf 0.1",
        "pgd exact linf 0.1",
    ]


def test_carlini_wagner_is_for_l2_alone() -> None:
    assert AttackConfig("cw").applies_to(L2)
    assert not AttackConfig("cw").applies_to(LINF)
    assert AttackConfig("pgd").applies_to(LINF)


@pytest.mark.parametrize(
    ("config", "keywords"),
    [
        (AttackConfig("noise", steps=3), {"draws": 3, "seed": 5}),
        (AttackConfig("fgsm", loss="margin"), {"loss": "margin"}),
        (AttackConfig("cw", steps=9, restarts=2), {"steps": 9, "searches": 2}),
        (AttackConfig("pgd", 7, 2), {"steps": 7, "restarts": 2, "loss": "ce", "stop_early": True, "seed": 5}),
    ],
)
def test_an_attack_is_bound_to_its_threat(config: AttackConfig, keywords: dict[str, Any]) -> None:
    bound = config.bind(L2, seed=5, transfer=False)
    assert bound.keywords == {"norm": "l2", "eps": 0.5, **keywords}
    if config.name == "pgd":
        assert not config.bind(L2, seed=5, transfer=True).keywords["stop_early"]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("name", "jsma"),
        ("steps", 0),
        ("restarts", 0),
        ("loss", "dlr"),
        ("views", ()),
        ("views", ("bpda",)),
    ],
)
def test_an_attack_config_names_its_bad_key(key: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"^{key}.*: expected"):
        AttackConfig(**{key: value})


@pytest.mark.parametrize(
    ("name", "loss", "label"),
    [
        ("pgd", "ce", "pgd"),
        ("pgd", "margin", "pgd-margin"),
        ("pgd", "both", "pgd"),
        ("fgsm", "ce", "fgsm"),
        ("fgsm", "margin", "fgsm-margin"),
    ],
)
def test_rows_name_the_loss(name: Any, loss: Any, label: str) -> None:
    assert AttackConfig(name, loss=loss).label == label


@pytest.mark.parametrize("name", ["noise", "fgsm", "cw"])
def test_both_losses_are_for_pgd_alone(name: Any) -> None:
    with pytest.raises(ValueError, match=f"^loss of {name}: expected"):
        AttackConfig(name, loss="both")


@pytest.mark.parametrize(
    "values",
    [
        {"norm": "l3"},
        {"eps": 0.0},
        {"eps": -1.0},
        {"eps": math.nan},
        {"norm": "l0", "eps": 2.5},
        {"norm": "patch", "eps": 0.3},
        {"norm": "corruption", "eps": 6},
    ],
)
def test_a_threat_names_its_bad_key(values: dict[str, Any]) -> None:
    key = "norm" if values.get("norm") == "l3" else "eps"
    with pytest.raises(ValueError, match=f"^{key}.*: expected"):
        Threat(**values)


@pytest.mark.parametrize(
    ("norm", "size"), [("linf", 0.5), ("l2", 0.7071), ("l1", 1.0), ("l0", 2), ("patch", 4), ("corruption", 0)]
)
def test_the_size_of_a_perturbation(norm: str, size: float) -> None:
    delta = torch.zeros(2, 2, 8, 8)
    delta[0, 0, 1, 3] = 0.5
    delta[0, 1, 4, 2] = -0.5
    found = sizes(norm, delta)
    assert found.tolist() == pytest.approx([size, 0], abs=1e-4)


def test_a_pixel_counts_once_whatever_its_channels() -> None:
    delta = torch.zeros(1, 3, 4, 4)
    delta[0, :, 3, 3] = 0.1
    assert sizes("l0", delta).item() == sizes("patch", delta).item() == 1
    assert sizes("patch", torch.ones(1, 3, 4, 6)).item() == 6


def test_an_unknown_size_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^norm: expected"):
        sizes("l3", torch.zeros(1, 1, 2, 2))


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
    assert torch.equal(outcome.correct, outcome.prediction == y)
    torch.testing.assert_close(outcome.size, (x_adv - x).flatten(1).abs().amax(1))


def test_clean_images_are_not_touched(defended: DefendedClassifier) -> None:
    x, y = labelled(defended)
    job = Job(Defence.filtered("inc", defended), None, None, None)
    assert torch.equal(attack_images(job, x, y, 0), x)
    outcome = run_job(job, x, y, 0)
    assert outcome.correct.tolist() == [False] * 3 + [True] * 9
    assert outcome.size.tolist() == [0.0] * 12
    clean = row(job, outcome)
    assert (clean.defence, clean.attack, clean.view, clean.norm, clean.eps) == ("inc", "clean", None, None, 0)
    assert (clean.n, clean.robust_accuracy) == (12, 0.75)
    assert (clean.ci_low, clean.ci_high) == wilson(9, 12)
    assert clean.as_dict()["robust_accuracy"] == 0.75


class Cheat(AttackConfig):
    """Adds what it is told to, whatever the threat."""

    delta: float = 0.0

    def bind(self, threat: Threat, *, seed: int, transfer: bool) -> Any:
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


# --- The table ---


def outcome(*correct: int) -> Outcome:
    flags = torch.tensor(correct, dtype=torch.bool)
    return Outcome(flags.long(), flags, torch.zeros(len(flags)))


def test_the_worst_row_is_the_and_of_all_others() -> None:
    a, b = Defence("a", nn.Identity(), {}), Defence("b", nn.Identity(), {})
    pgd, fgsm = AttackConfig("pgd"), AttackConfig("fgsm")
    results = [
        (Job(a, pgd, "exact", LINF), outcome(1, 1, 1, 0, 1)),
        (Job(a, None, None, None), outcome(0, 1, 1, 1, 1)),
        (Job(a, pgd, "identity", LINF), outcome(1, 1, 0, 1, 1)),
        (Job(a, fgsm, "exact", L2), outcome(1, 0, 1, 1, 1)),
        (Job(b, None, None, None), outcome(1, 1, 1, 1, 1)),
        (Job(b, pgd, "exact", LINF), outcome(1, 0, 1, 1, 1)),
    ]
    found = {(r.defence, r.norm): r for r in worst_rows(results)}
    assert {key: r.robust_accuracy for key, r in found.items()} == {
        ("a", "linf"): 2 / 5,  # neither the clean error nor either attack
        ("a", "l2"): 3 / 5,
        ("b", "linf"): 4 / 5,
    }
    assert all((r.attack, r.view, r.n) == ("worst", "all", 5) for r in found.values())
    assert (found["a", "linf"].ci_low, found["a", "linf"].ci_high) == wilson(2, 5)
    # The least of the rows is not the worst over images.
    assert min(float(o.correct.float().mean()) for _, o in results) > found["a", "linf"].robust_accuracy


def test_evaluate_end_to_end(defended: DefendedClassifier, classifier: nn.Module) -> None:
    x, y = labelled(defended)
    defences = [Defence.bare("cnn", classifier), Defence.filtered("inc", defended)]
    rows = evaluate(defences, SUITE, [LINF, L2], x, y)
    assert rows == evaluate(defences, SUITE, [LINF, L2], x, y)
    assert len(rows) == len(list(jobs(defences, SUITE, [LINF, L2]))) + 4
    for worst in rows[-4:]:
        others = [
            r.robust_accuracy
            for r in rows[:-4]
            if r.defence == worst.defence and (r.norm, r.eps) in ((worst.norm, worst.eps), (None, 0.0))
        ]
        assert worst.attack == "worst"
        assert worst.robust_accuracy <= min(others)
    for r in rows:
        assert r.n == 12
        assert r.ci_low <= r.robust_accuracy <= r.ci_high
    # The attacker who looks through the filter is the stronger one.
    inc = {(r.attack, r.view): r.robust_accuracy for r in rows if (r.defence, r.norm) == ("inc", "l2")}
    assert inc["pgd", "exact"] <= inc["pgd", "unaware"]
    assert checks.order(rows) == []
    assert all(p.grad is None for p in defended.parameters())


# --- Checks ---


class Masked(nn.Module):
    """A projection that hides its gradient in one way or another."""

    def __init__(self, defended: DefendedClassifier, how: str) -> None:
        super().__init__()
        self.defended, self.how = defended, how

    def forward(self, x: Tensor) -> Tensor:
        match self.how:
            case "detached":
                x = self.defended.filter(x.detach())
            case "rounded":
                x = self.defended.filter((4 * x).round() / 4)
            case "not a number":
                x = self.defended.filter(x) + 0 * (x - x).sqrt()
            case "half":
                x = self.defended.filter(
                    torch.where(torch.arange(len(x)).view(-1, 1, 1, 1) < 6, x.round(), x)
                )
        return self.defended.classifier(x)


@pytest.mark.parametrize(
    ("how", "images"), [("detached", 12), ("rounded", 12), ("not a number", 12), ("half", 6), ("honest", 0)]
)
def test_dead_gradients_are_found(defended: DefendedClassifier, how: str, images: int) -> None:
    x, y = labelled(defended)
    model = Masked(defended, how) if how != "honest" else defended
    findings = checks.dead_gradients(how, model, x, y)
    if images:
        (finding,) = findings
        assert finding.startswith(f"{how}: ")
        assert f"{images} of 12" in finding
    else:
        assert findings == []
        for view in ("exact", "identity"):
            assert checks.dead_gradients(view, defended.view(view), x, y) == []


def test_dead_gradients_are_found_without_any_trainable_weight(defended: DefendedClassifier) -> None:
    """Then the logits carry no graph at all."""
    x, y = labelled(defended)
    defended.requires_grad_(False)
    (finding,) = checks.dead_gradients("detached", Masked(defended, "detached"), x, y)
    assert "12 of 12" in finding
    assert checks.dead_gradients("honest", defended, x, y) == []


make_row = partial(Row, defence="a", view="exact", norm="linf", eps=0.1, n=100, ci_low=0.0, ci_high=1.0)


def table(**accuracy: float) -> list[Row]:
    return [
        make_row(attack=name.replace("_", "-"), robust_accuracy=value) for name, value in accuracy.items()
    ]


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (table(noise=0.9, fgsm=0.6, pgd=0.4), []),
        (table(noise=0.9, fgsm=0.6, pgd=0.605), []),  # within one in a hundred
        (table(noise=0.9, fgsm=0.6, pgd=0.7), [["a, linf 0.1", "pgd leaves 70.0%", "fgsm with 60.0%"]]),
        (table(noise=0.5, fgsm=0.6, pgd=0.4), [["fgsm leaves 60.0%", "noise with 50.0%"]]),
        (table(noise=0.3, fgsm=0.4, pgd=0.5), [["fgsm leaves", "noise"], ["pgd leaves", "fgsm"]]),
        (table(noise=0.3, pgd=0.5), [["pgd leaves 50.0%", "noise with 30.0%"]]),
        (table(fgsm=0.6, pgd=0.7, pgd_margin=0.5), []),  # each attack at its strongest
        (table(fgsm=0.6, fgsm_margin=0.4, pgd=0.5), [["pgd leaves 50.0%", "fgsm with 40.0%"]]),
        (table(worst=0.1, clean=0.2, cw=0.9), []),
        ([], []),
    ],
)
def test_a_table_out_of_order_is_found(rows: list[Row], words: list[list[str]]) -> None:
    findings = checks.order(rows)
    assert len(findings) == len(words)
    for finding, expected in zip(findings, words, strict=True):
        assert all(word in finding for word in expected), finding


def test_order_compares_like_with_like() -> None:
    """Other defences and threats are other tables; views of one attack are one attack."""
    rows = table(fgsm=0.2, pgd=0.1)
    rows.append(make_row(attack="pgd", robust_accuracy=0.9, view="unaware"))
    for other in ({"defence": "b"}, {"norm": "l2"}, {"eps": 0.2}):
        rows.append(Row(**{**make_row(attack="pgd", robust_accuracy=0.9).as_dict(), **other}))
    assert checks.order(rows) == []


def _pgd_rows(**by_view: float) -> list[Row]:
    return [Row("filter", "pgd", view, "linf", 0.3, 100, value, 0.0, 1.0) for view, value in by_view.items()]


@pytest.mark.parametrize(
    ("rows", "finding"),
    [
        (_pgd_rows(unaware=0.5, identity=0.4, exact=0.3), None),
        (_pgd_rows(unaware=0.5, identity=0.3, exact=0.305), None),
        (
            _pgd_rows(unaware=0.5, identity=0.2, exact=0.6),
            "exact gradient leaves 60.0% robust, a weaker view 20.0%",
        ),
        (_pgd_rows(unaware=0.5), "no PGD through the exact gradient"),
    ],
)
def test_an_exact_view_that_is_weaker_than_the_others_is_reported(rows, finding):
    found = checks.views(rows)
    assert len(found) == (finding is not None)
    assert finding is None or finding in found[0]


def test_a_bare_classifier_has_but_one_view():
    assert checks.views([Row("hardened", "pgd", "exact", "linf", 0.3, 100, 0.5, 0.0, 1.0)]) == []


def test_an_answer_that_is_not_a_number_is_wrong():
    def broken(x):
        return torch.full((len(x), 2), torch.nan)

    x, y = torch.rand(2, 1, 8, 8), torch.tensor([0, 1])
    outcome = run_job(Job(Defence.bare("broken", broken), None, None, None), x, y, 0)
    assert not outcome.correct.any()
