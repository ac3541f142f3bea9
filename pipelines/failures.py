"""What users can cause is one line and an exit code; what only we can cause keeps its traceback."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

import click


class Failure(click.ClickException):
    """One line on stderr and an exit code."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(" ".join(message.split()))
        vars(self)["exit_code"] = code  # click declares it for the class


def fail(message: str, code: int) -> NoReturn:
    raise Failure(message, code)


@contextmanager
def reported(interrupted: str = "interrupted") -> Iterator[None]:
    """Around a command: whatever a user can cause is raised as a `Failure`; Ctrl-C says `interrupted`."""
    try:
        yield
    except (click.ClickException, click.exceptions.Exit, click.Abort):
        raise
    except KeyboardInterrupt:
        fail(interrupted, 130)
    except OSError as error:
        fail(f"{error.filename or ''}: {error.strerror or error}".removeprefix(": "), 1)
    except Exception as error:
        if _out_of_memory(error):
            fail("out of memory: expected smaller batches (batch_size, projection.chunk) or networks", 1)
        code = _exit_code(error)
        if code is None:
            if _cannot_compile(error):
                why = str(error).split("\n\n")[0]  # after which it is advice to developers
                fail(f"torch.compile: {why}; projection.compiled=false does without", 1)
            raise
        fail(str(error) or interrupted, code)


def _out_of_memory(error: Exception) -> bool:
    import torch

    # Of a CPU's memory PyTorch says so in words alone.
    told = isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
    return told or isinstance(error, (MemoryError, torch.OutOfMemoryError))


def _cannot_compile(error: Exception) -> bool:
    from torch._dynamo.exc import TorchDynamoException

    return isinstance(error, TorchDynamoException)


def _exit_code(error: Exception) -> int | None:
    # Imported late: `--help` answers without torch.
    from manifold_defense.artifact import ArtifactError
    from pipelines.context import InterruptionError
    from pipelines.data import DataError
    from pipelines.own import OwnClassifierError
    from pipelines.purify import PurifyError
    from pipelines.settings import ConfigError
    from pipelines.stage import StageError

    if isinstance(error, (ConfigError, OwnClassifierError)):
        return 2
    if isinstance(error, InterruptionError):
        return 130
    if isinstance(error, (StageError, DataError, ArtifactError, PurifyError)):
        return 1
    return None
