"""Deliberately masked defences are flagged, each by the check that is for it, and an honest model is not."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from deceivers import Alone, Labels, Lukewarm, OnGrid, Remembers
from torch import Tensor, nn
from torch.nn import functional as F

from manifold_defense import DefendedClassifier, ManifoldFilter, ProjectionConfig, Threat
from manifold_defense.attacks import Expectation
from manifold_defense.evaluation import CHECKS, Defence, checks, evaluate, examine
from manifold_defense.evaluation.baselines import Preprocessed, RandomNoise
from manifold_defense.evaluation.recipe import AttackConfig
from manifold_defense.evaluation.subject import Subject
from manifold_defense.rejection import RejectingClassifier
from manifold_defense.types import Norm

LINF = Threat("linf", 0.1)


@pytest.fixture(scope="module")
def learned() -> tuple[nn.Module, Tensor, Tensor]:
    """A small network that knows the digits, and 40 images with labels."""
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    x = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8) / 16
    y = torch.tensor(labels)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        adam = torch.optim.Adam(model.parameters(), lr=3e-3)
        for step in range(150):
            at = torch.randint(0, 1500, (256,), generator=torch.Generator().manual_seed(step))
            adam.zero_grad()
            nn.functional.cross_entropy(model(x[at]), y[at]).backward()
            adam.step()
    adam.zero_grad()
    return model.eval().requires_grad_(False), x[1500:1540], y[1500:1540]


class Changed(nn.Module):
    """A model whose input or output is changed."""

    def __init__(self, model: nn.Module, before: Any = None, after: Any = None) -> None:
        super().__init__()
        self.model, self.before, self.after = model, before, after

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.model(self.before(x) if self.before else x)
        return self.after(logits) if self.after else logits


def some(x: Tensor) -> Tensor:
    """x, for a model that cannot be asked about no images, as a view of unknown length cannot."""
    assert len(x)
    return x


def shattered(x: Tensor) -> Tensor:
    """Almost x, but for ripples far finer than a perturbation, whose slope drowns that of x."""
    return x + 0.002 * torch.sin(4000 * x)


def quantised(x: Tensor) -> Tensor:
    return (8 * x).round() / 8


def rough(x: Tensor) -> Tensor:
    """Quantised, with a gradient of its own invention."""
    noise = torch.sin(1e4 * x.detach())
    return quantised(x).detach() + (x - x.detach()) * noise


def noisy(x: Tensor) -> Tensor:
    return x + 0.1 * torch.randn_like(x)


def beside(x: Tensor) -> Tensor:
    """Each image a little like its neighbour in the batch."""
    return 0.8 * x + 0.2 * x.roll(1, 0)


MASKED: dict[str, tuple[dict[str, Callable[[Tensor], Tensor]], set[str]]] = {
    "detached": ({"before": lambda x: x.detach()}, {"gradient", "slope", "black box", "unbounded"}),
    "quantised": ({"before": quantised}, {"gradient", "slope", "black box"}),
    "invented gradient": ({"before": rough}, {"slope"}),
    "shattered": ({"before": shattered}, {"stability"}),
    "logits × 1000": ({"after": lambda z: 1000 * z}, {"saturation"}),
    "logits − 100": ({"after": lambda z: z - 100}, {"offset"}),
    "logits / 10,000 + 45": ({"after": lambda z: z / 10_000 + 45}, {"offset"}),
    "softmax": ({"after": lambda z: z.softmax(1)}, {"probabilities"}),
    "noisy": ({"before": noisy}, {"randomness"}),
    "batch": ({"before": beside}, {"batch"}),
    "batch alone": ({"after": lambda z: z if len(z) > 4 else torch.nan * z}, {"batch"}),
    "lazy": ({"before": lambda x: quantised(x) if x.requires_grad else x}, {"recording"}),
    "not a number": ({"before": lambda x: x + 0 * (x - x).sqrt()}, {"gradient", "slope"}),
}


@pytest.fixture(autouse=True)
def _rng() -> Iterator[None]:
    """The noisy one draws from the global generator."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def failed(defence: Defence, x: Tensor, y: Tensor, threat: Threat = LINF) -> set[str]:
    return {check.name for check in examine(defence, threat, x, y) if not check.passed}


def test_an_honest_model_passes(learned: Any) -> None:
    model, x, y = learned
    found = examine(Defence.bare("honest", model), LINF, x, y)
    assert [str(check) for check in found if not check.passed] == []
    assert len(found) == len(CHECKS)
    assert len({check.name for check in found}) == len(CHECKS)


def test_a_class_that_is_switched_off_is_honest(learned: Any) -> None:
    model, x, y = learned
    off = Changed(model, after=lambda z: nn.functional.pad(z, (0, 1), value=-1e9))
    unused = copy.deepcopy(off)
    found = examine(Defence.bare("off", off), LINF, x, y, unused=unused)
    assert [str(check) for check in found if not check.passed] == []


def test_an_honest_filter_passes(learned: Any, linear: Any) -> None:
    model, x, y = learned
    config = ProjectionConfig("gd", "origin", steps=10, step_size=1.0)
    defended = DefendedClassifier(ManifoldFilter(linear.float(), config=config), model)
    x = x[:20]
    with torch.no_grad():
        y = defended(x).argmax(1)
    assert failed(Defence.filtered("filter", defended), x, y) == set()


@pytest.mark.parametrize("how", MASKED)
def test_a_masked_defence_is_flagged(how: str, learned: Any) -> None:
    model, x, y = learned
    change, expected = MASKED[how]
    found = failed(Defence.bare(how, Changed(model, **change)), x, y)
    assert expected <= found


ASTRAY: dict[str, Callable[[nn.Module, Tensor], nn.Module]] = {
    "lukewarm": lambda model, x: Lukewarm(model, x, 6.0),
    "cold": lambda model, x: Lukewarm(model, x, 12.0),
    "three classes": lambda model, x: Labels(model, 3),
    "all classes": lambda model, x: Labels(model, 10),
}


@pytest.mark.parametrize("how", ASTRAY)
@pytest.mark.parametrize("threat", [Threat("linf", 0.15), Threat("l2", 0.9)])
def test_what_leads_every_loss_astray_is_found_all_the_same(how: str, threat: Threat, learned: Any) -> None:
    """No gradient is hidden, but none leads to a boundary that is that of the honest model."""
    model, x, y = learned
    astray = Defence.bare(how, ASTRAY[how](model, x))
    with torch.no_grad():
        assert torch.equal(astray.model(x).argmax(1), model(x).argmax(1))
    subject = Subject(astray, threat, x, y)
    alive = subject.robust(subject.adversarial("pgd"))
    share = float(alive.float().mean())
    honest = Subject(Defence.bare("honest", model), threat, x, y).share("pgd")
    assert share > honest + 0.05
    found = examine(astray, threat, x, y, left=(x[alive], y[alive], alive[alive].float()), left_share=share)
    assert "convergence" in {check.name for check in found if not check.passed}


def test_an_answer_that_holds_on_the_grid_alone_is_flagged(learned: Any) -> None:
    model, x, y = learned
    assert "jump" in failed(Defence.bare("grid", OnGrid(model, 16)), x, y)


@pytest.mark.parametrize("classes", [10, 3])
def test_labels_on_another_surface_are_flagged_where_they_change(classes: int, learned: Any) -> None:
    model, x, y = learned
    assert "edge" in failed(Defence.bare("labels", Labels(model, classes)), x, y)


@pytest.mark.parametrize("gain", [1e-3, 1.0, 1e3])
def test_an_affine_margin_vanishes_where_the_label_changes(gain: float) -> None:
    """Whatever its scale; between images of one label there is no such place."""
    weights = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))

    class Affine(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return gain * (x.flatten(1) - 0.5) @ weights.T

    x = torch.rand(12, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    y = Affine()(x).argmax(1)
    assert checks.edge(Subject(Defence.bare("affine", Affine()), LINF, x, y)).figure == 0
    surface = Subject(Defence.bare("labels", Labels(Affine(), 3)), LINF, x, y)
    assert checks.edge(surface).figure == 1
    constant = Changed(nn.Identity(), before=some, after=lambda z: torch.eye(3)[:1].expand(len(z), 3))
    assert checks.edge(Subject(Defence.bare("constant", constant), LINF, x, 0 * y)).passed


def test_an_answer_that_depends_on_the_size_of_the_batch_is_flagged(learned: Any) -> None:
    model, x, y = learned
    assert "batch" in failed(Defence.bare("alone", Alone(model)), x, y)
    # Evaluations ask in large batches what is then asked an image at a time: eight are no large one.
    for served in (8, 29):
        sturdy = Changed(model, before=lambda x, most=served: x if len(x) <= most else (x + 0.1).clamp(max=1))
        assert not checks.batch(Subject(Defence.bare("served", sturdy), LINF, x[:30], y[:30])).passed


def test_a_model_that_remembers_is_flagged(learned: Any) -> None:
    model, x, y = learned
    before = Remembers(model)
    used = Remembers(model)
    used(x)
    defence = Defence.bare("remembers", used)
    found = {c.name: c for c in examine(defence, LINF, x, y, unused=before)}
    assert not found["memory"].passed

    # A class that is switched off stretches the logits, not the difference between those that decide.
    def blind(model: nn.Module) -> nn.Module:
        return Changed(model, after=lambda z: torch.cat([0.02 * z, torch.full_like(z[:, :1], -500.0)], 1))

    found = {
        c.name: c for c in examine(Defence.bare("a", blind(used)), LINF, x, y, unused=blind(Remembers(model)))
    }
    assert not found["memory"].passed
    honest = {c.name: c for c in examine(Defence.bare("a", model), LINF, x, y, unused=copy.deepcopy(model))}
    assert honest["memory"].passed
    assert honest["memory"].figure == 0


def test_a_rule_of_refusal_that_no_attack_knows_is_flagged(learned: Any, linear: Any) -> None:
    """A filter that refuses by its error is met by an attack that knows the threshold; another is not."""
    model, x, y = learned

    def refuse(images: Tensor) -> Tensor:
        stored = (16 * images - (16 * images).round()).abs().flatten(1).amax(1) < 1e-3
        return torch.where(stored, model(images).argmax(1), -1)

    own = replace(Defence.bare("own rule", model), predict=refuse)
    assert {"rule", "jump"} <= failed(own, x, y)
    filter = ManifoldFilter(linear.float(), config=ProjectionConfig("gd", "origin", steps=5, step_size=1.0))
    known = Defence.filtered("known", RejectingClassifier(filter, model, threshold=1.0))
    with torch.no_grad():
        y = known.model(x).argmax(1)
    assert not {"rule", "jump"} & failed(known, x, y)


def test_a_detached_projection_is_flagged_by_its_views(learned: Any, linear: Any) -> None:
    """The exact view finds nothing, the others do."""
    model, x, _ = learned
    x = x[:20]
    filter = ManifoldFilter(linear.float(), config=ProjectionConfig("gd", "origin", steps=10, step_size=1.0))
    honest = Defence.filtered("inc", DefendedClassifier(filter, model))
    with torch.no_grad():
        y = honest.model(x).argmax(1)
    cut = Changed(honest.model, lambda x: x.detach())  # type: ignore[arg-type]
    masked = replace(honest, attacked={**honest.attacked, "exact": cut})
    assert {"gradient", "slope", "views"} <= failed(masked, x, y)
    tangent = honest.attacked["tangent"]
    for attacked in ({"tangent": tangent, "exact": cut}, {"exact": cut, "tangent": tangent}):
        assert "views" in failed(replace(honest, attacked=attacked), x, y)


def test_images_that_are_sorted_by_class_hide_nothing(learned: Any) -> None:
    """The gradients of the last classes alone are masked."""
    model, x, y = learned
    order = y.argsort(stable=True)

    def masked(logits: Tensor) -> Tensor:
        return torch.where(logits.argmax(1, keepdim=True) >= 7, logits.detach(), logits)

    attacks = [AttackConfig("pgd", 5)]
    found = evaluate(
        [Defence.bare("a", Changed(model, after=masked))], attacks, [LINF], x[order], y[order], checks=10
    )
    assert found.rows[-1].masked
    assert "gradient" in {check.name for check in found.checks if not check.passed}


def test_a_function_that_knows_a_model_by_its_name_is_copied_with_it(learned: Any) -> None:
    model, x, y = learned
    for net, honest in ((model, True), (Remembers(model), False)):
        named = eval("lambda x: net(x)", {"net": net})
        found = evaluate([Defence.of("a", named)], [AttackConfig("pgd", 5)], [LINF], x, y, checks=10)
        assert {check.passed for check in found.checks if check.name == "memory"} == {honest}


@pytest.mark.parametrize("threat", [Threat("l2", 0.5), Threat("patch", 3), Threat("l0", 4)])
def test_any_threat_can_be_named(threat: Threat, learned: Any) -> None:
    model, x, y = learned
    assert failed(Defence.bare("honest", model), x, y, threat) == set()


def test_noise_is_no_finding_where_its_draws_are_averaged(learned: Any) -> None:
    model, x, y = learned
    random = Preprocessed(RandomNoise(0.1), model)
    averaged = Defence("noisy", random, {"exact": Expectation(random, 10)}, draws=10)
    assert failed(averaged, x, y) == set()
    one_draw = replace(averaged, attacked={"exact": random})
    assert "randomness" in failed(one_draw, x, y)


def test_images_that_a_longer_attack_still_breaks_are_told(learned: Any) -> None:
    """Clean images were never attacked: to call them robust is the mistake that the check is for."""
    model, x, y = learned
    honest = Defence.bare("honest", model)
    by_name = {
        c.name: c for c in examine(honest, LINF, x, y, left=(x, y, torch.ones(len(x))), left_share=1.0)
    }
    found = by_name["convergence"]
    assert not found.passed
    assert found.figure > 0.3
    broken = Subject(Defence.bare("some", Changed(model, some)), Threat("linf", 1.0), x, y)
    assert checks.convergence(broken).passed
    none = examine(honest, LINF, x, y, left=(x[:0], y[:0], torch.ones(0)), left_share=0.0)
    assert all(c.passed for c in none)
    rare = examine(honest, LINF, x, y, left=(x, y, torch.ones(len(x))), left_share=0.01)
    assert all(c.passed for c in rare)  # of a hundredth of the images little can be lost


@pytest.mark.parametrize("last", [checks._IN_BALL, (checks._BY_LABELS,)], ids=["gradients", "labels"])
def test_a_surrogate_that_is_fooled_ends_no_longer_attack(
    last: tuple[AttackConfig, ...], learned: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor is it asked for answers: it is the deployed model that has to be fooled."""
    model, x, y = learned

    class AlwaysWrong(nn.Module):
        """Up its gradient the model errs; its own answer errs from the beginning."""

        def forward(self, images: Tensor) -> Tensor:
            nearest = torch.cdist(images.detach().flatten(1), x.flatten(1)).argmin(1)
            logits: Tensor = model(images)
            return logits - 100 * F.one_hot(y[nearest], logits.shape[1])

    monkeypatch.setattr(checks, "_LAST", {"linf": last})
    stood_in = Defence("stood in", model, {"exact": AlwaysWrong()}, surrogates=frozenset({"exact"}))
    right = model(x).argmax(1) == y
    left = (x[right], y[right], torch.ones(int(right.sum())))
    subject = Subject(stood_in, LINF, *left[:2], left=left)
    found = checks.convergence(subject)
    assert not found.passed
    assert found.figure > 0.2


@pytest.mark.parametrize(
    ("norm", "by_labels"), [("linf", {"hop_skip_jump"}), ("l2", {"hop_skip_jump"}), ("l1", set())]
)
def test_what_is_left_in_a_ball_is_attacked_by_losses_ratios_windows_minimum_norm_and_labels(
    norm: Norm, by_labels: set[str], learned: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of these has once found what the others had left."""
    model, x, y = learned
    right = model(x).argmax(1) == y
    x, y = x[right], y[right]
    asked: list[tuple[str, str, int]] = []

    def idle(config: AttackConfig, threat: Threat, **_: Any) -> Any:
        def attack(model: Any, x: Tensor, y: Tensor) -> Tensor:
            asked.append((config.name, config.loss, len(x)))
            return x

        assert threat.norm == norm
        return attack

    monkeypatch.setattr(AttackConfig, "bind", idle)
    subject = Subject(Defence.bare("honest", model), Threat(norm, 0.1), x, y, left=(x, y, torch.ones(len(x))))
    checks.convergence(subject)
    assert {name for name, _, _ in asked} == {"apgd", "window_pgd", "fab"} | by_labels
    assert {loss for name, loss, _ in asked if name == "apgd"} > {"dlr"}
    assert {count for _, _, count in asked} == {len(x)}


@pytest.mark.parametrize(
    "threat", [Threat("patch", 4), Threat("l0", 12), Threat("corruption", 5), Threat("l1", 4)]
)
def test_what_is_left_of_any_threat_is_attacked_within_it(threat: Threat, learned: Any) -> None:
    """All else is asked at L∞ 0.1, whose answers do not depend on what is left."""
    model, x, y = learned
    honest = Defence.bare("honest", model)
    with torch.no_grad():
        right = model(x).argmax(1) == y
    x, y = x[right], y[right]
    found = {
        c.name: c for c in examine(honest, threat, x, y, left=(x, y, torch.ones(len(x))), left_share=1.0)
    }
    assert len(found) == len(CHECKS)
    convergence = found.pop("convergence")
    assert (convergence.norm, convergence.eps) == (threat.norm, threat.eps)
    assert not convergence.passed
    assert convergence.figure > 0.3
    assert {(c.norm, c.eps) for c in found.values()} == {(None, 0.0), ("linf", 0.1)}
    alone = {c.name: c for c in examine(honest, threat, x, y)}
    assert (alone.pop("convergence").norm, alone) == ("linf", found)


def test_a_refusal_holds(learned: Any, linear: Any) -> None:
    model, x, y = learned
    filter = ManifoldFilter(linear.float(), config=ProjectionConfig("gd", "origin", steps=5))
    strict = Defence.filtered("strict", RejectingClassifier(filter, model, threshold=0.0))
    assert strict.predict is not None
    assert (strict.predict(x) == -1).all()
    assert Subject(strict, LINF, x, y).score(x, y, 1).eq(1).all()


@pytest.mark.parametrize(("eps", "fall"), [(0.01, 0.0), (0.2, 0.6)])
def test_of_a_model_that_draws_the_fall_is_that_of_its_mean_score(eps: float, fall: float) -> None:
    """It is right in some three draws of four, and in none where the image is darker by more than a tenth."""

    class Wavering(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            drawn = 4.0 if torch.rand(()) < 0.75 else -4.0
            margin = drawn + 40 * (x.flatten(1).mean(1) - 0.5)
            return torch.stack([-margin, margin], 1)

    model, x, y = Wavering(), torch.full((6, 1, 4, 4), 0.5), torch.ones(6, dtype=torch.long)
    drawing = Defence("drawing", model, {"exact": Expectation(model, 20)}, draws=400)
    clean = Subject(drawing, LINF, x, y).score(x, y, 17)
    assert float(clean.mean()) == pytest.approx(0.75, abs=0.05)
    subject = Subject(drawing, Threat("linf", eps), x, y, left=(x, y, clean), left_share=0.6)
    found = checks.convergence(subject)
    assert found.figure == pytest.approx(fall, abs=0.03)
    assert found.passed == (fall == 0)


@pytest.mark.parametrize("threat", [Threat("patch", 3), Threat("l0", 4), Threat("corruption", 3)])
def test_refusals_where_no_attack_knows_the_rule_are_no_robustness(
    threat: Threat, learned: Any, linear: Any
) -> None:
    model, x, y = learned
    filter = ManifoldFilter(linear.float(), config=ProjectionConfig("gd", "origin", steps=2))
    refusing = Defence.filtered("refusing", RejectingClassifier(filter, model, threshold=0.01))
    subject = Subject(refusing, threat, x, y, left=(x, y, torch.ones(len(x))))
    assert not checks.convergence(subject).passed
    assert checks.convergence(replace(subject, left=(x[:0], y[:0], torch.ones(0)), left_share=0.0)).passed


def test_a_model_that_is_always_wrong_says_nothing(learned: Any) -> None:
    model, x, y = learned
    assert examine(Defence.bare("wrong", model), LINF, x, (y + 1) % 10) == []


def test_every_check_leaves_the_model_alone(learned: Any) -> None:
    model, x, y = learned
    model.train()
    before = torch.get_rng_state()
    examine(Defence.bare("honest", model), LINF, x, y)
    assert torch.equal(before, torch.get_rng_state())
    assert model.training
    assert all(p.grad is None for p in model.parameters())
    model.eval()


def known(**shares: float) -> Subject:
    """A subject whose attacks leave the given shares of 100 images."""

    class Known(Subject):
        def share(self, attack: str, view: str | None = None, scale: float = 1.0) -> float:
            name = attack if view is None else f"{attack}_{view}"
            return shares[name if scale == 1 else f"{name}_twice"]

    model = nn.Identity()
    defence = Defence("a", model, {"unaware": model, "exact": model})
    return Known(defence, LINF, torch.zeros(0), torch.zeros(0))


@pytest.mark.parametrize(
    ("check", "shares", "passes"),
    [
        (checks.order, {"noise": 0.9, "fgsm": 0.6, "pgd": 0.4}, True),
        (checks.order, {"noise": 0.9, "fgsm": 0.6, "pgd": 0.62}, True),
        (checks.order, {"noise": 0.9, "fgsm": 0.6, "pgd": 0.7}, False),
        (checks.order, {"noise": 0.5, "fgsm": 0.6, "pgd": 0.4}, False),
        (checks.views, {"pgd": 0.3, "pgd_unaware": 0.5}, True),
        (checks.views, {"pgd": 0.6, "pgd_unaware": 0.2}, False),
        (checks.budget, {"pgd": 0.6, "pgd_twice": 0.2}, True),
        (checks.budget, {"pgd": 0.2, "pgd_twice": 0.4}, False),
    ],
)
def test_the_verdict_on_known_figures(check: Any, shares: dict[str, float], passes: bool) -> None:
    found = check(known(**shares))
    assert found.passed == passes
    assert found.defence == "a"
    assert str(found).startswith("a: ")
    assert "%" in found.words


@pytest.mark.parametrize(("dead", "of", "passes"), [(0, 20, True), (1, 20, False), (1, 21, True)])
def test_a_share_of_exactly_the_bound_fails(dead: int, of: int, passes: bool) -> None:
    """5 % of the images, without a gradient."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2, bias=False))
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([[1.0, 2.0, 3.0, 4.0], [0.0, 0.0, 0.0, 0.0]]))
    x = torch.full((of, 1, 2, 2), 0.5)
    x[:dead] = 0

    class Dead(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            alive = (x.flatten(1).amax(1) > 0).to(x).unsqueeze(1)
            return torch.cat([torch.ones(len(x), 1), torch.zeros(len(x), 1)], 1) + alive * model(x)

    found = checks.gradient(Subject(Defence.bare("a", Dead()), LINF, x, torch.zeros(of, dtype=torch.long)))
    assert found.figure == dead / of
    assert found.passed == passes
