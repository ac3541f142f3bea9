"""Runs that were stopped, cut short or damaged: what is kept, resumed, refused and named."""

import errno
import importlib
import json
import shutil
from types import SimpleNamespace
from typing import NoReturn

import pytest
import torch
from lightning_fabric import Fabric
from PIL import Image
from pipelines_support import FEWER, invoke, rows, settings
from safetensors.torch import load_file

from manifold_defense import Threat
from manifold_defense.evaluation import AttackConfig, Defence
from manifold_defense.evaluation.outcome import Job, Outcome
from pipelines.context import Context, InterruptionError
from pipelines.failures import Failure, reported
from pipelines.jobs import JobStore
from pipelines.stages import STAGES


@pytest.mark.parametrize("stage", ["train-gan", "train-encoder", "harden"])
def test_an_interrupted_training_resumes_to_the_same_weights(run_folder, monkeypatch, stage):
    folder = run_folder / stage
    before = {path.relative_to(folder): load_file(path) for path in folder.rglob("*.safetensors")}
    assert before
    train = Context.train

    def interrupted(self, loop, state, total, picture=None):
        def until_half():
            for record in loop:
                yield record
                if state["images"] >= total // 2:
                    self.fabric.save(self.folder / "state.ckpt", state)
                    raise InterruptionError

        train(self, until_half(), state, total, picture)

    shutil.rmtree(folder)
    with monkeypatch.context() as patch:
        patch.setattr(Context, "train", interrupted)
        stopped = invoke(stage, *settings())
    assert stopped.exit_code == 130
    assert "run the same command again to resume" in stopped.output
    assert not folder.exists()
    assert "unfinished" in invoke("stages", *settings()).output

    resumed = invoke(stage, *settings())
    assert resumed.exit_code == 0, resumed.output
    assert "resumed at" in resumed.output
    for name, tensors in before.items():
        after = load_file(folder / name)
        assert tensors.keys() == after.keys()
        assert all(torch.equal(tensors[key], after[key]) for key in tensors)


def test_an_interrupted_evaluation_keeps_finished_jobs(run_folder, monkeypatch):
    evaluation = importlib.import_module("manifold_defense.evaluation.course")
    assert invoke("evaluate", "--force", *settings(*FEWER)).exit_code == 0
    expected = rows(run_folder)
    shutil.rmtree(run_folder / "evaluate")
    run_job, done = evaluation.run_job, []

    def counted(job, *arguments):
        if job.name not in done:
            if len(done) == 5:
                raise KeyboardInterrupt
            done.append(job.name)
        return run_job(job, *arguments)

    put, kept = JobStore.put, {}

    def noted(store, job, outcome):
        before = {*store.folder.iterdir()}
        put(store, job, outcome)
        (kept[job.name],) = {*store.folder.iterdir()} - before

    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "run_job", counted)
        patch.setattr(JobStore, "put", noted)
        assert invoke("evaluate", *settings(*FEWER)).exit_code == 130
    assert len(kept) == 5
    kept[done[1]].write_bytes(b"cut short")

    again = []
    with monkeypatch.context() as patch:
        patch.setattr(
            evaluation, "run_job", lambda job, *rest: (again.append(job.name), run_job(job, *rest))[1]
        )
        assert invoke("evaluate", *settings(*FEWER)).exit_code == 0
    assert set(again) & set(done) == {done[1]}
    assert rows(run_folder) == expected


def test_processes_that_see_other_files_agree_on_what_is_done(tmp_path):
    """The first one's files count: what another finds, or does not, would leave one of them waiting."""
    job = Job(Defence.bare("a", torch.nn.Identity()), AttackConfig("pgd"), "exact", Threat("linf", 0.1))
    met = torch.arange(3)
    outcome = Outcome(*(torch.zeros(3) for _ in Outcome._fields))._replace(met=met)
    told = []

    def process(folder, rank, broadcast):
        return JobStore(folder, SimpleNamespace(is_global_zero=rank == 0, broadcast=broadcast), "digest")

    first = process(tmp_path / "first", 0, lambda value: (told.append(value), value)[1])
    first.put(job, outcome)
    assert first.get(job, met).met.equal(met)
    assert first.get(job, met + 1) is None  # of other images
    second = process(tmp_path / "second", 1, lambda value: told.pop(0))
    second.put(job, outcome)
    assert not (tmp_path / "second").exists()
    assert second.get(job, met).met.equal(met)
    blind = process(tmp_path / "first", 1, lambda value: told.pop(0))
    assert blind.get(job, met) is None  # though the file lies there
    assert told == []


def test_unfinished_work_of_other_settings_is_not_thrown_away(run_folder):
    shutil.rmtree(run_folder / "train-encoder")
    part = run_folder / "train-encoder.part"
    part.mkdir()
    plan = {"fingerprint": "other", "version": 1, "config": {"encoder.images": 5}, "inputs": {}}
    (part / "plan.json").write_text(json.dumps(plan))
    (part / "state.ckpt").write_bytes(b"an hour's work")
    result = invoke("train-encoder", *settings())
    assert result.exit_code == 1
    assert "unfinished work with other settings" in result.output
    assert part.exists()
    assert invoke("train-encoder", "--force", *settings()).exit_code == 0


def test_a_damaged_checkpoint_is_named(run_folder):
    plan = json.loads((run_folder / "train-gan" / "stage.json").read_text())
    shutil.rmtree(run_folder / "train-gan")
    part = run_folder / "train-gan.part"
    part.mkdir()
    (part / "plan.json").write_text(json.dumps(plan))
    (part / "state.ckpt").write_bytes(b"PK\x03\x04 not a checkpoint")
    result = invoke("train-gan", *settings())
    assert result.exit_code == 1
    assert "train-gan.part/state.ckpt: damaged checkpoint" in result.output
    assert "Traceback" not in result.output


@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied"), torch.OutOfMemoryError("full")])
def test_a_checkpoint_that_could_not_be_read_here_is_not_called_damaged(run_folder, monkeypatch, error):
    def load(*args, **kwargs):
        raise error

    part = run_folder / "train-gan.part"
    (run_folder / "train-gan").rename(part)
    (part / "stage.json").rename(part / "plan.json")
    (part / "state.ckpt").write_bytes(b"an hour's work")
    monkeypatch.setattr(Fabric, "load", load)
    result = invoke("train-gan", *settings())
    assert result.exit_code == 1
    assert "Permission denied" in result.output or "out of memory" in result.output
    assert "delete" not in result.output


def test_a_full_disk_is_named_and_the_same_command_works_once_there_is_room(run_folder, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    shutil.rmtree(run_folder / "train-gan")
    with monkeypatch.context() as patch:
        patch.setattr(Fabric, "save", full)
        result = invoke("train-gan", *settings())
    assert result.exit_code == 1
    assert "train-gan.part: No space left on device" in result.output
    assert invoke("train-gan", *settings()).exit_code == 0


@pytest.mark.parametrize("old_is_left", [True, False])
def test_a_commit_that_was_cut_short_is_completed(run_folder, old_is_left):
    (run_folder / "train-gan").rename(run_folder / "train-gan.part")
    (run_folder / "train-gan.part" / "state.ckpt").touch()
    if old_is_left:
        (run_folder / "train-gan.old").mkdir()
    # To look moves nothing: whoever commits may be at it.
    for look in (("stages",), ("run", "--dry-run")):
        assert "unfinished" not in invoke(*look, *settings()).output
    assert (run_folder / "train-gan.part" / "state.ckpt").exists()
    assert invoke("run", *settings()).output.count(": cached") == len(STAGES)
    assert not list(run_folder.glob("train-gan.*"))
    assert not list(run_folder.rglob("state.ckpt"))


def test_damaged_facts_are_named(run_folder):
    (run_folder / "train-gan" / "stage.json").write_text("{")
    result = invoke("stages", *settings())
    assert result.exit_code == 1
    assert "stage.json: damaged" in result.output


def test_damaged_weights_of_an_input_are_named(run_folder):
    weights = run_folder / "train-encoder" / "filter.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    shutil.rmtree(run_folder / "project")
    result = invoke("project", *settings())
    assert result.exit_code == 1
    assert "train-encoder/filter.safetensors: cannot be read" in result.output


def test_force_on_a_stage_makes_it_anew_even_if_begun(run_folder):
    part = run_folder / "train-classifier.part"
    (run_folder / "train-classifier").rename(part)
    facts = json.loads((part / "stage.json").read_text())
    (part / "stage.json").unlink()
    (part / "plan.json").write_text(json.dumps(facts))
    (part / "state.ckpt").write_bytes(b"of no use")
    assert invoke("train-classifier", *settings()).exit_code == 1
    assert invoke("train-classifier", "--force", *settings()).exit_code == 0


def test_a_stage_that_failed_before_it_had_anything_stands_in_nobodys_way(tmp_path, monkeypatch):
    """A class of images was missing: once it is there the same command works."""
    monkeypatch.chdir(tmp_path)
    command = ("data.name=image_folder", "data.root=photos", "data.image_size=16", "run=photos")
    command = ("train-classifier", *settings(*command, "classifier.training.images=64"))

    def add(name):
        for split in ("train", "test"):
            (tmp_path / "photos" / split / name).mkdir(parents=True)
            for i in range(4):
                shade = Image.new("L", (16, 16), 40 * i + len(name))
                shade.save(tmp_path / "photos" / split / name / f"{i}.png")

    add("cat")
    failed = invoke(*command)
    assert failed.exit_code == 1
    assert "fewer than 2 class folders" in failed.output
    add("horse")
    mended = invoke(*command)
    assert mended.exit_code == 0, mended.output
    plan = json.loads((tmp_path / "runs" / "photos" / "train-classifier" / "stage.json").read_text())
    assert plan["seconds"] > 0


def test_work_whose_plan_is_lost_is_started_again(run_folder):
    shutil.rmtree(run_folder / "train-encoder")
    (run_folder / "train-encoder.part").mkdir()
    (run_folder / "train-encoder.part" / "state.ckpt").write_bytes(b"of what, nobody knows")
    result = invoke("train-encoder", *settings())
    assert result.exit_code == 0, result.output


def test_a_lack_of_memory_is_one_line():
    with pytest.raises(Failure, match=r"^out of memory: expected smaller batches") as caught, reported():
        torch.empty(10**15)
    assert caught.value.exit_code == 1
    with pytest.raises(RuntimeError, match="another"), reported():
        raise RuntimeError("another")


def test_a_lack_of_a_compiler_is_one_line():
    def lacking(graph: torch.fx.GraphModule, inputs: object) -> NoReturn:
        raise RuntimeError("no compiler")

    refused = torch.compile(lambda x: x + 1, backend=lacking)
    with (
        pytest.raises(Failure, match=r"^torch\.compile: .*no compiler; projection\.compiled=false") as caught,
        reported(),
    ):
        refused(torch.ones(1))
    assert caught.value.exit_code == 1
