"""One command at a time on a folder: two at work on it would overwrite each other."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def alone(folder: Path, error: type[Exception]) -> Iterator[None]:
    """Hold an existing folder; raise `error`, in one line, if another command does.

    The folder itself is locked, so that nothing is left in it, and the system lets go of what was killed.
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise error(f"{folder}: another command is at work on it") from None
        yield
    finally:
        os.close(handle)
