"""The reject option, whose curve and thresholds are counted by hand, and the randomised filter."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from manifold_defense import DefendedClassifier, ManifoldFilter, ProjectionConfig
from manifold_defense.attacks import Expectation, detector_aware, fgsm, mean_over_draws, pgd
from manifold_defense.evaluation import Defence
from manifold_defense.evaluation.baselines import Preprocessed, RandomNoise
from manifold_defense.randomised import RandomisedFilter, seeded
from manifold_defense.rejection import REJECTED, RejectingClassifier, credited, roc, threshold_at
from tests.defence.attack_table import Linear

SOLVED = ProjectionConfig("lbfgs", "prior", steps=40)
SHORT = ProjectionConfig("gd", "prior", steps=2)


def on_range(linear: Any, n: int, seed: int = 0) -> Tensor:
    """(N, 1, 8, 8)"""
    z = torch.randn(n, 5, generator=torch.Generator().manual_seed(seed)).to(linear.matrix) / 2
    return linear(z).detach()


def off_range(linear: Any, n: int, length: float) -> Tensor:
    """Directions orthogonal to the range, of the given length."""
    noise = torch.randn(n, 64, generator=torch.Generator().manual_seed(9)).to(linear.matrix)
    residual = noise - (linear(linear.solve(noise + 0.5)).detach().flatten(1) - 0.5)
    return length * (residual / residual.norm(dim=1, keepdim=True)).view(n, 1, 8, 8)


# --- The reject option ---


@pytest.mark.parametrize("length", [0.0, 0.4, 0.8])
def test_the_residual_is_the_squared_distance_to_the_range(linear: Any, length: float) -> None:
    model = RejectingClassifier(ManifoldFilter(linear, config=SOLVED), Linear(0.0).double(), 0.005)
    x = on_range(linear, 6) + off_range(linear, 6, length)
    expected = torch.full((6,), length**2 / 64, dtype=torch.float64)
    torch.testing.assert_close(model.residual(x), expected, atol=1e-9, rtol=1e-6)
    refused = model.predict(x) == REJECTED
    assert refused.all() if length**2 / 64 > 0.005 else not refused.any()
    labels = Linear(0.0).double()(linear(linear.solve(x))).argmax(1)
    assert torch.equal(model.predict(x)[~refused], labels[~refused])


def test_the_gradient_of_the_residual_is_that_of_the_distance(linear: Any) -> None:
    """`2 (x − G(z*)) / P`: at the optimum the projection itself adds nothing."""
    model = RejectingClassifier(ManifoldFilter(linear, config=SOLVED), Linear(0.0).double(), 0.005)
    delta = off_range(linear, 3, 0.5)
    x = (on_range(linear, 3) + delta).requires_grad_(True)
    for seen in (model, model.view("identity"), model.view("tangent")):
        (gradient,) = torch.autograd.grad(seen.residual(x).sum(), x)
        torch.testing.assert_close(gradient, 2 * delta / 64, atol=1e-7, rtol=0)


def test_who_is_refused_does_not_depend_on_the_strength_what_the_others_are_called_does(linear: Any) -> None:
    classifier = Linear(0.0).double()
    whole, part = (
        RejectingClassifier(ManifoldFilter(linear, config=replace(SOLVED, strength=s)), classifier, 0.005)
        for s in (1.0, 0.01)
    )
    x = on_range(linear, 40) + off_range(linear, 40, 0.4)
    torch.testing.assert_close(part.residual(x), whole.residual(x))
    assert not (part.predict(x) == REJECTED).any()
    assert torch.equal(part.predict(x), classifier(x + 0.01 * (part.filter.drawing(x) - x)).argmax(1))
    far = on_range(linear, 40) + off_range(linear, 40, 0.8)
    assert (part.predict(far) == REJECTED).all()


def test_logits_are_those_of_the_filter_whether_refused_or_not(linear: Any) -> None:
    filter = ManifoldFilter(linear, config=SHORT)
    model = RejectingClassifier(filter, Linear(0.0).double(), 0.0)
    x = on_range(linear, 4) + off_range(linear, 4, 0.3)
    assert (model.predict(x) == REJECTED).all()
    expected = DefendedClassifier(filter, model.classifier)
    assert torch.equal(model(x), expected(x))
    assert torch.equal(model.view("identity")(x), expected(x))
    assert model.view("identity").threshold == 0.0


def test_what_is_not_finite_is_refused(linear: Any) -> None:
    filter = ManifoldFilter(linear, config=SHORT)
    x = on_range(linear, 3)
    broken = RejectingClassifier(filter, Linear(float("nan")).double(), float("inf"))
    assert (broken.predict(x) == REJECTED).all()
    assert (RejectingClassifier(filter, Linear(0.0).double(), float("inf")).predict(x) >= 0).all()


@pytest.mark.parametrize("threshold", [-1.0, float("nan")])
def test_a_threshold_below_zero_is_refused(linear: Any, threshold: float) -> None:
    with pytest.raises(ValueError, match=r"^threshold: expected at least 0"):
        RejectingClassifier(ManifoldFilter(linear, config=SHORT), nn.Identity(), threshold)


def test_a_refusal_is_a_defence_against_an_attack_and_an_error_on_a_clean_image() -> None:
    predictions, y = torch.tensor([0, 1, REJECTED]), torch.tensor([0, 0, 0])
    assert credited(predictions, y, attacked=True).tolist() == [True, False, True]
    assert credited(predictions, y, attacked=False).tolist() == [True, False, False]


# --- Thresholds and curves ---


@pytest.mark.parametrize(("rate", "refused"), [(0.0, 0), (0.05, 0), (0.1, 1), (0.29, 2), (0.3, 3), (0.99, 9)])
def test_a_threshold_refuses_as_many_clean_images_as_it_may(rate: float, refused: int) -> None:
    errors = torch.randperm(10, generator=torch.Generator().manual_seed(0)).double() / 7
    threshold = threshold_at(errors, rate)
    assert int((errors > threshold).sum()) == refused
    # None lower would do.
    assert int((errors > threshold - 1e-6).sum()) == refused + 1


def test_rates_that_have_no_exact_float_are_met() -> None:
    errors = torch.arange(100.0)
    for percent in range(100):
        assert int((errors > threshold_at(errors, percent / 100)).sum()) == percent


def test_ties_never_refuse_too_many() -> None:
    assert threshold_at(torch.tensor([1.0, 2.0, 2.0, 2.0]), 0.5) == 2.0


def test_a_curve_by_hand() -> None:
    curve = roc(torch.tensor([0.1, 0.2, 0.3, 0.4]), torch.tensor([0.25, 0.5]))
    assert curve.thresholds.tolist() == pytest.approx([0.5, 0.4, 0.3, 0.25, 0.2, 0.1, -torch.inf])
    assert curve.fpr.tolist() == pytest.approx([0, 0, 0.25, 0.5, 0.5, 0.75, 1])
    assert curve.tpr.tolist() == pytest.approx([0, 0.5, 0.5, 0.5, 1, 1, 1])
    assert curve.auc == pytest.approx(6 / 8)  # of 8 pairs, 6 are in order


@pytest.mark.parametrize(("shift", "area"), [(0.0, 0.5), (1.0, 0.76025), (3.0, 0.98305), (-1.0, 0.23975)])
def test_the_area_of_two_gaussians(shift: float, area: float) -> None:
    """Φ(d / √2) for a shift of d standard deviations."""
    rng = torch.Generator().manual_seed(0)
    clean, attacked = torch.randn(20000, generator=rng), torch.randn(20000, generator=rng) + shift
    curve = roc(clean, attacked)
    assert curve.auc == pytest.approx(area, abs=0.006)
    assert (curve.fpr[0], curve.tpr[0], curve.fpr[-1], curve.tpr[-1]) == (0, 0, 1, 1)
    assert (curve.fpr.diff() >= 0).all()
    assert (curve.tpr.diff() >= 0).all()


def test_ties_count_one_half() -> None:
    rng = torch.Generator().manual_seed(0)
    clean = torch.randint(0, 4, (30,), generator=rng).float()
    attacked = torch.randint(1, 5, (20,), generator=rng).float()
    pairs = attacked.unsqueeze(1) - clean
    assert roc(clean, attacked).auc == pytest.approx(
        float((pairs > 0).double().mean() + (pairs == 0).double().mean() / 2)
    )


@pytest.mark.parametrize("errors", [torch.zeros(0), torch.tensor([float("nan")]), torch.zeros(2, 2)])
def test_errors_that_are_none_are_refused(errors: Tensor) -> None:
    with pytest.raises(ValueError, match="expected shape"):
        roc(errors, torch.zeros(3))
    with pytest.raises(ValueError, match="expected shape"):
        threshold_at(errors, 0.1)
    with pytest.raises(ValueError, match="false_positive_rate"):
        threshold_at(torch.zeros(3), 1.0)


def test_a_detector_catches_who_does_not_know_of_it_and_not_who_does(linear: Any) -> None:
    """On the range f errs within reach; the plain attack leaves the range, the one that knows stays."""
    linear.float()
    filter, x = ManifoldFilter(linear, config=SOLVED), on_range(linear, 12)
    score = ((x - 0.5) * Linear(0.0).w).flatten(1).sum(1)
    model = RejectingClassifier(filter, Linear(0.5 - float(score.min())), 1e-3)
    y = model.predict(x)
    assert (y == 1).all()
    settings: dict[str, Any] = {"norm": "l2", "eps": 1.5, "steps": 25}
    # In the identity view an attack sees the pixels, and does not know that most of its way is lost.
    unaware = pgd(model.classifier, x, y, stop_early=False, **settings)
    assert credited(model.predict(unaware), y, attacked=True).float().mean() > 0.9
    assert (model.predict(unaware) == REJECTED).float().mean() > 0.9
    aware = detector_aware(model, x, y, residual=model.residual, threshold=model.threshold, **settings)
    fooled = ~credited(model.predict(aware), y, attacked=True)
    assert fooled.any()
    assert (model.predict(aware)[fooled] == 0).all()
    assert (model.residual(aware)[fooled] <= model.threshold).all()
    # What it could not do comes back clean.
    assert torch.equal(aware[~fooled], x[~fooled])


# --- The randomised filter ---


@pytest.fixture
def randomised(networks: Any) -> RandomisedFilter:
    return RandomisedFilter(ManifoldFilter(networks[0], config=SHORT), seed=3)


def pictures(n: int) -> Tensor:
    return torch.rand(n, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def test_every_call_is_a_new_draw_and_a_seed_begins_them_anew(randomised: RandomisedFilter) -> None:
    x, before = pictures(3), torch.get_rng_state()
    first, second = randomised(x), randomised(x)
    assert not torch.equal(first, second)
    randomised.reseed(3)
    assert torch.equal(randomised(x), first)
    assert torch.equal(randomised.project(x).image, second)
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(RandomisedFilter(randomised.draw(), seed=3)(x), first)


def test_a_draw_is_a_filter_whose_starts_stay(randomised: RandomisedFilter) -> None:
    x = pictures(3)
    draw = randomised.draw()
    assert torch.equal(draw(x), draw(x))
    fixed = ManifoldFilter(randomised.generator, config=draw.config)
    assert torch.equal(draw(x), fixed(x))
    # An image's result does not depend on the rest of the batch, as ever.
    randomised.reseed(3)
    together = randomised(x)
    randomised.reseed(3)
    torch.testing.assert_close(randomised(x[:1])[0], together[0])


def test_the_views_share_the_draws_and_never_change_the_result(randomised: RandomisedFilter) -> None:
    x = pictures(2).requires_grad_(True)
    randomised.reseed(8)
    expected = randomised(x).detach()
    for view in randomised.views():
        seen = randomised.seen(view)
        assert isinstance(seen, RandomisedFilter)
        randomised.reseed(8)  # as the evaluator does, who knows the deployed filter alone
        assert torch.equal(seen(x), expected), view
    more = randomised.configured(ProjectionConfig("gd", "prior", steps=3))
    randomised.reseed(3)
    fewer = more(x)
    randomised.reseed(3)
    assert not torch.equal(randomised(x), fewer)


def test_a_filter_without_prior_starts_cannot_be_randomised(networks: Any) -> None:
    for config in (ProjectionConfig(), ProjectionConfig(start="bank")):
        with pytest.raises(ValueError, match="prior starts"):
            RandomisedFilter(ManifoldFilter(*networks, config))
    RandomisedFilter(ManifoldFilter(*networks, ProjectionConfig(restarts=2)))


def test_the_exact_gradient_is_that_of_its_own_draw(randomised: RandomisedFilter) -> None:
    x = pictures(2).requires_grad_(True)
    (gradient,) = torch.autograd.grad(randomised(x).square().sum(), x)
    randomised.reseed(3)
    (expected,) = torch.autograd.grad(randomised.draw()(x).square().sum(), x)
    assert torch.equal(gradient, expected)


# --- Expectation over draws ---


class Shaken(nn.Module):
    """Logits (N, 2) whose difference is `(w + ξ)·(x − ½) + m`, ξ fresh at every call."""

    def __init__(self, m: float = 0.0, spread: float = 3.0) -> None:
        super().__init__()
        self.w, self.m, self.spread = Linear(0.0).w, m, spread
        self.rng = torch.Generator().manual_seed(11)

    def direction(self) -> Tensor:
        return self.w + self.spread * torch.randn(self.w.shape, generator=self.rng)

    def forward(self, x: Tensor) -> Tensor:
        difference = ((x - 0.5) * self.direction()).flatten(1).sum(1) + self.m
        # What a draw adds to all logits is nothing, even where it is much.
        return torch.stack([-difference / 2, difference / 2], 1) + 10 * torch.randn((), generator=self.rng)


def test_an_attack_on_the_expectation_ends_where_the_averaged_gradient_points() -> None:
    model, x, y = Shaken(m=30.0), torch.full((2, 1, 8, 8), 0.5), torch.ones(2, dtype=torch.long)
    with seeded(model, 5):
        draws = []
        for _ in range(15):
            draws.append(model.direction())
            torch.randn((), generator=model.rng)
    expectation = Expectation(model, draws=15, seed=5)
    # Where all draws have the same margin, each of them counts alike.
    x_adv = fgsm(expectation, x, y, eps=0.1, loss="margin")
    torch.testing.assert_close(x_adv, x - 0.1 * torch.stack(draws).mean(0).sign(), atol=1e-5, rtol=0)
    assert not torch.equal(x_adv, fgsm(Expectation(model, 15, seed=6), x, y, eps=0.1))


def test_an_expectation_is_a_function_and_leaves_the_model_in_its_place() -> None:
    model, x = Shaken(), pictures(4)
    before, place = torch.get_rng_state(), model.rng.get_state()
    expectation = Expectation(model, draws=4, seed=2)
    first = expectation(x)
    assert torch.equal(expectation(x), first)
    assert torch.equal(model.rng.get_state(), place)
    assert torch.equal(before, torch.get_rng_state())
    assert not torch.equal(Expectation(model, draws=4, seed=3)(x), first)
    assert not torch.equal(Expectation(model, draws=5, seed=2)(x), first)


def test_a_model_that_draws_from_the_global_generator_is_repeated_as_well() -> None:
    x, before = pictures(4), torch.get_rng_state()
    expectation = Expectation(lambda x: Linear(0.0)(x + torch.randn_like(x)), draws=3)
    assert torch.equal(expectation(x), expectation(x))
    assert torch.equal(before, torch.get_rng_state())


def test_the_share_of_draws_is_that_of_the_normal_distribution() -> None:
    """The difference is normal with mean w·δ + m and standard deviation `spread ‖δ‖`."""
    model, delta = Shaken(m=1.0, spread=3.0), torch.zeros(3, 1, 8, 8)
    delta[:, 0, 0, 0] = torch.tensor([0.0, 0.2, 0.5])
    y = torch.ones(3, dtype=torch.long)
    share = mean_over_draws(model, 0.5 + delta, y, draws=4000)
    moved = delta[:, 0, 0, 0] * Linear(0.0).w[0, 0, 0] + 1.0
    expected = torch.special.ndtr(moved / (3.0 * delta[:, 0, 0, 0]).clamp(min=1e-6))
    torch.testing.assert_close(share.float(), expected, atol=0.02, rtol=0)
    assert torch.equal(share, mean_over_draws(model, 0.5 + delta, y, draws=4000))


def test_averaging_finds_more_than_a_single_draw() -> None:
    """Scored on draws that neither attack has seen; a single draw's gradient is mostly noise."""
    model, x, y = Shaken(m=3.0), torch.full((4, 1, 8, 8), 0.5), torch.ones(4, dtype=torch.long)
    left = {
        draws: float(
            mean_over_draws(
                model, pgd(Expectation(model, draws), x, y, eps=0.08, stop_early=False), y, draws=300
            ).mean()
        )
        for draws in (1, 30)
    }
    assert left[30] < left[1] - 0.1


def test_the_scale_of_the_logits_does_not_help_a_model_that_draws() -> None:
    """Its labels do not depend on it."""
    x, y = torch.full((4, 1, 8, 8), 0.5), torch.ones(4, dtype=torch.long)
    left = []
    for gain in (1.0, 300.0):
        model = Scaled(Shaken(m=3.0), gain)
        x_adv = pgd(Expectation(model, 20), x, y, eps=0.08, loss="margin", stop_early=False)
        left.append(float(mean_over_draws(model, x_adv, y, draws=300).mean()))
    assert left[1] == pytest.approx(left[0], abs=0.05)


class Scaled(nn.Module):
    def __init__(self, model: nn.Module, gain: float) -> None:
        super().__init__()
        self.model, self.gain = model, gain

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.gain * self.model(x)
        return logits


def test_of_what_draws_the_mean_is_attacked_and_many_draws_count(randomised: RandomisedFilter) -> None:
    classifier = Linear(1.0)
    noisy = Defence.of("noisy", Preprocessed(RandomNoise(0.1), classifier))
    for defence in (noisy, Defence.of("drawing", DefendedClassifier(randomised, classifier))):
        assert defence.draws == 100
        assert {view for view, model in defence.attacked.items() if not isinstance(model, Expectation)} == {
            "unaware"
        }
        assert {model.draws for model in defence.attacked.values() if isinstance(model, Expectation)} == {20}
    still = DefendedClassifier(randomised.draw(), classifier)
    assert Defence.of("still", still).draws == 1
    again = noisy.averaged(3, 7)
    assert again.draws == 7
    exact: Any = again.attacked["exact"]
    assert exact.draws == 3
    assert not isinstance(exact.model, Expectation)


def test_a_deterministic_model_is_its_own_expectation(linear: Any) -> None:
    model, x = Linear(1.0), pictures(3)
    torch.testing.assert_close(Expectation(model, 3)(x), model(x).log_softmax(1))
    drawn = Shaken(spread=5.0)
    with seeded(drawn, 8):
        chances = torch.stack([drawn(x).softmax(1) for _ in range(4)]).double()
    expected = (chances.mean(0).log() + chances.log().mean(0)) / 2
    torch.testing.assert_close(Expectation(drawn, 4, seed=8)(x).double(), expected, atol=1e-3, rtol=1e-4)
    share = mean_over_draws(model, x, model(x).argmax(1), draws=3)
    assert torch.equal(share, torch.ones(3, dtype=torch.float64))
    for call in (
        lambda: Expectation(model, 0),
        lambda: mean_over_draws(model, x, x[:, 0, 0, 0].long(), draws=0),
    ):
        with pytest.raises(ValueError, match=r"^draws: expected at least 1, got 0"):
            call()
