"""Hardening: objectives that fall, robustness that rises, and runs that resume bit for bit."""

from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning_fabric import Fabric
from state_support import tensors
from torch import Tensor, nn
from torch.nn import functional as F

from gan.optimisation import seeded
from gan.sampling import batch_indices
from manifold_defense import DefendedClassifier, ManifoldFilter, ProjectionConfig
from manifold_defense.attacks import pgd
from manifold_defense.certification import interval_certificates, interval_logits
from manifold_defense.classifiers import ArchitectureConfig, ImageClassifier
from manifold_defense.evaluation.baselines import BitDepth, Jpeg, Preprocessed
from manifold_defense.hardening import (
    OBJECTIVES,
    Clean,
    Curriculum,
    Distillation,
    Dual,
    Fast,
    GradientPenalty,
    IntervalBounds,
    Latent,
    Mixture,
    Noise,
    Objective,
    Pgd,
    RobustManifold,
    Step,
    Trades,
)
from manifold_defense.hardening.training import TrainingConfig, classifier_state, train_classifier

CONFIG = TrainingConfig(images=40 * 32, batch_size=32, lr=5e-3, average_half_life=200)


def classifier(seed: int = 0) -> nn.Module:
    return seeded(seed, lambda: ImageClassifier((1, 8, 8), 10, ArchitectureConfig(width=8)))


def with_batch_statistics(seed: int = 0) -> nn.Module:
    """Buffers, whole numbers among them, that an average and a saved state must carry."""
    return seeded(
        seed,
        lambda: nn.Sequential(
            nn.Conv2d(1, 4, 3, stride=2), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(36, 10)
        ),
    )


def batches_of(digits: tuple[Tensor, Tensor], config: TrainingConfig = CONFIG) -> Any:
    def batch(step: int) -> tuple[Tensor, Tensor]:
        chosen = batch_indices(len(digits[0]), config.batch_size, 3, step)
        return digits[0][chosen], digits[1][chosen]

    return batch


def trained(
    fabric: Fabric, digits: Any, objective: Objective, seed: int = 0, **aids: Any
) -> tuple[Any, list[float]]:
    """The final state and the losses on the way."""
    state = classifier_state(fabric, classifier(), CONFIG)
    records = list(train_classifier(fabric, state, batches_of(digits), CONFIG, objective, seed, **aids))
    assert records[-1].images == CONFIG.images
    assert len(records) == 40
    return state, [float(record.metrics["loss"]) for record in records]


def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    model.eval()
    with torch.no_grad():
        return float((model(x).argmax(1) == y).float().mean())


# Every objective there is, in small.
SMALL: dict[str, Objective] = {
    "clean": Clean(),
    "noise": Noise(sigma=0.2),
    "pgd-linf": Pgd(norm="linf", eps=0.1, steps=2),
    "pgd-l2": Pgd(norm="l2", eps=0.5, steps=2, ramp=0.0),
    "pgd-mixed": Pgd(norm="linf", eps=0.1, steps=2, clean_share=0.5),
    "fast": Fast(eps=0.1),
    "trades": Trades(eps=0.1, steps=2, beta=2.0),
    "mixture": Mixture(eps=0.1, steps=2),
    "curriculum": Curriculum(eps_l2=0.5, eps=0.1, steps=2),
    "latent": Latent(eps=0.2, steps=2),
    "dual": Dual(eps=0.1, eps_latent=0.2, steps=2),
    "robust_manifold": RobustManifold(eps=0.1, steps=2, pairs=8, pair_steps=3),
    "penalty-linf": GradientPenalty(eps=0.05),
    "penalty-l2": GradientPenalty(norm="l2", eps=0.5),
    "distillation": Distillation(temperature=5.0),
    "interval_bounds": IntervalBounds(eps=0.01),
}


def test_every_objective_is_tested() -> None:
    assert {type(objective) for objective in SMALL.values()} == set(OBJECTIVES)
    assert len({kind.name for kind in OBJECTIVES}) == len(OBJECTIVES)


class Mixtures(nn.Module):
    """Linear mixtures of the digits: a manifold whose encoder is known."""

    latent_dim, image_shape = 20, (1, 8, 8)

    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self.mean = x.mean(0)
        _, _, basis = torch.linalg.svd((x - self.mean).flatten(1), full_matrices=False)
        self.basis = basis[: self.latent_dim]

    def forward(self, z: Tensor) -> Tensor:
        return (self.mean + (z @ self.basis).unflatten(1, self.image_shape)).clamp(0, 1)


class Encoder(nn.Module):
    def __init__(self, mixtures: Mixtures) -> None:
        super().__init__()
        self.mixtures = mixtures

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mixtures.mean).flatten(1) @ self.mixtures.basis.T


@pytest.fixture(scope="module")
def manifold(digits: Any) -> ManifoldFilter:
    mixtures = Mixtures(digits[0])
    return ManifoldFilter(mixtures, Encoder(mixtures), ProjectionConfig(steps=0))


@pytest.mark.parametrize("name", SMALL)
def test_the_loss_falls(fabric: Fabric, digits: Any, manifold: ManifoldFilter, name: str) -> None:
    state, losses = trained(fabric, digits, SMALL[name], manifold=manifold)
    # A radius that grows, and a temperature, hold the loss up.
    slow = name in ("trades", "interval_bounds", "distillation", "robust_manifold")
    assert sum(losses[-5:]) < (0.9 if slow else 0.7) * sum(losses[:5])
    assert accuracy(state["best"], *digits) > 0.8


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


def test_clean_training_learns_digits_quickly(fabric: Fabric, digits: Any) -> None:
    state, _ = trained(fabric, digits, Clean())
    assert accuracy(classifier(), *digits) < 0.4
    assert accuracy(state["model"], *digits) > 0.9
    assert accuracy(state["average"], *digits) > 0.9


def test_adversarial_training_buys_robustness(fabric: Fabric, digits: Any) -> None:
    x, y = digits
    robust = {}
    for name, objective in (("clean", Clean()), ("pgd", Pgd(eps=0.15, steps=3))):
        model = trained(fabric, digits, objective)[0]["average"]
        robust[name] = accuracy(model, pgd(model, x, y, eps=0.15, steps=10), y)
        assert accuracy(model, x, y) > 0.8
    assert robust["pgd"] > robust["clean"] + 0.1


def test_the_frozen_average_and_the_model_are_left_as_promised(fabric: Fabric, digits: Any) -> None:
    state, _ = trained(fabric, digits, Pgd(steps=1))
    assert state["model"].training
    assert not state["average"].training
    assert not any(p.requires_grad for p in state["average"].parameters())
    assert all(p.requires_grad for p in state["model"].parameters())


def test_batch_statistics_are_learned_and_averaged(fabric: Fabric, digits: Any) -> None:
    """Also by a model that comes in eval mode."""
    state = classifier_state(fabric, with_batch_statistics().eval(), CONFIG)
    exhaust(train_classifier(fabric, state, batches_of(digits), CONFIG, Clean(), 0), 10)
    model, average = state["model"][1], state["average"][1]
    assert int(model.num_batches_tracked) == int(average.num_batches_tracked) == 10
    assert (average.running_mean - model.running_mean).abs().max() > 0
    assert average.running_mean.abs().max() > 0


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
    objective = RobustManifold(eps=0.0, pairs=5, pair_eps=0.2, pair_steps=60, spread=0.05)
    ends, labels = objective.label_consistent_pairs(wrong, Line()(z), y, Step(manifold=line))
    assert len(labels) > 0
    assert (labels == 1).all()  # around 1 the true label is that of the upper half
    first, second = Back()(ends).squeeze(1).chunk(2)
    assert ((first - 1) * (second - 1) < 0).all()  # told apart by the model
    assert (first > 0).all()
    assert (second > 0).all()
    # Where the model's boundary is the true one, no pair is left to learn from.
    ends, labels = objective.label_consistent_pairs(
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


def test_training_attacks_in_eval_mode_and_learns_in_train_mode(digits: Any) -> None:
    modes: list[bool] = []
    model = with_batch_statistics().train()
    model[1].register_forward_hook(lambda module, *_: modes.append(module.training))
    Pgd(steps=2)(model, digits[0][:4], digits[1][:4], Step())
    assert len(modes) >= 4
    assert not any(modes[:-1])
    assert modes[-1]
    assert int(model[1].num_batches_tracked) == 1


# --- Determinism and resumption ---


def exhaust(iterator: Iterable[Any], steps: int) -> None:
    assert len(list(islice(iterator, steps))) == steps


@pytest.mark.parametrize("build", [classifier, with_batch_statistics])
def test_the_seed_decides(fabric: Fabric, digits: Any, build: Any) -> None:
    runs = []
    for seed, disturbance in ((0, 1), (0, 2), (1, 1)):
        torch.manual_seed(disturbance)
        state = classifier_state(fabric, build(), CONFIG)
        exhaust(train_classifier(fabric, state, batches_of(digits), CONFIG, Pgd(steps=1, ramp=0), seed), 5)
        runs.append(tensors(state))
    assert all(torch.equal(runs[0][key], runs[1][key]) for key in runs[0])
    assert not all(torch.equal(runs[0][key], runs[2][key]) for key in runs[0])


@pytest.mark.parametrize("build", [classifier, with_batch_statistics])
@pytest.mark.parametrize("name", ["clean", "pgd-linf", "robust_manifold"])
def test_resumes_bit_for_bit(
    fabric: Fabric, digits: Any, manifold: ManifoldFilter, tmp_path: Path, build: Any, name: str
) -> None:
    def validate(model: nn.Module) -> tuple[float, float]:
        return accuracy(model, *digits), accuracy(model, digits[0].flip(3), digits[1])

    def run(state: dict[str, Any], steps: int) -> None:
        loop = train_classifier(
            fabric, state, batches_of(digits), CONFIG, SMALL[name], 0, validate=validate, manifold=manifold
        )
        exhaust(loop, steps)

    straight = classifier_state(fabric, build(), CONFIG)
    run(straight, 20)
    first = classifier_state(fabric, build(), CONFIG)
    run(first, 10)
    fabric.save(tmp_path / "state.ckpt", first)
    run(first, 3)  # what came after the saving is lost

    def resumed() -> dict[str, Any]:
        state = classifier_state(fabric, build(), CONFIG)
        fabric.load(tmp_path / "state.ckpt", state, weights_only=True)
        return state

    second = resumed()
    assert (second["step"], second["images"]) == (10, 320)
    run(second, 10)
    assert (second["step"], second["images"]) == (straight["step"], straight["images"])
    assert straight["validations"] == [tuple(entry) for entry in second["validations"]]
    assert len(straight["validations"]) == 10
    expected, found = tensors(straight), tensors(second)
    assert expected.keys() == found.keys()
    assert [key for key in expected if not torch.equal(expected[key], found[key])] == []

    # A forgotten counter would show.
    forgetful = resumed()
    forgetful["step"] = 0
    run(forgetful, 10)
    assert not all(torch.equal(expected[key], value) for key, value in tensors(forgetful).items())


def test_the_best_validation_is_kept(fabric: Fabric, digits: Any) -> None:
    """By robust accuracy, the latest of equals; the average goes on."""
    scores = iter([0.1, 0.5, 0.3, 0.5, 0.4, *([0.2] * 20)])
    seen: list[dict[str, Tensor]] = []

    def validate(model: nn.Module) -> tuple[float, float]:
        seen.append({key: value.clone() for key, value in model.state_dict().items()})
        return 0.9, next(scores)

    state, _ = trained(fabric, digits, Clean(), validate=validate)
    assert len(seen) == 20
    best = state["best"].state_dict()
    assert all(torch.equal(value, seen[3][key]) for key, value in best.items())
    assert all(torch.equal(value, seen[-1][key]) for key, value in state["average"].state_dict().items())
    assert state["validations"][3] == (256, 0.9, 0.5)
    assert not any(p.requires_grad for p in state["best"].parameters())


def test_the_last_average_is_the_best_where_nothing_was_validated(fabric: Fabric, digits: Any) -> None:
    state, _ = trained(fabric, digits, Clean())
    average = state["average"].state_dict()
    assert all(torch.equal(value, average[key]) for key, value in state["best"].state_dict().items())


def test_a_classifier_is_trained_behind_what_it_is_deployed_behind(
    fabric: Fabric, digits: Any, manifold: ManifoldFilter
) -> None:
    """Behind the filter it learns reconstructions, and attacks on both; the filter itself stays as it is."""
    x, y = digits
    before = {key: value.clone() for key, value in manifold.state_dict().items()}
    coarse = ManifoldFilter(manifold.generator, manifold.encoder, ProjectionConfig(steps=1))
    for through in (
        lambda model: DefendedClassifier(coarse, model),
        lambda model: Preprocessed(BitDepth(2), model),
    ):
        state, losses = trained(fabric, digits, Pgd(eps=0.1, steps=2), through=through)
        assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
        deployed = through(state["best"])
        assert accuracy(deployed, x, y) > 0.8
        assert accuracy(deployed, pgd(deployed, x, y, eps=0.05, steps=5), y) > 0.4
    assert all(torch.equal(value, before[key]) for key, value in manifold.state_dict().items())


def test_a_finished_run_does_nothing(fabric: Fabric, digits: Any) -> None:
    state, _ = trained(fabric, digits, Clean())
    before = tensors(state)
    assert list(train_classifier(fabric, state, batches_of(digits), CONFIG, Clean(), 0)) == []
    assert all(torch.equal(before[key], value) for key, value in tensors(state).items())


def test_the_loss_is_that_of_the_objective_on_the_batch(fabric: Fabric, digits: Any) -> None:
    state = classifier_state(fabric, classifier(), CONFIG)
    x, y = batches_of(digits)(0)
    expected = F.cross_entropy(classifier()(x), y)
    record = next(train_classifier(fabric, state, batches_of(digits), CONFIG, Clean(), 0))
    torch.testing.assert_close(record.metrics["loss"], expected.detach())
    assert record.images == 32


@pytest.mark.parametrize(
    ("key", "value"),
    [("images", 0), ("batch_size", 0), ("average_half_life", 0), ("lr", 0.0), ("weight_decay", -1.0)],
)
def test_a_config_names_its_bad_key(key: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"^{key}: expected"):
        TrainingConfig(**{key: value})
