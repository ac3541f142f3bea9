"""Attacks that know the defence: by features, on the range, in pairs.

Oracles are linear: of `w·x` over a ball, its cut with a plane, or with a half-space, the maximum is
known in closed form or by `linprog`.
"""

import math
from typing import Any

import pytest
import torch
from scipy.optimize import linprog
from torch import Tensor, nn

from manifold_defense import ManifoldFilter, ProjectionConfig
from manifold_defense.attacks import (
    detector_aware,
    feature_matching,
    geometry,
    overpowered_pairs,
    pair_break,
    pgd,
    range_attack,
)
from manifold_defense.attacks.objective import fooled
from tests.defence.attack_table import GREY, Linear, gain, logits_of, network
from tests.defence.projection_support import Curved

ONES = torch.ones(3, dtype=torch.long)
FOOLED = -40.0  # a bias that leaves every image misclassified: then the attack maximises, and stops nowhere


@pytest.mark.parametrize(
    ("attack", "more"),
    [
        (feature_matching, {"features": nn.Identity()}),
        (range_attack, {"generator": Curved()}),
        (detector_aware, {"residual": lambda x: x.flatten(1).mean(1), "threshold": 1.0}),
    ],
)
@pytest.mark.parametrize(
    ("keywords", "words"),
    [
        ({"eps": -0.1}, "^eps: expected at least 0"),
        ({"eps": math.nan}, "^eps: expected at least 0"),
        ({"steps": 0}, "steps ≥ 1"),
        ({"restarts": 0}, "restarts ≥ 1"),
        ({"norm": "l3"}, r"^norm: expected one of linf, l2.*, got 'l3'"),
    ],
)
def test_bad_arguments_are_refused(attack: Any, more: Any, keywords: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        attack(Linear(0.0), GREY, ONES, **more, **keywords)


def test_arguments_of_one_attack_alone_are_refused(linear: Any) -> None:
    with pytest.raises(ValueError, match=r"^method: expected one of lagrangian, .*, got 'both'"):
        detector_aware(Linear(0.0), GREY, ONES, residual=torch.sum, threshold=1.0, method="both")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^z: expected shape \(3, 5\), got \(2, 5\)"):
        range_attack(Linear(0.0), GREY, ONES, generator=linear, z=torch.zeros(2, 5))
    with pytest.raises(ValueError, match=r"^pair_break: expected norm l2, got 'linf'"):
        pair_break(Linear(0.0), GREY, ONES, generator=linear, norm="linf")
    with pytest.raises(ValueError, match=r"^starts: expected two of shape"):
        overpowered_pairs(Linear(0.0), linear, starts=(torch.zeros(2, 5), torch.zeros(3, 5)))
    for keywords in ({"eps": 0.0}, {"steps": 0}, {"n": -1}):
        with pytest.raises(ValueError, match="eps > 0, steps ≥ 1, n ≥ 0"):
            overpowered_pairs(Linear(0.0), linear, **keywords)  # type: ignore[arg-type]


# --- Features ---


class Nearest(nn.Module):
    """Logits (N, K) by the distance to one image of each class, (K, 1, 8, 8)."""

    def __init__(self, centres: Tensor, bins: int = 0) -> None:
        super().__init__()
        self.centres, self.bins = centres, bins

    def forward(self, x: Tensor) -> Tensor:
        x = (x * self.bins).round() / self.bins if self.bins else x
        return -torch.cdist(x.flatten(1), self.centres.flatten(1)).square()


def centres(n: int) -> Tensor:
    """Images (N, 1, 8, 8) that all differ by more than 0.1 in every pixel."""
    shade = torch.stack([torch.randperm(n, generator=torch.Generator().manual_seed(i)) for i in range(64)], 1)
    return (0.1 + 0.8 * shade / (n - 1)).view(n, 1, 8, 8)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_with_pixels_as_features_an_image_goes_straight_to_the_nearest_candidate(norm: Any) -> None:
    x, y = centres(4), torch.arange(4)
    model, eps = Nearest(x), 0.05 if norm == "linf" else 0.3
    x_adv = feature_matching(
        model, x, y, features=nn.Identity(), candidates=(x, y), norm=norm, eps=eps, random_start=False
    )
    distance = torch.cdist(x.flatten(1), x.flatten(1)) + 1e9 * torch.eye(4)
    expected = x + geometry(norm).project(x[distance.argmin(1)] - x, eps)
    torch.testing.assert_close(x_adv, expected, atol=1e-4, rtol=0)
    # By default the candidates are the batch itself, as the model sees it.
    default = feature_matching(model, x, y, features=nn.Identity(), norm=norm, eps=eps, random_start=False)
    assert torch.equal(default, x_adv)
    # Or images that it labels itself: an image that is left alone still has the others to aim at.
    settings: dict[str, Any] = {"features": nn.Identity(), "norm": norm, "eps": eps, "random_start": False}
    torch.testing.assert_close(feature_matching(model, x[:1], y[:1], candidates=x, **settings), x_adv[:1])
    assert torch.equal(feature_matching(model, x[:1], y[:1], **settings), x[:1])


class Island(nn.Module):
    """Logits (N, 2): class 1 within 1 of one image, class 0 elsewhere."""

    def __init__(self, centre: Tensor) -> None:
        super().__init__()
        self.centre = centre

    def forward(self, x: Tensor) -> Tensor:
        near = 1 - (x - self.centre).flatten(1).norm(dim=1)
        return torch.stack([torch.zeros_like(near), near], 1)


def test_each_restart_aims_at_the_next_candidate_and_then_begins_anew() -> None:
    x, zero = centres(4), torch.zeros(1, dtype=torch.long)
    order = torch.cdist(x[:1].flatten(1), x.flatten(1))[0].argsort()[1:]
    settings: dict[str, Any] = {"features": nn.Identity(), "eps": 0.8, "random_start": False}
    candidates = (x[order.flip(0)], torch.ones(3, dtype=torch.long))
    for rank in range(3):
        model = Island(x[order[rank]])
        reached = [
            feature_matching(model, x[:1], zero, candidates=candidates, restarts=restarts, **settings)
            for restarts in (1, 2, 3, 4)
        ]
        assert [bool(fooled(model(x_adv), zero, False)) for x_adv in reached] == [r >= rank for r in range(4)]


def test_targets_are_the_class_that_is_aimed_at() -> None:
    x = centres(4)
    model = Nearest(x)
    for target in range(4):
        goal = torch.full((4,), target)
        x_adv = feature_matching(
            model, x, goal, features=nn.Identity(), candidates=(x, torch.arange(4)), eps=0.6, targeted=True
        )
        assert (model(x_adv).argmax(1) == goal).all()


def test_an_image_without_a_candidate_comes_back_as_it_was() -> None:
    x, y = centres(4), torch.arange(4)
    model = Nearest(x)
    for candidates in ((x, torch.zeros(4, dtype=torch.long)), (x[:0], y[:0])):
        x_adv = feature_matching(model, x, y, features=nn.Identity(), candidates=candidates)
        lonely = y == 0 if len(candidates[0]) else y >= 0
        assert torch.equal(x_adv[lonely], x[lonely])
    assert torch.equal(feature_matching(model, x[:1], y[:1], features=nn.Identity()), x[:1])
    # Nor is an image that is misclassified a candidate for itself: alone, it has none.
    wrong = y[1:2]
    assert torch.equal(feature_matching(model, x[:1], wrong, features=nn.Identity(), stop_early=False), x[:1])


def test_features_lead_where_the_model_has_no_gradient() -> None:
    x, y = centres(6), torch.arange(6)
    model = Nearest(x, bins=16)
    settings: dict[str, Any] = {"eps": 0.45, "steps": 30}
    left = (model(pgd(model, x, y, **settings)).argmax(1) == y).float().mean()
    led = feature_matching(model, x, y, features=nn.Identity(), restarts=2, **settings)
    assert left > 0.9
    assert (model(led).argmax(1) == y).float().mean() < 0.2
    assert ((led - x).abs() <= 0.45 + 1e-6).all()


def test_features_of_a_filter_carry_one_projection_towards_another(networks: Any) -> None:
    filter = ManifoldFilter(*networks, ProjectionConfig("gd", "encoder", steps=3))
    x = networks[0](torch.randn(6, 6, generator=torch.Generator().manual_seed(2))).detach()
    aim = networks[0](torch.full((1, 6), 1.5)).detach()

    def apart(x: Tensor) -> Tensor:
        return (filter(x) - filter(aim)).flatten(1).norm(dim=1)

    def model(x: Tensor) -> Tensor:
        """Never fooled, and the less far from it the nearer the two are."""
        return torch.stack([torch.zeros(len(x)), -apart(x)], 1)

    candidates, y = (aim, torch.tensor([1])), torch.zeros(6, dtype=torch.long)
    x_adv = feature_matching(model, x, y, features=filter, candidates=candidates, eps=0.2, steps=20)
    assert (apart(x_adv) < 0.5 * apart(x)).all()
    assert all(p.grad is None for p in filter.parameters())


# --- The range ---


def plane(linear: Any) -> Tensor:
    """The orthogonal projector (64, 64) on the range's directions."""
    a = linear.matrix.detach().float()
    return a @ torch.linalg.inv(a.T @ a) @ a.T


def near_the_plane(linear: Any, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """Images (N, 1, 8, 8) at most 0.2 off it, their projections and latents."""
    rng = torch.Generator().manual_seed(4)
    z = torch.randn(n, 5, generator=rng) / 2
    x = linear(z).detach() + 0.02 * torch.randn(n, 1, 8, 8, generator=rng)
    nearest = linear.double().solve(x.double()).float()
    linear.float()
    return x, linear(nearest).detach(), nearest


@pytest.mark.parametrize("eps", [0.3, 1.0])
@pytest.mark.parametrize("started", [True, False])
def test_on_a_plane_the_range_attack_ends_at_the_edge_of_the_ball(
    linear: Any, eps: float, started: bool
) -> None:
    """At `x̂ − √(ε² − ‖x − x̂‖²) Pw / ‖Pw‖`, x̂ the nearest point of the plane."""
    linear.float()
    x, nearest, z = near_the_plane(linear, 6)
    model, y = Linear(FOOLED), torch.ones(6, dtype=torch.long)
    along = plane(linear) @ model.w.flatten()
    reach = (eps**2 - (x - nearest).flatten(1).square().sum(1)).sqrt()
    best = nearest - (reach[:, None] * along / along.norm()).view_as(x)
    found = range_attack(
        model,
        x,
        y,
        generator=linear,
        z=z if started else None,
        norm="l2",
        eps=eps,
        steps=150,
        strict=True,
        stop_early=False,
    )
    share = gain(model, found, x) / gain(model, best, x)
    assert (share <= 1 + 1e-3).all(), share
    assert (share >= 0.97).all(), share
    torch.testing.assert_close(
        linear(linear.double().solve(found.double())).float(), found, atol=2e-5, rtol=0
    )


def test_one_step_does_not_end_there(linear: Any) -> None:
    linear.float()
    x, _, z = near_the_plane(linear, 6)
    model, y = Linear(FOOLED), torch.ones(6, dtype=torch.long)
    settings: dict[str, Any] = {"generator": linear, "z": z, "norm": "l2", "eps": 1.0, "stop_early": False}
    few, many = (range_attack(model, x, y, steps=steps, **settings) for steps in (1, 150))
    assert (gain(model, few, x) < 0.6 * gain(model, many, x)).all()


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_success_on_the_range_is_what_can_be_had_there(linear: Any, norm: Any, strict: bool) -> None:
    """The boundary is put where the cut of plane and ball reaches it by 10 %, and where it falls short."""
    linear.float()
    z = torch.randn(1, 5, generator=torch.Generator().manual_seed(4)) / 4
    x, y, eps = (
        linear(z).detach(),
        torch.ones(1, dtype=torch.long),
        {"linf": 0.05, "l2": 0.3, "l1": 2.0}[norm],
    )
    w, a = Linear(0.0).w.flatten(), linear.matrix.detach()
    if norm == "l2":
        most = eps * float((plane(linear) @ w).norm())
    elif norm == "linf":
        most = -linprog(
            (w @ a).numpy(), torch.cat([a, -a]).numpy(), [eps] * 128, bounds=[(None, None)] * 5
        ).fun
    else:  # min c·z, s.t. |Az| ≤ t, Σt ≤ eps
        rows = torch.cat([torch.cat([a, -torch.eye(64)], 1), torch.cat([-a, -torch.eye(64)], 1)])
        rows = torch.cat([rows, torch.cat([torch.zeros(5), torch.ones(64)])[None]])
        cost = torch.cat([w @ a, torch.zeros(64)])
        most = -linprog(cost.numpy(), rows.numpy(), [0.0] * 128 + [eps], bounds=[(None, None)] * 69).fun
    clean = float(((x - 0.5).flatten() * w).sum())
    settings: dict[str, Any] = {"generator": linear, "z": z, "norm": norm, "eps": eps, "strict": strict}
    within, beyond = Linear(0.9 * most - clean), Linear(1.1 * most - clean)
    x_adv = range_attack(within, x, y, **settings)
    assert fooled(within(x_adv), y, False).all()
    assert (geometry(norm).size(x_adv - x) <= eps * (1 + 1e-5)).all()
    if strict:  # off the plane there is more to be had
        assert torch.equal(range_attack(beyond, x, y, **settings), x)


def test_what_fools_the_surrogate_alone_does_not_count(linear: Any) -> None:
    linear.float()
    x, _, z = near_the_plane(linear, 4)
    y = torch.ones(4, dtype=torch.long)
    settings: dict[str, Any] = {"generator": linear, "z": z, "norm": "l2", "eps": 1.0}
    easy = Linear(0.3 - float(((x - 0.5) * Linear(0.0).w).flatten(1).sum(1).min()))
    assert (easy(x).argmax(1) == 1).all()
    assert fooled(easy(range_attack(easy, x, y, **settings)), y, False).any()
    assert torch.equal(range_attack(Linear(1e3), x, y, surrogate=easy, **settings), x)


def test_a_filter_hands_the_range_attack_through_and_masks_nothing() -> None:
    """Behind an exact projection whose gradient is hidden, PGD finds nothing and the range attack does."""
    generator = Curved()
    filter = ManifoldFilter(generator, config=ProjectionConfig("lbfgs", "origin", steps=30))
    z = torch.randn(6, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64) / 3
    x = generator(z).detach()
    w = Linear(0.0).w.double()
    bias = 0.3 - float(((filter(x) - 0.5) * w).flatten(1).sum(1).min())
    classifier = Linear(bias).double()
    classifier.w = w

    def deployed(x: Tensor) -> Tensor:
        return classifier(filter(x.detach()) + 0 * x)

    y = torch.ones(6, dtype=torch.long)
    settings: dict[str, Any] = {"norm": "l2", "eps": 1.0, "steps": 25}
    assert (deployed(x).argmax(1) == 1).all()
    assert not fooled(deployed(pgd(deployed, x, y, random_start=False, **settings)), y, False).any()
    found = range_attack(deployed, x, y, generator=generator, z=z, surrogate=classifier, **settings)
    wrong = fooled(deployed(found), y, False)
    assert wrong.any()
    assert torch.equal(found[~wrong], x[~wrong])
    assert all(p.grad is None for p in generator.parameters())


# --- Pairs ---


@pytest.mark.parametrize("scale", [1.0, 1000.0])
@pytest.mark.parametrize("m", [0.0, 3.0])
@pytest.mark.parametrize("eps", [0.1, 0.5])
def test_pairs_on_a_plane_are_as_far_apart_in_logits_as_can_be(
    linear: Any, scale: float, m: float, eps: float
) -> None:
    """`Z₁ − Z₀` changes by at most `eps ‖Pw‖` on it; a half of that on each side of the boundary."""
    linear.float()
    model = Linear(m, scale)
    most = scale * eps * float((plane(linear) @ model.w.flatten()).norm()) / 2
    pairs = overpowered_pairs(model, linear, n=10, eps=eps)
    assert pairs.found.all()
    assert (pairs.gap <= most * (1 + 1e-4)).all()
    assert (pairs.gap >= 0.95 * most).all(), pairs.gap / most
    assert (pairs.distance <= eps).all()
    assert torch.equal(linear(pairs.z1), pairs.x1)
    assert torch.equal(linear(pairs.z2), pairs.x2)
    torch.testing.assert_close(pairs.distance, (pairs.x1 - pairs.x2).flatten(1).norm(dim=1))
    assert (model(pairs.x1).argmax(1) != model(pairs.x2).argmax(1)).all()


@pytest.mark.parametrize("eps", [0.05, 0.2])
def test_pairs_on_a_curved_range(networks: Any, eps: float) -> None:
    generator, model, before = networks[0], network(3), torch.get_rng_state()
    pairs = overpowered_pairs(model, generator, n=8, eps=eps)
    assert pairs.found.float().mean() > 0.7
    assert (pairs.distance <= eps).all()
    labels = [logits_of(model, x).argmax(1) for x in (pairs.x1, pairs.x2)]
    assert torch.equal(labels[0] != labels[1], pairs.found)
    assert not pairs.x1.requires_grad
    assert model.training
    assert all(p.grad is None for m in (model, generator) for p in m.parameters())
    assert torch.equal(before, torch.get_rng_state())
    again = overpowered_pairs(model, generator, n=8, eps=eps)
    assert torch.equal(pairs.z1, again.z1)
    other = overpowered_pairs(model, generator, n=8, eps=eps, seed=1)
    assert not torch.equal(pairs.z1, other.z1)


def test_pairs_stay_around_what_they_are_of(networks: Any) -> None:
    generator, model = networks[0], network(3)
    centre = torch.randn(40, generator.latent_dim, generator=torch.Generator().manual_seed(2))
    pairs = overpowered_pairs(model, generator, around=(centre, 0.2), eps=0.5, steps=60)
    for z in (pairs.z1, pairs.z2):
        assert ((z - centre).abs() <= 0.2 + 1e-6).all()
        assert ((z - centre).abs() > 0.15)[pairs.found].any()
    wide = overpowered_pairs(model, generator, around=(centre, 2.0), eps=0.5, steps=60)
    assert 0 < int(pairs.found.sum()) < int(wide.found.sum())
    again = overpowered_pairs(model, generator, around=(centre, 0.2), eps=0.5, steps=60)
    assert torch.equal(pairs.z2, again.z2)
    with pytest.raises(ValueError, match=r"^around: expected no starts"):
        overpowered_pairs(model, generator, starts=(centre, centre), around=(centre, 0.2))
    with pytest.raises(ValueError, match=r"^around: expected a radius above 0"):
        overpowered_pairs(model, generator, around=(centre, 0.0))


def test_where_there_is_no_pair_none_is_found(linear: Any) -> None:
    linear.float()
    starts = (torch.zeros(4, 5), torch.ones(4, 5))
    pairs = overpowered_pairs(Linear(1e6), linear, starts=starts, eps=0.3, steps=20)
    assert not pairs.found.any()
    assert torch.equal(pairs.x1, pairs.x2)
    assert (pairs.distance == 0).all()
    assert (pairs.gap <= 0).all()
    assert overpowered_pairs(Linear(0.0), linear, n=0).found.shape == (0,)


def test_a_pair_does_not_depend_on_the_others(linear: Any) -> None:
    rng = torch.Generator().manual_seed(0)
    starts = torch.randn(2, 4, 5, generator=rng).double()
    model = Linear(1.0).double()
    model.w = model.w.double()
    settings: dict[str, Any] = {"eps": 0.3, "steps": 60}
    together = overpowered_pairs(model, linear, starts=(starts[0], starts[1]), **settings)
    alone = overpowered_pairs(model, linear, starts=(starts[0, :1], starts[1, :1]), **settings)
    torch.testing.assert_close(alone.x2[0], together.x2[0])
    assert together.z1.dtype == torch.float64


def test_the_break_is_a_point_of_the_range_and_not_of_the_ball_alone(linear: Any) -> None:
    linear.float()
    x, nearest, z = near_the_plane(linear, 5)
    y = torch.ones(5, dtype=torch.long)
    model = Linear(1.0 - float(((nearest - 0.5) * Linear(0.0).w).flatten(1).sum(1).min()))
    x_adv = pair_break(model, x, y, generator=linear, z=z, eps=1.0)
    broken = fooled(model(x_adv), y, False)
    assert broken.any()
    back = linear(linear.double().solve(x_adv.double())).float()
    torch.testing.assert_close(back[broken], x_adv[broken], atol=2e-5, rtol=0)
    assert ((x_adv - x).flatten(1).norm(dim=1) <= 1.0 + 1e-5).all()
    assert torch.equal(x_adv[~broken], x[~broken])
    # A ball that does not reach the range holds no point of it.
    linear.float()
    assert torch.equal(pair_break(model, x, y, generator=linear, z=z, eps=0.02), x)
