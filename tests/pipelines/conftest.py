"""A whole run, made once, and copies of it."""

import shutil

import pytest
from pipelines_support import invoke, settings


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """A folder in which `manifold-defense run` has been carried out."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        result = invoke("run", *settings())
        assert result.exit_code == 0, result.output
        (folder / "output.txt").write_text(result.output)
    return folder


@pytest.fixture
def run_folder(finished, tmp_path, monkeypatch):
    """A copy of the finished run in the working directory, free to be damaged."""
    shutil.copytree(finished / "runs", tmp_path / "runs")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "runs" / "digits"
