"""Do attacks on the manifold, added to adversarial training, buy anything at equal cost?

    python benchmarks/hardening.py --filter zoo/mnist/filter --classifier zoo/mnist/undefended \\
        --data mnist --set data.root=PATH --eps 0.2 --eps-latent 0.05 --images 60000 --json hardening.json

Every objective starts from the same clean classifier and may spend the processor time that plain PGD
training takes for `--images` images: how many images that makes is measured first, on one batch, the
objectives by turns. Each is trained with `--seeds` seeds, and attacked on `--test-images` test images:
PGD (from windows, too) and APGD in pixels, latents around E(x), and overpowered pairs, of which the
share that is found counts. Figures are means over the seeds, with the least and the most. With
`--json FILE` what is finished is kept in FILE.jobs until all is done, and the same command goes on
from there.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import click
import torch
from inputs import Images, benchmark, data_options, folder, json_option, read_images
from kept import Kept, Row
from lightning_fabric import Fabric
from rich.console import Console
from torch import Tensor

from gan.sampling import batch_indices, step_rng
from manifold_defense import DefendedClassifier, ManifoldFilter
from manifold_defense.attacks import apgd, latent_attack, overpowered_pairs, pgd, window_pgd
from manifold_defense.attacks.objective import correct
from manifold_defense.classifiers import ImageClassifier
from manifold_defense.evaluation import Defence
from manifold_defense.hardening import Clean, Dual, Latent, Objective, Pgd, RobustManifold
from manifold_defense.hardening.objective import Step
from manifold_defense.hardening.training import TrainingConfig, classifier_state, train_classifier
from manifold_defense.types import Ball, Generator
from pipelines.data import augment, to_float
from pipelines.jobs import digest_of
from pipelines.progress import progress_bar

_TIMED_STEPS = 8


def make_objectives(eps: float, steps: int, eps_latent: float) -> dict[str, Objective]:
    return {
        "pgd": Pgd(eps=eps, steps=steps),
        "dual": Dual(eps=eps, steps=steps, eps_latent=eps_latent),
        "robust_manifold": RobustManifold(eps=eps, steps=steps, eps_latent=eps_latent),
        "latent": Latent(steps=steps, eps=eps_latent),
        "clean": Clean(),
    }


NAMES = tuple(make_objectives(0.3, 1, 0.1))


def batches(read: Images, batch_size: int, seed: int) -> Callable[[int], tuple[Tensor, Tensor]]:
    train = read.dataset.train

    def batch(step: int) -> tuple[Tensor, Tensor]:
        chosen = batch_indices(len(train.labels), batch_size, seed, step)
        x = augment(to_float(train.images[chosen]), read.config, step_rng(seed + 1, step), shift=True)
        return x, train.labels[chosen]

    return batch


def seconds_per_image(
    model: Callable[[], ImageClassifier],
    objectives: dict[str, Objective],
    batch: Any,
    fabric: Fabric,
    aids: Any,
) -> dict[str, float]:
    """Medians over steps at the full radius, the objectives by turns."""
    config = TrainingConfig(images=10**9, batch_size=len(batch(0)[1]))
    states = {name: classifier_state(fabric, model(), config) for name in objectives}
    loops = {}
    for name, objective in objectives.items():
        states[name]["images"] = config.images // 2  # past every ramp
        loops[name] = train_classifier(fabric, states[name], batch, config, objective, 0, **aids)
    times: dict[str, list[float]] = {name: [] for name in objectives}
    for _ in range(_TIMED_STEPS):
        for name, loop in loops.items():
            started = time.process_time()
            next(loop)
            times[name].append((time.process_time() - started) / config.batch_size)
    return {name: statistics.median(own[1:]) for name, own in times.items()}


def measure(
    model: ImageClassifier,
    filter: ManifoldFilter,
    x: Tensor,
    y: Tensor,
    eps: float,
    eps_latent: float,
    seed: int,
) -> dict[str, float]:
    """Shares in [0, 1]; `pairs` is the share of pairs that the attacker finds, the others what is left."""
    generator, encoder = cast(Generator, filter.generator), filter.encoder
    assert encoder is not None
    model = model.requires_grad_(False)
    found: dict[str, float] = {}

    def left(images: Tensor) -> Tensor:
        with torch.no_grad():
            return correct(model(images), y)

    found["clean"] = float(left(x).double().mean())
    balls: tuple[tuple[str, Ball, float], ...] = (("linf", "linf", eps), ("l2", "l2", 5 * eps))
    for name, norm, radius in balls:
        alive = left(x)
        ball: dict[str, Any] = {"norm": norm, "eps": radius, "seed": seed}
        alive &= left(pgd(model, x, y, steps=40, restarts=2, loss="both", **ball))
        alive &= left(apgd(model, x, y, steps=100, **ball))
        alive &= left(apgd(model, x, y, steps=50, loss="margin", **ball))
        alive &= left(window_pgd(model, x, y, steps=20, restarts=5, **ball))
        found[name] = float(alive.double().mean())
    with torch.no_grad():
        z = encoder(x)
    moved = latent_attack(model, generator, z, y, eps=eps_latent, steps=40, restarts=2, seed=seed)
    found["on_manifold"] = float(left(moved).double().mean())
    pairs = overpowered_pairs(model, generator, around=(z, eps_latent), eps=1.0, steps=100, seed=seed)
    found["pairs"] = float(pairs.found.double().mean())
    return found


@benchmark(__doc__)
@folder("--filter", "filter_folder", required=True)
@folder("--classifier", required=True, help="The clean one.")
@data_options("mnist")
@click.option(
    "--objective",
    "names",
    multiple=True,
    type=click.Choice(NAMES),
    default=NAMES,
)
@click.option(
    "--eps", default=0.3, type=click.FloatRange(min=0, min_open=True), help="L∞; L2 is five times that."
)
@click.option(
    "--eps-latent",
    default=0.1,
    type=click.FloatRange(min=0, min_open=True),
    help="L∞, of attacks and pairs around E(x), in training and after; keep it so small that labels stay.",
)
@click.option("--steps", default=5, type=click.IntRange(min=1), help="Of every inner attack.")
@click.option("--images", default=60_000, type=click.IntRange(min=1), help="That PGD training sees.")
@click.option("--batch", default=128, type=click.IntRange(min=1))
@click.option("--seeds", default=3, type=click.IntRange(min=1))
@click.option("--test-images", default=500, type=click.IntRange(min=1))
@json_option
def main(
    filter_folder: Path,
    classifier: Path,
    data: str,
    settings: tuple[str, ...],
    names: tuple[str, ...],
    eps: float,
    eps_latent: float,
    steps: int,
    images: int,
    batch: int,
    seeds: int,
    test_images: int,
    output: Path | None,
) -> None:
    read = read_images(data, settings, test_images)
    filter, fabric = read.filter(filter_folder), Fabric(accelerator="cpu", devices=1)
    console = Console(stderr=True)
    x, y = read.x, read.y
    objectives = {
        name: made for name, made in make_objectives(eps, steps, eps_latent).items() if name in names
    }
    aids = {"manifold": filter}

    def trained(name: str, objective: Objective, seed: int) -> Row:
        own = TrainingConfig(images=round(images * cost["pgd"] / cost[name]), batch_size=batch)
        # Longer than the whole of a short training makes no mean of it.
        own = replace(own, average_half_life=max(own.images // 20, 1))
        started = time.process_time()
        state = classifier_state(fabric, read.classifier(classifier), own)
        loop = train_classifier(fabric, state, batches(read, batch, seed), own, objective, seed, **aids)
        with progress_bar(
            f"{name} {seed}", own.images, "images", console, shown=console.is_terminal
        ) as advance:
            for record in loop:
                advance(record.images)
        spent = time.process_time() - started
        row = {"objective": name, "seed": seed, "images": own.images, "cpu_seconds": spent}
        if isinstance(objective, RobustManifold):  # of the images, around how many it still finds one
            objective = replace(objective, pairs=len(x))
            _, labels = objective.found(state["best"], x, y, Step(manifold=filter, seed=seed))
            row["pairs_left"] = len(labels) / len(x)
        return {**row, **measure(state["best"], filter, x, y, eps, eps_latent, seed)}

    every = {"pgd": Pgd(eps=eps, steps=steps), **objectives}
    defended = DefendedClassifier(filter, read.classifier(classifier).requires_grad_(False))
    answers = digest_of([Defence.of("", defended)], x[:2])
    asked = (
        eps,
        eps_latent,
        steps,
        images,
        batch,
        test_images,
        read.dataset.digest,
        read.config,
        list(every),
    )
    kept = Kept(output, f"{answers} {asked}")
    cost = kept.row(
        "cost",
        lambda: seconds_per_image(
            lambda: read.classifier(classifier), every, batches(read, batch, 0), fabric, aids
        ),
    )
    rows = []
    for name, objective in objectives.items():
        for seed in range(seeds):
            rows.append(kept.row(f"{name} {seed}", partial(trained, name, objective, seed)))
            click.echo(
                "  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in rows[-1].items())
            )
            if output is not None:
                facts = {
                    "eps": eps,
                    "eps_latent": eps_latent,
                    "steps": steps,
                    "test_images": len(x),
                    "rows": rows,
                }
                output.write_text(json.dumps(facts) + "\n", encoding="utf-8")
    kept.finish()
    for name in objectives:
        own_rows = [row for row in rows if row["objective"] == name]
        cells = []
        for key in ("clean", "linf", "l2", "on_manifold", "pairs"):
            values = [100 * cast(float, row[key]) for row in own_rows]
            cells.append(f"{statistics.mean(values):.1f} ({min(values):.1f}–{max(values):.1f})")
        click.echo(f"| {name} | {own_rows[0]['images']:,} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
