"""One table drives all attacks through the properties that every attack has."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from manifold_defense.attacks import deepfool, fab, fmn, pgd
from manifold_defense.attacks.objective import attack_loss, fooled
from tests.defence.attack_table import (
    ATTACKS,
    SEEDED,
    distance,
    every_attack,
    every_number_of_classes,
    images,
    logits_of,
    network,
    problem,
)


@every_attack
@every_number_of_classes
@pytest.mark.parametrize("targeted", [False, True])
def test_inside_the_ball_and_the_box(name: str, classes: int, targeted: bool) -> None:
    model, x, y = problem(classes)
    x_adv = ATTACKS[name](model, x, y, targeted=targeted)
    assert x_adv.shape == x.shape
    assert x_adv.dtype == x.dtype
    assert not x_adv.requires_grad
    assert (x_adv >= 0).all()
    assert (x_adv <= 1).all()
    assert (distance(name, x_adv, x) <= ATTACKS[name].keywords["eps"] + 1e-6).all()
    assert not torch.equal(x_adv, x)


@every_attack
@every_number_of_classes
@pytest.mark.parametrize("targeted", [False, True])
def test_never_lowers_the_loss(name: str, classes: int, targeted: bool) -> None:
    """In the margin, by which iterates are judged, and for images that the model gets right.

    One step of FGSM may, on a curved model; it is held to it on a linear one below.
    """
    model, x, y = problem(classes)
    before = logits_of(model, x)
    after = logits_of(model, ATTACKS[name](model, x, y, targeted=targeted))
    waiting = ~fooled(before, y, targeted)
    gain = attack_loss(after, y, "margin", targeted) - attack_loss(before, y, "margin", targeted)
    if not name.startswith("fgsm"):
        assert (gain[waiting] >= -1e-5).all(), gain[waiting].min()
    if not name.startswith("noise"):
        assert fooled(after, y, targeted).float().mean() > fooled(before, y, targeted).float().mean()


@every_attack
@pytest.mark.parametrize("targeted", [False, True])
def test_what_is_fooled_stays_fooled(name: str, targeted: bool) -> None:
    model, x, y = problem(3)
    wanted = fooled(logits_of(model, x), y, targeted)
    assert wanted.any()
    assert fooled(logits_of(model, ATTACKS[name](model, x, y, targeted=targeted)), y, targeted)[wanted].all()


@every_attack
def test_the_same_again(name: str) -> None:
    model, x, y = problem(3)
    before = torch.get_rng_state()
    first = ATTACKS[name](model, x, y)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(123)
    assert torch.equal(first, ATTACKS[name](model, x, y))
    torch.set_rng_state(before)


@pytest.mark.parametrize("name", SEEDED)
def test_another_seed_is_another_attack(name: str) -> None:
    model, x, y = problem(3)
    assert torch.equal(ATTACKS[name](model, x, y, seed=0), ATTACKS[name](model, x, y))
    assert not torch.equal(ATTACKS[name](model, x, y, seed=1), ATTACKS[name](model, x, y))


@every_attack
@pytest.mark.parametrize("host", [torch.enable_grad, torch.no_grad])
def test_nothing_is_left_behind(name: str, host: Any) -> None:
    model, x, y = problem(3)
    model[3].eval()  # a mixed state, so that a blanket train() shows
    model[0].weight.requires_grad_(False)
    model[5].bias.grad = torch.ones(3)
    seen = []
    model[4].register_forward_hook(lambda module, *_: seen.append(module.training))
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    x.requires_grad_(True)
    x_before, y_before = x.detach().clone(), y.clone()
    with host():
        ATTACKS[name](model, x, y)
    assert [module.training for module in model] == [True, True, True, False, True, True]
    assert model.training
    assert seen
    assert not any(seen)
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    assert [p.requires_grad for p in model.parameters()] == [False] + [True] * 5
    assert torch.equal(model[5].bias.grad, torch.ones(3))
    assert all(p.grad is None for p in model.parameters() if p is not model[5].bias)
    assert x.grad is None
    assert torch.equal(x, x_before)
    assert torch.equal(y, y_before)


@every_attack
def test_no_gradient_is_lost_in_silence(name: str) -> None:
    """Where none can be recorded an attack that follows one says so; others find what they always find."""
    model, x, y = problem(3)
    if name.startswith(("noise", "corruption", "square", "hop-skip-jump", "sparse-rs")):
        with torch.inference_mode():
            found = ATTACKS[name](model, x, y)
        assert torch.equal(found, ATTACKS[name](model, x, y))
    else:
        with torch.inference_mode(), pytest.raises(RuntimeError, match=r"(?i)inference"):
            ATTACKS[name](model, x, y)


def test_modes_come_back_after_an_error() -> None:
    model = network(3)
    model.append(nn.Linear(7, 7))  # does not fit
    with pytest.raises(RuntimeError):
        pgd(model, images(), torch.zeros(12, dtype=torch.long))
    assert all(module.training for module in model.modules())


@every_attack
def test_double_precision(name: str) -> None:
    model, x, y = problem(3)
    x_adv = ATTACKS[name](model.double(), x.double(), y)
    assert x_adv.dtype == torch.float64
    assert (distance(name, x_adv, x.double()) <= ATTACKS[name].keywords["eps"] + 1e-6).all()


@every_attack
def test_logits_in_half_precision(name: str) -> None:
    """As a model under autocast gives them."""
    model, x, y = problem(3)
    x_adv = ATTACKS[name](lambda x: model.eval()(x).bfloat16(), x, y)
    assert x_adv.dtype == torch.float32


@every_attack
def test_no_images(name: str) -> None:
    model, x, y = problem(3)
    assert ATTACKS[name](model, x[:0], y[:0]).shape == (0, 1, 8, 8)


@pytest.mark.parametrize(
    "name", [name for name in ATTACKS if not name.startswith("noise") and name not in SEEDED]
)
def test_an_image_is_attacked_as_if_alone(name: str) -> None:
    model, x, y = problem(3)
    together = ATTACKS[name](model, x, y)
    for i in range(3):
        torch.testing.assert_close(ATTACKS[name](model, x[i : i + 1], y[i : i + 1])[0], together[i])


@pytest.mark.parametrize("name", ["fgsm-linf", "pgd-linf", "pgd-l2", "pgd-l2-margin", "cw"])
def test_a_target_is_reached(name: str) -> None:
    """With a large budget every image becomes every class, and untargeted the opposite of it."""
    model, x, y = problem(3)
    big = {"eps": 0.5 if "linf" in name else 6.0}
    big |= {"steps": 60} if not name.startswith("fgsm") else {}
    for target in range(3):
        goal = torch.full_like(y, target)
        predictions = logits_of(model, ATTACKS[name](model, x, goal, targeted=True, **big)).argmax(1)
        assert (predictions == goal).float().mean() > (0.6 if name.startswith("fgsm") else 0.99)
        away = logits_of(model, ATTACKS[name](model, x, goal, **big)).argmax(1)
        assert (away == goal).float().mean() < 0.2


_NONSENSE: tuple[tuple[str, Any, str], ...] = (
    ("x", lambda x: 255 * x, r"^images: expected values in \[0, 1\], got \[.*, 2[0-9.]*\]"),
    ("x", lambda x: (255 * x).byte(), "^images: expected a tensor of float32 or float64, got torch.uint8"),
    ("x", lambda x: x.half(), "^images: expected a tensor of float32 or float64, got torch.float16"),
    ("x", lambda x: x.numpy(), "^images: expected a tensor of float32 or float64, got ndarray"),
    ("x", lambda x: torch.where(x > 0.5, x, torch.nan), "^images: expected values in"),
    ("y", lambda y: y.float(), r"^labels: expected 12 of int64, got torch.float32 of shape \(12,\)"),
    ("y", lambda y: y[:3], "^labels: expected 12 of int64"),
    ("y", lambda y: y - 3, "^labels: expected at least 0, got -"),
    ("y", lambda y: y + 3, "^labels: expected below 3, the classes of the model, got 5"),
    ("eps", lambda eps: -eps, "^eps: expected at least 0, got -"),
    ("eps", lambda eps: eps * torch.nan, "^eps: expected at least 0, got nan"),
)


@every_attack
def test_what_would_make_nonsense_of_an_attack_is_refused(name: str) -> None:
    """Images of another scale, above all: within an eps of [0, 1] all of them would pass for robust."""
    model, x, y = problem(3)
    for which, change, words in _NONSENSE:
        given = {"x": x, "y": y, "eps": ATTACKS[name].keywords["eps"]}
        given[which] = change(given[which])
        with pytest.raises(ValueError, match=words):
            ATTACKS[name](model, given["x"], given["y"], eps=given["eps"])


@pytest.mark.parametrize("name", [name for name in ATTACKS if "linf" in name])
def test_a_radius_of_eight_greys_of_255_is_not_one_of_eight(name: str) -> None:
    model, x, y = problem(3)
    with pytest.raises(ValueError, match=r"^eps: expected at most 1 in linf, .*, got 8$"):
        ATTACKS[name](model, x, y, eps=8)


def test_an_infinite_radius_is_for_those_that_seek_the_nearest_image() -> None:
    model, x, y = problem(3)
    for name in ("pgd-linf", "pgd-l2", "window-linf", "noise-l2"):
        with pytest.raises(ValueError, match=r"^eps: expected a finite number, got inf$"):
            ATTACKS[name](model, x, y, eps=float("inf"))
    for attack in (fab, fmn, deepfool):
        assert fooled(logits_of(model, attack(model, x, y, norm="linf")), y, False).all()


# These never ask the model about the very images that they are given.
_ASK_OF_OTHERS = ("detector", "fgsm-random", "sparse-rs", "stroke-search")


@pytest.mark.parametrize("size", [1.0, 30.0, 3000.0])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("targeted", [False, True])
def test_however_sure_a_model_is_cross_entropy_is_climbed(
    size: float, dtype: torch.dtype, targeted: bool
) -> None:
    """Its own gradient, the same but for its length, is lost digit by digit, and then altogether."""
    logits = size * torch.rand(6, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    logits, y = logits.to(dtype).requires_grad_(True), logits.argmax(1)
    (found,) = torch.autograd.grad(attack_loss(logits, y, "ce", targeted).sum(), logits)
    own = nn.functional.one_hot(y, 4)
    expected = logits.double().masked_fill(own > 0, -torch.inf).softmax(1) - own
    expected = (-expected if targeted else expected).detach()
    rounding = 1e-3 if dtype == torch.float16 else 1e-5
    torch.testing.assert_close(found.double(), expected, atol=rounding, rtol=0)
    if size == 1.0:
        entropy = nn.functional.cross_entropy(logits.double(), y, reduction="none")
        (true,) = torch.autograd.grad((-entropy if targeted else entropy).sum(), logits)
        assert torch.cosine_similarity(true.double(), expected).min() > 0.999


@pytest.mark.parametrize("name", [name for name in ATTACKS if not name.startswith(_ASK_OF_OTHERS)])
def test_a_model_that_changes_its_images_is_refused(name: str) -> None:
    model, x, y = problem(3)

    def spoiling(x: Tensor) -> Tensor:
        with torch.no_grad():
            x.mul_(0.99)
        logits: Tensor = model(x)
        return logits

    with pytest.raises(ValueError, match=r"^model: expected one that leaves its images alone"):
        ATTACKS[name](spoiling, x, y)
