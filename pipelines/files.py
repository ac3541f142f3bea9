"""Files that are whole or not there, whatever stops the writing."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Lend a name beside `path`, which takes its place unless writing it failed.

    What a killed process leaves has the same name the next time, and is written over.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        yield partial
    except OSError as error:  # of a full disk it knows no name
        raise OSError(error.errno, error.strerror, str(path)) from None
    os.replace(partial, path)


def write_json(path: Path, value: Any) -> None:
    with whole(path) as partial:
        partial.write_text(json.dumps(value, indent=2, default=str) + "\n", encoding="utf-8")
