"""A user's own classifier under the evaluator, with and without a filter."""

import json

import pytest
from pipelines_support import invoke

MODULE = """
import torch
from torch import nn


def classifier():
    torch.manual_seed(WEIGHTS)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))


from manifold_defense.evaluation.baselines import BitDepth, Preprocessed

module = classifier()
coarse = lambda: Preprocessed(BitDepth(2), classifier())
number = lambda: 7
wrong_shape = lambda: nn.Sequential(nn.Flatten(), nn.Linear(63, 10))
images = lambda: nn.Identity()
"""
SETTINGS = (
    "evaluate.images=8",
    "evaluate.checks=4",
    'evaluate.baselines=["binarise","noise","nearest","encoder"]',
    'evaluate.attacks=[{name="fgsm"},{name="pgd",steps=2,views=["unaware","exact"]}]',
)


@pytest.fixture(autouse=True)
def _own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "mine_first.py").write_text(MODULE.replace("WEIGHTS", "0"))
    (tmp_path / "mine_second.py").write_text(MODULE.replace("WEIGHTS", "1"))


def run(*arguments):
    return invoke("evaluate", *(part for s in SETTINGS for part in ("--set", s)), *arguments)


def metrics(tmp_path, name="own"):
    return json.loads((tmp_path / "runs" / name / "evaluate" / "stage.json").read_text())["metrics"]


@pytest.mark.parametrize("name", ["classifier", "module"])
def test_an_own_classifier_is_evaluated_beside_baselines(tmp_path, name):
    result = run("--classifier", f"mine_first:{name}", "--data", "digits")
    assert result.exit_code == 0, result.output
    assert "L∞ 0.15" in result.output
    assert {r["defence"] for r in metrics(tmp_path)["rows"]} == {"own", "binarise", "noise"}


def test_one_that_brings_its_preprocessing_is_attacked_in_all_its_views(tmp_path):
    attacks = 'evaluate.attacks=[{name="pgd",steps=2,views=["unaware","identity","soft","exact"]}]'
    result = run(
        "--classifier",
        "mine_first:coarse",
        "--data",
        "digits",
        "--set",
        attacks,
        "--set",
        "evaluate.mode=full",
    )
    assert result.exit_code == 0, result.output
    own = [r for r in metrics(tmp_path)["rows"] if r["defence"] == "own" and r["attack"] == "pgd"]
    assert {r["view"] for r in own} == {"unaware", "identity", "soft"}


def test_behind_a_filter(tmp_path, finished):
    folder = finished / "runs" / "digits" / "export" / "filter"
    # Checks of the filter that draws would take longer than all the rest; tests/defence has them.
    more = ("--set", "evaluate.random=1", "--set", "evaluate.checks=0")
    result = run("--classifier", "mine_first:classifier", "--filter", folder, "--run", "both", *more)
    assert result.exit_code == 0, result.output
    found = metrics(tmp_path, "both")
    assert {r["defence"] for r in found["rows"]} == {
        *(
            "own",
            "binarise",
            "noise",
            "nearest",
            "encoder",
            "own+filter",
            "own+filter+random",
            "own+filter+reject",
        )
    }
    assert "own+filter" in result.output
    assert {"unaware", "exact"} <= {r["view"] for r in found["rows"] if r["attack"] == "pgd"}


def test_it_is_measured_anew_each_time(tmp_path):
    """Its weights are not part of the settings."""
    assert run("--classifier", "mine_first:classifier").exit_code == 0
    before = (tmp_path / "runs" / "own" / "evaluate" / "images.csv").read_text()
    (tmp_path / "mine_first.py").write_text(MODULE.replace("WEIGHTS", "1"))
    import mine_first

    mine_first.classifier = __import__("mine_second").classifier
    again = run("--classifier", "mine_first:classifier")
    assert again.exit_code == 0
    assert "evaluate: done" in again.output
    assert (tmp_path / "runs" / "own" / "evaluate" / "images.csv").read_text() != before


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--classifier", "mine_first"), "expected package.module:function"),
        (("--classifier", "nowhere:classifier"), "No module named 'nowhere'"),
        (("--classifier", "mine_first:nothing"), "has no attribute 'nothing'"),
        (("--classifier", "mine_first:number"), "expected a torch.nn.Module, got int"),
        (("--classifier", "mine_first:wrong_shape"), "no answer to images of shape (1, 8, 8)"),
        (("--classifier", "mine_first:images"), "expected logits (N, K), got (2, 1, 8, 8)"),
        (("--filter", "folder"), "give --classifier as well"),
        (("--classifier", "mine_first:classifier", "--data", "imagenet"), "data.name"),
    ],
)
def test_what_does_not_fit_is_one_line_and_usage(arguments, words):
    result = run(*arguments)
    assert result.exit_code == 2
    assert words in result.output
    assert "Traceback" not in result.output


def test_a_filter_that_is_not_there(tmp_path):
    result = run("--classifier", "mine_first:classifier", "--filter", tmp_path / "none")
    assert result.exit_code == 1
    assert "none" in result.output
