"""The one training loop of every classifier: clean, hardened in pixels, hardened on the manifold.

Like the loops in `gan`, it yields after every step and depends on nothing but `state`, the seed
and the step, so that a restarted run continues bit for bit (on CPU).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from gan.averaging import averaged_copy, update_average
from gan.optimisation import Record, State, cosine, descend, share_statistics
from manifold_defense.filter import ManifoldFilter
from manifold_defense.hardening.objective import Objective, Step
from manifold_defense.types import Classifier

# Images (N, C, H, W) and labels (N,) of a step, on the model's device.
LabelledBatches = Callable[[int], tuple[Tensor, Tensor]]
# Accuracy of a model on images that it is not trained on, clean and under the attacks that it is hardened
# for: the same, if there are none.
Validation = Callable[[nn.Module], tuple[float, float]]
# How often a training is validated; at the start its weights are worth nothing yet.
_VALIDATIONS = 20


@dataclass(frozen=True)
class TrainingConfig:
    """Length and pace of a classifier's training.

    images             seen in the whole training
    batch_size         images a step and process
    lr                 of AdamW at the start; it falls along a cosine
    weight_decay       of AdamW
    average_half_life  images after which a step's weights count half in the average that is kept
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}  # read by pipelines.settings

    images: int = 60_000
    batch_size: int = 64
    lr: float = 2e-3
    weight_decay: float = 1e-4
    average_half_life: int = 5_000

    def __post_init__(self) -> None:
        for name in ("images", "batch_size", "average_half_life"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if not 0 < self.lr <= 1:
            raise ValueError(f"lr: expected above 0 and at most 1, got {self.lr}")
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"weight_decay: expected at least 0 and finite, got {self.weight_decay}")


def classifier_state(fabric: Fabric, model: nn.Module, config: TrainingConfig) -> State:
    """What `fabric.save` and `fabric.load` carry; training starts from the weights of `model`.

    `average` is the exponential mean of the weights, `best` that of the best validation, `validations` all
    of them: images seen, clean accuracy, robust accuracy.
    """
    model = fabric.to_device(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=config.weight_decay)
    return {
        "model": model,
        "average": averaged_copy(model),
        "best": averaged_copy(model),
        "validations": [],
        "optimizer": fabric.setup_optimizers(optimizer),
        "step": 0,
        "images": 0,
    }


def train_classifier(
    fabric: Fabric,
    state: State,
    batches: LabelledBatches,
    config: TrainingConfig,
    objective: Objective,
    seed: int,
    *,
    through: Callable[[nn.Module], Classifier] = lambda model: model,
    validate: Validation | None = None,
    manifold: ManifoldFilter | None = None,
    teacher: Classifier | None = None,
) -> Iterator[Record]:
    """Train `state["model"]` in place until `config.images` have been seen, yielding after every step.

    `state["best"]` is what one should use afterwards: of the averages that `validate` has seen the one of
    the highest robust accuracy, the latest of equals; without `validate` the last. `through(model)` is
    what the objective meets: the model behind a filter, say. `manifold` and `teacher` are for it to use.
    """
    model, average, optimizer = state["model"], state["average"], state["optimizer"]
    trained = through(model)
    model.train()
    while state["images"] < config.images:
        progress = state["images"] / config.images
        x, y = batches(state["step"])
        # The attack of a step differs between steps and processes, and is the same when resumed.
        attack_seed = (seed * 1_000_003 + state["step"]) * 1_009 + fabric.global_rank
        with fabric.autocast():
            losses = objective(trained, x, y, Step(progress, attack_seed, state["step"], manifold, teacher))
        assert losses.shape == y.shape
        lr = cosine(config.lr, state["images"], config.images, final=0.02)
        descend(fabric, optimizer, losses.mean(), lr)
        share_statistics(fabric, model)

        batch = config.batch_size * fabric.world_size
        state["step"] += 1
        state["images"] += batch
        update_average(average, model, batch, state["images"], config.average_half_life)
        metrics = {"loss": losses.detach().mean()}
        if validate is not None and _due(progress, state["images"] / config.images):
            clean, robust = fabric.broadcast(validate(average))
            if robust >= max((score for _, _, score in state["validations"]), default=0.0):
                state["best"].load_state_dict(average.state_dict())
            state["validations"].append((state["images"], clean, robust))
        if state["validations"]:
            _, clean, robust = state["validations"][-1]
            metrics["validation/clean"] = torch.tensor(clean)
            if objective.threats:
                metrics["validation/robust"] = torch.tensor(robust)
        elif state["images"] >= config.images:
            state["best"].load_state_dict(average.state_dict())
        yield Record(state["images"], metrics)


def _due(before: float, now: float) -> bool:
    """Whether a validation falls between two points of the training; the last one always does."""
    return int(before * _VALIDATIONS) != int(now * _VALIDATIONS) or now >= 1
