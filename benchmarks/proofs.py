"""What share of images can be proved at L∞, and what share refuted, for a classifier behind a threshold?

    python benchmarks/proofs.py --classifier zoo/mnist/classifier-proved --data mnist --set data.root=PATH \\
        --eps 0.3 --images 1000 --json proofs.json

Each image ends as proved (no image within eps has another label), refuted (one has, and the classifier
gave it before our eyes) or open (the `--boxes` ran out). `intervals` is the share that interval bounds
alone prove. The file is written as the work goes on, and is where an interrupted one begins again.
"""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path
from typing import Any

import click
import torch
from inputs import benchmark, data_options, folder, json_option, read_images
from rich.progress import track

from manifold_defense.certification import decide, intervals_prove
from manifold_defense.certification.lipschitz import chain
from manifold_defense.evaluation.baselines import Binarise, Preprocessed
from manifold_defense.evaluation.statistics import wilson
from pipelines.files import write_json

_CHUNK = 10
VERDICTS = ("proved", "refuted", "open")


@benchmark(__doc__)
@folder("--classifier", required=True)
@data_options("mnist")
@click.option("--eps", default=0.3, show_default=True, type=click.FloatRange(0, 1))
@click.option("--boxes", default=10_000, show_default=True, type=click.IntRange(min=1))
@click.option("--images", default=1000, show_default=True, type=click.IntRange(min=1))
@json_option
def main(
    classifier: Path,
    data: str,
    settings: tuple[str, ...],
    eps: float,
    boxes: int,
    images: int,
    output: Path | None,
) -> None:
    read = read_images(data, settings, images)
    own = read.classifier(classifier)
    try:
        chain(own.body)
    except TypeError as error:
        raise click.UsageError(f"{classifier}: {error}") from None
    model = Preprocessed(Binarise(), own).eval().requires_grad_(False)
    weights = (classifier / "classifier.safetensors").read_bytes()
    test = read.dataset.test
    asked = {
        "weights": hashlib.sha256(weights).hexdigest(),
        "data": hashlib.sha256(test.images.numpy().tobytes() + test.labels.numpy().tobytes()).hexdigest(),
        "eps": eps,
        "boxes": boxes,
    }
    found = _earlier(output, asked)[: len(read.x)]
    started, before = time.perf_counter(), len(found)
    chunks = range(before, len(read.x), _CHUNK)
    for first in track(chunks, f"L∞ {eps:g}", transient=True):
        chosen = slice(first, first + _CHUNK)
        x, y = read.x[chosen], read.y[chosen]
        verdicts = decide(model, x, y, eps, boxes=boxes)
        with torch.no_grad():
            right = model(x).argmax(1) == y
            refuted = model(verdicts.x_adv).argmax(1) != y
        assert torch.equal(refuted, verdicts.broken)
        assert ((verdicts.x_adv - x).abs() <= eps + 1e-6).all()
        by_intervals = intervals_prove(model, x, y, eps)
        columns = zip(
            right.tolist(), verdicts.proved.tolist(), refuted.tolist(), by_intervals.tolist(), strict=True
        )
        for clean, proved, broken, loose in columns:
            verdict = VERDICTS[0 if proved else 1 if broken else 2]
            found.append({"right": clean, "verdict": verdict, "intervals": loose})
        if output is not None:
            write_json(output, {**asked, "images": found})
    n = len(found)
    if n > before:
        click.echo(f"{(time.perf_counter() - started) / (n - before):.2f} s an image")
    shares = {"clean": sum(image["right"] for image in found)}
    shares |= {name: sum(image["verdict"] == name for image in found) for name in VERDICTS}
    shares["intervals"] = sum(image["intervals"] for image in found)
    for name, count in shares.items():
        low, high = wilson(count, n)
        click.echo(f"{name:<10}{count / n:6.1%}  ({low:.1%} to {high:.1%}), {count} of {n}")


def _earlier(output: Path | None, asked: dict[str, Any]) -> list[dict[str, Any]]:
    """The images that an interrupted call has done already; refuses a file that is of something else."""
    if output is None or not output.exists():
        return []
    try:
        facts = json.loads(output.read_text(encoding="utf-8"))
        images: list[dict[str, Any]] = facts.pop("images")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise click.UsageError(f"{output}: exists, and is no result of this command") from error
    if facts != asked:
        raise click.UsageError(f"{output}: exists, and is of other weights, data, eps or boxes")
    return images


if __name__ == "__main__":
    main()
