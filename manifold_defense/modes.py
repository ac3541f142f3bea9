"""The mode and the precision that a module is asked in, and whether it writes to what it is given."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial, wraps
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

_Function = TypeVar("_Function", bound=Callable[..., Any])


@contextmanager
def evaluation_mode(*models: object) -> Iterator[None]:
    """Eval mode for a time; every submodule, those that functions call included, gets its own mode back."""
    # A frozen script has no mode.
    modules = [module for module in _modules(*models) if hasattr(module, "training")]
    modes = [module.training for module in modules]
    try:
        for module in modules:
            module.training = False
        yield
    finally:
        for module, mode in zip(modules, modes, strict=True):
            module.training = mode


def _modules(*models: object) -> list[nn.Module]:
    """The modules that models consist of; of a function those that it closes over or knows by name, of
    another object that can be called those that it holds.
    """
    found: list[nn.Module] = []
    left, seen = list[Any](models), dict[int, Any]()
    while left:
        value = left.pop()
        if id(value) in seen:
            continue
        seen[id(value)] = value
        if isinstance(value, nn.Module):
            found.append(value)
            left += value._modules.values()
            if not type(value).__module__.startswith("torch.nn.modules"):  # which hold no functions
                left += [held for held in vars(value).values() if callable(held)]
        elif isinstance(value, partial):
            left += [value.func, *value.args, *value.keywords.values()]
        elif isinstance(value, types.MethodType):
            left.append(value.__self__)
        elif isinstance(value, types.FunctionType):
            with suppress(ValueError):  # a variable that has no value yet
                known = inspect.getclosurevars(value)
                left += known.nonlocals.values()
                left += [module for module in known.globals.values() if isinstance(module, nn.Module)]
            left += value.__defaults__ or ()
        elif callable(value) and not isinstance(value, type):
            left += [held for held in getattr(value, "__dict__", {}).values() if callable(held)]
    return found


def uncompiled(function: _Function) -> _Function:
    """`torch.compile` leaves it as it is: what differentiates within itself is no graph."""

    @wraps(function)
    def called(*given: Any, **named: Any) -> Any:
        if torch.compiler.is_compiling():  # `disable` imports the compiler, which few need
            return torch.compiler.disable(function)(*given, **named)
        return function(*given, **named)

    return cast(_Function, called)


def writes(tensor: Tensor) -> int:
    """How often a tensor was written to in place; of one made in inference mode nobody counts."""
    return 0 if tensor.is_inference() else tensor._version


@contextmanager
def as_deployed(*models: object) -> Iterator[None]:
    """`evaluation_mode`, and the full precision of weights and images whatever autocast the caller is in."""
    with ExitStack() as stack:
        for device in ("cpu", "cuda", "mps"):
            stack.enter_context(torch.autocast(device, enabled=False))
        stack.enter_context(evaluation_mode(*models))
        yield
