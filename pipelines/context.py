"""What a stage works with: configuration, devices, data, its folder and those of its inputs."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch
from lightning_fabric import Fabric
from rich.console import Console
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from gan.optimisation import Record
from gan.sampling import batch_indices, step_rng
from pipelines.config import Config, FabricConfig
from pipelines.data import Dataset, ImageData, augment, in_one_line, load_data, subset, to_float
from pipelines.progress import progress_bar
from pipelines.settings import ConfigError
from pipelines.stage import STATE, StageError

Result = TypeVar("Result")
# A training saves its state, and its board gets scalars and pictures, so many times over its length.
SAVES, SCALARS = 20, 200


class InterruptionError(Exception):
    """Ctrl-C, after the state has been saved."""


def make_fabric(config: FabricConfig) -> Fabric:
    """The processes and devices of one command, launched."""
    devices = int(config.devices) if str(config.devices).isdigit() else config.devices
    try:
        fabric = Fabric(
            accelerator=config.accelerator,
            devices=devices,
            strategy=config.strategy,
            num_nodes=config.num_nodes,
            precision=config.precision,
        )
    except Exception as error:  # Fabric has many kinds for what it cannot provide
        raise ConfigError(f"fabric: {in_one_line(error)}") from None
    most = max(2, os.cpu_count() or 1)  # Fabric starts as many processes as it is told
    if fabric.device.type == "cpu" and isinstance(devices, int) and devices > most:
        raise ConfigError(f"fabric: devices: expected at most {most} processes on this CPU, got {devices}")
    if fabric.device.type == "cpu" and config.precision == "16-mixed":  # Fabric would take another one
        raise ConfigError("fabric.precision: expected 32-true or bf16-mixed on a CPU, got 16-mixed")
    fabric.launch()
    return fabric


def on_first(fabric: Fabric, work: Callable[[], Result]) -> Result | None:
    """What the first process makes of `work`, None to the others; all of them raise if that one does."""
    made: Result | None = None
    failure: Exception | None = None
    if fabric.is_global_zero:
        try:
            made = work()
        except Exception as error:
            failure = error
    said = fabric.broadcast("" if failure is None else in_one_line(failure))
    if failure is not None:
        raise failure
    if said:
        raise StageError(said)
    return made


class Workshop:
    """What the stages of one command share, so that the data are read once."""

    def __init__(self, config: Config, fabric: Fabric, console: Console) -> None:
        self.config, self.fabric, self.console = config, fabric, console

    @cached_property
    def data(self) -> Dataset:
        return load_data(self.config.data)


@dataclass
class Context:
    """One stage at work in `folder`; `inputs` are the finished folders of the stages before it.

    `previous` is where the stage left what it made under other settings, parts of which may still hold.
    """

    shop: Workshop
    stage: str
    folder: Path
    inputs: Mapping[str, Path]
    previous: Path | None = None

    @property
    def config(self) -> Config:
        return self.shop.config

    @property
    def fabric(self) -> Fabric:
        return self.shop.fabric

    @property
    def data(self) -> Dataset:
        return self.shop.data

    @cached_property
    def board(self) -> SummaryWriter:
        """TensorBoard events of this stage; only the first process may write to it."""
        return SummaryWriter(str(self.folder / "events"))

    def close(self) -> None:
        """Flush what the board holds."""
        if "board" in self.__dict__:
            self.board.close()

    @property
    def main(self) -> bool:
        """Whether this process writes the results."""
        return self.fabric.is_global_zero

    def say(self, line: str) -> None:
        if self.main:
            self.shop.console.print(line, highlight=False, markup=False)

    def batches(
        self, batch_size: int, *, shift: bool, data: ImageData | None = None
    ) -> Callable[[int], tuple[Tensor, Tensor]]:
        """Augmented images (N, C, H, W) and labels (N,) of a step, on this process's device.

        Of the whole training set, if `data` does not say otherwise.
        """
        seed, fabric = self.config.seed, self.fabric
        data = self.data.train if data is None else data

        def batch(step: int) -> tuple[Tensor, Tensor]:
            index = batch_indices(
                len(data.labels), batch_size, seed, step, fabric.global_rank, fabric.world_size
            )
            x = to_float(data.images[index].to(fabric.device))
            rng = step_rng(seed + 1, step, fabric.global_rank)
            return augment(x, self.config.data, rng, shift=shift), data.labels[index].to(fabric.device)

        return batch

    def image_batches(self, batch_size: int) -> Callable[[int], Tensor]:
        """As `batches`, images alone and unshifted: what the generative model is to draw."""
        labelled = self.batches(batch_size, shift=False)
        return lambda step: labelled(step)[0]

    def resume(self, state: dict[str, Any]) -> None:
        """Load what an interrupted run of this stage saved, if it did."""
        path = self.folder / STATE
        if not path.exists():
            return
        try:
            self.fabric.load(path, state, weights_only=True)
        except (OSError, MemoryError, torch.OutOfMemoryError):
            raise  # the file may be whole
        except Exception as error:
            raise StageError(
                f"{path}: damaged checkpoint ({in_one_line(error)[:200]}); "
                f"delete {path.parent} to start the stage again"
            ) from None
        self.say(f"{self.stage}: resumed at {state['images']:,} images")

    def train(
        self,
        loop: Iterator[Record],
        state: dict[str, Any],
        total: int,
        picture: Callable[[int], None] | None = None,
    ) -> None:
        """Run a training loop to its end with progress, scalars, pictures and saved states.

        Ctrl-C lets the step finish, saves, and raises InterruptionError; a second one stops at once.
        """
        fabric, path = self.fabric, self.folder / STATE
        partial = path.with_name(STATE + ".partial")

        def save() -> None:
            fabric.save(partial, state)
            if fabric.is_global_zero:
                partial.replace(path)

        first = state["images"]
        with self.progress(total) as advance, _interruptible() as stop:
            advance(first)
            for record in loop:
                before, first = first, record.images
                metrics = record.metrics
                if _crossed(before, first, total, SCALARS):
                    values = {name: float(value) for name, value in metrics.items()}
                    if fabric.is_global_zero:
                        for name, value in values.items():
                            self.board.add_scalar(name, value, record.images)
                    broken = [name for name, value in values.items() if not torch.tensor(value).isfinite()]
                    if self._anyone(bool(broken)):
                        what = broken[0] if broken else "loss of another process"
                        raise StageError(
                            f"{self.stage}: {what} is not finite after {record.images:,} images; "
                            "a lower learning rate may help"
                        )
                advance(record.images)
                halted = self._anyone(stop())
                if halted or _crossed(before, first, total, SAVES):
                    save()
                    if picture is not None and fabric.is_global_zero:
                        picture(record.images)
                if halted:
                    raise InterruptionError

    def map_images(
        self, work: Callable[[int, slice], tuple[Tensor, ...]], n: int, size: int
    ) -> tuple[Tensor, ...]:
        """`work(chunk, images)` on every chunk of `size` of n images, shared out over the processes.

        Each of its results is a CPU tensor with a row an image; they come back whole and in order,
        the same whatever the number of processes.
        """
        chunks = [slice(first, min(first + size, n)) for first in range(0, n, size)]
        rank, world = self.fabric.global_rank, self.fabric.world_size
        mine = {i: work(i, chunks[i]) for i in range(rank, len(chunks), world)}
        if world > 1:
            gathered: list[dict[int, tuple[Tensor, ...]]] = [{}] * world
            torch.distributed.all_gather_object(gathered, mine)
            mine = {i: result for part in gathered for i, result in part.items()}
        ordered = [mine[i] for i in range(len(chunks))]
        return tuple(torch.cat(column) for column in zip(*ordered, strict=True))

    def test_images(self, count: int) -> tuple[Tensor, Tensor]:
        """The first `count` (0: all) test images of a stratified order, (N, C, H, W), and labels (N,)."""
        data = subset(self.data.test, min(count, len(self.data.test.labels)))
        return to_float(data.images.to(self.fabric.device)), data.labels.to(self.fabric.device)

    def _anyone(self, flag: bool) -> bool:
        """Whether any process says so; all processes must stop at the same step."""
        if self.fabric.world_size == 1:
            return flag
        votes = self.fabric.all_reduce(torch.tensor(float(flag), device=self.fabric.device), reduce_op="sum")
        return bool(votes > 0)  # type: ignore[operator]

    @contextmanager
    def progress(self, total: int, unit: str = "img") -> Iterator[Callable[..., None]]:
        """A bar with rate and time left; yields a function that is told how much is done (of what)."""
        shown = self.main and self.shop.console.is_terminal
        with progress_bar(self.stage, total, unit, self.shop.console, shown=shown) as advance:
            yield advance


def _crossed(before: int, now: int, total: int, times: int) -> bool:
    """Whether a multiple of total/times lies in (before, now]."""
    return before * times // total != now * times // total or now >= total


@contextmanager
def _interruptible() -> Iterator[Callable[[], bool]]:
    """Yields a function that tells whether Ctrl-C was pressed; a second press interrupts as usual."""
    pressed = False

    def handler(number: int, frame: Any) -> None:
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True

    previous = signal.signal(signal.SIGINT, handler)
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, previous)
