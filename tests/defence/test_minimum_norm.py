"""DDN, FMN, DeepFool and JSMA: on a linear model the nearest adversarial image is known in every norm.

Away from the box it lies `|m|/‖w‖₂`, `|m|/‖w‖₁` (L∞), `|m|/max|w|` (L1) off; in the box it is the
solution of a linear or convex program, and in L0 the fewest pixels that together gain the margin.
"""

from functools import partial
from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import linprog, minimize
from torch import Tensor, nn

from manifold_defense.attacks import cw, ddn, deepfool, fab, fmn, geometry, jsma, pgd
from manifold_defense.attacks.fmn import _project
from manifold_defense.attacks.halfspace import NORMS, nearest_in_halfspace
from manifold_defense.attacks.minimum_norm import Nearest, refine, smooth_gradient
from manifold_defense.attacks.norms import sizes
from manifold_defense.attacks.objective import input_gradient, logits_and_gradient
from tests.defence.attack_table import GREY, Linear, images, logits_of, network

ATTACKS = {
    "ddn": (ddn, "l2"),
    "fmn-l0": (partial(fmn, norm="l0"), "l0"),
    "fmn-l1": (partial(fmn, norm="l1"), "l1"),
    "fmn-l2": (partial(fmn, norm="l2"), "l2"),
    "fmn-linf": (partial(fmn, norm="linf"), "linf"),
    "deepfool-l2": (partial(deepfool, norm="l2"), "l2"),
    "deepfool-linf": (partial(deepfool, norm="linf"), "linf"),
    "fab-l1": (partial(fab, norm="l1"), "l1"),
    "fab-l2": (partial(fab, norm="l2"), "l2"),
    "fab-linf": (partial(fab, norm="linf"), "linf"),
    "jsma": (partial(jsma, eps=64), "l0"),
    "jsma-single": (partial(jsma, eps=64, pairs=False), "l0"),
}
every_attack = pytest.mark.parametrize("name", ATTACKS)
DUAL = {"l2": lambda w: w.norm(), "linf": lambda w: w.abs().sum(), "l1": lambda w: w.abs().max()}


def gap(model: Linear, x: Tensor) -> Tensor:
    """`w·(x − ½) + m`, (N,): class 1 where it is above zero."""
    return ((x - 0.5) * model.w).flatten(1).sum(1) + model.m


def in_the_box(model: Linear, x: Tensor, norm: str) -> Tensor:
    """The distance of each image to the boundary inside [0, 1], by pixels in greedy order or by bisection."""
    w, wanted = model.w.flatten(), gap(model, x)
    room = torch.where(w * wanted.sign().view(-1, 1) > 0, x.flatten(1), 1 - x.flatten(1))
    result = []
    for free, margin in zip(room.double(), wanted.abs().double(), strict=True):
        slope = w.abs().double()
        if norm in ("l0", "l1"):
            order = (slope * free if norm == "l0" else slope).argsort(descending=True)
            gains = (slope * free)[order].cumsum(0)
            count = int((gains < margin).sum())
            rest = (margin - (gains[count - 1] if count else 0)) / slope[order[count]]
            result.append(float(count + 1 if norm == "l0" else free[order[:count]].sum() + rest))
            continue
        speed = slope if norm == "l2" else torch.ones_like(slope)
        low, high = 0.0, 100.0
        for _ in range(60):
            middle = (low + high) / 2
            moved = torch.minimum(middle * speed, free)
            low, high = (low, middle) if (slope * moved).sum() >= margin else (middle, high)
        result.append(float(moved.norm() if norm == "l2" else moved.max()))
    return torch.tensor(result)


# --- The nearest point of a half-space ---


def program(x: Tensor, gradient: Tensor, wanted: float, norm: str) -> float:
    """The least size of δ by a general solver, or over all sets of pixels (L0)."""
    g, low, high = gradient.flatten().numpy(), -x.flatten().numpy(), 1 - x.flatten().numpy()
    n = len(g)
    if norm == "l0":
        gain = np.maximum(g * low, g * high).reshape(x.shape[0], -1).sum(0)
        counts = (k for k in range(1, n + 1) for s in combinations(gain, k) if sum(s) >= wanted * (1 - 1e-9))
        return float(next(counts))
    if norm == "l2":
        solution = minimize(
            lambda d: d @ d,
            np.clip(np.sign(g), low, high),
            bounds=list(zip(low, high, strict=True)),
            constraints={"type": "ineq", "fun": lambda d: g @ d - wanted},
            method="SLSQP",
            options={"ftol": 1e-14, "maxiter": 500},
        )
        return float(np.sqrt(solution.fun))
    # δ = p − q with p, q ≥ 0, and t above all of them in L∞.
    bounds = [(0, u) for u in high] + [(0, -u) for u in low] + [(0, None)]
    above = np.hstack([np.eye(2 * n), -np.ones((2 * n, 1))])
    gains = np.hstack([-g, g, 0])[None]
    cost = np.ones(2 * n + 1) if norm == "l1" else np.eye(2 * n + 1)[-1]
    cost[-1] = float(norm == "linf")
    a, b = (gains, [-wanted]) if norm == "l1" else (np.vstack([gains, above]), [-wanted] + [0] * 2 * n)
    return float(linprog(cost, A_ub=a, b_ub=b, bounds=bounds).fun)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("share", [0.02, 0.4, 0.95])
def test_the_nearest_point_is_what_a_general_solver_finds(norm: str, share: float) -> None:
    rng = torch.Generator().manual_seed(3)
    x = (torch.rand(6, 2, 2, 3, generator=rng, dtype=torch.float64) * 1.6 - 0.3).clamp(0, 1)
    gradient = torch.randn(6, 2, 2, 3, generator=rng, dtype=torch.float64)
    gradient[:, 0, 0, 0] = 0
    most = torch.maximum(gradient * (1 - x), -gradient * x).flatten(1).sum(1)
    delta = nearest_in_halfspace(x, gradient, share * most, norm)
    assert ((x + delta >= 0) & (x + delta <= 1)).all()
    assert ((gradient * delta).flatten(1).sum(1) >= share * most * (1 - 1e-9)).all()
    if norm == "l0":  # a pixel that counts is used to the full
        assert ((delta == 0) | (x + delta == 0) | (x + delta == 1)).all()
    for i in range(6):
        least = program(x[i], gradient[i], float(share * most[i]), norm)
        assert float(sizes(norm, delta)[i]) == pytest.approx(least, rel=1e-5)


@pytest.mark.parametrize("norm", NORMS)
def test_the_nearest_point_at_its_limits(norm: str) -> None:
    x, gradient = images(2), torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    most = torch.maximum(gradient * (1 - x), -gradient * x).flatten(1).sum(1)
    assert (nearest_in_halfspace(x, gradient, -most, norm) == 0).all()
    assert (nearest_in_halfspace(x, 0 * gradient, most, norm) == 0).all()
    beyond = nearest_in_halfspace(x, gradient, 2 * most, norm)
    torch.testing.assert_close(x + beyond, (gradient > 0).float(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("norm", ["l1", "l2", "linf"])
def test_a_radius_for_each_image_is_the_projection_of_each(norm: Any) -> None:
    delta = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(4))
    radii = torch.tensor([0.0, 0.3, 2.0, 1e3])
    projected = _project(norm, delta, radii)
    for i, radius in enumerate(radii.tolist()):
        alone = geometry(norm).project(delta[i : i + 1], radius)[0]
        torch.testing.assert_close(projected[i], alone, atol=1e-5, rtol=1e-4)


def test_a_projection_on_l0_keeps_the_largest_pixels() -> None:
    delta = torch.tensor([[3.0, 0, 1], [0, 2.5, 2]]).view(1, 2, 1, 3)  # 3, 2.5 and √5 over channels
    kept = _project("l0", delta, torch.tensor([2.0])).view(2, 3)
    assert torch.equal(kept, torch.tensor([[3.0, 0, 0], [0, 2.5, 0]]))


# --- Distances on linear models ---


@pytest.mark.parametrize("name", ["ddn", "fmn-l1", "fmn-l2", "fmn-linf", "deepfool-l2", "deepfool-linf"])
@pytest.mark.parametrize("label", [0, 1])
@pytest.mark.parametrize("targeted", [False, True])
def test_away_from_the_box_the_distance_is_the_margin_over_the_dual_norm(
    name: str, label: int, targeted: bool
) -> None:
    attack, norm = ATTACKS[name]
    model = Linear(m=0.9 if label == int(not targeted) else -0.9)
    y = torch.full((3,), label)
    x_adv = attack(model, GREY, y, targeted=targeted)
    assert ((model(x_adv).argmax(1) == label) == targeted).all()
    expected = gap(model, GREY).abs() / DUAL[norm](model.w)
    size = sizes(norm, x_adv - GREY)
    torch.testing.assert_close(size, expected, rtol=0.01, atol=0)
    assert (size >= expected * (1 - 1e-4)).all()  # nearer there is none


@every_attack
@pytest.mark.parametrize("m", [8.0, -8.0])
def test_in_the_box_the_distance_is_that_of_the_program(name: str, m: float) -> None:
    """Half of the pixels are black or white, as in drawings, and many of the others reach the bounds."""
    attack, norm = ATTACKS[name]
    model, x = Linear(m=m), images(8)
    x_adv = attack(model, x, (gap(model, x) > 0).long())
    assert ((model(x_adv).argmax(1) == 1) != (gap(model, x) > 0)).all()
    size, least = sizes(norm, x_adv - x), in_the_box(model, x, norm)
    if name == "jsma":
        assert ((size >= least) & (size <= least + 1)).all()  # by pairs
    elif norm == "l0":
        assert torch.equal(size, least)
    else:
        torch.testing.assert_close(size, least, rtol=0.03 if name == "fmn-l1" else 0.01, atol=0)


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_a_wrong_distance_would_show(norm: Any) -> None:
    """PGD in a ball of twice the distance fools the model, and is not the nearest that does."""
    model, y = Linear(m=0.9), torch.ones(3, dtype=torch.long)
    expected = gap(model, GREY) / DUAL[norm](model.w)
    x_adv = pgd(model, GREY, y, norm=norm, eps=float(2 * expected.max()))
    assert (model(x_adv).argmax(1) == 0).all()
    assert not torch.allclose(sizes(norm, x_adv - GREY), expected, rtol=0.03)
    assert (in_the_box(model, GREY, norm) < 1.001 * expected).all()
    assert (in_the_box(model, (GREY > 0.5).float(), norm) > 1.001 * expected).all()


@pytest.mark.parametrize("norm", NORMS)
def test_the_refinement_slides_along_the_boundary(norm: str) -> None:
    """From far beyond the boundary to the nearest image; without passes it stays there."""
    model, y = Linear(m=0.9), torch.ones(3, dtype=torch.long)
    for passes in (0, 30):
        nearest = Nearest(model, GREY, y, norm=norm, eps=float("inf"), targeted=False)
        far = (torch.rand(GREY.shape, generator=torch.Generator().manual_seed(0)) - model.w).clamp(0, 1)
        assert nearest.keep(torch.arange(3), far, model(far)).all()
        refine(model, nearest, passes)
        least = in_the_box(model, GREY, norm)
        assert ((nearest.size > 3 * least) if passes == 0 else (nearest.size <= 1.02 * least)).all()


# --- What comes back ---


@every_attack
@pytest.mark.parametrize("scale", [1.0, 0.0])
def test_a_model_that_cannot_be_fooled_gets_the_clean_image(name: str, scale: float) -> None:
    """Out of reach, or without any slope."""
    attack, _ = ATTACKS[name]
    model = Linear(m=1000.0, scale=scale)
    constant = torch.tensor([0.0, 1.0])
    fixed = model if scale else lambda x: constant + 0 * model(x)
    x = images()
    assert torch.equal(attack(fixed, x, torch.ones(12, dtype=torch.long)), x)


@every_attack
def test_what_is_farther_than_eps_or_fooled_already_comes_back_unchanged(name: str) -> None:
    attack, norm = ATTACKS[name]
    model, x = Linear(m=8.0), images()
    y = torch.ones(12, dtype=torch.long)
    least = sizes(norm, attack(model, x, y) - x)
    assert (least > 0).all()
    eps = float(least.sort().values[5:7].mean())  # an attack that knows eps takes another way
    x_adv = attack(model, x, y, eps=eps)
    near = least <= eps
    assert 0 < near.sum() < 12
    assert torch.equal(x_adv[~near], x[~near])
    assert (model(x_adv[near]).argmax(1) == 0).all()
    assert (sizes(norm, x_adv - x) <= eps).all()
    assert torch.equal(attack(model, x, 1 - y), x)


@pytest.mark.parametrize("name", ["ddn", "fmn-l1", "fmn-linf"])
def test_with_an_eps_the_first_within_is_enough_unless_pressed_on(name: str) -> None:
    attack, norm = ATTACKS[name]
    model, y = Linear(m=2.0), torch.ones(3, dtype=torch.long)
    least = in_the_box(model, GREY, norm)
    first = sizes(norm, attack(model, GREY, y, eps=float(1.5 * least.max())) - GREY)
    on = sizes(norm, attack(model, GREY, y, eps=float(1.5 * least.max()), stop_early=False) - GREY)
    assert (on <= first).all()
    torch.testing.assert_close(on, least, rtol=0.03, atol=0)


@pytest.mark.parametrize("far", [0.05, 0.2, 2.0])
@pytest.mark.parametrize("attack", [ddn, cw, fmn])
def test_a_few_steps_reach_a_boundary_within_eps_however_far(attack: Any, far: float) -> None:
    """Their own lengths, of a first step or of δ, are of images; eps need not be."""
    slope = torch.randn(64, generator=torch.Generator().manual_seed(0))

    def model(x: Tensor) -> Tensor:
        beyond = (x - 0.5).flatten(1) @ slope / slope.norm() - far
        return torch.stack([-beyond, beyond], 1)

    x, y = torch.full((2, 1, 8, 8), 0.5), torch.zeros(2, dtype=torch.long)
    x_adv = attack(model, x, y, norm="l2", eps=1.1 * far, steps=40)
    assert (model(x_adv).argmax(1) == 1).all()
    assert (sizes("l2", x_adv - x) <= 1.1 * far).all()


def test_a_gradient_that_is_not_finite_is_no_direction() -> None:
    """Of one column, now and then: the others still lead to the boundary."""
    model, y, passes = Linear(m=2.0), torch.ones(3, dtype=torch.long), []

    def broken(x: Tensor) -> Tensor:
        passes.append(1)
        if len(passes) % 3 == 0 and x.requires_grad:
            x.register_hook(lambda gradient: gradient.index_fill(3, torch.tensor(0), torch.nan))
        return model(x)

    for attack in (cw, ddn, fmn, fab):
        passes.clear()
        x_adv, whole = (attack(f, GREY, y, norm="l2", eps=float("inf"), steps=60) for f in (broken, model))
        assert (model(x_adv).argmax(1) == 0).all()
        assert (sizes("l2", x_adv - GREY) <= 1.05 * sizes("l2", whole - GREY)).all()


def sparse_network() -> nn.Module:
    """Three channels, three classes, none of them preferred."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        model = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(384, 3))
        with torch.no_grad():
            model[3].bias -= model(torch.rand(100, 3, 8, 8)).mean(0)
        return model


@pytest.mark.parametrize("attack", [partial(fmn, norm="l0"), jsma, partial(jsma, theta=0.4)])
@pytest.mark.parametrize("targeted", [False, True])
def test_l0_counts_pixels_over_channels(attack: Any, targeted: bool) -> None:
    x = torch.rand(16, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    model = sparse_network()
    y = logits_of(model, x).argmax(1)
    y = (y + 1) % 3 if targeted else y
    x_adv = attack(model, x, y, targeted=targeted, eps=6)
    pixels = (x_adv != x).any(1).flatten(1).sum(1)
    assert (pixels <= 6).all()
    fooled = (logits_of(model, x_adv).argmax(1) == y) == targeted
    assert torch.equal(fooled, pixels > 0)
    assert fooled.float().mean() > 0.6


@pytest.mark.parametrize("attack", [partial(fmn, norm="l0"), jsma, partial(jsma, pairs=False)])
def test_all_channels_of_one_pixel_are_one_change(attack: Any) -> None:
    """Two channels of the strong pixel do not fool the model; three do, or two and three of the weak."""
    w = torch.full((3, 4, 4), 0.5)
    w[:, 2, 1] = 1.0
    x, y = torch.zeros(1, 3, 4, 4), torch.zeros(1, dtype=torch.long)

    def model(x: Tensor) -> Tensor:
        lead = (w * x).flatten(1).sum(1) - 2.9
        return torch.stack([-lead, lead], 1)

    x_adv = attack(model, x, y, eps=1)
    assert model(x_adv).argmax(1) == 1
    assert torch.equal((x_adv != x)[0], w == 1)


def test_jsma_takes_images_whose_channels_lie_last() -> None:
    x = torch.rand(4, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    w = torch.randn(48, 3, generator=torch.Generator().manual_seed(1))

    def model(x: Tensor) -> Tensor:
        return x.flatten(1) @ w

    y = model(x).argmax(1)
    last = jsma(model, x.to(memory_format=torch.channels_last), y, eps=3)
    assert torch.equal(last, jsma(model, x, y, eps=3))


@pytest.mark.parametrize("shade", [0.0, 1.0])
@pytest.mark.parametrize("pairs", [False, True])
def test_jsma_increases_and_decreases(shade: float, pairs: bool) -> None:
    x = torch.full((1, 1, 8, 8), shade)
    model = Linear(m=0.0)
    model.m = 3.0 - float(gap(model, x))
    x_adv = jsma(model, x, torch.ones(1, dtype=torch.long), eps=10, pairs=pairs)
    assert float(gap(model, x_adv)) < 0
    assert set((x_adv - x).unique().tolist()) == {0.0, 1.0 - 2 * shade}


def test_jsma_may_change_a_tenth_of_the_pixels() -> None:
    model, y = Linear(m=0.0), torch.ones(3, dtype=torch.long)
    strongest = (0.5 * model.w.abs()).flatten().sort(descending=True).values.cumsum(0)
    x = torch.full_like(GREY, 0.5)
    for m, found in ((float(strongest[5]) - 0.01, True), (float(strongest[5]) + 0.01, False)):
        model.m = m
        assert torch.equal(jsma(model, x, y), x) != found


# --- Curved models ---


@every_attack
def test_the_scale_of_the_logits_does_not_matter(name: str) -> None:
    attack, norm = ATTACKS[name]
    model, x = network(5).eval(), images(8)
    y = logits_of(model, x).argmax(1)
    changed = {
        "as it is": model,
        "× 1000": lambda x: 1000 * model(x),
        "× 0.001": lambda x: 0.001 * model(x),
        "− 100": lambda x: model(x) - 100,
        "a class that is switched off": lambda x: nn.functional.pad(model(x), (0, 1), value=-1e9),
    }
    keywords = {"steps": 50} if "jsma" not in name else {}
    found = {key: sizes(norm, attack(f, x, y, **keywords) - x) for key, f in changed.items()}
    assert (found["as it is"] > 0).all()
    for size in found.values():
        torch.testing.assert_close(size.mean(), found["as it is"].mean(), rtol=0.05, atol=0)


def test_the_smooth_gradient_points_where_cross_entropy_does_and_does_not_vanish() -> None:
    """At the spread where the sharpness is 1; with logits × 1000, cross-entropy has no slope left."""
    model, x = network(5).eval(), images(4)
    y = logits_of(model, x).argmax(1)

    def spread(x: Tensor, scale: float = 4.0) -> Tensor:
        logits = model(x)
        return scale * logits / logits.detach().std(1, keepdim=True)

    for targeted in (False, True):
        smooth = smooth_gradient(spread, x, y, targeted)[1]
        entropy = logits_and_gradient(spread, x, y, "ce", targeted)[1]
        cosine = nn.functional.cosine_similarity(smooth.flatten(1), entropy.flatten(1))
        torch.testing.assert_close(cosine, torch.ones(4))
    at = x.clone().requires_grad_(True)
    assert (input_gradient(nn.functional.cross_entropy(spread(at, scale=4e3), y), at) == 0).all()
    sharp = smooth_gradient(partial(spread, scale=4e3), x, y, False)[1] / 1000
    torch.testing.assert_close(sharp, smooth_gradient(spread, x, y, False)[1], rtol=1e-3, atol=1e-6)


def test_nearest_in_l2_first_and_every_norm_best_in_its_own() -> None:
    """DDN and FMN in 100 passes are no farther than C&W in 300 or DeepFool, up to half a percent."""
    model, x = network(5), images(16)
    y = logits_of(model, x).argmax(1)
    found = {name: attack(model, x, y) for name, (attack, _) in ATTACKS.items()}
    found["cw"] = cw(model, x, y, steps=100, searches=3)
    assert all((logits_of(model, x_adv).argmax(1) != y).all() for x_adv in found.values())
    size = {
        norm: {name: float(sizes(norm, x_adv - x).mean()) for name, x_adv in found.items()} for norm in NORMS
    }
    for norm in NORMS:
        best = min(size[norm].values())
        assert size[norm][f"fmn-{norm}"] <= 1.02 * best
        assert sum(value <= 1.02 * best for value in size[norm].values()) <= 4
    assert size["l2"]["ddn"] <= 1.005 * size["l2"]["cw"]
    assert size["l2"]["ddn"] <= 1.005 * size["l2"]["deepfool-l2"]
    assert size["linf"]["fmn-linf"] <= 1.005 * size["linf"]["deepfool-linf"]


@pytest.mark.parametrize(
    "name", ["ddn", "fmn-l2", "fmn-linf", "fab-l2", "fab-linf", "deepfool-l2", "deepfool-linf"]
)
def test_every_class_is_a_target(name: str) -> None:
    attack, _ = ATTACKS[name]
    model, x = network(3), images().repeat(3, 1, 1, 1)
    y = torch.arange(3).repeat_interleave(12)
    assert torch.equal(logits_of(model, attack(model, x, y, targeted=True)).argmax(1), y)


# --- Arguments ---


@pytest.mark.parametrize(
    ("attack", "keywords", "words"),
    [
        (ddn, {"norm": "linf"}, "expected norm l2, got 'linf'"),
        (fmn, {"norm": "patch"}, "^norm: expected one of l0, l1, l2, linf, got 'patch'"),
        (fab, {"norm": "patch"}, "^norm: expected one of linf, l2, l1, got 'patch'"),
        (fab, {"restarts": 0}, "restarts ≥ 1"),
        (fab, {"target_classes": 2, "targeted": True}, "^target_classes: expected 0"),
        (deepfool, {"norm": "l1"}, "^norm: expected one of l2, linf, got 'l1'"),
        (jsma, {"norm": "l2"}, "expected norm l0, got 'l2'"),
        *((attack, {"eps": -1.0}, "^eps: expected") for attack in (ddn, fmn, fab, deepfool, jsma)),
        *((attack, {"eps": float("nan")}, "^eps: expected") for attack in (ddn, fmn, fab, deepfool, jsma)),
        *((attack, {"steps": 0}, "steps ≥ 1") for attack in (ddn, fmn, fab, deepfool)),
        (ddn, {"gamma": 1.0}, "gamma between 0 and 1"),
        (ddn, {"initial_size": 0.0}, "initial_size > 0"),
        (fmn, {"gamma": (0.01, 0.05)}, "gamma: expected two shares that fall"),
        (fmn, {"step_size": 0.0}, "step_size > 0"),
        (deepfool, {"overshoot": -0.1}, "overshoot ≥ 0"),
        (deepfool, {"candidates": 0}, "candidates ≥ 1"),
        (deepfool, {"halvings": -1}, "halvings ≥ 0"),
        (jsma, {"theta": 0.0}, "theta: expected in"),
    ],
)
def test_bad_arguments_are_refused(attack: Any, keywords: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        attack(network(3), images(), torch.zeros(12, dtype=torch.long), **keywords)
