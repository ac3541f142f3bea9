"""The benchmarks as commands: what is wrong with their input is one line, before anything is computed."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

ROOT = Path(__file__).parents[1]
ZOO = ROOT / "zoo" / "mnist"
BENCHMARKS = sorted(
    p.stem for p in (ROOT / "benchmarks").glob("*.py") if p.stem not in ("inputs", "deceivers")
)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Call a benchmark, in this process and the project's root, as its script would be."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.chdir(ROOT)

    def called(name: str, *arguments: object) -> Result:
        spec = spec_from_file_location(f"benchmark_{name}", ROOT / "benchmarks" / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        module = module_from_spec(spec)
        spec.loader.exec_module(module)
        return CliRunner().invoke(module.main, [*map(str, arguments)], prog_name=f"{name}.py")

    return called


def error_of(done: Result) -> str:
    """The one line of an error; above it click may have printed the usage."""
    assert isinstance(done.exception, SystemExit), done.exception
    *usage, line = done.stderr.strip().splitlines()
    assert all(text.startswith(("Usage:", "Try ")) or not text for text in usage), usage
    return line


@pytest.mark.parametrize("name", BENCHMARKS)
def test_help_says_how_it_is_called(run: Callable[..., Result], name: str) -> None:
    done = run(name, "--help")
    assert done.exit_code == 0
    assert f"Usage: {name}.py [OPTIONS]" in done.stdout
    assert f"python benchmarks/{name}.py" in " ".join(done.stdout.replace("-\n", "-").split())


# The zoo is of MNIST: what passes every other check is refused for its shape.
GIVEN: dict[str, tuple[object, ...]] = {
    "projection": ("--filter", ZOO / "filter", "--classifier", ZOO / "undefended"),
    "robustness": ("--filter", ZOO / "filter", "--classifier", f"plain={ZOO / 'undefended'}"),
    "hardening": ("--filter", ZOO / "filter", "--classifier", ZOO / "undefended"),
    "certification": ("--filter", ZOO / "filter", "--classifier", ZOO / "undefended"),
    "picture": ("--filter", ZOO / "filter", "--classifier", ZOO / "undefended", "--output", "picture.png"),
    "second_opinion": ("--evaluation", ZOO, "--classifier", ZOO / "undefended"),
}


@pytest.mark.parametrize("name", [name for name in GIVEN if name != "second_opinion"])
@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("--filter", "nowhere"), 2, "'nowhere' does not exist"),
        (("--filter", ROOT / "docs"), 1, "filter.json"),
        (("--set", "data.nmae=1"), 2, "data.nmae"),
        (("--data", "image_folder", "--set", "data.root=nowhere"), 1, "nowhere"),
        ((), 1, "the data have (1, 8, 8)"),
    ],
)
def test_wrong_input_is_one_line(
    run: Callable[..., Result], name: str, arguments: tuple[object, ...], code: int, said: str
) -> None:
    done = run(name, "--data", "digits", *GIVEN[name], *arguments)
    assert done.exit_code == code, done.output
    assert said in error_of(done)


@pytest.mark.parametrize("name", GIVEN)
def test_a_result_that_could_not_be_written_is_refused_first(run: Callable[..., Result], name: str) -> None:
    option = "--output" if name == "picture" else "--json"
    done = run(name, *GIVEN[name], option, "nowhere/a.file")
    assert done.exit_code == 2
    assert "nowhere: no such folder" in error_of(done)


@pytest.mark.parametrize(
    ("name", "arguments", "code", "said"),
    [
        ("robustness", ("--threat", "l7:1"), 2, "l7:1: expected NORM:EPS"),
        ("robustness", ("--threat", "linf"), 2, "linf: expected NORM:EPS"),
        ("robustness", ("--proxy", "reference=mine"), 2, "got 'mine'"),
        ("robustness", ("--preset", "mine"), 2, "mine"),
        ("robustness", ("--classifier", "undefended"), 2, "NAME=FOLDER"),
        ("hardening", ("--objective", "mine"), 2, "mine"),
        ("second_opinion", (), 1, "images.csv"),
    ],
)
def test_a_wrong_name_is_one_line(
    run: Callable[..., Result], name: str, arguments: tuple[object, ...], code: int, said: str
) -> None:
    done = run(name, *GIVEN[name], *arguments)
    assert done.exit_code == code, done.output
    assert said in error_of(done)
