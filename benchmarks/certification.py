"""Certified accuracy against L2 radius: smoothing, bare and behind the filter, and distances to a bank.

    python benchmarks/certification.py --filter zoo/mnist/filter --classifier zoo/mnist/undefended \\
        --data mnist --set data.root=PATH --json certification.json

The classifier is trained on under Gaussian noise for each `--sigma`, for `--images` images, then smoothed
with `--draws` draws (behind the filter a tenth of them, for these are dear). The distance classifier
keeps `--bank` training images, as they are, and as affine patches. Beside each deterministic proof
stands what PGD leaves.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import click
import torch
from inputs import benchmark, data_options, folder, json_option, read_images
from lightning_fabric import Fabric
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
from manifold_defense.hardening import Noise
from manifold_defense.hardening.training import TrainingConfig, classifier_state, train_classifier
from pipelines.data import ImageData, subset, to_float

RADII = (0.0, 0.25, 0.5, 1.0, 1.5, 2.0)


def trained_under_noise(
    model: ImageClassifier, train: ImageData, sigma: float, images: int
) -> ImageClassifier:
    config = TrainingConfig(images=images, batch_size=128, average_half_life=max(images // 20, 1))

    def batches(step: int) -> tuple[Tensor, Tensor]:
        chosen = batch_indices(len(train.labels), config.batch_size, 0, step)
        return to_float(train.images[chosen]), train.labels[chosen]

    fabric = Fabric(accelerator="cpu", devices=1)
    state = classifier_state(fabric, model, config)
    for _ in train_classifier(fabric, state, batches, config, Noise(sigma=sigma), seed=0):
        pass
    best: ImageClassifier = state["best"]
    return best


@benchmark(__doc__)
@folder("--filter", "filter_folder", required=True)
@folder("--classifier", required=True)
@data_options("mnist")
@click.option(
    "--sigma", "sigmas", multiple=True, default=(0.25, 0.5), type=click.FloatRange(0, min_open=True)
)
@click.option("--images", default=120_000, type=click.IntRange(min=1), help="Of training under noise.")
@click.option("--draws", default=10_000, type=click.IntRange(min=10))
@click.option("--bank", default=20_000, type=click.IntRange(min=1))
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
    rows: list[dict[str, Any]] = []

    def report(name: str, found: Certificates, seconds: float, pgd_left: list[float] | None = None) -> None:
        shares = certified_accuracy(found, y, RADII).tolist()
        rows.append({"name": name, "radii": RADII, "certified": shares, "pgd": pgd_left, "seconds": seconds})
        cells = [f"{share:.1%}" for share in shares]
        if pgd_left:
            cells = [f"{cell} (PGD {left:.1%})" for cell, left in zip(cells, pgd_left, strict=True)]
        click.echo(f"| {name} | " + " | ".join(cells) + f" |  {seconds:.0f} s")
        if output is not None:
            facts = {"test_images": len(x), "draws": draws, "bank": bank, "rows": rows}
            output.write_text(json.dumps(facts) + "\n", encoding="utf-8")

    kept = subset(train, min(bank, len(train.labels)))
    for patches, directions in ((0, 0), (50, 10)):
        started = time.perf_counter()
        model = fit_patches(to_float(kept.images), kept.labels, patches=patches, directions=directions)
        found = model.certify(x)
        seconds, left = time.perf_counter() - started, []
        for eps in RADII:
            moved = pgd(model, x, y, norm="l2", eps=eps, steps=20, loss="margin") if eps else x
            with torch.no_grad():
                left.append(float((model(moved).argmax(1) == y).double().mean()))
        kind = (
            f"{patches} patches of {directions} directions a class"
            if patches
            else f"{len(kept.labels)} points"
        )
        report(f"distance, {kind}", found, seconds, left)

    for sigma in sigmas:
        noisy = trained_under_noise(read.classifier(classifier), train, sigma, images)
        defended = Clipped(DefendedClassifier(filter, noisy))
        for name, model_, n in (("", noisy, draws), (" behind the filter", defended, draws // 10)):
            started = time.perf_counter()
            found = smoothed_certify(model_, x, SmoothingConfig(sigma=sigma, draws=n))
            report(f"smoothing, σ {sigma:g}{name}, {n:,} draws", found, time.perf_counter() - started)


if __name__ == "__main__":
    main()
