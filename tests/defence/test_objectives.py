"""Objectives: what each is, on known models; and that a step down its gradient lowers it."""

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from manifold_defense import ManifoldFilter, ProjectionConfig
from manifold_defense.certification import interval_certificates, interval_logits
from manifold_defense.evaluation.baselines import Binarise, Jpeg, Preprocess, Preprocessed
from manifold_defense.hardening import (
    OBJECTIVES,
    Clean,
    Curriculum,
    Distillation,
    Dual,
    GradientPenalty,
    IntervalBounds,
    Latent,
    Mixture,
    Objective,
    Pgd,
    RobustManifold,
    Step,
    Trades,
    Union,
)
from manifold_defense.hardening.adversarial import training_attack
from manifold_defense.hardening.disturbance import Disturbance
from manifold_defense.types import Threat
from tests.defence.hardening_support import SMALL, classifier, with_batch_statistics


def test_every_objective_is_tested() -> None:
    assert {type(objective) for objective in SMALL.values()} == set(OBJECTIVES)
    assert len({kind.name for kind in OBJECTIVES}) == len(OBJECTIVES)


@pytest.mark.parametrize("name", SMALL)
def test_a_step_down_the_gradient_lowers_the_loss(digits: Any, manifold: ManifoldFilter, name: str) -> None:
    """By what the gradient says, to first order: the inner attack is held where it was (Danskin)."""
    x, y = digits[0][:32], digits[1][:32]
    model, step = classifier(), Step(seed=3, manifold=manifold)
    before = SMALL[name](model, x, y, step).mean()
    before.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= 0.01 * parameter.grad
    assert SMALL[name](model, x, y, step).mean() < before


# --- Objectives ---


def losses_of(objective: Objective, x: Tensor, y: Tensor, **step: Any) -> Tensor:
    return objective(classifier(), x, y, Step(**step))


_NO_DRAWS = ("clean", "mixture", "penalty-linf", "penalty-l2", "distillation", "interval_bounds")


# Not above the clean loss image by image: what they add is no attack on the images.
_NO_ATTACK = ("clean", "noise", "latent", "dual", "distillation")


@pytest.mark.parametrize("name", SMALL)
def test_an_objective_is_one_loss_an_image(digits: Any, manifold: ManifoldFilter, name: str) -> None:
    x, y = digits[0][:6], digits[1][:6]
    state = torch.random.get_rng_state()
    loss = losses_of(SMALL[name], x, y, manifold=manifold)
    assert loss.shape == (6,)
    assert loss.requires_grad
    assert torch.equal(loss, losses_of(SMALL[name], x, y, manifold=manifold))
    assert torch.equal(state, torch.random.get_rng_state())
    if name not in _NO_DRAWS:
        assert not torch.equal(loss, losses_of(SMALL[name], x, y, manifold=manifold, seed=1))
    if name not in _NO_ATTACK:
        assert loss.sum() > losses_of(Clean(), x, y).sum()


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_penalty_is_the_slope_of_the_loss(digits: Any, norm: Any) -> None:
    """Finite differences along the steepest direction of the ball, in float64."""
    x, y = digits[0][:8].double(), digits[1][:8]
    model = classifier().double()
    clean = Clean()(model, x, y, Step())
    found = (GradientPenalty(norm=norm, eps=1.0)(model, x, y, Step()) - clean).detach()
    x.requires_grad_(True)
    (gradient,) = torch.autograd.grad(Clean()(model, x, y, Step()).sum(), x)
    direction = (
        gradient.sign() if norm == "linf" else gradient / gradient.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    )
    h = 1e-6
    with torch.no_grad():
        up, down = (Clean()(model, x + s * h * direction, y, Step()) for s in (1, -1))
    torch.testing.assert_close(found, (up - down) / (2 * h), rtol=1e-4, atol=1e-8)


def test_trades_weighs_the_gap_to_the_clean_answer(digits: Any) -> None:
    x, y = digits[0][:20], digits[1][:20]
    clean = losses_of(Clean(), x, y)
    gaps = [losses_of(Trades(eps=0.1, steps=3, beta=beta), x, y) - clean for beta in (1.0, 3.0)]
    assert (gaps[0] > 0).all()
    torch.testing.assert_close(gaps[1], 3 * gaps[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", SMALL)
def test_answers_that_are_certain_have_a_gradient(digits: Any, manifold: ManifoldFilter, name: str) -> None:
    """Of logits so far apart that the softmax is 0 but for one class."""
    model = classifier()
    *_, last = (module for module in model.modules() if isinstance(module, nn.Linear))
    last.weight.data *= 1e4
    x, y = digits[0][:8], digits[1][:8]
    assert (model(x).softmax(1) == 0).any()
    SMALL[name](model, x, y, Step(manifold=manifold)).sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_trades_climbs_to_where_the_gap_is_largest() -> None:
    """Of a linear model of two classes: one of two corners of the ball, by where it begins."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    model[1].weight.data = torch.tensor([[1.0, -2.0, 0.5, 1.0], [-1.0, 1.0, 0.0, 3.0]])
    x, y = torch.full((1, 1, 2, 2), 0.5), torch.tensor([0])
    losses = Trades(eps=0.1, steps=5, beta=1.0)(model, x, y, Step(seed=0))
    away = (model[1].weight[1] - model[1].weight[0]).sign().view(1, 1, 2, 2)
    gaps = [
        F.kl_div(model(x + s * 0.1 * away).log_softmax(1), model(x).softmax(1), reduction="none").sum(1)
        for s in (1, -1)
    ]
    found = losses - F.cross_entropy(model(x), y, reduction="none")
    assert torch.stack([(found - gap).abs() for gap in gaps]).amin().item() < 1e-6


def test_a_mixture_remembers_its_gradients(digits: Any) -> None:
    x, y = digits[0][:20], digits[1][:20]
    forgetful, own = (losses_of(Mixture(eps=0.1, steps=5, decay=decay), x, y) for decay in (0.0, 1.0))
    assert not torch.allclose(forgetful, own)


def test_dual_training_is_half_in_pixels_and_half_in_latents(digits: Any, manifold: ManifoldFilter) -> None:
    x, y = digits[0][:20], digits[1][:20]
    both = losses_of(Dual(eps=0.1, eps_latent=0.2, steps=2), x, y, manifold=manifold)
    pixels = losses_of(Pgd(eps=0.1, steps=2), x, y)
    latents = losses_of(Latent(eps=0.2, steps=2, clean_share=0.0), x, y, manifold=manifold)
    torch.testing.assert_close(both, (pixels + latents) / 2)


def test_the_penalty_ramps(digits: Any) -> None:
    x, y = digits[0][:20], digits[1][:20]
    penalty = GradientPenalty(eps=0.1, ramp=0.5)
    clean, half, full = (losses_of(penalty, x, y, progress=p) for p in (0.0, 0.25, 0.5))
    torch.testing.assert_close(clean, losses_of(Clean(), x, y))
    torch.testing.assert_close(half - clean, (full - clean) / 2)


def test_pairs_weigh_as_they_are_told(digits: Any, manifold: ManifoldFilter, hardened: nn.Module) -> None:
    x, y, step = digits[0][:50], digits[1][:50], Step(manifold=manifold)
    objective = RobustManifold(eps=0.1, steps=2, ramp=0.0, weight=0.7, pairs=50, pair_eps=2.0, eps_latent=0.5)
    ends, labels = objective.found(hardened, x, y, step)
    assert len(labels) > 0
    paired = F.cross_entropy(hardened(ends), torch.cat([labels, labels]))
    own = Pgd(eps=0.1, steps=2, ramp=0.0)(hardened, x, y, step)
    torch.testing.assert_close(objective(hardened, x, y, step), own + 0.7 * paired)


@pytest.mark.parametrize("name", ["latent", "dual", "robust_manifold"])
def test_latents_are_attacked_in_full_under_autocast(
    digits: Any, manifold: ManifoldFilter, name: str
) -> None:
    asked: list[torch.dtype] = []
    handle = manifold.generator.register_forward_pre_hook(lambda _, given: asked.append(given[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        assert manifold.encoder(digits[0][:4]).dtype == torch.bfloat16
        losses = losses_of(SMALL[name], digits[0][:8], digits[1][:8], manifold=manifold)
    handle.remove()
    assert losses.isfinite().all()
    assert set(asked) == {torch.float32}


def test_the_curriculum_changes_the_ball(digits: Any) -> None:
    x, y = digits[0][:20], digits[1][:20]
    objective = Curriculum(eps_l2=0.8, eps=0.1, steps=3, switch=0.5)
    torch.testing.assert_close(losses_of(objective, x, y, progress=0.0), losses_of(Clean(), x, y))
    for progress, ball in ((0.49, Pgd(norm="l2", eps=0.8, steps=3)), (1.0, Pgd(eps=0.1, steps=3))):
        torch.testing.assert_close(losses_of(objective, x, y, progress=progress), losses_of(ball, x, y))


def test_distillation_learns_the_teachers_answers_at_the_temperature(digits: Any) -> None:
    x, y = digits[0][:20], digits[1][:20]
    teacher, objective = classifier(seed=5), Distillation(temperature=4.0)
    soft = (teacher(x) / 4).softmax(1)
    expected = -(soft * (classifier()(x) / 4).log_softmax(1)).sum(1)
    torch.testing.assert_close(losses_of(objective, x, y, teacher=teacher), expected)
    torch.testing.assert_close(
        losses_of(objective, x, y), F.cross_entropy(classifier()(x) / 4, y, reduction="none")
    )


def test_interval_bounds_grow_to_the_whole_radius(digits: Any) -> None:
    x, y = digits[0][:20], digits[1][:20]
    objective, clean = IntervalBounds(eps=0.05, kappa=0.25, warmup=0.1, ramp=0.5), losses_of(Clean(), x, y)
    torch.testing.assert_close(losses_of(objective, x, y, progress=0.1), clean)
    bounds = F.cross_entropy(interval_logits(classifier(), x, y, 0.05), y, reduction="none")
    torch.testing.assert_close(losses_of(objective, x, y, progress=0.6), 0.25 * clean + 0.75 * bounds)
    with pytest.raises(TypeError, match="ImageClassifier, got Sequential"):
        objective(with_batch_statistics(), x, y, Step())
    with pytest.raises(TypeError, match="cannot follow Jpeg"):
        objective(Preprocessed(Jpeg(), classifier()), x, y, Step())


@pytest.mark.parametrize("preprocess", [None, Binarise()])
def test_bounds_of_some_pixels_lie_between_an_attack_and_all(
    digits: Any, preprocess: Preprocess | None
) -> None:
    x, y = digits[0][:50], digits[1][:50]
    model: Any = classifier() if preprocess is None else Preprocessed(preprocess, classifier())
    every = F.cross_entropy(interval_logits(model, x, y, 0.2), y, reduction="none")
    x_adv = training_attack(model, x, y, norm="linf", eps=0.2, steps=2, seed=1)
    losses = [F.cross_entropy(model(x_adv), y, reduction="none")]
    for free in (1e-9, 0.3, 0.6, 1.0):
        losses.append(IntervalBounds(eps=0.2, kappa=0.0, free=free)(model, x, y, Step(seed=1)))
    torch.testing.assert_close(losses[0], losses[1])
    torch.testing.assert_close(losses[4], every)
    # The draws are nested: what is free at 0.3 is free at 0.6.
    for tighter, wider in pairwise(losses[1:]):
        assert (tighter <= wider + 1e-5).all()
        assert tighter.mean() < 0.99 * wider.mean()


def test_an_objective_that_proves_says_what(digits: Any) -> None:
    """As the certificates do, for the label that is asked for; none of the others proves anything."""
    x, y = digits[0][:50], digits[1][:50]
    model = classifier()
    prediction, radius = interval_certificates(model, x)
    eps = float(radius[prediction == y].median())
    proved = IntervalBounds(eps=eps).proved(model, x, y)
    assert torch.equal(proved, (prediction == y) & (radius >= eps))
    assert 0 < proved.sum() < (prediction == y).sum()
    assert not IntervalBounds(eps=eps).proved(model, x, (prediction + 1) % 10).any()
    others = [objective for objective in SMALL.values() if not isinstance(objective, IntervalBounds)]
    others.append(IntervalBounds(eps=eps, free=0.5))  # nor does one that bounds less than the ball
    assert all(objective.proved(model, x, y) is None for objective in others)


def test_without_a_clean_share_there_is_no_clean_pass(digits: Any) -> None:
    x, y = digits[0][:5], digits[1][:5]
    model = classifier()

    def refused(*_: Any) -> None:
        raise AssertionError("called")

    model.register_forward_pre_hook(refused)
    bounds = F.cross_entropy(interval_logits(model, x, y, 0.05), y, reduction="none")
    assert torch.equal(IntervalBounds(eps=0.05, kappa=0.0)(model, x, y, Step()), bounds)
    with pytest.raises(AssertionError, match="called"):
        IntervalBounds(eps=0.05, kappa=0.1)(model, x, y, Step())


def test_pairs_keep_the_label_of_their_image(digits: Any) -> None:
    """On a line with a known boundary: latents below 0 are one class, those above the other."""

    class Line(nn.Module):
        latent_dim, image_shape = 1, (1, 1, 2)

        def forward(self, z: Tensor) -> Tensor:
            return torch.stack([0.5 + z / 8, 0.5 - z / 8], 2).unsqueeze(1).squeeze(3).clamp(0, 1)

    class Back(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 8 * (x.flatten(1)[:, :1] - 0.5)

    def wrong(x: Tensor) -> Tensor:
        """A model that draws the boundary at 1, where the true one is at 0."""
        z = 8 * (x.flatten(1)[:, :1] - 0.5)
        return torch.cat([1 - z, z - 1], 1)

    line = ManifoldFilter(Line(), Back(), ProjectionConfig(steps=0))
    z = torch.tensor([[-2.0], [-0.9], [0.8], [1.2], [2.0]])
    y = (z > 0).long().squeeze(1)
    objective = RobustManifold(eps=0.0, pairs=5, pair_eps=0.2, pair_steps=60, eps_latent=0.25)
    ends, labels = objective.found(wrong, Line()(z), y, Step(manifold=line))
    assert len(labels) > 0
    assert (labels == 1).all()  # around 1 the true label is that of the upper half
    first, second = Back()(ends).squeeze(1).chunk(2)
    assert ((first - 1) * (second - 1) < 0).all()  # told apart by the model
    assert (first > 0).all()
    assert (second > 0).all()
    # Where the model's boundary is the true one, no pair is left to learn from.
    ends, labels = objective.found(
        lambda x: wrong(x) + torch.tensor([-1.0, 1.0]), Line()(z), y, Step(manifold=line)
    )
    assert len(labels) == 0
    assert ends.shape == (0, 1, 1, 2)


@pytest.mark.parametrize("name", ["latent", "dual", "robust_manifold"])
def test_an_objective_on_the_manifold_says_what_it_misses(digits: Any, name: str) -> None:
    with pytest.raises(ValueError, match="needs a filter with an encoder"):
        losses_of(SMALL[name], digits[0][:4], digits[1][:4])


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_a_setting_out_of_range_is_named(kind: Any) -> None:
    for key in ("eps", "steps", "sigma", "temperature", "beta", "pair_eps"):
        if key in kind.__dataclass_fields__:
            with pytest.raises(ValueError, match=f"^{key}: expected"):
                kind(**{key: -1})


def test_the_radius_ramps(digits: Any) -> None:
    x, y = digits[0][:20], digits[1][:20]
    objective, clean = Pgd(eps=0.2, steps=3, ramp=0.5), losses_of(Clean(), x, y)
    torch.testing.assert_close(losses_of(objective, x, y, progress=0.0), clean)
    means = [float(losses_of(objective, x, y, progress=p).mean().detach()) for p in (0, 0.25, 0.5, 1)]
    assert means[0] < means[1] < means[2] == means[3]
    constant = Pgd(eps=0.2, steps=3, ramp=0.0)
    assert float(losses_of(constant, x, y, progress=0.0).mean().detach()) == means[3]


def test_clean_share_blends(digits: Any) -> None:
    x, y = digits[0][:20], digits[1][:20]
    clean = losses_of(Clean(), x, y)
    hard = losses_of(Pgd(steps=3), x, y)
    mixed = losses_of(Pgd(steps=3, clean_share=0.25), x, y)
    torch.testing.assert_close(mixed, 0.25 * clean + 0.75 * hard)


def _union(kind: Any = "adversarial", *threats: Threat, **settings: Any) -> Union:
    settings = {"steps": 3, "ramp": 0.0} | settings
    return Union(disturbance=Disturbance(kind, threats, **settings))


def test_a_union_takes_its_threats_by_turns(digits: Any) -> None:
    x, y = digits[0][:20], digits[1][:20]
    ball, pixels = Threat("linf", 0.1), Threat("l0", 3)
    both = _union("adversarial", ball, pixels, ball)
    assert both.threats == (ball, pixels)
    for number, threat in enumerate((ball, pixels, ball, ball)):
        alone = losses_of(_union("adversarial", threat), x, y, number=number)
        assert torch.equal(losses_of(both, x, y, number=number), alone)
    assert not torch.equal(losses_of(both, x, y, number=0), losses_of(both, x, y, number=1))


def test_a_union_weighs_the_gap_to_the_clean_answer(digits: Any) -> None:
    """None without a disturbance; where one climbs more than where it is drawn, and the more the further."""
    x, y = digits[0][:50], digits[1][:50]
    clean, l2 = losses_of(Clean(), x, y), Threat("l2", 1.0)
    torch.testing.assert_close(losses_of(_union("none", l2), x, y), clean)
    assert _union("none", l2).threats == _union("noise", l2).threats == ()  # it is hardened for nothing
    gaps = [
        (losses_of(objective, x, y) - clean).mean()
        for objective in (_union("noise", l2), _union("adversarial", l2, steps=1), _union("adversarial", l2))
    ]
    assert 0 < 2 * gaps[0] < gaps[1] < gaps[2]
    half = replace(_union("adversarial", l2), beta=3.0)
    torch.testing.assert_close(2 * (losses_of(half, x, y) - clean).mean(), gaps[2])


def test_a_union_climbs_the_lead_of_the_nearest_other_class() -> None:
    """Not cross-entropy, which a class further behind but steeper would lead the other way."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    model[1].weight.data = torch.tensor([[0.0], [0.1], [-3.0]]).expand(3, 4).contiguous()
    model[1].bias.data = torch.tensor([4.0, 2.0, 5.5])
    x, y = torch.full((1, 1, 2, 2), 0.5), torch.tensor([0])
    gradient = torch.autograd.functional.jacobian(lambda at: F.cross_entropy(model(at), y), x)
    assert (gradient < 0).all()  # towards class 2; but 1 is the nearest in all of the ball
    losses = _union("adversarial", Threat("linf", 0.1))(model, x, y, Step(seed=0))
    furthest = F.kl_div(model(x + 0.1).log_softmax(1), model(x).softmax(1), reduction="none").sum(1)
    torch.testing.assert_close(losses, F.cross_entropy(model(x), y, reduction="none") + 6 * furthest)


@pytest.mark.parametrize("kind", [GradientPenalty, Mixture])
def test_an_objective_of_two_norms_refuses_a_third(kind: Any) -> None:
    with pytest.raises(ValueError, match=r"norm: expected one of linf, l2, got 'l1'"):
        kind(norm="l1")


def test_bounds_without_a_ramp_wait_for_the_end_of_the_warmup(digits: Any) -> None:
    x, y = digits[0][:10], digits[1][:10]
    bounds = IntervalBounds(eps=0.05, warmup=0.5, ramp=0.0)
    torch.testing.assert_close(losses_of(bounds, x, y, progress=0.4), losses_of(Clean(), x, y))
    assert (losses_of(bounds, x, y, progress=0.5) > losses_of(Clean(), x, y)).all()
