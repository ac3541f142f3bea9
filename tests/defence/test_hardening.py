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
from manifold_defense.attacks import pgd
from manifold_defense.classifiers import ArchitectureConfig, ImageClassifier
from manifold_defense.hardening import Clean, Latent, Objective, Pgd
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


def trained(fabric: Fabric, digits: Any, objective: Objective, seed: int = 0) -> tuple[Any, list[float]]:
    """The final state and the losses on the way."""
    state = classifier_state(fabric, classifier(), CONFIG)
    records = list(train_classifier(fabric, state, batches_of(digits), CONFIG, objective, seed))
    assert records[-1].images == CONFIG.images
    assert len(records) == 40
    return state, [float(record.metrics["loss"]) for record in records]


def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    model.eval()
    with torch.no_grad():
        return float((model(x).argmax(1) == y).float().mean())


@pytest.fixture
def objectives(networks: Any) -> dict[str, Objective]:
    return {
        "clean": Clean(),
        "pgd-linf": Pgd("linf", eps=0.1, steps=2),
        "pgd-l2": Pgd("l2", eps=0.5, steps=2, ramp=0.0),
        "pgd-mixed": Pgd("linf", eps=0.1, steps=2, clean_share=0.5),
        "latent": Latent(*networks, steps=2),
    }


@pytest.mark.parametrize("name", ["clean", "pgd-linf", "pgd-l2", "pgd-mixed"])
def test_the_loss_falls(fabric: Fabric, digits: Any, objectives: Any, name: str) -> None:
    _, losses = trained(fabric, digits, objectives[name])
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])


def test_the_latent_loss_falls(fabric: Fabric, digits: Any) -> None:
    """On the manifold of linear mixtures of the digits, whose encoder is known."""
    x, y = digits
    mean = x.mean(0)
    _, _, basis = torch.linalg.svd((x - mean).flatten(1), full_matrices=False)
    basis = basis[:20]

    class Mixtures(nn.Module):
        latent_dim, image_shape = 20, (1, 8, 8)

        def forward(self, z: Tensor) -> Tensor:
            return (mean + (z @ basis).unflatten(1, self.image_shape)).clamp(0, 1)

    objective = Latent(Mixtures(), lambda x: (x - mean).flatten(1) @ basis.T, eps=0.2, steps=2)
    state, losses = trained(fabric, digits, objective)
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])
    assert accuracy(state["average"], x, y) > 0.8


def test_clean_training_learns_digits_quickly(fabric: Fabric, digits: Any) -> None:
    state, _ = trained(fabric, digits, Clean())
    assert accuracy(classifier(), *digits) < 0.4
    assert accuracy(state["model"], *digits) > 0.9
    assert accuracy(state["average"], *digits) > 0.9


def test_adversarial_training_buys_robustness(fabric: Fabric, digits: Any) -> None:
    x, y = digits
    robust = {}
    for name, objective in (("clean", Clean()), ("pgd", Pgd("linf", eps=0.15, steps=3))):
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


def losses_of(objective: Objective, x: Tensor, y: Tensor, progress: float = 1.0, seed: int = 0) -> Tensor:
    return objective(classifier(), x, y, progress=progress, seed=seed)


@pytest.mark.parametrize("name", ["clean", "pgd-linf", "pgd-l2", "pgd-mixed", "latent"])
def test_an_objective_is_one_loss_an_image(digits: Any, objectives: Any, name: str) -> None:
    x, y = digits[0][:6], digits[1][:6]
    loss = losses_of(objectives[name], x, y)
    assert loss.shape == (6,)
    assert loss.requires_grad
    assert torch.equal(loss, losses_of(objectives[name], x, y))
    if name.startswith("pgd"):
        assert not torch.equal(loss, losses_of(objectives[name], x, y, seed=1))
        assert loss.sum() > losses_of(Clean(), x, y).sum()


def test_the_radius_ramps(digits: Any) -> None:
    x, y = digits[0][:20], digits[1][:20]
    objective, clean = Pgd("linf", eps=0.2, steps=3, ramp=0.5), losses_of(Clean(), x, y)
    torch.testing.assert_close(losses_of(objective, x, y, progress=0.0), clean)
    means = [float(losses_of(objective, x, y, progress=p).mean().detach()) for p in (0, 0.25, 0.5, 1)]
    assert means[0] < means[1] < means[2] == means[3]
    constant = Pgd("linf", eps=0.2, steps=3, ramp=0.0)
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
    Pgd(steps=2)(model, digits[0][:4], digits[1][:4], progress=1.0, seed=0)
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
@pytest.mark.parametrize("name", ["clean", "pgd-linf", "latent"])
def test_resumes_bit_for_bit(
    fabric: Fabric, digits: Any, objectives: Any, tmp_path: Path, build: Any, name: str
) -> None:
    def run(state: dict[str, Any], steps: int) -> None:
        exhaust(train_classifier(fabric, state, batches_of(digits), CONFIG, objectives[name], 0), steps)

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
    expected, found = tensors(straight), tensors(second)
    assert expected.keys() == found.keys()
    assert [key for key in expected if not torch.equal(expected[key], found[key])] == []

    # A forgotten counter would show.
    forgetful = resumed()
    forgetful["step"] = 0
    run(forgetful, 10)
    assert not all(torch.equal(expected[key], value) for key, value in tensors(forgetful).items())


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
