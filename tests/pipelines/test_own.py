"""A user's own classifier under the evaluator, with and without a filter."""

import json
import os
import re

import pytest
import torch
from pipelines_support import invoke
from torch import nn

from manifold_defense.evaluation import Defence
from pipelines.jobs import digest_of

MODULE = """
import torch
from torch import nn


def classifier():
    torch.manual_seed(WEIGHTS)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))


from manifold_defense.evaluation.baselines import BitDepth, Preprocessed
from pipelines.data import DataConfig, load_data, to_float


def nearest_mean():
    train = load_data(DataConfig()).train
    means = torch.stack([to_float(train.images[train.labels == c]).mean(0).flatten() for c in range(10)])
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    model[1].weight.data, model[1].bias.data = 2 * means, -means.square().sum(1)
    return model


module = classifier()
coarse = lambda: Preprocessed(BitDepth(2), classifier())
number = lambda: 7
value = 7


def absent():
    raise KeyError("weights")


class Answers(nn.Module):
    def __init__(self, answer):
        super().__init__()
        self.answer = answer

    def forward(self, x):
        return self.answer(x)


def only_black(x):
    assert not x.any(), "too bright"
    return torch.zeros(len(x), 10)


def only_without_gradient(x):
    if x.requires_grad:
        raise AttributeError("no gradients here")
    return torch.zeros(len(x), 10)


five = Answers(lambda x: x.flatten(1)[:, :5])
pairs = Answers(lambda x: x.flatten(1)[:, : 10 if len(x) == 2 else 7])
lazy = lambda: nn.Sequential(nn.Flatten(), nn.LazyLinear(10))
scripted = lambda: torch.jit.script(classifier())
frozen = lambda: torch.jit.freeze(torch.jit.script(classifier().eval()))
exported = lambda: torch.export.export(
    classifier(), (torch.rand(2, 1, 8, 8),), dynamic_shapes=({0: torch.export.Dim("n", min=1)},)
).module()
whole = Answers(lambda x: torch.zeros(len(x), 10, dtype=torch.int64))
nan = Answers(lambda x: x.flatten(1)[:, :10] * torch.nan)
sparse = Answers(lambda x: x.flatten(1)[:, :10].to_sparse())
several = Answers(lambda x: (x, x))
bright, flat = Answers(only_black), Answers(only_without_gradient)
greedy = Answers(lambda x: x.data.clamp_(0.2, 0.8).flatten(1)[:, :10])
needy = lambda path: module
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
    (tmp_path / "mine_broken.py").write_text("def module(:\n")
    (tmp_path / "mine_leaving.py").write_text("import sys\n\nsys.exit(3)\n")


def run(*arguments):
    return invoke("evaluate", *(part for s in SETTINGS for part in ("--set", s)), *arguments)


def metrics(tmp_path, name="own"):
    return json.loads((tmp_path / "runs" / name / "evaluate" / "stage.json").read_text())["metrics"]


@pytest.mark.parametrize("name", ["classifier", "module"])
def test_an_own_classifier_is_evaluated_beside_baselines(tmp_path, name):
    result = run("--classifier", f"mine_first:{name}", "--data", "digits")
    assert result.exit_code == 0, result.output
    assert "L∞ 0.15" in result.output
    assert "Masked gradients were looked for on 4 images: too few" in " ".join(result.output.split())
    assert {r["defence"] for r in metrics(tmp_path)["rows"]} == {"own", "binarise", "noise"}


def test_one_that_guesses_is_doubted(tmp_path):
    doubt = "as by guessing: do its columns follow the classes (0, 1, 2 …)"
    for name, doubted in (("classifier", True), ("nearest_mean", False)):
        assert (doubt in run("--classifier", f"mine_first:{name}").output.replace("\n", "")) == doubted


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
    more = (
        *("--set", "evaluate.random=1"),
        *("--set", "evaluate.mixed=0.5"),
        *("--set", "evaluate.checks=0"),
    )
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
            "own+mixed",
        )
    }
    assert "own+filter" in result.output
    assert {"unaware", "exact"} <= {r["view"] for r in found["rows"] if r["attack"] == "pgd"}


@pytest.mark.parametrize("named", ["by the option", "in the configuration"])
def test_it_is_measured_anew_each_time(tmp_path, monkeypatch, named):
    """Its weights are not part of the settings."""

    def run(*arguments):
        chosen = [part for s in SETTINGS for part in ("--set", s)]
        if named == "by the option":
            return invoke("evaluate", *chosen, *arguments)
        return invoke(
            "run", "evaluate", "--run", "own", "--set", f"evaluate.classifier={arguments[1]}", *chosen
        )

    assert run("--classifier", "mine_first:classifier").exit_code == 0
    before = (tmp_path / "runs" / "own" / "evaluate" / "images.csv").read_text()
    (tmp_path / "mine_first.py").write_text(MODULE.replace("WEIGHTS", "1"))
    import mine_first

    monkeypatch.setattr(mine_first, "classifier", __import__("mine_second").classifier)
    again = run("--classifier", "mine_first:classifier")
    assert again.exit_code == 0, again.output
    assert "evaluate: done" in again.output
    assert (tmp_path / "runs" / "own" / "evaluate" / "images.csv").read_text() != before


def test_a_crash_and_a_mended_forward(tmp_path):
    """Jobs that were finished before the crash are those of other code, and are done again."""
    text = """
from torch import nn


class Model(nn.Module):
    calls = 0

    def forward(self, x):
        Model.calls += len(x) > 2
        if ROLL and Model.calls > 3:  # two of them to tell the defences from others
            raise RuntimeError("a bug")
        return 9 * x.roll(ROLL, -1).flatten(1)[:, 20:30]


module = Model()
"""
    for name, roll in (("mine_crashing", "1"), ("mine_mended", "0")):
        (tmp_path / f"{name}.py").write_text(text.replace("ROLL", roll))
    arguments = ("--run", "crash", "--set", 'evaluate.baselines=["binarise"]')
    crashed = run("--classifier", "mine_crashing:module", *arguments)
    assert crashed.exit_code == 2
    assert re.search(
        r"--classifier mine_crashing:module: \w+: .*a bug.* \(.*mine_crashing.py:\d+\)", crashed.output
    )
    assert any((tmp_path / "runs" / "crash" / "evaluate.part" / "jobs").iterdir())
    import mine_crashing

    mine_crashing.module = __import__("mine_mended").module
    assert run("--classifier", "mine_crashing:module", *arguments).exit_code == 0
    assert run("--classifier", "mine_mended:module", "--run", "fresh", *arguments[2:]).exit_code == 0
    assert metrics(tmp_path, "crash")["rows"] == metrics(tmp_path, "fresh")["rows"]


def test_the_digest_of_defences_is_of_what_they_answer():
    class Turned(nn.Module):
        def __init__(self, by, draws=0.0):
            super().__init__()
            self.by, self.draws = by, draws

        def forward(self, x):
            return x.roll(self.by, -1).flatten(1)[:, :10] + self.draws * torch.randn(len(x), 10)

    x = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    state = torch.random.get_rng_state()
    found = {}
    for models in ((Turned(0),), (Turned(1),), (Turned(0, 0.1),), (Turned(0), Turned(0))):
        twice = [digest_of([Defence.bare(str(i), m) for i, m in enumerate(models)], x) for _ in range(2)]
        assert twice[0] == twice[1]
        found[models] = twice[0]
    assert len(set(found.values())) == 4
    # What a GPU rounds otherwise from call to call is the same model.
    assert digest_of([Defence.bare("0", Turned(0, 1e-8))], x) in found.values()
    assert torch.equal(torch.random.get_rng_state(), state)

    class Noted(Turned):  # its state is not of tensors alone
        def get_extra_state(self):
            return {"by": self.by}

        def set_extra_state(self, state):
            pass

        def __init__(self, by):
            super().__init__(by)
            self.register_buffer("sparse", torch.eye(3).to_sparse())

    assert digest_of([Defence.bare("0", Noted(1))], x) == found[next(m for m in found if m[0].by == 1)]


def test_one_that_leaves_the_folder_leaves_the_results_here(tmp_path):
    (tmp_path / "mine_wandering.py").write_text(
        "import os\nimport mine_first\n\n\n"
        "def classifier():\n    os.chdir('/')\n    return mine_first.classifier()\n"
    )
    assert run("--classifier", "mine_wandering:classifier").exit_code == 0
    assert os.getcwd() == str(tmp_path)
    assert (tmp_path / "runs" / "own" / "evaluate" / "stage.json").exists()


def test_one_whose_weights_are_lazy_is_made_by_its_first_images(tmp_path):
    assert run("--classifier", "mine_first:lazy").exit_code == 0


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
@pytest.mark.parametrize("form", ["scripted", "frozen", "exported"])
def test_one_that_is_no_longer_python_is_attacked_like_the_module_that_it_was(tmp_path, form):
    for function, name in (("classifier", "plain"), (form, form)):
        assert run("--run", name, "--classifier", f"mine_first:{function}").exit_code == 0
    left = {
        name: [row["robust_accuracy"] for row in metrics(tmp_path, name)["rows"] if row["defence"] == "own"]
        for name in ("plain", form)
    }
    assert left["plain"] == left[form]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--classifier", "mine_first"), "expected package.module:function"),
        (("--classifier", "nowhere:classifier"), "No module named 'nowhere'"),
        (("--classifier", "mine_first:nothing"), "has no attribute 'nothing'"),
        (("--classifier", "mine_first:number"), "expected a torch.nn.Module, got int"),
        (("--classifier", "mine_first:greedy"), "it changed them in place"),
        (("--classifier", "mine_first:wrong_shape"), "no answer to images of shape (1, 8, 8)"),
        (("--classifier", "mine_first:images"), "of 2 images it gave (2, 1, 8, 8)"),
        (("--classifier", "mine_first:several"), "of 2 images it gave tuple"),
        (("--classifier", "mine_first:five"), "expected logits (N, 10), a column a class"),
        (("--classifier", "mine_first:whole"), "expected finite float logits, got torch.int64"),
        (("--classifier", "mine_first:sparse"), "expected finite float logits, got torch.float32 of layout"),
        (("--classifier", "mine_first:nan"), "expected finite float logits, got NaN"),
        (("--classifier", "mine_first:value"), "expected a function or a torch.nn.Module, got int"),
        (("--classifier", "mine_first:absent"), "cannot be made: KeyError: 'weights'"),
        (("--classifier", "mine_first:needy"), "missing 1 required positional argument: 'path'"),
        (("--classifier", "mine_first:bright"), "AssertionError: too bright"),
        (("--classifier", "mine_first:flat"), "AttributeError: no gradients here"),
        (("--classifier", ".mine_first:module"), "TypeError"),
        (("--classifier", "mine_first.py:classifier"), "the module without .py"),
        (("--classifier", "mine_nowhere:classifier"), "No module named 'mine_nowhere' (also looked for in"),
        (("--classifier", "mine_broken:module"), "SyntaxError"),
        (("--classifier", "mine_leaving:module"), "SystemExit: 3"),
        (("--filter", "folder"), "give --classifier as well"),
        (("--classifier", "mine_first:classifier", "--data", "imagenet"), "data.name"),
    ],
)
def test_what_does_not_fit_is_one_line_and_usage(tmp_path, arguments, words):
    result = run(*arguments)
    assert result.exit_code == 2
    assert words in result.output
    assert "Traceback" not in result.output
    assert not (tmp_path / "runs" / "own" / "evaluate.part").exists()


def test_one_that_answers_other_batches_otherwise_is_one_line_and_usage(tmp_path):
    result = run("--classifier", "mine_first:pairs")
    assert result.exit_code == 2
    assert "of 8 images it gave (8, 7)" in result.output
    assert "Traceback" not in result.output


def test_the_place_is_named(tmp_path):
    (tmp_path / "mine_placed.py").write_text("def absent():\n    raise KeyError('weights')\n")
    result = run("--classifier", "mine_placed:absent")
    assert f"KeyError: 'weights' ({tmp_path / 'mine_placed.py'}:2)" in result.output


def test_a_filter_that_is_not_there(tmp_path):
    result = run("--classifier", "mine_first:classifier", "--filter", tmp_path / "none")
    assert result.exit_code == 1
    assert "none" in result.output
