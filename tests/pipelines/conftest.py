"""A whole run, made once."""

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
