"""Can the evaluator be deceived? What is printed of models that are built for it, and what is true.

    python benchmarks/deception.py --images 100 --json deception.json
    python benchmarks/deception.py --classifier zoo/mnist/undefended --data mnist --set data.root=PATH

Each of `benchmarks/deceivers.py` (but `Alternates`, which hangs on the order of attacks) has the labels of
the undefended classifier (without `--classifier` a small one that is trained on the spot), but for the
nearest neighbour. It meets the attacks and checks of the default configuration. *True* is at most: what it is
right on after PGD and APGD on the honest model, and after all that the evaluation found. A line that says
DECEIVED prints over three points more, and no check objects.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import torch
from deceivers import Alone, Labels, Lukewarm, Neighbour, OnGrid, Remembers
from inputs import Images, benchmark, data_options, folder, json_option, read_images
from torch import Tensor, nn
from torch.nn import functional as F

from gan.sampling import batch_indices
from manifold_defense.attacks import apgd, pgd
from manifold_defense.attacks.objective import correct
from manifold_defense.classifiers import ArchitectureConfig, ImageClassifier
from manifold_defense.evaluation import Defence, evaluate
from manifold_defense.modes import evaluation_mode
from manifold_defense.types import Classifier, Threat
from pipelines.config import EvaluateConfig
from pipelines.data import to_float

_TOLERANCE = 0.03


def trained(read: Images, steps: int = 400) -> nn.Module:
    """A small classifier of the training images, clean."""
    train = read.dataset.train
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = ImageClassifier(
            read.dataset.image_shape, len(read.dataset.classes), ArchitectureConfig(width=16)
        )
    adam = torch.optim.Adam(model.parameters(), lr=2e-3)
    for step in range(steps):
        chosen = batch_indices(len(train.labels), 64, 0, step)
        loss = F.cross_entropy(model(to_float(train.images[chosen])), train.labels[chosen])
        adam.zero_grad()
        loss.backward()
        adam.step()
    return model.eval().requires_grad_(False)


def deceivers(model: nn.Module, read: Images) -> dict[str, nn.Module]:
    train = read.dataset.train
    known, labels = to_float(train.images[:600]), train.labels[:600]
    pixels = known.shape[1:].numel()
    return {
        "honest": model,
        "lukewarm": Lukewarm(model, known, 256 / pixels),
        "cold": Lukewarm(model, known, 768 / pixels),
        "labels": Labels(model, len(read.dataset.classes)),
        "labels of three classes": Labels(model, 3),
        "on the grid": OnGrid(model, 255),
        "alone": Alone(model),
        "remembers": Remembers(model),
        "neighbour": Neighbour(known, labels),
    }


def honest_attacks(model: Classifier, x: Tensor, y: Tensor, threat: Threat) -> list[Tensor]:
    """Images (N, C, H, W) each, from attacks that press on, and the same as files store them."""
    ball: Any = {"norm": threat.norm, "eps": threat.eps, "stop_early": False}
    found = [
        pgd(model, x, y, **ball, steps=40, restarts=4, loss="both"),
        apgd(model, x, y, **ball, steps=100, loss="margin"),
        apgd(model, x, y, **ball, steps=100, loss="dlr"),
    ]
    # Rounded towards the clean image, which lies on the grid, they stay within the threat.
    return [*found, *(x + torch.trunc(255 * (images - x)) / 255 for images in found)]


@torch.no_grad()
def true_accuracy(model: nn.Module, x: Tensor, y: Tensor, attacked: list[Tensor], left: Tensor) -> float:
    """Of the model asked an image at a time, of which `left` (N,) are what an evaluation could not break."""
    held = left.clone()
    with evaluation_mode(model):
        for images in (x, *attacked):
            for i in held.nonzero()[:, 0].tolist():
                if isinstance(model, Remembers):
                    model.first = None  # deployed, it has seen no test image before
                held[i] = bool(correct(model(images[i : i + 1]), y[i : i + 1]))
    return float(held.float().mean())


@benchmark(__doc__)
@folder("--classifier", metavar="FOLDER", help="of an undefended classifier")
@click.option("--images", default=100, show_default=True, type=click.IntRange(1))
@data_options("digits")
@json_option
def main(
    classifier: Path | None, images: int, data: str, settings: tuple[str, ...], output: Path | None
) -> None:
    read = read_images(data, settings, images)
    model = read.classifier(classifier) if classifier else trained(read)
    config, lines = EvaluateConfig(), []
    attacked = {threat: honest_attacks(model, read.x, read.y, threat) for threat in config.threats}
    for name, deceiver in deceivers(model, read).items():
        found = evaluate([Defence.bare(name, deceiver)], config.attacks, config.threats, read.x, read.y)
        for row in (row for row in found.rows if row.attack == "worst" and row.norm != "union"):
            threat = next(t for t in config.threats if (t.norm, t.eps) == (row.norm, row.eps))
            failed = [c.name for c in found.checks if not c.passed and c.norm in (None, row.norm)]
            true = true_accuracy(deceiver, read.x, read.y, attacked[threat], found.worst[name, threat] > 0)
            deceived = not row.masked and row.robust_accuracy > true + _TOLERANCE
            line = {
                "model": name,
                "norm": row.norm,
                "eps": row.eps,
                "printed": row.robust_accuracy,
                "true": true,
                "masked": row.masked,
                "settled": row.settled,
                "failed": failed,
                "deceived": deceived,
            }
            lines.append(line)
            click.echo(
                f"{name:24} {row.norm:4} {row.eps:<5g} printed {' ' if row.settled else '≤'}"
                f"{row.robust_accuracy:6.1%}"
                f"{' (masked)' if row.masked else '':9}  true {true:6.1%}  "
                f"{'DECEIVED' if deceived else ', '.join(failed)}"
            )
    if output:
        output.write_text(json.dumps({"images": len(read.x), "data": data, "models": lines}, indent=2) + "\n")


if __name__ == "__main__":
    main()
