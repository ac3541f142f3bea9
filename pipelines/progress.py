"""The bar that long work shows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text


@contextmanager
def progress_bar(
    title: str, total: int, unit: str, console: Console, *, shown: bool
) -> Iterator[Callable[..., None]]:
    """A bar with rate and time left; yields a function that is told how much is done (of what)."""
    with Progress(
        TextColumn("{task.description:<17}"),
        BarColumn(),
        TaskProgressColumn(),
        _Rate(unit),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not shown,
    ) as bar:
        task = bar.add_task(title, total=total)
        yield lambda done, of=total: bar.update(task, completed=min(done, of), total=of)


class _Rate(ProgressColumn):
    def __init__(self, unit: str) -> None:
        super().__init__()
        self.unit = unit

    def render(self, task: Task) -> Text:
        speed = task.speed
        if not speed:
            text = f"- {self.unit}/s"
        elif speed < 1:
            text = f"{60 * speed:,.1f} {self.unit}/min"
        else:
            text = f"{speed:,.0f} {self.unit}/s"
        return Text(text, style="progress.data.speed")
