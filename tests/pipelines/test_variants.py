"""Variants of the hardened classifier, each with its folder and its rows; and proofs of them."""

import csv
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from pipelines_support import invoke, settings

import pipelines.stages.classifiers as stage
from manifold_defense import load_classifier
from manifold_defense.certification import interval_certificates
from pipelines.data import load_data, to_float
from pipelines.defences import behind, compared
from pipelines.judging import held_out
from pipelines.settings import load_config

VARIANTS = """
[certify]
methods = ["lipschitz", "intervals", "branching", "smoothing", "distance"]
boxes = 20

[[harden]]
name = "hardened"
objective = { steps = 2 }
training = { images = 640 }

[[harden]]
name = "through"
behind = "filter"
objective = { name = "fast", eps = 0.1, ramp = 0 }  # in full at once: its few steps all depend on it
training = { images = 128 }

[[harden]]
name = "teacher"
objective = { name = "distillation", temperature = 20 }
training = { images = 640 }

[[harden]]
name = "student"
teacher = "teacher"
objective = { name = "distillation", temperature = 20 }
training = { images = 640 }

[[harden]]
name = "coarse"
behind = "bit_depth"
start = "hardened"
objective = { name = "interval_bounds", eps = 0.002 }
training = { images = 128 }

[[harden]]
name = "narrow"
behind = "binarise"
architecture = { width = 4 }
objective = { name = "clean" }
training = { images = 640 }

[[harden]]
name = "many"
objective.name = "union"
objective.disturbance.steps = 1
objective.disturbance.pieces = 1
objective.disturbance.threats = [
  { norm = "l2", eps = 0.5 },
  { norm = "l0", eps = 2 },
  { norm = "linf", eps = 0.1 },
]
training = { images = 128 }

[[harden]]
name = "drawn"
behind = "reconstructions"
objective = { name = "latent", steps = 1 }
training = { images = 128 }
"""
SMALL = settings(without="harden.")
FAST = [
    *("--set", "evaluate.checks=0"),
    *("--set", "evaluate.reject=0"),
    *("--set", "evaluate.mixed=0"),
    *("--set", "evaluate.baselines=[]"),
]


def clean(path):
    return {key: value.clone() for key, value in load_classifier(path).state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.fixture(scope="module")
def variants(finished, tmp_path_factory):
    """A run whose `harden` holds all of the variants above, from the networks of the finished one."""
    home = tmp_path_factory.mktemp("variants")
    shutil.copytree(finished / "runs", home / "runs")
    (home / "variants.toml").write_text(VARIANTS)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        # Some need the filter, whose encoder then cannot begin as one of them: it is made anew as well.
        result = invoke("run", "harden", "--force", "--config", "variants.toml", *SMALL)
    assert result.exit_code == 0, result.output
    return home


@pytest.fixture
def home(variants, tmp_path, monkeypatch):
    """A copy of it in the working directory."""
    shutil.copytree(variants, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "runs" / "digits"


def test_every_variant_has_its_folder(home):
    names = ("hardened", "through", "teacher", "student", "coarse", "narrow", "many", "drawn")
    facts = json.loads((home / "harden" / "stage.json").read_text())
    assert tuple(facts["metrics"]["variants"]) == names
    assert set(facts["inputs"]) == {"train-classifier", "train-encoder"}
    assert "projection.steps" in facts["config"]  # one is trained behind the filter
    weights = [clean(home / "harden" / name) for name in names]
    assert not any(same(a, b) for i, a in enumerate(weights) for b in weights[:i])
    widths = {name: load_classifier(home / "harden" / name).config.width for name in names}
    assert {name for name, width in widths.items() if width == 4} == {"narrow"}
    assert not list((home / "harden").rglob("*.ckpt"))
    for metrics in facts["metrics"]["variants"].values():
        assert 0 <= metrics["quick_accuracy"] <= 1
        assert len(metrics["validations"]) >= 2
        assert all(0 <= robust <= 1 and seen for seen, _, robust in metrics["validations"])
    # Judged in every threat that it was trained for.
    assert facts["metrics"]["variants"]["many"]["quick_threats"] == [["l2", 0.5], ["l0", 2], ["linf", 0.1]]


def test_a_training_that_proves_is_judged_by_its_proofs(home):
    facts = json.loads((home / "harden" / "stage.json").read_text())["metrics"]["variants"]
    assert {name for name, metrics in facts.items() if "proved_accuracy" in metrics} == {"coarse"}
    assert facts["coarse"]["proved_accuracy"] <= facts["coarse"]["quick_accuracy"]
    judged, _ = held_out(load_data(load_config(None, ["data.train_images=300"]).data).train)
    model = behind("bit_depth", load_classifier(home / "harden" / "coarse"), None)
    prediction, radius = interval_certificates(model, to_float(judged.images))
    proved = ((prediction == judged.labels) & (radius >= 0.002)).float().mean()
    best = max(robust for _, _, robust in facts["coarse"]["validations"])
    assert 0 < best < 1
    assert best == pytest.approx(float(proved), abs=1e-6)


def test_what_has_not_changed_is_taken_over(home, tmp_path):
    before = {name: clean(home / "harden" / name) for name in ("hardened", "through", "teacher", "student")}
    changed = VARIANTS.replace("eps = 0.1,", "eps = 0.05,")
    changed += '\n[[harden]]\nname = "more"\nobjective = { name = "clean" }\ntraining = { images = 64 }\n'
    (tmp_path / "variants.toml").write_text(changed)
    refused = invoke("harden", "--config", "variants.toml", *SMALL)
    assert refused.exit_code == 1
    assert "harden.1.objective.eps was 0.1, is 0.05" in refused.output
    result = invoke("harden", "--force", "--config", "variants.toml", *SMALL)
    assert result.exit_code == 0, result.output
    for name in ("hardened", "teacher", "student", "coarse", "drawn"):
        assert f"harden {name}: cached" in result.output
    for name, weights in before.items():
        assert same(weights, clean(home / "harden" / name)) is (name != "through")
    assert (home / "harden" / "more" / "classifier.json").exists()

    again = invoke("harden", "--force", "--config", "variants.toml", *SMALL)
    assert "cached" not in again.output  # what is current is made anew if one insists

    # What builds on a variant changes with it.
    (tmp_path / "variants.toml").write_text(changed.replace("temperature = 20", "temperature = 10", 1))
    result = invoke("harden", "--force", "--config", "variants.toml", *SMALL)
    assert "harden hardened: cached" in result.output
    assert "harden teacher: cached" not in result.output
    assert "harden student: cached" not in result.output


@pytest.fixture
def teachers(monkeypatch):
    """Whom each training asks, in order."""
    asked, train = [], stage._train

    def noting(*given):
        asked.append(given[-1])
        return train(*given)

    monkeypatch.setattr(stage, "_train", noting)
    return asked


def test_a_teacher_is_asked_where_it_stands(home, teachers):
    """Behind its preprocessing: grey pixels are nothing that it was ever shown."""
    Path("taught.toml").write_text(
        '[[harden]]\nname = "narrow"\nbehind = "binarise"\nobjective = { name = "clean" }\n'
        'training = { images = 64 }\n[[harden]]\nname = "pupil"\nteacher = "narrow"\n'
        'objective = { name = "distillation" }\ntraining = { images = 64 }\n'
    )
    # A run of its own, of the same classifier.
    shutil.copytree(home, home.with_name("taught"))
    given = ("--force", "--run", "taught", "--config", "taught.toml")
    result = invoke("harden", *given, *SMALL)
    assert result.exit_code == 0, result.output
    alone, teacher = teachers
    assert alone is None
    x = torch.rand(5, 1, 8, 8)
    deployed = load_classifier(home.with_name("taught") / "harden" / "narrow")
    assert torch.equal(teacher(x), deployed((x > 0.5).float()))
    assert not torch.equal(teacher(x), deployed(x))


@pytest.mark.parametrize("place", ["filter", "reconstructions"])
def test_a_teacher_behind_the_filter_sees_what_is_drawn_once(home, teachers, place):
    variants = (
        f'harden=[{{name="wise",behind="{place}",objective={{name="clean"}},training={{images=64}}}},'
        '{name="pupil",behind="reconstructions",teacher="wise",objective={name="distillation"},'
        "training={images=64}}]"
    )
    result = invoke("harden", "--force", *SMALL, "--set", variants)
    assert result.exit_code == 0, result.output
    x = torch.rand(5, 1, 8, 8)
    assert torch.equal(teachers[1](x), load_classifier(home / "harden" / "wise")(x))


def test_a_training_behind_the_filter_takes_the_view_that_it_is_told(home, monkeypatch):
    seen, trained = [], stage.train_classifier

    def noting(*given, through, validate, **named):
        seen.append(through(torch.nn.Identity()).filter.view)
        return trained(*given, through=through, validate=validate, **named)

    monkeypatch.setattr(stage, "train_classifier", noting)
    variant = 'harden=[{name="through",behind="filter",view="identity",training={images=64}}]'
    result = invoke("harden", "--force", *SMALL, "--set", variant)
    assert result.exit_code == 0, result.output
    assert seen == ["identity"]


def test_finished_variants_outlive_an_interruption(home, monkeypatch):

    before = clean(home / "harden" / "student")
    shutil.rmtree(home / "harden")
    harden = stage._harden

    def stopped(own, context, variant):
        if variant.name == "teacher":
            raise KeyboardInterrupt
        return harden(own, context, variant)

    with monkeypatch.context() as patch:
        patch.setattr(stage, "_harden", stopped)
        assert invoke("harden", "--config", "variants.toml", *SMALL).exit_code == 130
    made = home / "harden.part" / "hardened" / "classifier.safetensors"
    stamp = made.stat().st_mtime_ns
    result = invoke("harden", "--config", "variants.toml", *SMALL)
    assert result.exit_code == 0, result.output
    assert (home / "harden" / "hardened" / made.name).stat().st_mtime_ns == stamp
    assert same(before, clean(home / "harden" / "student"))


def test_the_evaluation_attacks_each_and_certify_proves_each(home):
    result = invoke("run", "report", "--force", "--config", "variants.toml", *SMALL, *FAST)
    assert result.exit_code == 0, result.output
    metrics = json.loads((home / "evaluate" / "stage.json").read_text())["metrics"]
    rows = metrics["rows"]
    defences = ["undefended", "filter"]
    for name in ("hardened", "through", "teacher", "student"):
        defences += [name, f"{name}+filter"]
    defences += ["coarse", "narrow", "many", "many+filter", "drawn", "drawn+filter"]
    assert list(dict.fromkeys(r["defence"] for r in rows)) == defences
    assert {r["view"] for r in rows if r["defence"] == "coarse"} >= {"unaware", "identity"}
    trained = {r["defence"] for r in rows if r["attack"] == "worst" and r["trained"]}
    # The ball of `through` is another one; but the encoder of the filter met all that is evaluated.
    behind_filter = {name for name in defences if name.endswith("filter")}
    assert trained == {"hardened"} | behind_filter
    pairs = {(c["before"], c["after"]) for c in metrics["comparisons"]}
    assert (
        "hardened",
        "through+filter",
    ) in pairs  # what was trained behind the filter has a static one to beat
    assert ("teacher", "teacher+filter") in pairs

    certified = json.loads((home / "certify" / "stage.json").read_text())["metrics"]
    found = {(line["defence"], line["method"]) for line in certified["lines"]}
    assert {("undefended", "smoothing"), ("filter", "smoothing"), ("distance", "distance")} <= found
    assert {("hardened", "intervals"), ("through+filter", "smoothing"), ("student", "lipschitz")} <= found
    proved = {(line["defence"], line["method"]): line["certified"] for line in certified["lines"]}
    assert [defence for defence, method in proved if method == "branching"] == ["narrow"]
    assert "hardened is left out: branch and bound follows a classifier behind Binarise" in result.output
    assert all(
        proved["narrow", "branching"][radius] >= share
        for radius, share in proved["narrow", "intervals"].items()
    )
    for line in certified["lines"]:
        assert line["contradicted"] == 0
        shares = list(line["certified"].values())
        assert shares == sorted(shares, reverse=True)
        for radius, left in line["pgd"].items():
            assert line["certified"][radius] <= left <= 1
    with (home / "certify" / "images.csv").open() as file:
        images = list(csv.DictReader(file))
    assert len(images) == 6 * len(certified["lines"])
    report = (home / "report" / "report.md").read_text()
    assert "## What is proved" in report
    assert "| distance, distance |" in report
    for picture in ("certify-certified-l2.png", "certify-certified-linf.png", "trade-off-0.png"):
        assert f"({picture})" in report
        assert (home / "report" / picture).stat().st_size > 1000


def test_a_stopped_certification_goes_on(home, monkeypatch):
    import pipelines.stages.certify as stage

    certify = stage.smoothed_certify
    calls = []

    def once(*args, **kwargs):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return certify(*args, **kwargs)

    few = ["--set", 'certify.methods=["smoothing"]', "--set", "certify.images=4"]
    monkeypatch.setattr(stage, "smoothed_certify", once)
    shutil.rmtree(home / "certify")
    command = ("certify", "--config", "variants.toml", *SMALL, *few)
    assert invoke(*command).exit_code == 130
    assert invoke(*command).exit_code == 0
    # One call a proof, for there is one chunk of images; the second was begun twice, the first was not.
    lines = json.loads((home / "certify" / "stage.json").read_text())["metrics"]["lines"]
    assert len(calls) == len(lines) + 1


def test_settings_find_their_variant():
    text = ['harden=[{name="a"},{name="b"}]', "harden.b.objective.eps=0.2", "harden.0.training.images=7"]
    a, b = load_config(None, text).harden
    assert (a.training.images, b.objective.eps) == (7, 0.2)
    assert a.objective.eps == 0.15
    assert [v.name for v in load_config(None, ["harden.name=solo"]).harden] == ["solo"]
    assert load_config(None, ["harden=[]"]).harden == ()
    assert compared(load_config(None, ["harden=[]"])) == [("undefended", "filter")]
    assert compared(load_config()) == [
        ("undefended", "filter"),
        ("hardened", "hardened+filter"),
        ("hardened", "hardened+mixed"),
    ]


def test_a_variant_more_or_less_is_named(home, tmp_path):
    plain = VARIANTS.rindex("[[harden]]")
    (tmp_path / "variants.toml").write_text(VARIANTS[:plain])
    fewer = invoke("harden", "--config", "variants.toml", *SMALL)
    assert fewer.exit_code == 1
    assert re.search(r"harden\.7\.\S+ is no longer there", fewer.output)
    (tmp_path / "variants.toml").write_text(VARIANTS + '\n[[harden]]\nname = "more"\n')
    more = invoke("harden", "--config", "variants.toml", *SMALL)
    assert "harden.8.name is new" in more.output
