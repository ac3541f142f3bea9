"""The mode and the precision that a module is asked in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn


@contextmanager
def evaluation_mode(*models: object) -> Iterator[None]:
    """Eval mode for a time; every submodule gets its own mode back. What is no module has none."""
    asked = [module for model in models if isinstance(model, nn.Module) for module in model.modules()]
    modules = [module for module in asked if hasattr(module, "training")]  # a frozen script has none
    modes = [module.training for module in modules]
    try:
        for module in modules:
            module.training = False
        yield
    finally:
        for module, mode in zip(modules, modes, strict=True):
            module.training = mode


@contextmanager
def as_deployed(*models: object) -> Iterator[None]:
    """`evaluation_mode`, and the full precision of weights and images whatever autocast the caller is in."""
    with ExitStack() as stack:
        for device in ("cpu", "cuda", "mps"):
            stack.enter_context(torch.autocast(device, enabled=False))
        stack.enter_context(evaluation_mode(*models))
        yield
