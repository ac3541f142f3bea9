"""The filter over files: an image, or a folder of them, replaced by lossless purified copies.

Letters of shapes: N images, C channels, S pixels a side.
"""

from __future__ import annotations

import csv
import math
import os
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from manifold_defense.filter import ManifoldFilter
from pipelines.data import (
    EXTENSIONS,
    DataError,
    NoImagesError,
    decode_image,
    image_files,
    in_one_line,
    to_float,
)
from pipelines.locking import alone

ERRORS = "errors.csv"
# What JPEG would change is a perturbation of its own, made after the filter.
_LOSSLESS = {".png": "PNG", ".bmp": "BMP", ".tif": "TIFF", ".tiff": "TIFF"}


class PurifyError(Exception):
    """The images cannot be purified as asked; the message is one line that says why."""


class Purified(NamedTuple):
    """What `purify` did."""

    written: int  # images
    target: Path  # the folder, or the file, that they went to
    unreadable: tuple[str, ...]  # files left out as corrupt, relative to the source folder
    error: float  # their mean; NaN if none was written


class _Task(NamedTuple):
    source: Path
    name: str  # of the source, in the table
    output: Path


class _Row(NamedTuple):
    """A line of the table; its fields are the header."""

    file: str
    error: str  # mean squared distance of G(z*) to the input, per pixel; empty if unreadable
    steps: str  # generator gradients spent; empty if unreadable
    status: str  # "ok", or "unreadable: " and why


def purify(
    filter: ManifoldFilter,
    source: Path,
    target: Path,
    *,
    batch_size: int = 256,
    force: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
) -> Purified:
    """Write the projection of the image `source`, or of every image below the folder `source`.

    Images are read as those of an `image_folder` data set are: upright, on black, of the filter's channels,
    and, if the size differs from the filter's, cropped to the centre square and resized.

    A folder's results are `target/RELATIVE.png`, and `target/errors.csv` at the end: a row for each file in
    sorted order, corrupt ones too. An image's result goes to the file `target` (PNG, BMP or TIFF; without a
    suffix, .png is added), or into the folder `target` as NAME.png. Each file appears whole or not at all.

    batch_size    files decoded and projected at a time; bounds memory, not the result
    force         write into a folder that is not empty, or over a file; other files there are kept
    on_progress   called after each batch with the files done and the files in all

    Runs on the device of the filter. Raises PurifyError for all that the user can mend: before any work if
    the source is missing or has no images, or the target is unfit; later if a file cannot be written.
    """
    channels, height, width = filter.image_shape
    if channels not in (1, 3) or height != width:
        raise PurifyError(
            f"the filter takes images of {channels}×{height}×{width}; files can be read as square grey or "
            "RGB images only"
        )
    if batch_size < 1:
        raise PurifyError(f"batch_size: expected at least 1, got {batch_size}")
    with _explained(source, "read"):
        if not source.exists():
            raise PurifyError(f"{source}: no such file or folder")
        is_folder = source.is_dir()
        if not is_folder and not source.is_file():
            raise PurifyError(f"{source}: neither a file nor a folder")
    if is_folder:
        return _purify_folder(filter, source, target, batch_size, force, on_progress)
    return _purify_file(filter, source, target, force, on_progress)


def _purify_file(
    filter: ManifoldFilter,
    source: Path,
    target: Path,
    force: bool,
    on_progress: Callable[[int, int], None] | None,
) -> Purified:
    with _explained(target, "written"):
        output = _output_file(source, target)
        if output.exists():
            if output.samefile(source):
                raise PurifyError(f"{output}: input and output are the same file")
            if not force:
                raise PurifyError(f"{output}: exists; --force overwrites it")
    (row,) = _purify_batch(filter, [_Task(source, str(source), output)])
    if row.status != "ok":
        raise PurifyError(f"{source}: {row.status}")
    if on_progress is not None:
        on_progress(1, 1)
    return Purified(written=1, target=output, unreadable=(), error=float(row.error))


def _output_file(source: Path, target: Path) -> Path:
    if target.is_dir():
        return target / f"{source.stem}.png"
    output = target if target.suffix else target.with_name(f"{target.name}.png")
    if output.suffix.lower() not in _LOSSLESS:
        raise PurifyError(f"{target}: expected a lossless format: {', '.join(_LOSSLESS)}")
    return output


def _purify_folder(
    filter: ManifoldFilter,
    source: Path,
    target: Path,
    batch_size: int,
    force: bool,
    on_progress: Callable[[int, int], None] | None,
) -> Purified:
    tasks = _plan(source, target)
    with _explained(target, "written"):
        if target.exists() and not target.is_dir():
            raise PurifyError(f"{target}: is a file; a folder's images need a folder")
        target.mkdir(parents=True, exist_ok=True)
        if not force and any(target.iterdir()):
            raise PurifyError(f"{target}: not empty; --force writes into it")
    with alone(target, PurifyError):
        for folder in {target, *(task.output.parent for task in tasks)}:
            _sweep(folder)
        return _fill_folder(filter, tasks, target, batch_size, on_progress)


def _sweep(folder: Path) -> None:
    """Remove what commands that were killed left half-written."""
    for partial in folder.glob(".*.partial"):
        if re.fullmatch(r"\.\d+\.partial", partial.name):
            with _explained(partial, "removed"):
                partial.unlink(missing_ok=True)


def _fill_folder(
    filter: ManifoldFilter,
    tasks: Sequence[_Task],
    target: Path,
    batch_size: int,
    on_progress: Callable[[int, int], None] | None,
) -> Purified:
    table = target / ERRORS
    with _explained(table, "removed"):
        table.unlink(missing_ok=True)  # a table is the sign that all its images are there
    rows: list[_Row] = []
    for start in range(0, len(tasks), batch_size):
        batch = tasks[start : start + batch_size]
        rows += _purify_batch(filter, batch)
        for task, row in zip(batch, rows[start:], strict=True):
            if row.status != "ok":
                with _explained(task.output, "removed"):
                    task.output.unlink(missing_ok=True)  # an earlier result is not this file's
        if on_progress is not None:
            on_progress(len(rows), len(tasks))
    # File names are bytes, not always of UTF-8; surrogateescape writes back what was read.
    with (
        _whole(table) as partial,
        partial.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file,
    ):
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(_Row._fields)
        writer.writerows(rows)
    unreadable = tuple(row.file for row in rows if row.status != "ok")
    errors = [float(row.error) for row in rows if row.status == "ok"]
    return Purified(len(errors), target, unreadable, sum(errors) / len(errors) if errors else math.nan)


def _plan(source: Path, target: Path) -> list[_Task]:
    """Every image below `source` and where its result goes; no two to the same place, none into `source`."""
    inside, outside = Path(os.path.realpath(source)), Path(os.path.realpath(target))
    if inside.is_relative_to(outside) or outside.is_relative_to(inside):
        raise PurifyError(f"{target}: input and output folder must not contain one another ({source})")
    with _explained(source, "read"):
        try:
            files = image_files(source)
        except NoImagesError:
            raise PurifyError(f"{source}: no image file ({' '.join(sorted(EXTENSIONS))}) in it") from None
        except DataError as error:
            raise PurifyError(str(error).removeprefix("image_folder: ")) from None
    makers: dict[Path, str] = {}  # result -> the source that it is made of
    for path in files:
        relative = path.relative_to(source)
        result = relative.with_suffix(".png")
        if result in makers:
            raise PurifyError(
                f"{source}: {makers[result]} and {relative.as_posix()} would both become {result}"
            )
        makers[result] = relative.as_posix()
    _check_links(source, target, files, makers)
    for result, name in makers.items():
        if result.parts[0] == ERRORS:
            raise PurifyError(f"{source}: {name} would stand where the table {ERRORS} goes")
        for folder in result.parents:
            if folder in makers:
                raise PurifyError(f"{source}: {makers[folder]} would become {folder}, the folder of {name}")
    return [_Task(source / name, name, target / result) for result, name in makers.items()]


def _check_links(source: Path, target: Path, files: Sequence[Path], results: Iterable[Path]) -> None:
    """PurifyError where a link leads from where images are read to where they are written, or back."""
    read = {os.path.realpath(folder) for folder in {source, *(path.parent for path in files)}}
    within = os.path.realpath(target)
    for path in files:
        if Path(os.path.realpath(path)).is_relative_to(within):
            raise PurifyError(f"{path}: leads into the output folder {target}")
    for folder in {(target / result).parent for result in results}:
        place = os.path.realpath(folder)
        if place in read or not Path(place).is_relative_to(within):
            raise PurifyError(f"{folder}: leads out of the output folder {target}, to {place}")


def _purify_batch(filter: ManifoldFilter, tasks: Sequence[_Task]) -> list[_Row]:
    """Decode, project and write; a row for each task. Of an unreadable file nothing is written."""
    channels, size, _ = filter.image_shape
    readings = _read([task.source for task in tasks], channels, size)
    rows = {
        task: _Row(task.name, "", "", f"unreadable: {reading}")
        for task, reading in zip(tasks, readings, strict=True)
        if isinstance(reading, str)
    }
    readable = [task for task in tasks if task not in rows]
    if readable:
        pixels = np.stack([reading for reading in readings if not isinstance(reading, str)])
        images = torch.from_numpy(pixels).permute(0, 3, 1, 2)  # (N, S, S, C) to (N, C, S, S)
        x = to_float(images.to(_device(filter))).contiguous()
        projection = filter.project(x)
        given = _to_uint8(filter.blend(x, projection.image))
        results = given.permute(0, 2, 3, 1).cpu().numpy()  # (N, S, S, C)
        errors, steps = projection.error.tolist(), projection.steps.tolist()
        for task, result, error, count in zip(readable, results, errors, steps, strict=True):
            _write(result, task.output)
            rows[task] = _Row(task.name, f"{error:.9g}", str(count), "ok")  # 9 digits tell all float32 apart
    return [rows[task] for task in tasks]


def _device(filter: ManifoldFilter) -> torch.device:
    parameter = next(filter.parameters(), None)
    return torch.device("cpu") if parameter is None else parameter.device


def _to_uint8(images: Tensor) -> Tensor:
    """Float images in [0, 1] to the nearest of 256 levels."""
    return (images * 255).round().clamp(0, 255).to(torch.uint8)


def _read(paths: Sequence[Path], channels: int, size: int) -> list[NDArray[np.uint8] | str]:
    """Decode in threads; of each file its pixels (S, S, C), or why there are none."""
    from PIL import Image, UnidentifiedImageError

    def read(path: Path) -> NDArray[np.uint8] | str:
        try:
            return decode_image(path, channels, size)
        except UnidentifiedImageError:
            return "not an image of a known format"
        except Exception as error:  # corrupt bytes raise nearly anything: OSError, SyntaxError, struct.error
            return getattr(error, "strerror", None) or in_one_line(error)

    Image.init()  # Here, lest the threads race to load the decoders.
    with warnings.catch_warnings(), ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        warnings.simplefilter("ignore")  # Pillow remarks on odd metadata of images that it reads well.
        return list(pool.map(read, paths))


def _write(pixels: NDArray[np.uint8], path: Path) -> None:
    """Save pixels (S, S, C) in the format of the path's suffix."""
    from PIL import Image

    image = Image.fromarray(pixels.squeeze(2) if pixels.shape[2] == 1 else pixels)
    with _whole(path) as partial:
        image.save(partial, format=_LOSSLESS[path.suffix.lower()])


@contextmanager
def _whole(path: Path) -> Iterator[Path]:
    """Lend a temporary name in the folder of `path`, which takes its place unless writing it failed."""
    partial = path.with_name(f".{os.getpid()}.partial")  # hidden, and never longer than a name may be
    with _explained(path, "written"):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            yield partial
            os.replace(partial, path)
        finally:
            with suppress(OSError):  # gone if all went well
                partial.unlink()


@contextmanager
def _explained(path: Path, verb: str) -> Iterator[None]:
    """Turn an OSError into one line about `path`."""
    try:
        yield
    except OSError as error:
        raise PurifyError(f"{path}: cannot be {verb}: {error.strerror or in_one_line(error)}") from error
