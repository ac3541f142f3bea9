"""The staged pipeline as a user meets it: results, skipping, refusing, and honest failures."""

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pipelines_support import FEWER, invoke, rows, settings

import pipelines.run
from manifold_defense import load_classifier
from pipelines.locking import alone
from pipelines.stage import Plan
from pipelines.stages import STAGES

ROOT = Path(__file__).parents[2]


def test_every_stage_leaves_its_facts_and_no_scraps(finished):
    run = finished / "runs" / "digits"
    for name in STAGES:
        facts = json.loads((run / name / "stage.json").read_text())
        assert facts["stage"] == name
        assert facts["seconds"] > 0 or name in ("report", "export")
        assert facts["versions"]["torch"]
    assert not [path for path in run.rglob("*") if path.suffix in (".part", ".partial", ".ckpt", ".old")]


def test_of_settings_that_are_gone_the_first_is_named():
    plan = Plan("train-gan", 1, {"gan.images": 5}, {})
    facts = {"version": 1, "config": {"gan.z": 1, "gan.a": 2, "gan.images": 6}}
    assert plan.difference(facts) == "gan.z is no longer there"


def test_the_table_holds_every_cell(finished):
    table = rows(finished / "runs" / "digits")
    defences = ["undefended", "binarise", "encoder"]
    defences += ["filter", "filter+reject", "hardened", "hardened+filter", "hardened+mixed"]
    assert list(dict.fromkeys(r["defence"] for r in table)) == defences
    for norm, eps in (("linf", 0.15), ("l2", 1.0)):
        gradient = ["fgsm", "pgd", "window_pgd"] + (["cw"] if norm == "l2" else [])
        for defence in ("filter", "hardened+filter", "hardened+mixed"):
            cells = [r for r in table if (r["defence"], r["norm"], r["eps"]) == (defence, norm, eps)]
            transfers = {f"transfer from {other}" for other in defences if other != defence}
            met = {"noise", "square", "worst", *gradient} | transfers
            assert {r["attack"] for r in cells} - {"checks"} == met  # those where anything is left
            views = {name: {r["view"] for r in cells if r["attack"] == name} for name in gradient}
            everything = {"unaware", "start", "identity", "tangent", "exact"}
            assert views["pgd"] == everything
            assert views["fgsm"] == everything | {"implicit", "gauss_newton"}
            assert views["window_pgd"] == views.get("cw", {"exact"}) == {"exact"}
    assert {r["defence"] for r in table if r["norm"] == "union"} == set(defences)
    assert all(r["n"] == 20 and r["ci_low"] <= r["robust_accuracy"] <= r["ci_high"] for r in table)
    trained = {(r["defence"], r["norm"]) for r in table if r["trained"]}
    filtered = ("encoder", "filter", "filter+reject", "hardened+filter", "hardened+mixed")
    assert trained == {("hardened", "linf"), *((name, norm) for name in filtered for norm in ("linf", "l2"))}


def test_in_mode_standard_a_row_is_what_is_left_so_far(finished):
    metrics = json.loads((finished / "runs/digits/evaluate/stage.json").read_text())["metrics"]
    assert metrics["mode"] == "standard"
    chains = {}
    for r in metrics["rows"]:
        if r["attack"] not in ("clean", "worst"):
            chains.setdefault((r["defence"], r["norm"], r["eps"]), []).append(r["robust_accuracy"])
    for chain in chains.values():
        assert chain == sorted(chain, reverse=True)


def test_the_worst_row_is_what_survives_in_the_csv(finished):
    run = finished / "runs" / "digits"
    with (run / "evaluate" / "images.csv").open() as file:
        lines = list(csv.DictReader(file))
    for r in rows(run):
        if r["attack"] != "worst":
            continue
        left = [1.0] * 20
        for line in lines:
            threat = (line["norm"], float(line["eps"]))
            counts = line["attack"] == "clean" or r["norm"] == "union" or threat == (r["norm"], r["eps"])
            if line["defence"] == r["defence"] and counts:
                left[int(line["image"])] = min(left[int(line["image"])], float(line["score"]))
        assert r["robust_accuracy"] == pytest.approx(sum(left) / 20)


def test_checks_are_kept_and_failures_stand_above_the_table(finished):
    metrics = json.loads((finished / "runs/digits/evaluate/stage.json").read_text())["metrics"]
    failed = [check for check in metrics["checks"] if not check["passed"]]
    assert len(failed) == len(metrics["warnings"])
    # Of the model, or of the threat alone under which they were found; a union is of any.
    found = {(check["defence"], check["norm"], check["eps"]) for check in failed}
    for r in metrics["rows"]:
        of_model, of_threat = (r["defence"], None, 0.0), (r["defence"], r["norm"], r["eps"])
        speaks = {line for line in found if line[0] == r["defence"]}
        expected = bool(speaks if r["norm"] == "union" else speaks & {of_model, of_threat})
        assert r["masked"] == expected, r
    assert {(c["norm"], c["eps"]) for c in metrics["checks"]} == {(None, 0.0), ("linf", 0.15), ("l2", 1.0)}
    report = (finished / "runs" / "digits" / "report" / "report.md").read_text()
    for check in failed:
        under = f" at {check['norm']} {check['eps']:g}" if check["norm"] else ""
        assert f"**Not a robustness figure:** {check['defence']}{under}: {check['words']}" in report


def test_the_terminal_and_the_report_quote_the_worst(finished):
    output = (finished / "output.txt").read_text()
    report = (finished / "runs" / "digits" / "report" / "report.md").read_text()
    for r in rows(finished / "runs" / "digits"):
        if r["attack"] == "worst":
            figure = f"{'' if r['settled'] else '≤ '}{100 * r['robust_accuracy']:.1f} %"
            assert figure in output
            assert (f"| {figure} (masked) |" if r["masked"] else f"| **{figure}** |") in report
    assert "worst of all attacks and views" in output
    for name in json.loads((finished / "runs/digits/report/stage.json").read_text())["metrics"]["pictures"]:
        assert (finished / "runs" / "digits" / "report" / name).stat().st_size > 1000
        assert f"({name})" in report


def test_a_second_run_finds_everything_cached(run_folder):
    before = {p: p.stat().st_mtime_ns for p in run_folder.rglob("stage.json")}
    result = invoke("run", *settings())
    assert result.exit_code == 0
    for name in STAGES:
        assert f"{name}: cached" in result.output
    assert before == {p: p.stat().st_mtime_ns for p in run_folder.rglob("stage.json")}


def test_where_data_and_devices_lie_changes_nothing(run_folder, tmp_path):
    result = invoke("run", "--dry-run", *settings(f"data.root={tmp_path}", "fabric.accelerator=cpu"))
    assert result.exit_code == 0
    assert result.output.count(": cached") == len(STAGES)


def test_other_settings_are_refused_by_name_before_any_work(run_folder):
    (run_folder / "train-classifier" / "keep").touch()
    result = invoke("run", *settings("classifier.training.images=64"))
    assert result.exit_code == 1
    assert "classifier.training.images was 3200, is 64" in result.output
    assert "--force" in result.output
    assert (run_folder / "train-classifier" / "keep").exists()


def test_force_replaces_what_is_stale_and_what_depends_on_it(run_folder):
    (run_folder / "train-gan" / "keep").touch()
    (run_folder / "train-classifier" / "lose").touch()
    result = invoke("run", "harden", "--force", *settings("classifier.training.images=640"))
    assert result.exit_code == 0, result.output
    assert "train-classifier: done" in result.output
    assert "harden: done" in result.output
    assert not (run_folder / "train-classifier" / "lose").exists()
    assert (run_folder / "train-gan" / "keep").exists()
    table = invoke("stages", *settings("classifier.training.images=640")).output
    for name, state in (("train-gan", "cached"), ("harden", "cached"), ("evaluate", "stale")):
        assert state in next(line for line in table.splitlines() if f" {name} " in line)


def test_what_was_made_of_an_input_as_it_was_is_stale(run_folder):
    """By what the input holds, not by when it was made: the same weights made again change nothing."""

    def states(*more):
        table = invoke("stages", *settings(*more)).output.splitlines()
        names = ("harden", "project", "evaluate", "report", "export")
        lines = [next(line for line in table if f" {name} " in line) for name in names]
        return [line.split("│")[2].strip() for line in lines]

    before = states()
    assert invoke("train-classifier", "--force", *settings()).exit_code == 0
    assert states() == before == ["cached"] * 5
    facts = json.loads((run_folder / "train-classifier" / "stage.json").read_text())
    facts["content"] = "of another machine"
    (run_folder / "train-classifier" / "stage.json").write_text(json.dumps(facts))
    # What comes after these is stale once they are made anew, if they come out otherwise.
    assert states() == ["stale", "stale", "stale", "cached", "stale"]
    for command in (("run", "project"), ("run", "project", "--dry-run"), ("project",)):
        result = invoke(*command, *settings())
        assert result.exit_code == 1
        assert "made with an input that has been made anew since: train-classifier" in result.output
        assert "--force makes it anew" in result.output
    result = invoke("run", "export", "--force", *settings())
    assert result.exit_code == 0, result.output
    assert "train-classifier: cached" in result.output
    assert "harden: done" in result.output
    assert states() == ["cached", "stale", "stale", "cached", "cached"]


def test_a_report_follows_what_it_reports_unasked(run_folder):
    """It holds nothing that its inputs do not hold: to refuse would protect nothing."""
    path = run_folder / "evaluate" / "stage.json"
    facts = json.loads(path.read_text())
    facts["content"] = "another outcome"
    path.write_text(json.dumps(facts))
    assert "report: make anew" in invoke("run", "report", "--dry-run", *settings()).output
    result = invoke("run", "report", *settings())
    assert result.exit_code == 0, result.output
    assert "evaluate: cached" in result.output
    assert "report: done" in result.output
    assert "report: cached" in invoke("run", "report", *settings()).output
    # Nor where what was begun of it was of another evaluation.
    (run_folder / "report").rename(run_folder / "report.part")
    (run_folder / "report.part" / "stage.json").rename(run_folder / "report.part" / "plan.json")
    path.write_text(json.dumps({**facts, "content": "a third outcome"}))
    assert invoke("report", *settings()).exit_code == 0


def test_a_begun_stage_does_not_go_on_with_another_input(run_folder):
    part = run_folder / "harden.part"
    (run_folder / "harden").rename(part)
    facts = json.loads((part / "stage.json").read_text())
    (part / "stage.json").unlink()
    (part / "plan.json").write_text(json.dumps(facts))
    assert "harden: resume" in invoke("harden", "--dry-run", *settings()).output
    facts["made_of"]["train-classifier"] = "another"
    (part / "plan.json").write_text(json.dumps(facts))
    for more in ((), ("--dry-run",)):
        result = invoke("harden", *more, *settings())
        assert result.exit_code == 1
        assert (
            "unfinished work with an input that has been made anew since: train-classifier" in result.output
        )
    assert invoke("harden", "--force", *settings()).exit_code == 0


def test_a_stage_alone_names_what_it_misses(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for dry in ((), ("--dry-run",)):
        result = invoke("evaluate", "--run", "other", *dry, *settings())
        assert result.exit_code == 1
        assert "evaluate needs train-encoder, which is missing in runs/other" in result.output
        assert not (tmp_path / "runs").exists()


def test_dry_run_does_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = invoke("run", "project", "--dry-run", *settings())
    assert result.exit_code == 0
    assert result.output.split("\n")[:5] == [
        "train-gan: run",
        "train-classifier: run",
        "harden: run",
        "train-encoder: run",
        "project: run",
    ]
    assert list(tmp_path.iterdir()) == []


def test_a_run_folder_that_cannot_be_made_is_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").write_text("in the way")
    result = invoke("train-classifier", *settings())
    assert result.exit_code == 1
    assert len(result.output.strip().splitlines()) == 1
    assert "runs" in result.output


def test_two_commands_do_not_work_on_one_run(run_folder):
    shutil.rmtree(run_folder / "report")
    with alone(run_folder, RuntimeError):
        result = invoke("report", *settings())
    assert result.exit_code == 1
    assert "runs/digits: another command is at work on it" in result.output
    assert invoke("report", *settings()).exit_code == 0


def test_what_another_command_finished_meanwhile_is_not_replaced(run_folder, monkeypatch):
    """Between the first look and the lock devices are set up and data are read: time enough."""
    shutil.rmtree(run_folder / "train-classifier")
    first = ("run", "train-classifier", *settings("classifier.training.lr=1e-3"))
    made, outputs = pipelines.run.make_fabric, []

    def slow(config):
        monkeypatch.undo()
        monkeypatch.chdir(run_folder.parents[1])
        outputs.append(invoke(*first).output)
        return made(config)

    monkeypatch.setattr(pipelines.run, "make_fabric", slow)
    result = invoke("run", "train-classifier", *settings())
    assert "train-classifier: done" in outputs[0]
    assert result.exit_code == 1
    assert "classifier.training.lr was 0.001, is 0.002" in result.output
    monkeypatch.setattr(pipelines.run, "make_fabric", slow)
    shutil.rmtree(run_folder / "train-classifier")
    result = invoke(*first)
    assert "train-classifier: done" in outputs[1]
    assert result.exit_code == 0, result.output
    assert "train-classifier: cached" in result.output


def test_a_stage_that_lies_elsewhere_is_replaced_here_alone(run_folder, tmp_path):
    done, moved = run_folder / "train-classifier", tmp_path / "elsewhere"
    shutil.move(done, moved)
    before = (moved / "stage.json").read_bytes()
    for _ in range(2):
        if done.exists():
            shutil.rmtree(done)
        done.symlink_to(moved)
        result = invoke("train-classifier", "--force", *settings())
        assert result.exit_code == 0, result.output
        assert not done.is_symlink()
        assert not (run_folder / "train-classifier.old").is_symlink()
    assert (moved / "stage.json").read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["run", "--set", "gan.imagess=3"], 2, "did you mean gan.images"),
        (["run", "--config", "missing.toml"], 2, "missing.toml: cannot be read"),
        (["run", "nowhere"], 2, "no stage 'nowhere'"),
        (["run", "--nothing"], 2, "No such option"),
        (["train-gan", "--set", "fabric.accelerator=abacus"], 2, "fabric: "),
        (["train-gan", "--set", "fabric.devices=0"], 2, "fabric: "),
        (
            ["train-gan", "--set", "fabric.accelerator=cpu", "--set", "fabric.devices=9999"],
            2,
            "fabric: devices: expected at most ",
        ),
        (["train-gan", "--set", "fabric.strategy=luck"], 2, "fabric: "),
        (
            ["train-gan", "--set", "fabric.accelerator=cpu", "--set", "fabric.precision=16-mixed"],
            2,
            "fabric.precision: expected 32-true or bf16-mixed on a CPU, got 16-mixed",
        ),
        (
            ["filter", "missing.png", "out.png", "--filter", "nowhere"],
            1,
            "nowhere: expected a folder with filter",
        ),
        (["filter", "a.png", "b.png", "--filter", "x", "--run", "y"], 2, "give one of them"),
        (["train-gan", "--set", "data.name=image_folder", "--set", "data.root=nowhere"], 1, "nowhere"),
        (["run", "--set", "data.name=mnist"], 2, "linf 0.15 and l2 1 are meant for digits; for mnist give"),
        (["run", "evaluate", "--set", "data.name=mnist"], 2, "evaluate.threats"),
        (["evaluate", "--set", "data.name=mnist"], 2, "evaluate.threats"),
        (["evaluate", "--classifier", "mine:classifier", "--data", "mnist"], 2, "evaluate.threats"),
    ],
)
def test_bad_input_is_one_line_and_a_code(tmp_path, monkeypatch, arguments, code, said):
    monkeypatch.chdir(tmp_path)
    result = invoke(*arguments)
    assert result.exit_code == code, result.output
    assert said in result.output
    assert "Traceback" not in result.output
    assert list(tmp_path.iterdir()) == []


def test_help_and_usage_errors_answer_without_torch():
    code = (
        "import sys; from pipelines.cli import main\n"
        "try: main({})\nexcept SystemExit as e: print(e.code, 'torch' in sys.modules)"
    )
    for arguments, expected in ((["run", "--help"], "0 False"), (["run", "--nothing"], "2 False")):
        result = subprocess.run(
            [sys.executable, "-c", code.format(arguments)],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
        )
        assert result.stdout.endswith(expected + "\n"), result.stdout + result.stderr


def test_a_latent_objective_needs_the_encoder_and_hardens(run_folder):
    latent = settings("harden.objective.name=latent", "harden.training.images=128")
    refused = invoke("harden", "--force", *latent)
    assert refused.exit_code == 1  # an encoder that began as a variant is not what stands before variants
    assert "harden needs train-encoder, which is stale" in refused.output
    result = invoke("run", "harden", "--force", *latent)
    assert result.exit_code == 0, result.output
    facts = json.loads((run_folder / "harden" / "stage.json").read_text())
    assert set(facts["inputs"]) == {"train-classifier", "train-encoder"}


def test_an_image_folder_goes_through_the_whole_pipeline(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for split, count in (("train", 12), ("test", 4)):
        for label, name in enumerate(("dark", "bright")):
            folder = tmp_path / "photos" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(100 * label, 100 * label + 100, (20, 17, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    (tmp_path / "photos" / "train" / "dark" / "broken.png").write_bytes(b"\x89PNG broken")
    more = ("data.name=image_folder", f"data.root={tmp_path / 'photos'}", "data.image_size=16", "run=photos")
    more += ("data.train_images=0", "data.test_images=0", "gan.images=128", "encoder.images=128")
    more += ("classifier.training.images=640", "harden.training.images=128", "project.images=4")
    more += ("evaluate.baselines=[]", "evaluate.reject=0", "evaluate.checks=0")
    more += ('evaluate.threats=[{norm="linf",eps=0.05},{norm="l2",eps=0.5}]',)
    result = invoke("run", *settings(*more))
    assert result.exit_code == 0, result.output
    table = rows(tmp_path / "runs" / "photos")
    assert {r["n"] for r in table} == {8}
    (tmp_path / "photos" / "train" / "dark" / "0.png").unlink()
    stale = invoke("run", *settings(*more))
    assert stale.exit_code == 1
    assert "data.digest" in stale.output


def test_two_processes_measure_what_one_does(run_folder):
    assert invoke("evaluate", "--force", *settings(*FEWER)).exit_code == 0
    expected = rows(run_folder)
    shutil.rmtree(run_folder / "evaluate")
    command = [sys.executable, "-m", "pipelines.cli", "run", "evaluate"]
    command += settings(*FEWER, "fabric.accelerator=cpu", "fabric.devices=2")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert rows(run_folder) == expected
    assert result.stdout.count("harden: cached") == 1  # one process speaks

    shutil.rmtree(run_folder / "harden")
    command[command.index("evaluate")] = "harden"
    with alone(run_folder, RuntimeError):
        refused = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert refused.returncode == 1
    assert "another command is at work on it" in refused.stderr
    assert "Traceback" not in refused.stderr
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert load_classifier(run_folder / "harden" / "hardened")(torch.rand(1, 1, 8, 8)).isfinite().all()


def test_commands_are_listed_as_they_follow_one_another():
    lines = invoke("--help").output.splitlines()
    listed = [line.split()[0] for line in lines[lines.index("Commands:") + 1 :] if line.strip()]
    assert listed[:4] == ["run", "stages", "config", "filter"]
    assert set(listed[4:]) == set(STAGES)
    assert listed.index("train-gan") < listed.index("harden") < listed.index("train-encoder")
