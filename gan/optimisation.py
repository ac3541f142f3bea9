"""What all training loops share: the optimiser step over processes and the learning-rate curve."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

# The training images of a step, (N, C, H, W) in [0, 1], on the device of the networks.
Batches = Callable[[int], Tensor]
# What `fabric.save` and `fabric.load` carry: modules, optimisers, and the counters `step` and `images`.
State = dict[str, Any]


M = TypeVar("M", bound=nn.Module)


class Record(NamedTuple):
    """What a training loop yields after each step: images seen by all processes, and scalars ()."""

    images: int
    metrics: dict[str, Tensor]


def seeded(seed: int, build: Callable[[], M]) -> M:
    """Build a module with weights that depend on `seed` alone; the global RNG is left untouched."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # that of the CPU alone, which weights are drawn from
        return build()


def descend(fabric: Fabric, optimizer: torch.optim.Optimizer, loss: Tensor, lr: float) -> None:
    """One step down `loss` (), with gradients averaged over processes.

    Gradients are averaged here and not by DistributedDataParallel, whose hooks do not fit networks
    that are called several times, frozen in turn and differentiated twice within one step.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    optimizer.zero_grad(set_to_none=True)
    fabric.backward(loss)
    for parameter in parameters:
        if fabric.world_size > 1 and parameter.grad is not None:
            parameter.grad = fabric.all_reduce(parameter.grad, reduce_op="mean")
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()


def share_statistics(fabric: Fabric, module: nn.Module) -> None:
    """Let the batch statistics of `module` be the mean of what the processes made of their own images."""
    if fabric.world_size > 1:
        for name, buffer in module.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                mean = fabric.all_reduce(buffer, reduce_op="mean")
                assert isinstance(mean, Tensor)
                buffer.copy_(mean)


def cosine(lr: float, images: int, total: int, final: float = 0.05) -> float:
    """Learning rate after `images` of `total`: a half cosine from `lr` down to `final * lr`."""
    progress = min(images / total, 1.0)
    return lr * (final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress)))
