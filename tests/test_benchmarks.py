"""The benchmarks as commands: what is wrong with their input is one line, before anything is computed."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from torch import Tensor, nn

from gan import Encoder, Generator
from gan.optimisation import seeded
from manifold_defense import PRESETS, DefendedClassifier, ManifoldFilter
from manifold_defense.artifact import load_classifier, save_classifier, save_filter
from manifold_defense.classifiers import ArchitectureConfig, ImageClassifier
from manifold_defense.evaluation import Job, Outcome

ROOT = Path(__file__).parents[1]
ZOO = ROOT / "zoo" / "mnist"
BENCHMARKS = sorted(
    p.stem for p in (ROOT / "benchmarks").glob("*.py") if p.stem not in ("inputs", "kept", "deceivers")
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
    "memory": ("--filter", ZOO / "filter", "--classifier", ZOO / "undefended"),
    "restarts": ("--filter", ZOO / "filter", "--classifier", ZOO / "undefended"),
    "picture": ("--filter", ZOO / "filter", "--classifier", ZOO / "undefended", "--output", "picture.png"),
    "proofs": ("--classifier", ZOO / "undefended"),
    "second_opinion": ("--evaluation", ZOO, "--classifier", ZOO / "undefended"),
}


@pytest.mark.parametrize("name", [name for name in GIVEN if name not in ("second_opinion", "proofs")])
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


def test_proofs_go_on_where_they_stopped(
    run: Callable[..., Result], digits: tuple[Tensor, Tensor], tmp_path: Path
) -> None:
    config = ArchitectureConfig("shallow", width=2)
    model = seeded(0, lambda: ImageClassifier((1, 8, 8), 10, config))
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model((digits[0] > 0.5).float()), digits[1]).backward()
        optimizer.step()
    save_classifier(model, tmp_path / "own")
    whole, part = tmp_path / "whole.json", tmp_path / "part.json"
    given = ("--classifier", tmp_path / "own", "--data", "digits", "--eps", 0.05, "--boxes", 20)
    done = run("proofs", *given, "--images", 24, "--json", whole)
    assert done.exit_code == 0, done.output
    facts = json.loads(whole.read_text())
    verdicts = [image["verdict"] for image in facts["images"]]
    assert {"proved", "refuted"} <= set(verdicts) <= {"proved", "refuted", "open"}
    for name in ("proved", "refuted"):
        assert f"{verdicts.count(name)} of 24" in next(
            line for line in done.output.splitlines() if line.startswith(name)
        )
    run("proofs", *given, "--images", 10, "--json", part)
    assert "s an image" in run("proofs", *given, "--images", 24, "--json", part).output
    assert json.loads(part.read_text()) == facts
    assert "s an image" not in run("proofs", *given, "--images", 24, "--json", part).output
    # Of other settings, or no result at all: refused, and kept.
    part.write_text(before := whole.read_text())
    assert "of other weights, data, eps or boxes" in error_of(
        run("proofs", *given, "--eps", 0.1, "--json", part)
    )
    other = ("--set", "data.test_images=30")
    assert "of other weights, data" in error_of(run("proofs", *given, *other, "--json", part))
    assert part.read_text() == before
    part.write_text("[]")
    assert "no result of this command" in error_of(run("proofs", *given, "--json", part))


def test_robustness_goes_on_where_it_stopped(
    run: Callable[..., Result],
    networks: tuple[Generator, Encoder],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    save_filter(ManifoldFilter(*networks), tmp_path / "filter")
    config = ArchitectureConfig("shallow", width=2)
    save_classifier(seeded(0, lambda: ImageClassifier((1, 8, 8), 10, config)), tmp_path / "own")
    given: list[object] = ["--filter", tmp_path / "filter", "--classifier", f"own={tmp_path / 'own'}"]
    given += ["--data", "digits", "--threat", "linf:0.1", "--images", 40, "--preset", "robust"]
    given += ["--preset", "accurate", "--steps", 1, "--approximate-steps", 1, "--restarts", 1, "--queries", 0]
    given += ["--checks", 0, "--no-baselines"]
    whole, part = tmp_path / "whole.json", tmp_path / "part.json"
    done = run("robustness", *given, "--json", whole)
    assert done.exit_code == 0, done.output
    facts = json.loads(whole.read_text())
    assert [(row["preset"], row["norm"], len(row["alive"])) for row in facts["rows"]] == [
        ("robust", "linf", 40),
        ("accurate", "linf", 40),
    ]
    assert [(pair["before"], pair["after"]) for pair in facts["paired"]] == [("robust", "accurate")]

    module = import_module("manifold_defense.evaluation.course")
    run_job = module.run_job

    def noting(names: list[str], limit: int = 1000) -> Callable[..., Outcome]:
        def noted(job: Job, *rest: Any) -> Outcome:
            if len(names) == limit:
                raise KeyboardInterrupt
            names.append(job.name)
            outcome: Outcome = run_job(job, *rest)
            return outcome

        return noted

    met: list[str] = []
    again: list[str] = []
    with monkeypatch.context() as patch:
        patch.setattr(module, "run_job", noting(met, limit=4))
        assert run("robustness", *given, "--json", part).exit_code == 130
    assert not part.exists()
    assert len(list((tmp_path / "part.json.jobs").iterdir())) == 4
    with monkeypatch.context() as patch:
        patch.setattr(module, "run_job", noting(again))
        assert run("robustness", *given, "--json", part).exit_code == 0
    assert again
    assert not set(again) & set(met)
    assert json.loads(part.read_text()) == facts
    assert not (tmp_path / "part.json.jobs").exists()


@pytest.mark.parametrize(
    ("name", "part", "arguments"),
    [
        ("certification", "smoothed_certify", ("--sigma", 0.25, "--draws", 20, "--bank", 600)),
        ("hardening", "latent_attack", ("--eps", 0.1, "--steps", 1, "--seeds", 2, "--objective", "clean")),
    ],
)
def test_rows_that_are_finished_are_not_made_again(
    run: Callable[..., Result],
    networks: tuple[Generator, Encoder],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    part: str,
    arguments: tuple[object, ...],
) -> None:
    save_filter(ManifoldFilter(*networks), tmp_path / "filter")
    config = ArchitectureConfig("shallow", width=2)
    save_classifier(seeded(0, lambda: ImageClassifier((1, 8, 8), 10, config)), tmp_path / "own")
    given = ["--filter", tmp_path / "filter", "--classifier", tmp_path / "own", "--data", "digits"]
    given += ["--images", 64, "--test-images", 4, *arguments]
    output, kept = tmp_path / "rows.json", tmp_path / "rows.json.jobs"

    calls = 0

    def stopping(original: Callable[..., Any], limit: int) -> Callable[..., Any]:
        def called(*given: Any, **named: Any) -> Any:
            nonlocal calls
            if calls == limit:
                raise KeyboardInterrupt
            calls += 1
            return original(*given, **named)

        return called

    def made(limit: int) -> int:
        """How often a part of each row is asked for, until it is interrupted at the `limit`."""
        nonlocal calls
        calls = 0
        with monkeypatch.context() as patch:
            for room in ("certification", "attacks"):
                module = import_module(f"manifold_defense.{room}")
                if hasattr(module, part):
                    patch.setattr(module, part, stopping(getattr(module, part), limit))
            done = run(name, *given, "--json", output)
            assert done.exit_code == (130 if calls == limit else 0), done.output
        return calls

    assert made(1) == 1

    def bare(file: Path) -> str:
        return "".join(file.read_text().split())

    rows = [text.strip("{}") for text in map(bare, kept.glob("*.json")) if "seconds" in text]
    assert rows
    assert made(100) == 1  # of two
    assert not kept.exists()
    assert all(row in bare(output) for row in rows)
    assert made(100) == 2  # all is measured anew, and what another question left is not taken
    given[given.index("--images") + 1] = 65
    assert made(1) == 1
    given[given.index("--images") + 1] = 64
    assert made(100) == 2


def test_the_winning_restart_alone_is_the_preset(
    run: Callable[..., Result], networks: tuple[Generator, Encoder], tmp_path: Path
) -> None:
    save_filter(ManifoldFilter(*networks), tmp_path / "filter")
    config = ArchitectureConfig("shallow", width=2)
    save_classifier(seeded(0, lambda: ImageClassifier((1, 8, 8), 10, config)), tmp_path / "own")
    given = ["--filter", tmp_path / "filter", "--classifier", tmp_path / "own", "--data", "digits"]
    given += ["--threat", "linf:0.1", "--images", 5, "--steps", 2, "--every", 2, "--batch", 3]
    done = run("restarts", *given, "--json", tmp_path / "left.json")
    assert done.exit_code == 0, done.output
    left = json.loads((tmp_path / "left.json").read_text())["alive"]
    phases = ["clean", "windows at bare", "windows at robust", "windows at accurate", "own gradient"]
    assert list(left) == phases
    for before, after in pairwise(left[phase] for phase in phases):
        assert len(after) == 5
        assert all(was or not still for was, still in zip(before, after, strict=True))

    module = import_module("restarts")
    generator, encoder = networks
    filter = ManifoldFilter(generator, encoder, replace(PRESETS["reference"], steps=20))
    x = torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    defended = DefendedClassifier(filter, load_classifier(tmp_path / "own"))
    winning = module.Winning(defended, every=1)
    assert len(filter.project(x).restart.unique()) > 1
    torch.testing.assert_close(winning(x), defended(x))
    gradients = []
    for model in (winning, defended):
        at = x.clone().requires_grad_(True)
        gradients.append(torch.autograd.grad(model(at).square().sum(), at)[0])
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", GIVEN)
def test_a_result_that_could_not_be_written_is_refused_first(run: Callable[..., Result], name: str) -> None:
    option = "--output" if name == "picture" else "--json"
    done = run(name, *GIVEN[name], option, "nowhere/a.file")
    assert done.exit_code == 2
    assert "nowhere: no such folder" in error_of(done)


@pytest.fixture
def evaluated(digits: tuple[Tensor, Tensor], tmp_path: Path) -> Path:
    """A folder with a classifier `own` and the images.csv of an evaluation of it that attacked nothing."""
    config = ArchitectureConfig("shallow", width=2)
    model = seeded(0, lambda: ImageClassifier((1, 8, 8), 10, config))
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(digits[0]), digits[1]).backward()
        optimizer.step()
    save_classifier(model, tmp_path / "own")
    lines = ["image,defence,norm,eps,score"]
    lines += [f"{image},own,,,{float(image != 2)}" for image in range(8)]
    for norm, eps in (("linf", 0.3), ("patch", 3)):
        lines += [f"{image},own,{norm},{eps},{float(image != 5)}" for image in range(8) if image != 2]
    (tmp_path / "images.csv").write_text("\n".join(lines), encoding="utf-8")
    return tmp_path


def test_our_own_attacks_meet_what_an_evaluation_left(run: Callable[..., Result], evaluated: Path) -> None:
    output = evaluated / "more.json"
    given = ["--evaluation", evaluated, "--defence", "own", "--classifier", evaluated / "own"]
    given += ["--data", "digits", "--json", output, "--batch", 4]
    done = run("second_opinion", *given, "--threat", "linf:0.3", "--attack", "quick")
    assert done.exit_code == 0, done.output
    row = json.loads(output.read_text())["rows"][0]
    assert (row["images"], row["left"], row["tried"]) == (8, 6, 6)
    assert set(row["broken"]) <= {0, 1, 3, 4, 6, 7}  # image 2 was wrong, and 5 is broken
    assert len(row["broken"]) >= 4  # of an undefended classifier, which 0.3 leaves hardly an image
    assert row["share_of_all"] == len(row["broken"]) / 8
    assert "6 of 8 images are left (75.0%); of 6 tried" in done.stdout
    done = run("second_opinion", *given, "--threat", "patch:3", "--attack", "patch", "--survivors", 2)
    assert done.exit_code == 0, done.output
    assert json.loads(output.read_text())["rows"][0]["tried"] == 2


@pytest.mark.parametrize(
    ("threat", "attack", "said"),
    [
        ("linf:0.2", "pgd", "own did not meet linf:0.2"),
        ("patch:3", "autoattack", "--attack autoattack: knows no patch:3"),
        ("linf:0.3", "patch", "--attack patch: knows no linf:0.3"),
        ("linf:0.3", "noise", "'noise' is not one of"),
    ],
)
def test_a_second_opinion_that_nobody_has_is_refused_first(
    run: Callable[..., Result], evaluated: Path, threat: str, attack: str, said: str
) -> None:
    given = ["--evaluation", evaluated, "--defence", "own", "--classifier", evaluated / "own"]
    given += ["--data", "digits", "--threat", "linf:0.3", "--threat", threat]
    done = run("second_opinion", *given, "--attack", attack, "--json", evaluated / "more.json")
    assert done.exit_code == 2, done.output
    assert said in error_of(done)


@pytest.mark.parametrize(
    ("name", "arguments", "code", "said"),
    [
        ("robustness", ("--threat", "l7:1"), 2, "l7:1: expected NORM:EPS"),
        ("robustness", ("--threat", "linf"), 2, "linf: expected NORM:EPS"),
        ("robustness", ("--proxy", "reference=mine"), 2, "got 'mine'"),
        ("robustness", ("--preset", "mine"), 2, "mine"),
        (
            "restarts",
            ("--preset", "fast"),
            2,
            "--preset fast: expected one of several restarts from the prior",
        ),
        ("robustness", ("--classifier", "undefended"), 2, "NAME=FOLDER"),
        ("hardening", ("--objective", "mine"), 2, "mine"),
        ("second_opinion", (), 1, "images.csv"),
        ("proofs", ("--classifier", "nowhere"), 2, "'nowhere' does not exist"),
        ("proofs", ("--data", "digits", "--classifier", ROOT / "docs"), 1, "classifier.json"),
        ("proofs", ("--eps", "-1"), 2, "-1"),
    ],
)
def test_a_wrong_name_is_one_line(
    run: Callable[..., Result], name: str, arguments: tuple[object, ...], code: int, said: str
) -> None:
    done = run(name, *GIVEN[name], *arguments)
    assert done.exit_code == code, done.output
    assert said in error_of(done)
