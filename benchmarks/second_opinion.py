"""What do more attacks find on what an evaluation left? AutoAttack, HopSkipJump, our own from another seed.

    manifold-defense evaluate --config configs/mnist.toml --classifier mine:classifier --filter FOLDER ...
    python benchmarks/second_opinion.py --evaluation runs/own/evaluate --defence own+filter \\
        --filter FOLDER --classifier zoo/mnist/undefended --data mnist --set data.root=PATH

Only images that survived the whole evaluation are handed on: what is broken here, our suite lacks.
Robust accuracy under both together is at most the evaluation's less that share. AutoAttack is of the
published strength (APGD of 100 steps on cross-entropy and towards nine classes, FAB towards nine,
Square of 5,000 queries) and differentiates every step of the projection; HopSkipJump, by ART, asks the
deployed model alone. Peers as for `benchmarks/attacks.py`. `--attack thorough` and `quick` are our
suites, any other name what the former has of that attack, from `--seed`: if it still breaks images, the
evaluation has not settled. A line a threat says how many survivors were tried, the first `--survivors`,
and how many were broken. With `--json FILE` finished batches are kept in FILE.jobs until all are done, and
the same command goes on from there.
"""

from __future__ import annotations

import csv
import json
import time
from functools import partial
from importlib import import_module
from itertools import product
from pathlib import Path
from typing import cast

import click
import torch
from inputs import THREAT, benchmark, data_options, folder, json_option, read_images
from kept import Kept, Row
from rich.progress import track
from torch import Tensor

from manifold_defense import PRESETS, DefendedClassifier, Threat
from manifold_defense.attacks.norms import geometry
from manifold_defense.attacks.objective import correct
from manifold_defense.evaluation import SUITES, Defence, evaluate
from manifold_defense.evaluation.adapters import art_classifier, autoattack
from manifold_defense.evaluation.recipe import SPECS
from manifold_defense.evaluation.statistics import wilson
from manifold_defense.types import Classifier, Norm
from pipelines.jobs import digest_of

PEERS = ("autoattack", "hop_skip_jump")
# Noise alone says nothing.
_NAMES = {attack.name for attack in SUITES["thorough"] if not SPECS[attack.name].control}
OWN = SUITES | {
    name: tuple(attack for attack in SUITES["thorough"] if attack.name == name) for name in sorted(_NAMES)
}


def survivors(path: Path, defence: str) -> tuple[int, dict[Threat, list[int]]]:
    """How many images an evaluation had, and by threat those of `defence` that nothing broke.

    `path` is the stage's images.csv.
    """
    images: set[int] = set()
    broken: dict[Threat, set[int]] = {}
    wrong: set[int] = set()
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            if row["defence"] != defence:
                continue
            image, lost = int(row["image"]), float(row["score"]) == 0
            images.add(image)
            if not row["norm"]:
                wrong |= {image} if lost else set()
                continue
            found = broken.setdefault(Threat(cast(Norm, row["norm"]), float(row["eps"])), set())
            found |= {image} if lost else set()
    if not images:
        raise click.UsageError(f"{path}: no images of a defence {defence!r}")
    return len(images), {threat: sorted(images - wrong - lost) for threat, lost in broken.items()}


def label(threat: Threat) -> str:
    return f"{threat.norm}:{threat.eps:g}"


def answers(attack: str, threat: Threat) -> bool:
    """Whether an attack is one for that threat."""
    if attack in PEERS:
        return threat.norm in ("linf", "l2")
    return any(own.applies_to(threat) for own in OWN[attack])


def hop_skip_jump(model: Classifier, x: Tensor, y: Tensor, threat: Threat) -> Tensor:
    """ART's, of its published settings; what lies outside the ball is moved onto it."""
    kind = import_module("art.attacks.evasion").HopSkipJump
    with torch.no_grad():
        classes = model(x[:1]).shape[1]
    estimator = art_classifier(model, cast(tuple[int, int, int], tuple(x.shape[1:])), classes)
    norm = {"linf": "inf", "l2": 2}[threat.norm]
    found = kind(estimator, norm=norm, batch_size=len(x), verbose=False).generate(x.numpy(), y.numpy())
    delta = geometry(threat.norm).project(torch.from_numpy(found).to(x) - x, threat.eps)
    return (x + delta).clamp(0, 1)


def broken_by(name: str, model: Classifier, x: Tensor, y: Tensor, threat: Threat, seed: int) -> Row:
    """Which images (N,) the attack broke, and the seconds that it took."""
    started = time.perf_counter()
    if name in OWN:
        found = evaluate([Defence.of(name, model)], OWN[name], [threat], x, y, checks=0, seed=seed)
        broken = found.worst[name, threat] == 0
    else:
        if name == "autoattack":
            x_adv = autoattack(model, x, y, norm=threat.norm, eps=threat.eps)
        else:
            x_adv = hop_skip_jump(model, x, y, threat)
        with torch.no_grad():
            broken = ~correct(model(x_adv), y)
    return {"broken": broken.tolist(), "seconds": time.perf_counter() - started}


@benchmark(__doc__)
@folder("--evaluation", required=True)
@click.option("--defence", default="own+filter")
@folder("--classifier", required=True)
@folder("--filter", "filter_folder")
@click.option("--preset", type=click.Choice(list(PRESETS)), help="Of the filter, if not its own.")
@click.option(
    "--share", default=1.0, type=click.FloatRange(0, 1, min_open=True), help="Asked twice: of the drawing."
)
@click.option("--attack", "attacks", multiple=True, default=PEERS, type=click.Choice((*PEERS, *OWN)))
@click.option("--seed", default=1, help="Of our own attacks; the stage's is 0.")
@click.option("--threat", "threats", multiple=True, default=("linf:0.3", "l2:2.5"), type=THREAT)
@data_options("mnist")
@click.option("--survivors", "most", default=100, type=click.IntRange(min=1))
@click.option("--batch", default=50, type=click.IntRange(min=1))
@json_option
def main(
    evaluation: Path,
    defence: str,
    classifier: Path,
    filter_folder: Path | None,
    preset: str | None,
    share: float,
    attacks: tuple[str, ...],
    seed: int,
    threats: tuple[Threat, ...],
    data: str,
    settings: tuple[str, ...],
    most: int,
    batch: int,
    output: Path | None,
) -> None:
    count, left = survivors(evaluation / "images.csv", defence)
    for threat, attack in product(threats, attacks):
        if threat not in left:
            raise click.UsageError(f"{evaluation}: {defence} did not meet {label(threat)}")
        if not answers(attack, threat):
            raise click.UsageError(f"--attack {attack}: knows no {label(threat)}")
    read = read_images(data, settings, count)
    x, y = read.x, read.y
    bare = read.classifier(classifier).requires_grad_(False)
    model: Classifier = bare
    if filter_folder is not None:
        filter = read.filter(filter_folder)
        model = DefendedClassifier(filter.configured(PRESETS[preset]) if preset else filter, bare, share)
    digest = digest_of([Defence.of("", model)], x[:2])
    kept = Kept(output, f"{digest} {read.dataset.digest} {read.config}")
    lines: list[Row] = []
    for threat in threats:
        text = label(threat)
        at = torch.tensor(left[threat][:most], dtype=torch.long)
        for attack in attacks:
            batches = [
                kept.row(
                    f"{threat} {attack} {seed} {own.tolist()}",
                    partial(broken_by, attack, model, x[own], y[own], threat, seed),
                )
                for own in track(at.split(batch) if len(at) else (), f"{text} {attack}", transient=True)
            ]
            fell = torch.tensor([broken for row in batches for broken in row["broken"]], dtype=torch.bool)
            before = len(left[threat]) / count
            lost = before * float(fell.float().mean()) if len(at) else 0.0
            interval = wilson(int(fell.sum()), len(at))
            click.echo(
                f"{text} {attack}: {len(left[threat])} of {count} images are left ({before:.1%}); of "
                f"{len(at)} tried {int(fell.sum())} fall [{interval.low:.1%}, {interval.high:.1%}]: "
                f"{lost:.1%} of all; {sum(row['seconds'] for row in batches):.0f} s"
            )
            lines.append(
                {
                    "defence": defence,
                    "norm": threat.norm,
                    "eps": threat.eps,
                    "attack": attack,
                    "images": count,
                    "left": len(left[threat]),
                    "tried": len(at),
                    "broken": at[fell].tolist(),
                    "share_of_all": lost,
                }
            )
            if output is not None:
                output.write_text(json.dumps({"rows": lines}) + "\n", encoding="utf-8")
    kept.finish()


if __name__ == "__main__":
    main()
