"""What a run ships, and what it takes over: filters, encoders and classifiers from folders."""

import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pipelines_support import invoke, settings

from manifold_defense import PRESETS, ManifoldFilter, Threat, load_classifier, load_filter
from manifold_defense.artifact import save_classifier, save_filter
from manifold_defense.classifiers import ArchitectureConfig, ImageClassifier


def test_the_exports_load_and_filter_files(run_folder, tmp_path):
    filter, hardened = load_filter(run_folder / "export"), load_classifier(run_folder / "export" / "hardened")
    x = torch.rand(2, 1, 8, 8)
    assert filter(x).shape == x.shape
    assert hardened(x).shape == (2, 10)
    tree = tmp_path / "images" / "deep"
    tree.mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8), dtype=np.uint8)
    Image.fromarray(pixels).save(tree / "a.png")
    result = invoke("filter", tmp_path / "images", tmp_path / "out")
    assert result.exit_code == 0, result.output
    expected = filter(torch.from_numpy(pixels / 255.0).float()[None, None])
    written = np.asarray(Image.open(tmp_path / "out" / "deep" / "a.png"))
    assert np.array_equal(written, (expected[0, 0] * 255).round().numpy().astype(np.uint8))
    assert (tmp_path / "out" / "errors.csv").exists()

    weak = filter.configured(replace(filter.config, strength=0.25))
    save_filter(weak, tmp_path / "weak")
    result = invoke("filter", tree / "a.png", tmp_path / "weak.png", "--filter", tmp_path / "weak")
    assert result.exit_code == 0, result.output
    expected = weak(torch.from_numpy(pixels / 255.0).float()[None, None])
    written = np.asarray(Image.open(tmp_path / "weak.png"))
    assert np.array_equal(written, (expected[0, 0] * 255).round().numpy().astype(np.uint8))


def test_where_a_single_image_goes_is_said(run_folder, tmp_path):
    Image.new("L", (8, 8), 90).save(tmp_path / "a.png")
    for target, expected in (("new/", "new/a.png"), ("plain", "plain.png"), ("b.bmp", "b.bmp")):
        result = invoke("filter", tmp_path / "a.png", f"{tmp_path}/{target}")
        assert result.exit_code == 0, result.output
        assert re.search(rf"1 written to {tmp_path / expected}, error 0\.\d{{4}}\n", result.output)
        assert (tmp_path / expected).is_file()
    result = invoke("filter", tmp_path / "a.png", f"{tmp_path}/plain.png/")
    assert result.exit_code == 1
    assert "plain.png: cannot be made: File exists" in result.output


def test_without_a_run_the_filter_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.new("L", (8, 8), 90).save(tmp_path / "a.png")
    result = invoke("filter", "a.png", "b.png")
    assert result.exit_code == 1
    assert "no such filter yet" in result.output
    assert "--filter" in result.output


def test_a_preset_replaces_the_settings_of_a_filter(run_folder, tmp_path):
    filter = load_filter(run_folder / "export")
    Image.new("L", (8, 8), 90).save(tmp_path / "a.png")
    tables = {}
    for name in ("fast", "accurate"):
        source = tmp_path / f"in-{name}"
        source.mkdir()
        shutil.copy(tmp_path / "a.png", source)
        result = invoke("filter", source, tmp_path / name, "--preset", name)
        assert result.exit_code == 0, result.output
        line = (tmp_path / name / "errors.csv").read_text().splitlines()[1].split(",")
        tables[name] = int(line[2])
        expected = filter.configured(PRESETS[name]).project(torch.full((1, 1, 8, 8), 90 / 255))
        assert float(line[1]) == pytest.approx(float(expected.error), rel=1e-3)
    assert tables == {name: PRESETS[name].steps for name in tables}
    result = invoke("filter", tmp_path / "a.png", tmp_path / "b.png", "--preset", "best")
    assert result.exit_code == 2
    assert "--preset: expected one of reference, accurate" in result.output


def test_an_encoder_is_trained_for_a_finished_filter(finished, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = finished / "runs" / "digits" / "export" / "filter"
    result = invoke(
        "run",
        "train-encoder",
        *settings(
            f"filter={folder}",
            "run=on",
            "encoder.images=128",
            "encoder.disturbance.windows=2",
            "encoder.disturbance.pieces=1",
        ),
    )
    assert result.exit_code == 0, result.output
    assert "train-gan" not in result.output
    before, after = load_filter(folder), load_filter(Path("runs/on/train-encoder"))
    kept = zip(before.generator.parameters(), after.generator.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in kept)
    changed = zip(before.encoder.parameters(), after.encoder.parameters(), strict=True)
    assert not all(torch.equal(a, b) for a, b in changed)
    for named in (["filter=none"], [f"filter={folder}", "harden.start=./none"]):
        other = invoke("run", *settings(*named, "run=off"))
        assert other.exit_code == 1
        assert "none" in other.output
        assert "Traceback" not in other.output
        assert not Path("runs/off").exists()
    intended = invoke("run", "--dry-run", *settings(f"filter={folder}", "run=off"))
    assert "train-encoder: run" in intended.output
    assert "train-gan" not in intended.output

    result = invoke("run", "train-encoder", *settings(f"filter={folder}", "run=as_it_is", "encoder.images=0"))
    assert result.exit_code == 0, result.output
    untouched = load_filter(Path("runs/as_it_is/train-encoder"))
    kept = zip(before.encoder.parameters(), untouched.encoder.parameters(), strict=True)
    assert before.trained == after.trained == untouched.trained == (Threat("linf", 0.15), Threat("l2", 1.0))
    assert all(torch.equal(a, b) for a, b in kept)
    save_filter(ManifoldFilter(before.generator), tmp_path / "bare")
    result = invoke("run", "train-encoder", *settings("filter=bare", "run=none", "encoder.images=0"))
    assert result.exit_code == 1
    assert "encoder.images: expected at least 1, there is no encoder yet; got 0" in result.output


def test_drawings_agree_with_the_classifier_of_the_run_or_of_a_folder(finished, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exported = finished / "runs" / "digits" / "export"
    common = (f"filter={exported / 'filter'}", "encoder.images=128")
    agreeing = (*common, "encoder.agreement_weight=0.05")
    # One of the user's own that happens to be that of the run, as a module that no folder could hold.
    Path("mine_to_agree.py").write_text(
        "from torch import nn\n\nfrom manifold_defense import load_classifier\n\n\n"
        f"def classifier():\n    return nn.Sequential(load_classifier({str(exported / 'classifier')!r}))\n"
    )
    weights = {}
    for run, own in (
        ("plain", common),
        ("run", agreeing),
        ("folder", (*agreeing, f"encoder.classifier={exported / 'classifier'}")),
        ("twice", (*agreeing, f"encoder.classifier={exported / 'classifier'}", "encoder.share=0.5")),
        ("own", (*agreeing, "encoder.classifier=mine_to_agree:classifier")),
    ):
        result = invoke("run", "train-encoder", *settings(*own, f"run={run}"))
        assert result.exit_code == 0, result.output
        assert ("train-classifier: " in result.output) == (run == "run")
        encoder = load_filter(Path(f"runs/{run}/train-encoder")).encoder
        weights[run] = torch.cat([p.flatten() for p in encoder.parameters()])
    # Made by the same settings, the two classifiers are one.
    assert torch.equal(weights["run"], weights["folder"])
    assert torch.equal(weights["run"], weights["own"])
    assert not torch.equal(weights["run"], weights["plain"])
    assert not torch.equal(weights["run"], weights["twice"])
    for name, code, reason in (
        ("./none", 1, "none"),
        ("none_such:classifier", 2, "encoder.classifier none_such:classifier: ModuleNotFoundError"),
        ("none", 2, "or package.module:function, got 'none'"),
    ):
        result = invoke("run", *settings(*agreeing, f"encoder.classifier={name}", "run=off"))
        assert (result.exit_code, reason in " ".join(result.output.split())) == (code, True), result.output
    assert "Traceback" not in result.output
    assert not Path("runs/off").exists()


def test_an_encoder_begins_as_a_classifier(finished, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exported = finished / "runs" / "digits" / "export"
    shutil.copytree(exported / "classifier", tmp_path / "mine")
    met = 'encoder.disturbance.threats=[{norm="linf",eps=0.1}]'
    own = settings(
        f"filter={exported / 'filter'}", "encoder.body=./mine", "encoder.images=128", met, "run=body"
    )
    result = invoke("run", "train-encoder", *own)
    assert result.exit_code == 0, result.output
    filter = load_filter(Path("runs/body/train-encoder"))
    body, began = filter.encoder.body, load_classifier(Path("mine")).body
    apart = [(a - b).abs().max() for a, b in zip(body.parameters(), began.parameters(), strict=True)]
    assert 0 < max(apart) < 0.1  # trained on, from there
    assert filter.trained == (Threat("linf", 0.1),)  # what the encoder in its place had met does not count
    # Other weights in that folder are another beginning; what does not fit is refused at once.
    assert "train-encoder: cached" in invoke("run", "train-encoder", *own).output
    save_classifier(ImageClassifier((1, 8, 8), 10, ArchitectureConfig(width=4)), Path("mine"))
    changed = invoke("run", "train-encoder", *own)
    assert changed.exit_code == 1
    assert "encoder.body.digest" in changed.output
    save_classifier(ImageClassifier((3, 8, 8), 10, ArchitectureConfig(width=4)), Path("mine"))
    for folder, reason in (("./none", "none"), ("./mine", "a classifier of images of shape (3, 8, 8)")):
        other = invoke("run", "train-encoder", *own, "--set", "run=off", "--set", f"encoder.body={folder}")
        assert other.exit_code == 1
        assert reason in other.output
        assert "Traceback" not in other.output
        assert not Path("runs/off").exists()


def test_an_encoder_begins_as_the_second_of_two_variants(finished, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exported = finished / "runs" / "digits" / "export"
    Path("two.toml").write_text(
        f'filter = "{exported / "filter"}"\n'
        '[encoder]\nimages = 128\nbody = "second"\nagreement_weight = 0.1\nclassifier = "first"\n'
        '[[harden]]\nname = "first"\ntraining.images = 128\n'
        '[[harden]]\nname = "second"\nstart = "first"\ntraining.images = 128\n'
    )
    small = settings("run=two", without="harden.")
    result = invoke("run", "train-encoder", "--config", "two.toml", *small)
    assert result.exit_code == 0, result.output
    filter, second = (
        load_filter(Path("runs/two/train-encoder")),
        load_classifier(Path("runs/two/harden/second")),
    )
    pairs = zip(filter.encoder.body.parameters(), second.body.parameters(), strict=True)
    assert 0 < max((a - b).abs().max() for a, b in pairs) < 0.1


def test_a_variant_starts_from_a_folder(run_folder):
    mine = ImageClassifier((1, 8, 8), 10, ArchitectureConfig(width=4))
    save_classifier(mine, Path("mine"))
    more = ("harden.start=./mine", "harden.training.images=64")
    result = invoke("harden", "--force", *settings(*more))
    assert result.exit_code == 0, result.output
    assert load_classifier(run_folder / "harden" / "hardened").config.width == 4
    assert "harden: cached" in invoke("run", "harden", *settings(*more)).output
    with torch.no_grad():
        mine.head.bias.add_(1.0)
    save_classifier(mine, Path("mine"))
    assert "harden.0.start.digest was" in invoke("harden", *settings(*more)).output
    # Of three channels, and not there at all.
    save_classifier(ImageClassifier((3, 8, 8), 10, ArchitectureConfig(width=4)), Path("coloured"))
    for folder, said in (("./coloured", "images of shape (3, 8, 8) and 10 classes"), ("./gone", "gone")):
        result = invoke("harden", "--force", *settings(f"harden.start={folder}"))
        assert result.exit_code == 1
        assert said in result.output
        assert "Traceback" not in result.output
