"""The suite: which attacks meet which model in which view, and how one is bound to its threat."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from manifold_defense import DefendedClassifier, ManifoldFilter, ProjectionConfig, Threat
from manifold_defense.attacks.norms import sizes
from manifold_defense.evaluation import AttackConfig, Defence, jobs, run_job
from manifold_defense.evaluation.baselines import Binarise, Preprocessed
from manifold_defense.evaluation.recipe import SPECS
from manifold_defense.randomised import RandomisedFilter
from manifold_defense.rejection import RejectingClassifier
from tests.defence.evaluation_support import L2, LINF, SUITE, labelled


def cells(defence: Defence, attacks: list[AttackConfig], threats: list[Threat]) -> list[str]:
    return [job.name.removeprefix(f"{defence.name} ") for job in jobs([defence], attacks, threats)]


def test_the_jobs_of_a_filter(defended: DefendedClassifier) -> None:
    """From what knows nothing to what knows all, then without gradients."""
    views = ("unaware", "identity", "exact")
    suite = [replace(attack, views=views) for attack in SUITE] + [AttackConfig("square", steps=5)]
    suite += [AttackConfig("patch", steps=3), AttackConfig("range", steps=2)]
    assert cells(Defence.filtered("inc", defended), suite, [LINF, L2]) == [
        "clean",
        "noise deployed linf 0.1",
        *(f"{attack} {view} linf 0.1" for view in views for attack in ("fgsm", "pgd", "pgd-margin")),
        "range exact linf 0.1",
        "square deployed linf 0.1",
        "noise deployed l2 0.5",
        *(f"{attack} {view} l2 0.5" for view in views for attack in ("fgsm", "pgd", "pgd-margin", "cw")),
        "range exact l2 0.5",
        "square deployed l2 0.5",
    ]


def test_without_views_all_are_met(defended: DefendedClassifier) -> None:
    found = cells(Defence.filtered("inc", defended), [AttackConfig("pgd")], [LINF])
    views = ("unaware", "identity", "tangent", "gauss_newton", "implicit", "exact")
    assert found == ["clean", *(f"pgd {view} linf 0.1" for view in views)]


def test_the_jobs_of_a_bare_classifier(classifier: nn.Module) -> None:
    """Every attack once, also one whose views name the filter's alone; those that need a filter never."""
    attacks = [*SUITE, AttackConfig("pgd", views=("identity",)), AttackConfig("range")]
    attacks += [AttackConfig("feature_matching"), AttackConfig("transfer_pgd")]
    assert cells(Defence.bare("cnn", classifier), attacks, [LINF]) == [
        "clean",
        "noise deployed linf 0.1",
        "fgsm exact linf 0.1",
        "pgd exact linf 0.1",
        "pgd-margin exact linf 0.1",
        "pgd exact linf 0.1",
    ]


def test_the_jobs_of_a_preprocessed_classifier(classifier: nn.Module) -> None:
    found = cells(
        Defence.preprocessed("bits", Preprocessed(Binarise(), classifier)), [AttackConfig("pgd")], [LINF]
    )
    assert found == ["clean", *(f"pgd {view} linf 0.1" for view in ("unaware", "identity", "soft", "sharp"))]


@pytest.mark.parametrize(
    ("named", "met"),
    [
        (("exact",), ("identity", "soft", "sharp")),
        (("unaware", "exact"), ("unaware", "identity", "soft", "sharp")),
        (("unaware",), ("unaware",)),
        (("soft", "exact"), ("soft",)),
    ],
)
def test_what_has_no_exact_gradient_meets_its_attacks_in_the_views_that_it_has(
    classifier: nn.Module, named: Any, met: tuple[str, ...]
) -> None:
    """Else steps would seem the stronger defence for want of attackers."""
    defence = Defence.preprocessed("bits", Preprocessed(Binarise(), classifier))
    found = cells(defence, [AttackConfig("apgd", views=named)], [LINF])
    assert found == ["clean", *(f"apgd {view} linf 0.1" for view in met)]


@pytest.mark.parametrize("name", SPECS)
def test_every_attack_of_the_suite_runs_in_its_threats(name: Any, linear: Any, classifier: nn.Module) -> None:
    filter = ManifoldFilter(linear.float(), config=ProjectionConfig("gd", "origin", steps=3, step_size=1.0))
    model = (
        RejectingClassifier(filter, classifier, 1.0)
        if name == "detector_aware"
        else DefendedClassifier(filter, classifier)
    )
    defence = Defence.filtered("inc", model)
    x, y = labelled(model, 4)
    few = {"steps": 20 if name == "hop_skip_jump" else 3, "tries": 5, "queries": 10}
    config = AttackConfig(name, **{key: few[key] for key in few if getattr(SPECS[name], key)})
    sizes_of = {"l0": 3.0, "patch": 3.0, "corruption": 2.0, "l1": 1.0}
    threats = [Threat(norm, sizes_of.get(norm, 0.1)) for norm in SPECS[name].norms]
    assert all(config.applies_to(threat) for threat in threats)
    found = list(jobs([defence], [config], threats))
    assert len(found) >= 1 + len(threats)
    for job in found:
        run_job(job, x, y, 0)  # raises if the attack leaves its threat


@pytest.mark.parametrize("kind", [DefendedClassifier, RejectingClassifier, Preprocessed])
def test_a_view_is_of_the_kind_of_its_model(linear: Any, classifier: nn.Module, kind: Any) -> None:
    """What a subclass answers is what is attacked, in every view, and the model stays as it is."""

    class Louder(kind):
        def forward(self, x: Tensor) -> Tensor:
            return 3 * super().forward(x)

    filter = ManifoldFilter(linear.float(), config=ProjectionConfig("gd", "origin", steps=3, step_size=1.0))
    before = Binarise() if kind is Preprocessed else filter
    model = Louder(before, classifier, *([1.0] if kind is RejectingClassifier else []))
    x, _ = labelled(classifier, 4)
    for view, attacked in Defence.of("a", model).attacked.items():
        if view != "unaware":
            assert torch.equal(attacked(x), model(x))
            assert list(attacked.state_dict()) == list(model.state_dict())
    assert next(iter(model.children())) is before


def test_a_filter_that_draws_meets_what_looks_behind_a_filter(linear: Any, classifier: nn.Module) -> None:
    filter = ManifoldFilter(linear.float(), config=ProjectionConfig("gd", "prior", steps=3, step_size=1.0))
    drawing = Defence.of("inc", DefendedClassifier(RandomisedFilter(filter), classifier)).averaged(2, 3)
    suite = [AttackConfig("feature_matching", 3, views=("exact",)), AttackConfig("range", 3)]
    x, y = labelled(classifier, 4)
    found = [job for job in jobs([drawing], suite, [LINF]) if job.attack]
    assert [job.label for job in found] == ["feature_matching", "range"]
    for job in found:
        outcome = run_job(job, x, y, 0)
        assert (outcome.cost[:, 1] > 0).all()  # what they differentiate behind the model counts as well


def test_an_attack_is_for_its_threats_alone() -> None:
    assert AttackConfig("cw").applies_to(L2)
    assert not AttackConfig("cw").applies_to(LINF)
    assert AttackConfig("pgd").applies_to(LINF)
    assert not AttackConfig("pgd").applies_to(Threat("patch", 3))


@pytest.mark.parametrize(
    ("config", "keywords"),
    [
        (AttackConfig("noise", steps=3), {"draws": 3}),
        (AttackConfig("cw", steps=9, restarts=2), {"steps": 9, "searches": 2}),
        (AttackConfig("pgd", 7, 2), {"steps": 7, "restarts": 2}),
        (
            AttackConfig("apgd", 7, loss="dlr", targets=3),
            {"steps": 7, "loss": "dlr", "target_classes": 3},
        ),
        (AttackConfig("fab", targets=9), {"target_classes": 9}),
        (AttackConfig("window_pgd", tries=9), {"tries": 9}),
        (AttackConfig("square_pgd", 7, queries=9), {"steps": 7, "queries": 9}),
    ],
)
def test_an_attack_is_bound_to_its_threat(config: AttackConfig, keywords: dict[str, Any]) -> None:
    bound: Any = config.bind(L2, seed=5, press=False)
    assert bound.keywords == {"norm": "l2", "eps": 0.5, "seed": 5, **keywords}
    pressing: Any = config.bind(L2, seed=5, press=True)
    assert pressing.keywords.get("stop_early", True) == (not SPECS[config.name].pressing)


@pytest.mark.parametrize("name", SPECS)
def test_what_a_config_leaves_open_is_the_attack_s_own(name: Any) -> None:
    threat = Threat(SPECS[name].norms[0], 1)
    bound: Any = AttackConfig(name).bind(threat, seed=0, press=False)
    assert bound.keywords.keys() <= {"norm", "eps", "seed"}


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("name", {"name": "autoattack"}),
        ("steps", {"steps": -1}),
        ("restarts", {"restarts": -1}),
        ("steps", {"steps": 2.5}),
        ("steps of fgsm", {"name": "fgsm", "steps": 100}),
        ("restarts of fgsm", {"name": "fgsm", "restarts": 30}),
        ("queries of square", {"name": "square", "queries": 30}),
        ("tries of pgd", {"tries": 30}),
        ("tries", {"name": "window_pgd", "tries": -1}),
        ("targets", {"targets": -1}),
        ("targets of ddn", {"name": "ddn", "targets": 3}),
        ("loss", {"loss": "mse"}),
        ("loss", {"name": "noise", "loss": "ce"}),
        ("loss", {"name": "fgsm", "loss": "both"}),
        ("views", {"views": ("bpda",)}),
    ],
)
def test_an_attack_config_names_its_bad_key(key: str, values: Any) -> None:
    with pytest.raises(ValueError, match=f"^{key}.*: expected"):
        AttackConfig(**values)


@pytest.mark.parametrize(
    ("config", "label"),
    [
        (AttackConfig("pgd"), "pgd"),
        (AttackConfig("pgd", loss="ce"), "pgd"),
        (AttackConfig("pgd", loss="margin"), "pgd-margin"),
        (AttackConfig("pgd", loss="both"), "pgd"),
        (AttackConfig("apgd", loss="dlr"), "apgd-dlr"),
        (AttackConfig("apgd", loss="dlr", targets=9), "apgd-dlr-t"),
        (AttackConfig("pgd", targets=9), "pgd-t"),
        (AttackConfig("square"), "square"),
    ],
)
def test_rows_name_the_loss(config: AttackConfig, label: str) -> None:
    assert config.label == label


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
