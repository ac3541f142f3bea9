"""What a user brings along: a classifier, named as `package.module:function` or as a folder, and a filter."""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import chdir, contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn

import gan
import manifold_defense
import pipelines
from manifold_defense.artifact import load_classifier, load_filter
from manifold_defense.classifiers import ImageClassifier
from manifold_defense.evaluation import ModelError
from manifold_defense.filter import ManifoldFilter
from pipelines.data import Dataset, in_one_line, to_float
from pipelines.stage import StageError

# Where this program lies: in a checkout that is below the folder that it is called in.
_OURS = tuple(
    Path(module.__file__).parent for module in (gan, manifold_defense, pipelines) if module.__file__
)


class OwnClassifierError(Exception):
    """A classifier cannot be had as named; one line that says why."""


def load_own(source: str, data: Dataset, device: torch.device, option: str = "--classifier") -> nn.Module:
    """The module that `source`, given as `option`, names: a function without parameters that makes it, the
    module itself, or a folder that a training stage or `save_classifier` wrote.

    It takes images (N, C, H, W) in [0, 1] and returns logits (N, K) for the classes of `data`; two test
    images and their gradient are tried. Modules in the working folder are found as well. Raises
    OwnClassifierError for whatever does not fit.
    """

    def refused(why: str) -> OwnClassifierError:
        return OwnClassifierError(f"{option} {source}: {why}")

    path, _, name = source.partition(":")
    if not name and os.path.isdir(source):
        return load_own_classifier(source, data, device)
    if not path or not name or path.endswith(".py"):
        raise refused("expected package.module:function, the module without .py, or a classifier's folder")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        with chdir("."):  # where it leads is its own affair
            found = getattr(importlib.import_module(path), name)
    except (Exception, SystemExit) as error:
        where = " (also looked for in this folder)" if isinstance(error, ModuleNotFoundError) else ""
        raise refused(f"{_blamed(error)}{where}") from None
    if not callable(found):
        raise refused(f"expected a function or a torch.nn.Module, got {type(found).__name__}")
    try:
        with chdir("."):
            model = found if isinstance(found, nn.Module) else found()
    except (Exception, SystemExit) as error:
        raise refused(f"cannot be made: {_blamed(error)}") from None
    if not isinstance(model, nn.Module):
        raise refused(f"expected a torch.nn.Module, got {type(model).__name__}")
    classes = len(data.classes)

    def check(_: nn.Module, given: tuple[Any, ...], logits: Any) -> None:
        # A hook, not a module around it: what the model is says in which views it is attacked.
        if not isinstance(logits, torch.Tensor) or logits.shape != (len(given[0]), classes):
            got = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
            raise refused(
                f"expected logits (N, {classes}), a column a class; of {len(given[0])} images it gave {got}"
            )
        if not logits.is_floating_point() or logits.layout != torch.strided:
            raise refused(f"expected finite float logits, got {logits.dtype} of layout {logits.layout}")

    if isinstance(model, torch.jit.ScriptModule):  # which takes no hook
        model = nn.Sequential(model)
    clean = to_float(data.test.images[:2]).to(device)
    x = clean.clone().requires_grad_(True)
    try:
        model = model.to(device)
        with suppress(NotImplementedError):  # an exported program has the mode that it was exported in
            model.eval()
        with torch.no_grad():
            model(clean.clone())  # what is lazy gets its weights
        for weight in model.parameters():  # one by one, as a script allows it
            weight.requires_grad_(False)
        model.register_forward_hook(check)
        logits = model(x)
        if logits.requires_grad:
            torch.autograd.grad(logits.sum(), x, allow_unused=True)
    except OwnClassifierError:
        raise
    except (Exception, SystemExit) as error:
        raise refused(f"no answer to images of shape {data.image_shape}: {_blamed(error)}") from None
    if not torch.equal(x, clean):
        raise refused("expected a model that leaves its images alone, it changed them in place")
    if not logits.isfinite().all():
        raise refused("expected finite float logits, got NaN or infinity")
    return model


@contextmanager
def blamed_on(source: str, option: str = "--classifier") -> Iterator[None]:
    """Around the use of a classifier of the user's, "" for none: what fails in it is said in one line."""
    try:
        yield
    except (Exception, SystemExit) as error:
        theirs = isinstance(error, ModelError) or bool(_places(error))
        if not source or isinstance(error, OwnClassifierError) or not theirs:
            raise
        raise OwnClassifierError(f"{option} {source}: {_blamed(error)}") from error


def _blamed(error: BaseException) -> str:
    """One line: what went wrong and, if it was in a file of the user's, where."""
    line = f"{type(error).__name__}: {in_one_line(error)}"[:200]
    places = _places(error)
    return f"{line} ({places[-1]})" if places else line


def _places(error: BaseException) -> list[str]:
    """Lines of files of the user's that an error went through: below this folder, and not of this program."""
    return [
        f"{frame.filename}:{frame.lineno}"
        for frame in traceback.extract_tb(error.__traceback__)
        if Path(frame.filename).is_relative_to(os.getcwd())
        and "site-packages" not in frame.filename
        and not any(Path(frame.filename).is_relative_to(room) for room in _OURS)
    ]


def load_own_filter(folder: str, image_shape: tuple[int, ...], device: torch.device) -> ManifoldFilter:
    """The filter in `folder`, for images of `image_shape`; StageError if it is for others."""
    filter = load_filter(Path(folder)).to(device)
    if filter.image_shape != image_shape:
        raise StageError(
            f"{folder}: a filter for images of shape {filter.image_shape}, the data have {image_shape}"
        )
    return filter


def load_own_classifier(folder: str, data: Dataset, device: torch.device) -> ImageClassifier:
    """The classifier in `folder`, of the images and classes of `data`; StageError if it is of others."""
    classifier = load_classifier(Path(folder)).to(device)
    known, given = (classifier.image_shape, classifier.classes), (data.image_shape, len(data.classes))
    if known != given:
        raise StageError(
            f"{folder}: a classifier of images of shape {known[0]} and {known[1]} classes, the data have "
            f"{given[0]} and {given[1]}"
        )
    return classifier
