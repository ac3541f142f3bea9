"""Certified accuracy against L2 radius: smoothing, bare and behind the filter, and distances to a bank.

    python benchmarks/certification.py --filter zoo/mnist/filter --classifier zoo/mnist/undefended \\
        --data mnist --set data.root=PATH --json certification.json

The classifier is trained on under Gaussian noise for each `--sigma`, for `--images` images, then smoothed
with `--draws` draws (behind the filter a tenth of them, for these are dear). The distance classifier
keeps `--bank` training images, as they are, and as affine patches. Beside each deterministic proof
stands what PGD leaves. With `--json FILE` finished rows are kept in FILE.jobs until all are done, and
the same command goes on from there.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import click
import torch
from inputs import benchmark, data_options, folder, json_option, read_images
from kept import Kept, Row
from lightning_fabric import Fabric
from rich.console import Console
from rich.progress import track
from torch import Tensor

from gan.sampling import batch_indices
from manifold_defense import DefendedClassifier
from manifold_defense.attacks import pgd
from manifold_defense.certification import (
    Certificates,
    Clipped,
    SmoothingConfig,
    certified_accuracy,
    fit_patches,
    smoothed_certify,
)
from manifold_defense.classifiers import ImageClassifier
from manifold_defense.evaluation import Defence
from manifold_defense.hardening import Noise
from manifold_defense.hardening.training import TrainingConfig, classifier_state, train_classifier
from manifold_defense.types import Classifier
from pipelines.data import ImageData, subset, to_float
from pipelines.jobs import digest_of
from pipelines.progress import progress_bar

RADII = (0.0, 0.25, 0.5, 1.0, 1.5, 2.0)


def trained_under_noise(
    model: ImageClassifier, train: ImageData, sigma: float, images: int, console: Console
) -> ImageClassifier:
    config = TrainingConfig(images=images, batch_size=128, average_half_life=max(images // 20, 1))

    def batches(step: int) -> tuple[Tensor, Tensor]:
        chosen = batch_indices(len(train.labels), config.batch_size, 0, step)
        return to_float(train.images[chosen]), train.labels[chosen]

    fabric = Fabric(accelerator="cpu", devices=1)
    state = classifier_state(fabric, model, config)
    shown, title = console.is_terminal, f"noise σ {sigma:g}"
    with progress_bar(title, images, "images", console, shown=shown) as advance:
        for record in train_classifier(fabric, state, batches, config, Noise(sigma=sigma), seed=0):
            advance(record.images)
    best: ImageClassifier = state["best"]
    return best


def by_distance(kept: ImageData, x: Tensor, y: Tensor, patches: int, directions: int) -> Row:
    """What distances to points, or to affine patches, prove of images x (N, C, H, W), and what PGD leaves."""
    started = time.perf_counter()
    model = fit_patches(to_float(kept.images), kept.labels, patches=patches, directions=directions)
    found = model.certify(x)
    seconds, left = time.perf_counter() - started, []
    for eps in RADII:
        moved = pgd(model, x, y, norm="l2", eps=eps, steps=20, loss="margin") if eps else x
        with torch.no_grad():
            left.append(float((model(moved).argmax(1) == y).double().mean()))
    return {**shares(found, y), "pgd": left, "seconds": seconds}


def by_smoothing(model: Classifier, x: Tensor, y: Tensor, config: SmoothingConfig) -> Row:
    started = time.perf_counter()
    parts = [
        smoothed_certify(model, part, config) for part in track(x.split(10), "smoothing", transient=True)
    ]
    found = Certificates(*(torch.cat(column) for column in zip(*parts, strict=True)))
    return {**shares(found, y), "pgd": None, "seconds": time.perf_counter() - started}


def shares(found: Certificates, y: Tensor) -> Row:
    return {"radii": RADII, "certified": certified_accuracy(found, y, RADII).tolist()}


@benchmark(__doc__)
@folder("--filter", "filter_folder", required=True)
@folder("--classifier", required=True)
@data_options("mnist")
@click.option(
    "--sigma", "sigmas", multiple=True, default=(0.25, 0.5), type=click.FloatRange(0, min_open=True)
)
@click.option("--images", default=120_000, type=click.IntRange(min=1), help="Of training under noise.")
@click.option("--draws", default=10_000, type=click.IntRange(min=10))
@click.option("--bank", default=20_000, type=click.IntRange(min=1), help="Training images, of every class.")
@click.option("--test-images", default=100, type=click.IntRange(min=1))
@json_option
def main(
    filter_folder: Path,
    classifier: Path,
    data: str,
    settings: tuple[str, ...],
    sigmas: tuple[float, ...],
    images: int,
    draws: int,
    bank: int,
    test_images: int,
    output: Path | None,
) -> None:
    read = read_images(data, settings, test_images)
    x, y, train = read.x, read.y, read.dataset.train
    filter = read.filter(filter_folder)
    console = Console(stderr=True)
    defended = DefendedClassifier(filter, read.classifier(classifier).requires_grad_(False))
    answers = digest_of([Defence.of("", defended)], x[:2])
    asked = (images, draws, bank, test_images, read.dataset.digest, read.config)
    unfinished = Kept(output, f"{answers} {asked}")
    rows: list[Row] = []

    def report(name: str, make: Callable[[], Row]) -> None:
        row = {"name": name, **unfinished.row(name, make)}
        rows.append(row)
        cells = [f"{share:.1%}" for share in row["certified"]]
        if row["pgd"]:
            cells = [f"{cell} (PGD {left:.1%})" for cell, left in zip(cells, row["pgd"], strict=True)]
        click.echo(f"| {name} | " + " | ".join(cells) + f" |  {row['seconds']:.0f} s")
        if output is not None:
            facts = {"test_images": len(x), "draws": draws, "bank": bank, "rows": rows}
            output.write_text(json.dumps(facts) + "\n", encoding="utf-8")

    if bank < len(read.dataset.classes):
        raise click.UsageError(f"--bank: expected one image a class, {len(read.dataset.classes)}, got {bank}")
    kept = subset(train, min(bank, len(train.labels)))
    points = f"distance, {len(kept.labels)} points"
    report(points, lambda: by_distance(kept, x, y, 0, 0))
    patches = "distance, 50 patches of 10 directions a class"
    report(patches, lambda: by_distance(kept, x, y, 50, 10))

    @cache
    def noisy(sigma: float) -> ImageClassifier:
        return trained_under_noise(read.classifier(classifier), train, sigma, images, console)

    def smoothed(sigma: float, behind: bool, n: int) -> Row:
        model = Clipped(DefendedClassifier(filter, noisy(sigma))) if behind else noisy(sigma)
        return by_smoothing(model, x, y, SmoothingConfig(sigma=sigma, draws=n))

    for sigma in sigmas:
        for name, behind, n in (("", False, draws), (" behind the filter", True, draws // 10)):
            report(f"smoothing, σ {sigma:g}{name}, {n:,} draws", partial(smoothed, sigma, behind, n))
    unfinished.finish()


if __name__ == "__main__":
    main()
