"""What is written is whole or not there."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from pipelines.files import whole, write_json


def write(path: Path, text: str, error: BaseException | None = None) -> None:
    with whole(path) as partial:
        partial.write_text(text[:2] if error else text)
        if error:
            raise error


def test_a_file_takes_the_place_of_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"old": 1})
    write_json(path, {"path": tmp_path})
    assert path.read_text() == f'{{\n  "path": "{tmp_path}"\n}}\n'
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("bad"), OSError(errno.ENOSPC, "full")])
def test_the_old_file_stays_if_writing_fails(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "a.csv"
    write(path, "old")
    with pytest.raises(type(error)):
        write(path, "new", error)
    assert path.read_text() == "old"
    write(path, "new")  # over what the failure left
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_text() == "new"


def test_what_is_full_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    with pytest.raises(OSError, match=f"full: '{path}'$"):
        write(path, "new", OSError(errno.ENOSPC, "full"))
