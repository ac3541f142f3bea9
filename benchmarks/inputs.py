"""What benchmarks ask of their caller: filters, classifiers, images. What is wrong with them is one line."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import click
import torch
from torch import Tensor

from manifold_defense.classifiers import ImageClassifier
from manifold_defense.filter import ManifoldFilter
from manifold_defense.types import Norm, Threat
from pipelines.data import DataConfig, Dataset, load_data, subset, to_float
from pipelines.failures import reported
from pipelines.own import load_own_classifier, load_own_filter
from pipelines.settings import load_config

CPU = torch.device("cpu")


class _Benchmark(click.Command):
    def invoke(self, ctx: click.Context) -> Any:
        with reported():
            return super().invoke(ctx)


def benchmark(documentation: str | None) -> Callable[[Callable[..., Any]], click.Command]:
    """The command of a benchmark, described by its module's docstring."""
    # Indented paragraphs are commands; \b keeps click from wrapping them.
    text = (documentation or "").replace("\n\n    ", "\n\n\b\n    ")
    return click.command(cls=_Benchmark, help=text, context_settings={"help_option_names": ["-h", "--help"]})


folder = partial(click.option, type=click.Path(exists=True, file_okay=False, path_type=Path))


class _ThreatType(click.ParamType[Threat]):
    name = "NORM:EPS"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Threat:
        norm, _, eps = str(value).partition(":")
        try:
            return Threat(cast(Norm, norm), float(eps))
        except ValueError as error:
            self.fail(f"{value}: expected NORM:EPS, such as linf:0.3; {error}", param, ctx)


class _NamedFolderType(click.ParamType[tuple[str, Path]]):
    name = "NAME=FOLDER"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, Path]:
        name, equals, path = str(value).partition("=")
        if not name or not equals:
            self.fail(f"{value}: expected NAME=FOLDER", param, ctx)
        return name, Path(path)


class _NewFileType(click.Path):
    """A file to be written, whose folder must be there before hours are spent."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        path = Path(str(super().convert(value, param, ctx)))
        if not path.parent.is_dir():
            self.fail(f"{path.parent}: no such folder", param, ctx)
        return path


THREAT, NAMED_FOLDER = _ThreatType(), _NamedFolderType()
NEW_FILE = _NewFileType(dir_okay=False, writable=True, path_type=Path)


def json_option(command: Callable[..., Any]) -> Callable[..., Any]:
    return click.option("--json", "output", type=NEW_FILE, metavar="FILE")(command)


def data_options(default: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """`--data NAME` and `--set KEY=VALUE`."""

    def added(command: Callable[..., Any]) -> Callable[..., Any]:
        settings = click.option("--set", "settings", multiple=True, metavar="KEY=VALUE")
        return click.option("--data", default=default, show_default=True)(settings(command))

    return added


class Images(NamedTuple):
    """A data set, how it was asked for, and its first N test images, (N, C, H, W), with labels (N,)."""

    dataset: Dataset
    config: DataConfig
    x: Tensor
    y: Tensor

    def filter(self, folder: Path, device: torch.device = CPU) -> ManifoldFilter:
        return load_own_filter(str(folder), self.dataset.image_shape, device)

    def classifier(self, folder: Path, device: torch.device = CPU) -> ImageClassifier:
        return load_own_classifier(str(folder), self.dataset, device)


def read_images(data: str, settings: tuple[str, ...], count: int) -> Images:
    config = load_config(None, [f"data.name={data}", *settings]).data
    dataset = load_data(config)
    test = subset(dataset.test, min(count, len(dataset.test.labels)))
    return Images(dataset, config, to_float(test.images), test.labels)
