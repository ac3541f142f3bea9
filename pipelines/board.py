"""Pictures for the TensorBoard board and the report."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pipelines.files import whole

_TEXT: dict[str, Any] = {"fontsize": 9, "parse_math": False}  # a class may be called $a_$


class Strip(NamedTuple):
    """One row of pictures of the same images, and what the classifier says of each."""

    title: str
    images: Tensor  # (N, C, H, W) in [0, 1]
    predictions: Sequence[int]


def grid(images: Tensor, columns: int = 8) -> Tensor:
    """(N, C, H, W) in [0, 1] as one picture (C, H', W')."""
    from torchvision.utils import make_grid

    picture: Tensor = make_grid(images.detach().cpu().clamp(0, 1), nrow=columns, padding=1, pad_value=0.5)
    return picture


def strips(rows: Sequence[Strip], labels: Sequence[int], classes: Sequence[str]) -> Any:
    """A matplotlib figure: a row per strip, a column per image; wrong predictions in red.

    One picture with text on it: axes for each image take twenty times as long to draw.
    """
    from matplotlib.figure import Figure

    columns = len(labels)
    _, height, width = rows[0].images.shape[1:]
    down, across = round(1.35 * height), round(1.12 * width)  # from one image to the next
    canvas = torch.ones(down * len(rows), across * columns, 3)
    margin, inches = 1.2, (1.1 * columns, 1.35 * len(rows))  # on the left, for the titles
    figure = Figure(figsize=(margin + inches[0], inches[1]), dpi=100)
    axis = figure.add_axes((margin / (margin + inches[0]), 0.0, inches[0] / (margin + inches[0]), 0.97))
    axis.axis("off")
    for i, strip in enumerate(rows):
        middle = i * down + height / 2
        axis.text(-0.1 * width, middle, strip.title, ha="right", va="center", **_TEXT)
        for j in range(columns):
            top, left = i * down, j * across
            picture = strip.images[j].detach().cpu().float().clamp(0, 1)
            canvas[top : top + height, left : left + width] = picture.permute(1, 2, 0)
            colour = "tab:red" if strip.predictions[j] != labels[j] else "black"
            centre, below = left + width / 2, top + 1.03 * height
            name = classes[strip.predictions[j]]
            axis.text(centre, below, name, ha="center", va="top", color=colour, **_TEXT)
    axis.imshow(canvas.numpy(), extent=(0, canvas.shape[1], canvas.shape[0], 0), interpolation="nearest")
    return figure


def save_figure(figure: Any, path: Path) -> None:
    """PNG, whole or not at all."""
    with whole(path) as partial, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # names of classes in letters that the font lacks
        figure.savefig(partial, format="png")


@torch.no_grad()
def predictions(model: Any, x: Tensor) -> list[int]:
    """Class indices of images (N, C, H, W)."""
    return [int(i) for i in model(x).argmax(1)]


def curves(x: Sequence[float], lines: Mapping[str, Sequence[float]], across: str, up: str) -> Any:
    """A matplotlib figure of shares against x, a line each."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.5, 4), dpi=100, layout="constrained")
    axis = figure.subplots()
    for name, values in lines.items():
        axis.plot(x, values, label=name, linewidth=1.5)
    axis.set(xlabel=across, ylabel=up, ylim=(0, 1.02), xlim=(min(x), max(x)))
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    return figure


def scatter(points: Mapping[str, tuple[float, float]], title: str, across: str, up: str) -> Any:
    """A matplotlib figure of pairs of shares, each with its name beside it."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.5, 4.5), dpi=100, layout="constrained")
    axis = figure.subplots()
    for i, (name, point) in enumerate(points.items()):
        axis.scatter(*point, color=f"C{i % 10}", s=28, label=name)
    axis.set(xlabel=across, ylabel=up, title=title, ylim=(-0.02, 1.02))
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure
