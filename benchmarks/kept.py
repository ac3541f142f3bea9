"""What a long benchmark has found so far, row by row, so that one that was stopped goes on."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipelines.files import write_json

Row = dict[str, Any]


class Kept:
    """The rows of a benchmark, each a file in `output`.jobs from when it is made until `finish`.

    `asked` is what all rows depend on, in words; those of another question are not taken for this one's.
    Without an `output` nothing is kept.
    """

    def __init__(self, output: Path | None, asked: str) -> None:
        self.folder = output.with_name(f"{output.name}.jobs") if output is not None else None
        self.asked = asked

    def row(self, name: str, make: Callable[[], Row]) -> Row:
        """The row of that name, from the interrupted run if it was made there."""
        if self.folder is None:
            return make()
        self.folder.mkdir(exist_ok=True)
        path = self.folder / f"{hashlib.sha256(f'{self.asked} {name}'.encode()).hexdigest()[:16]}.json"
        if not path.exists():
            write_json(path, make())
        row: Row = json.loads(path.read_text(encoding="utf-8"))
        return row

    def finish(self) -> None:
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)
