"""Our models under other libraries: what is always true, and what each peer finds where it is installed.

The tests named after a peer are skipped without it (`pip install "manifold-defense[peers]"`); those of
the message, of the frozen copy and of AutoAttack's bookkeeping always run.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from manifold_defense import DefendedClassifier, ManifoldFilter, ProjectionConfig
from manifold_defense.attacks import pgd
from manifold_defense.attacks.objective import correct, margins
from manifold_defense.evaluation.adapters import _Peer, art_classifier, autoattack, foolbox_model
from tests.defence.attack_table import GREY, Linear, images, logits_of, network

EPS = 0.1
PACKAGES = ("autoattack", "pyautoattack", "torchattacks")
VIEWS = ("exact", "tangent", "identity")


@pytest.fixture
def defended(networks: Any) -> DefendedClassifier:
    """Three solver steps before a network of five classes."""
    return DefendedClassifier(
        ManifoldFilter(*networks, ProjectionConfig("adam", "encoder", steps=3)), network(5)
    )


@pytest.fixture
def untouched(defended: DefendedClassifier) -> Iterator[None]:
    """No trace on the model, nor on torch's global generator, is left by what a test does."""
    # Gradients would be left on a classifier that is still trainable, in train mode.
    assert all(p.requires_grad for p in defended.classifier.parameters())
    modes = [module.training for module in defended.modules()]
    weights = {name: value.clone() for name, value in defended.state_dict().items()}
    yield
    assert [module.training for module in defended.modules()] == modes
    assert all(p.grad is None for p in defended.parameters())
    assert all(torch.equal(value, weights[name]) for name, value in defended.state_dict().items())


def labelled(model: nn.Module, n: int = 6) -> tuple[Tensor, Tensor]:
    """Images (N, 1, 8, 8), all classified correctly."""
    x = images(n)
    return x, logits_of(model, x).argmax(1)


def input_gradient(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    x = x.detach().requires_grad_(True)
    return torch.autograd.grad(nn.functional.cross_entropy(model(x), y, reduction="sum"), x)[0]


@pytest.mark.parametrize(
    ("missing", "use"),
    [
        (("foolbox",), foolbox_model),
        (
            ("art", "art.estimators", "art.estimators.classification"),
            lambda m: art_classifier(m, (1, 8, 8), 5),
        ),
        (PACKAGES, lambda m: autoattack(m, images(2), torch.zeros(2, dtype=torch.int64))),
        (
            ("torchattacks",),
            lambda m: autoattack(m, images(2), torch.zeros(2, dtype=torch.int64), package="torchattacks"),
        ),
    ],
    ids=["foolbox", "art", "autoattack", "torchattacks"],
)
def test_a_missing_peer_is_named_with_its_remedy(
    monkeypatch: pytest.MonkeyPatch, missing: tuple[str, ...], use: Callable[[nn.Module], Any]
) -> None:
    for name in missing:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(
        ImportError, match=rf'{missing[-1]} cannot be imported .*pip install "manifold'
    ) as caught:
        use(network(5))
    assert "\n" not in str(caught.value)


def test_the_copy_has_the_models_gradient_at_black_and_white() -> None:
    """A clamp has none there in some versions of torch: most pixels of a digit would be masked."""
    model = network(5).eval()
    x, y = labelled(model, 12)
    assert ((x == 0) | (x == 1)).float().mean() > 0.3
    expected = input_gradient(model, x, y)
    assert torch.equal(input_gradient(_Peer(model), x, y), expected)
    masked = input_gradient(lambda a: model(torch.where((a > 0) & (a < 1), a, a.detach())), x, y)  # type: ignore[arg-type]
    assert not torch.allclose(masked, expected)


def test_the_copy_takes_images_a_rounding_error_outside(defended: DefendedClassifier) -> None:
    x, _ = labelled(defended)
    outside = x + 1e-6 * (2 * x - 1)
    with pytest.raises(ValueError, match=r"^images: expected values in \[0, 1\]"):
        defended(outside)
    torch.testing.assert_close(_Peer(defended)(outside), logits_of(defended, x), atol=1e-4, rtol=1e-4)


def test_the_copy_takes_the_double_precision_of_numpy(defended: DefendedClassifier) -> None:
    x, y = labelled(defended)
    with pytest.raises(ValueError, match="float64"):
        defended(x.double())
    peer = _Peer(defended)
    assert torch.equal(peer(x.double()), peer(x))
    double = x.double().requires_grad_(True)
    (slope,) = torch.autograd.grad(peer(double).gather(1, y.unsqueeze(1)).sum(), double)
    assert slope.abs().sum() > 0


def test_the_copy_is_frozen_and_on_its_own(defended: DefendedClassifier, untouched: None) -> None:
    x, _ = labelled(defended)
    peer = _Peer(defended)
    assert peer.train() is peer
    assert not any(module.training for module in peer.modules())
    assert not any(p.requires_grad for p in peer.parameters())
    assert torch.equal(peer(x), logits_of(defended, x))
    with torch.no_grad():
        for p in peer.parameters():
            p.zero_()
    assert logits_of(defended, x).abs().sum() > 0


def test_a_function_is_a_model_too() -> None:
    peer = _Peer(lambda x: x.flatten(1)[:, :5])
    assert len(list(peer.parameters())) == 1  # peers ask the first for the device
    assert peer(images(3)).shape == (3, 5)


@pytest.mark.parametrize(
    ("message", "settings", "classes"),
    [
        (r"^autoattack: expected norm linf or l2, got 'l1'$", {"norm": "l1"}, 5),
        (
            r"^package: expected one of autoattack, pyautoattack, torchattacks, got 'aa'$",
            {"package": "aa"},
            5,
        ),
        (r"^autoattack: expected at least 4 classes, got 3$", {}, 3),
    ],
)
def test_bad_arguments_of_autoattack(message: str, settings: dict[str, Any], classes: int) -> None:
    with pytest.raises(ValueError, match=message):
        autoattack(network(classes), images(2), torch.zeros(2, dtype=torch.int64), **settings)


class Careless:
    """Stands in for the port: leaves the ball, seeds the global generator, keeps its own steps."""

    made: Careless

    def __init__(self, model: nn.Module, **settings: Any) -> None:
        self.model, self.settings = model, settings
        self.parts = [SimpleNamespace(steps=10), SimpleNamespace()]
        self._autoattack = SimpleNamespace(attacks=self.parts)
        Careless.made = self

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        torch.manual_seed(7)
        gradient = input_gradient(self.model, x, y)
        return x + torch.where(torch.arange(len(x)).view(-1, 1, 1, 1) > 0, 3 * EPS * gradient.sign(), 0.01)


def test_autoattack_is_held_to_its_contract(monkeypatch: pytest.MonkeyPatch) -> None:
    library = ModuleType("torchattacks")
    library.AutoAttack = Careless  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torchattacks", library)
    model = network(5)
    x, y = labelled(model, 12)
    before = torch.random.get_rng_state()
    x_adv = autoattack(model, x, y, eps=EPS, package="torchattacks", seed=3)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert Careless.made.settings == {
        "norm": "Linf",
        "eps": EPS,
        "version": "standard",
        "n_classes": 5,
        "seed": 3,
    }
    assert Careless.made.parts[0].steps == 100  # ten are not AutoAttack
    assert not hasattr(Careless.made.parts[1], "steps")
    assert ((x_adv - x).abs() <= EPS + 1e-6).all()
    assert ((x_adv >= 0) & (x_adv <= 1)).all()
    broken = ~correct(logits_of(model, x_adv), y)
    assert broken.any()
    assert not broken[0]
    assert torch.equal(x_adv[~broken], x[~broken])
    empty = autoattack(model, x[:0], y[:0], eps=EPS, package="torchattacks")
    assert empty.shape == (0, 1, 8, 8)


class Authors:
    """Stands in for the authors' package, and, where labels come with the images, for that on PyPI."""

    made: Authors
    with_labels = False

    def __init__(self, model: nn.Module, *, device: torch.device, **settings: Any) -> None:
        self.careless, self.device = Careless(model, **settings), device
        self.apgd_targeted, self.fab = SimpleNamespace(), SimpleNamespace()
        Authors.made = self

    def run_standard_evaluation(self, x: Tensor, y: Tensor) -> Any:
        x_adv = self.careless(x, y)
        return (x_adv, y) if self.with_labels else x_adv


@pytest.mark.parametrize(("package", "with_labels"), [("autoattack", False), ("pyautoattack", True)])
def test_the_authors_autoattack_aims_at_all_classes_and_is_held_to_the_same(
    package: str, with_labels: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = ModuleType(package)
    library.AutoAttack = type("AutoAttack", (Authors,), {"with_labels": with_labels})  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, package, library)
    model = network(5)
    x, y = labelled(model, 12)
    x_adv = autoattack(model, x, y, eps=EPS, package=package, seed=3)
    made = Authors.made
    assert made.careless.settings == {"norm": "Linf", "eps": EPS, "version": "standard", "seed": 3}
    assert made.device == x.device
    assert made.apgd_targeted.n_target_classes == made.fab.n_target_classes == 4
    assert ((x_adv - x).abs() <= EPS + 1e-6).all()
    broken = ~correct(logits_of(model, x_adv), y)
    assert broken.any()
    assert torch.equal(x_adv[~broken], x[~broken])


@pytest.mark.parametrize("view", VIEWS)
def test_foolbox_steps_along_the_gradient_of_every_view(
    defended: DefendedClassifier, untouched: None, view: Any
) -> None:
    foolbox = pytest.importorskip("foolbox")
    x, y = labelled(defended)
    attack = foolbox.attacks.LinfPGD(steps=1, rel_stepsize=1.0, random_start=False)
    x_adv = attack(foolbox_model(defended.view(view)), x, y, epsilons=EPS)[1]
    steps = {v: EPS * input_gradient(_Peer(defended.view(v)), x, y).sign() for v in VIEWS}
    torch.testing.assert_close(x_adv, (x + steps[view]).clamp(0, 1))
    assert all(not torch.allclose(steps[view], steps[other]) for other in VIEWS if other != view)


def test_foolbox_climbs_through_the_exact_view(defended: DefendedClassifier, untouched: None) -> None:
    foolbox = pytest.importorskip("foolbox")
    x, y = labelled(defended)
    attack = foolbox.attacks.LinfPGD(steps=8, rel_stepsize=0.3, random_start=False)
    x_adv = attack(foolbox_model(defended), x, y, epsilons=EPS)[1]
    gained = margins(logits_of(defended, x_adv), y, False) - margins(logits_of(defended, x), y, False)
    assert (gained > 0).all()


def test_foolbox_finds_what_is_known_of_a_linear_model() -> None:
    foolbox = pytest.importorskip("foolbox")
    model, y = Linear(-0.5), torch.zeros(3, dtype=torch.int64)
    attack = foolbox.attacks.LinfPGD(steps=8, rel_stepsize=0.5, random_start=False)
    x_adv = attack(foolbox_model(model), GREY, y, epsilons=EPS)[1]
    torch.testing.assert_close(x_adv, GREY + EPS * model.w.sign())


@pytest.mark.parametrize("view", VIEWS)
def test_art_sees_the_gradient_of_every_view(
    defended: DefendedClassifier, untouched: None, view: Any
) -> None:
    pytest.importorskip("art")
    x, y = labelled(defended)
    estimator = art_classifier(defended.view(view), (1, 8, 8), 5)
    torch.testing.assert_close(torch.from_numpy(estimator.predict(x.numpy())), logits_of(defended, x))
    labels = nn.functional.one_hot(y, 5).numpy()
    found = torch.from_numpy(estimator.loss_gradient(x.numpy(), labels))
    expected = input_gradient(_Peer(defended.view(view)), x, y)
    # ART averages the loss over the batch.
    torch.testing.assert_close(found * len(x), expected, atol=1e-5, rtol=1e-3)
    assert (expected.flatten(1).abs().amax(1) > 0).all()


@pytest.mark.parametrize("package", PACKAGES)
def test_autoattack_breaks_a_defended_model(
    defended: DefendedClassifier, untouched: None, package: str
) -> None:
    pytest.importorskip(package)
    x, y = labelled(defended, 4)
    before = torch.random.get_rng_state()
    with torch.no_grad():
        x_adv = autoattack(defended, x, y, norm="linf", eps=0.5, package=package)
    assert torch.equal(torch.random.get_rng_state(), before)
    ours = pgd(defended, x, y, norm="linf", eps=0.5, steps=20, restarts=2, loss="both")
    left = correct(logits_of(defended, x_adv), y)
    assert left.sum() <= correct(logits_of(defended, ours), y).sum()
    assert not left.all()
    assert ((x_adv - x).abs() <= 0.5 + 1e-6).all()
    assert ((x_adv >= 0) & (x_adv <= 1)).all()
