"""What an evaluation says of figures that are no robustness: which rows are marked, and which are not."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from deceivers import Alternates, Remembers
from torch import Tensor, nn

from manifold_defense import Threat
from manifold_defense.evaluation import AttackConfig, Defence, evaluate
from tests.defence.evaluation_support import LINF, labelled


def test_a_masked_defence_is_marked_without_being_asked(classifier: nn.Module) -> None:
    """Its attacks find nothing; the figure must not pass for robustness."""
    x, y = labelled(classifier)

    class Swallowed(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> None:
            return None

    class Hidden(nn.Module):
        def __init__(self, before: Callable[[Tensor], Tensor]) -> None:
            super().__init__()
            self.before = before

        def forward(self, x: Tensor) -> Tensor:
            return classifier(self.before(x))

    hidden = {"detached": Hidden(Tensor.detach), "swallowed": Hidden(Swallowed.apply)}
    defences = [Defence.bare(name, model) for name, model in {"honest": classifier, **hidden}.items()]
    found = evaluate(defences, [AttackConfig("pgd", steps=20)], [LINF], x, y)
    worst = {r.defence: r for r in found.rows if r.attack == "worst"}
    assert not any(r.masked for r in found.rows if r.defence == "honest")
    for name in hidden:
        assert worst[name].masked
        assert "gradient" in {c.name for c in found.checks if c.defence == name and not c.passed}
        assert worst[name].robust_accuracy == worst["honest"].robust_accuracy  # by the honest one's images


def test_what_is_wrong_to_begin_with_hides_no_masked_gradient(classifier: nn.Module) -> None:
    """The images that are looked at are the first that it gets right, wherever they stand."""
    x, y = labelled(classifier, n=40)
    y[:30] = (y[:30] + 1) % 3

    class Detached(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return classifier(x.detach())

    found = evaluate([Defence.bare("detached", Detached())], [AttackConfig("pgd", 5)], [LINF], x, y)
    assert {"gradient", "slope"} <= {c.name for c in found.checks if not c.passed}
    assert all(r.masked for r in found.rows if r.attack == "worst")


@pytest.mark.parametrize("period", [2, 3, 4])
@pytest.mark.parametrize("phase", [0, 1])
def test_a_model_that_answers_now_and_then_is_told(classifier: nn.Module, period: int, phase: int) -> None:
    """Right when it is judged, otherwise when an attack asks or a check does: by how often it was asked."""
    x, y = labelled(classifier)

    found = evaluate(
        [Defence.bare("alternates", Alternates(classifier, period, phase))],
        [AttackConfig("pgd", 5)],
        [LINF],
        x,
        y,
    )
    worst = next(r for r in found.rows if r.attack == "worst")
    assert worst.masked
    assert "randomness" in {c.name for c in found.checks if not c.passed}


def test_a_model_that_remembers_the_clean_images_is_told_from_a_copy(classifier: nn.Module) -> None:
    """And one that cannot be copied, of which nobody can tell, is examined in all else."""
    x, y = labelled(classifier)

    class Single(nn.Module):
        def __deepcopy__(self, memo: Any) -> Any:
            raise TypeError("there is but one")

        def forward(self, x: Tensor) -> Tensor:
            return classifier(x)

    class Holds(nn.Module):
        """A function that remembers, kept by a module."""

        def __init__(self, function: Any) -> None:
            super().__init__()
            self.function = function

        def forward(self, x: Tensor) -> Tensor:
            return self.function(x)

    own = Remembers(classifier)
    models = {"remembers": own, "closure": lambda x: own(x), "single": Single(), "honest": classifier}
    inner = models["closure"]
    models |= {"nested": lambda x: inner(x), "held": Holds(inner), "default": lambda x, f=[inner]: f[0](x)}
    models["honest held"] = Holds(lambda x: classifier(x))
    models["function"] = lambda x: classifier(x)
    defences = [Defence.bare(name, model) for name, model in models.items()]
    checks = evaluate(defences, [AttackConfig("pgd", 5)], [LINF], x, y).checks
    passed = {(c.defence, c.name): c.passed for c in checks}
    assert not passed["remembers", "memory"]
    for name in ("closure", "nested", "held", "default"):
        assert not passed[name, "memory"], name
    assert passed["honest held", "memory"]
    assert passed["honest", "memory"]
    assert passed["function", "memory"]
    assert not passed["single", "memory"]
    assert {name for defence, name in passed if defence == "single"} == {
        name for defence, name in passed if defence == "remembers"
    }


def test_what_is_left_of_a_model_that_draws_is_what_it_mostly_gets_right() -> None:
    """Each image is wrong in some draw: none is left whole, and all that hold most of the time are asked."""

    class Wavering(nn.Module):
        """Right in three draws of four, whatever the image; where it is bright, in none."""

        def __init__(self) -> None:
            super().__init__()
            self.asked = 0

        def forward(self, x: Tensor) -> Tensor:
            self.asked += 1
            own = torch.full((len(x),), -1.0 if self.asked % 4 == 0 else 1.0) - 100 * (x > 0.6).flatten(
                1
            ).sum(1)
            return torch.stack([own + 0 * x.flatten(1).sum(1), torch.zeros(len(x))], 1)

    model = Wavering()
    x, y = torch.full((12, 1, 2, 2), 0.5), torch.zeros(12, dtype=torch.long)
    found = evaluate(
        [Defence("a", model, {"exact": model}, draws=8)], [AttackConfig("fgsm")], [Threat("linf", 0.05)], x, y
    )
    (convergence,) = (c for c in found.checks if c.name == "convergence")
    assert "of 12 images" in convergence.words


def test_what_is_masked_under_one_threat_is_marked_there() -> None:
    """Two white pixels fool it; spread out, the same length in L2 is next to nothing, as all of L∞ 0.1 is."""

    class Flat(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen = nn.functional.leaky_relu((x - 0.5).abs() - 0.42, 0.001).flatten(1).sum(1)
            return torch.stack([10 * seen, torch.ones_like(seen)], 1)

    x = 0.5 + (torch.rand(20, 1, 8, 8, generator=torch.Generator().manual_seed(0)) - 0.5) / 10
    y = torch.ones(20, dtype=torch.long)
    far, patch = Threat("l2", 0.8), Threat("patch", 1)
    attacks = [AttackConfig("pgd", steps=10), AttackConfig("patch", steps=2)]
    found = evaluate([Defence.bare("flat", Flat())], attacks, [LINF, far, patch], x, y, checks=20)
    assert {(c.name, c.norm) for c in found.checks if not c.passed} >= {("convergence", "l2")}
    assert all(c.passed for c in found.checks if c.norm != "l2")
    assert [c.name for c in found.checks if c.norm == "patch"] == ["convergence"]
    worst = {r.norm: r for r in found.rows if r.attack == "worst"}
    assert worst["linf"].robust_accuracy == 1
    left = {r.attack: r.robust_accuracy for r in found.rows if r.norm == "l2"}
    assert left == {"pgd": 1, "checks": 0, "worst": 0}  # what a check breaks is broken
    # What is masked in a ball may be so under a patch, and a union is as good as its worst.
    assert {norm for norm, r in worst.items() if r.masked} == {"l2", "patch", "union"}


def test_a_weak_attack_is_told_under_a_threat_that_is_no_ball(classifier: nn.Module) -> None:
    """Its rows are marked, and the union's; those of the ball are not."""
    x, y = labelled(classifier)
    attacks = [
        AttackConfig("apgd", 60),
        AttackConfig("window_pgd", 30, 10),
        AttackConfig("sparse_rs", steps=1),
    ]
    found = evaluate([Defence.bare("honest", classifier)], attacks, [LINF, Threat("l0", 6)], x, y)
    failed = {(c.name, c.norm) for c in found.checks if not c.passed}
    assert failed == {("convergence", "l0")}
    worst = {r.norm: r for r in found.rows if r.attack == "worst"}
    left = {r.attack: r.robust_accuracy for r in found.rows if r.norm == "l0"}
    assert left["sparse_rs"] > left["checks"] == left["worst"]
    assert {norm for norm, r in worst.items() if r.masked} == {"l0", "union"}
