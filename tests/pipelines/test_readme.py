"""Every command and every line of Python in the README does what it says."""

import re
import shlex
import shutil
from pathlib import Path

import pytest
from PIL import Image
from pipelines_support import invoke, settings

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGE = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)
COMMANDS = [
    shlex.split(line, comments=True)[1:]
    for language, block in BLOCKS
    if language == "sh"
    for line in block.splitlines()
    if line.startswith("manifold-defense")
]


def test_the_readme_has_commands_to_test():
    assert len(COMMANDS) >= 8
    assert any(language == "python" for language, _ in BLOCKS)


@pytest.fixture
def at_home(finished, tmp_path, monkeypatch):
    """A finished run, the recipes, images to filter and a folder of photographs."""
    shutil.copytree(finished / "runs", tmp_path / "runs")
    for folder in ("configs", "zoo"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    for name in ("INPUT", "PATH/train/a", "PATH/train/b", "PATH/test/a", "PATH/test/b"):
        (tmp_path / name).mkdir(parents=True)
        Image.new("L", (8, 8), 90).save(tmp_path / name / "grey.png")
    (tmp_path / "mine.py").write_text(
        "from torch import nn\n\n\ndef classifier():\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_a_command_works(at_home, command):
    name = command[0]
    # Whole runs are tested elsewhere, on small settings; here, that they would start.
    long = name in ("run", "harden") or "--config" in command
    more = ["--dry-run"] if long and "--dry-run" not in command else []
    sized = name in ("run", "harden", "stages", "evaluate") and "--config" not in command
    small = settings() if sized else []
    result = invoke(*command, *more, *small)
    assert result.exit_code == 0, result.output


def test_the_python_works(at_home):
    for language, block in BLOCKS:
        if language == "python":
            exec(compile(block, "README.md", "exec"), {})


def test_the_python_of_filters_that_refuse_or_draw_works(at_home):
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL)
    (block,) = [block for block in blocks if "load_filter" in block]
    found = {}
    exec(compile(block, "evaluation.md", "exec"), found)
    assert [defence.draws for defence in found["defences"]] == [1, 100]
    assert (found["labels"] == -1).float().mean() == 0.05


def test_make_runs_what_the_readme_says():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", README, flags=re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE)
    assert "\t.venv/bin/manifold-defense run\n" in makefile


def test_every_file_that_the_readme_names_exists():
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in link]
    assert links
    for link in links + re.findall(r"`(configs/\w+\.toml)`", README):
        assert (ROOT / link).is_file(), link


def test_the_picture_is_small():
    for picture in (ROOT / "docs").rglob("*.png"):
        assert picture.stat().st_size < 300_000
