"""What a user brings along: a classifier, named as `package.module:function` or as a folder, and a filter."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path

import torch
from torch import nn

from manifold_defense.artifact import load_classifier, load_filter
from manifold_defense.classifiers import ImageClassifier
from manifold_defense.filter import ManifoldFilter
from pipelines.data import Dataset
from pipelines.stage import StageError


class OwnClassifierError(Exception):
    """A classifier cannot be had as named; one line that says why."""


def load_own(source: str, image_shape: tuple[int, ...], device: torch.device) -> nn.Module:
    """The module that `source`, a function without parameters or a module itself, gives.

    It takes images (N, C, H, W) in [0, 1] and returns logits (N, K). Modules in the working folder
    are found as well. Raises OwnClassifierError for whatever does not fit.
    """
    path, _, name = source.partition(":")
    if not path or not name:
        raise OwnClassifierError(f"--classifier {source}: expected package.module:function")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found = getattr(importlib.import_module(path), name)
    except (ImportError, AttributeError) as error:
        raise OwnClassifierError(f"--classifier {source}: {error}") from None
    model = found if isinstance(found, nn.Module) else found()
    if not isinstance(model, nn.Module):
        raise OwnClassifierError(
            f"--classifier {source}: expected a torch.nn.Module, got {type(model).__name__}"
        )
    model = model.to(device).requires_grad_(False).eval()
    try:
        with torch.no_grad():
            logits = model(torch.zeros(2, *image_shape, device=device))
    except (RuntimeError, ValueError, TypeError) as error:
        line = " ".join(str(error).split())
        raise OwnClassifierError(
            f"--classifier {source}: no answer to images of shape {tuple(image_shape)}: {line[:200]}"
        ) from None
    if not (isinstance(logits, torch.Tensor) and logits.dim() == 2 and len(logits) == 2):
        shape = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
        raise OwnClassifierError(f"--classifier {source}: expected logits (N, K), got {shape}")
    return model


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
