"""The training loop: losses fall, robustness rises, the best is kept, a stopped run resumes bit for bit."""

import math
import os
import subprocess
import sys
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

from gan.sampling import batch_indices
from manifold_defense import DefendedClassifier, ManifoldFilter, ProjectionConfig
from manifold_defense.attacks import pgd
from manifold_defense.evaluation.baselines import BitDepth, Preprocessed
from manifold_defense.hardening import Clean, Objective, Pgd, Step
from manifold_defense.hardening.training import TrainingConfig, classifier_state, train_classifier
from tests.defence.hardening_support import SMALL, classifier, with_batch_statistics

CONFIG = TrainingConfig(images=40 * 32, batch_size=32, lr=5e-3, average_half_life=200)


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


@pytest.mark.parametrize("name", SMALL)
def test_the_loss_falls(fabric: Fabric, digits: Any, manifold: ManifoldFilter, name: str) -> None:
    state, losses = trained(fabric, digits, SMALL[name], manifold=manifold)
    # A radius that grows, and a temperature, hold the loss up.
    slow = name in ("trades", "interval_bounds", "partial_bounds", "distillation", "robust_manifold")
    assert sum(losses[-5:]) < (0.9 if slow else 0.7) * sum(losses[:5])
    assert accuracy(state["best"], *digits) > 0.8


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


def test_the_rate_falls_along_a_cosine_and_early_weights_are_forgotten(fabric: Fabric, digits: Any) -> None:
    start = classifier()
    state, rates = classifier_state(fabric, classifier(), CONFIG), []
    for k, _ in enumerate(train_classifier(fabric, state, batches_of(digits), CONFIG, Clean(), 0)):
        rates.append(state["optimizer"].param_groups[0]["lr"])
        if k == 0:  # of 32 images seen, a half-life of 3.2
            for mean, new, old in zip(
                *(m.parameters() for m in (state["average"], state["model"], start)), strict=True
            ):
                torch.testing.assert_close(mean, old.lerp(new, 1 - 0.5**10))
    shape = [0.02 + 0.98 * (1 + math.cos(math.pi * k / 40)) / 2 for k in range(40)]
    assert rates == pytest.approx([CONFIG.lr * share for share in shape])


def test_batch_statistics_are_learned_and_averaged(fabric: Fabric, digits: Any) -> None:
    """Also by a model that comes in eval mode."""
    state = classifier_state(fabric, with_batch_statistics().eval(), CONFIG)
    exhaust(train_classifier(fabric, state, batches_of(digits), CONFIG, Clean(), 0), 10)
    model, average = state["model"][1], state["average"][1]
    assert int(model.num_batches_tracked) == int(average.num_batches_tracked) == 10
    assert (average.running_mean - model.running_mean).abs().max() > 0
    assert average.running_mean.abs().max() > 0


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


_TWO = """
import sys
import torch
from lightning_fabric import Fabric
from manifold_defense.hardening import Clean, Pgd
from manifold_defense.hardening.training import TrainingConfig, classifier_state, train_classifier
from tests.defence.hardening_support import classifier, with_batch_statistics

torch.set_num_threads(1)
folder, devices = sys.argv[1], int(sys.argv[2])
fabric = Fabric(accelerator="cpu", devices=devices)
fabric.launch()
config = TrainingConfig(images=1000, batch_size=32 // devices)


def batches(step):
    rng = torch.Generator().manual_seed(step)
    x, y = torch.rand(32, 1, 8, 8, generator=rng), torch.randint(0, 10, (32,), generator=rng)
    own = slice(fabric.global_rank, None, devices)
    return x[own], y[own]


def run(state, objective, steps):
    loop = train_classifier(fabric, state, batches, config, objective, 0)
    for _ in range(steps):
        next(loop)
    return state


made = {"plain": run(classifier_state(fabric, classifier(), config), Clean(), 5)}
made["straight"] = run(classifier_state(fabric, with_batch_statistics(), config), Pgd(steps=1), 6)
half = run(classifier_state(fabric, with_batch_statistics(), config), Pgd(steps=1), 3)
fabric.save(folder + "/half.ckpt", half)
fabric.barrier()
made["resumed"] = classifier_state(fabric, with_batch_statistics(), config)
fabric.load(folder + "/half.ckpt", made["resumed"], weights_only=True)
run(made["resumed"], Pgd(steps=1), 3)
found = {name: {k: state[k].state_dict() for k in ("model", "average")} for name, state in made.items()}
torch.save(found, f"{folder}/{devices}-{fabric.global_rank}.pt")
"""


def test_two_processes_train_what_one_does_and_go_on_where_they_stopped(tmp_path: Path) -> None:
    """By the mean of their gradients, and of their batch statistics, which a state has but once."""
    script = tmp_path / "train.py"
    script.write_text(_TWO)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    for devices in (1, 2):
        command = [sys.executable, str(script), str(tmp_path), str(devices)]
        result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert result.returncode == 0, result.stderr
    one, first, second = (torch.load(tmp_path / f"{name}.pt") for name in ("1-0", "2-0", "2-1"))
    for key in ("model", "average"):
        for name, value in one["plain"][key].items():
            torch.testing.assert_close(first["plain"][key][name], value)
        for name, value in first["straight"][key].items():
            assert torch.equal(second["straight"][key][name], value)
            assert torch.equal(first["resumed"][key][name], value)


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
