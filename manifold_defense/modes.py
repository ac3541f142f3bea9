"""The mode that a module is asked in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

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
