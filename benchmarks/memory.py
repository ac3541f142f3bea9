"""How much memory does one gradient through the whole projection take?

    python benchmarks/memory.py --filter zoo/mnist/filter --classifier zoo/mnist/undefended --solver lbfgs \\
        --data mnist --set data.root=PATH

One step of an attack: the gradient of the cross-entropy in the images, through `--steps` steps of the solver,
which are run backwards one at a time. Peaks are of the whole process, PyTorch and the images included.
"""

from __future__ import annotations

import json
import resource
import sys
from pathlib import Path
from typing import Literal

import click
import torch
from inputs import benchmark, data_options, folder, json_option, read_images
from torch.nn import functional as F

from manifold_defense import DefendedClassifier, ProjectionConfig
from manifold_defense.projection.solvers import SOLVERS


def peak() -> float:
    """Of the memory that this process has held so far, in GB."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


@benchmark(__doc__)
@folder("--filter", "filter_folder", required=True)
@folder("--classifier", required=True)
@click.option("--solver", default="lbfgs", type=click.Choice(list(SOLVERS)), show_default=True)
@click.option("--steps", default=40, type=click.IntRange(min=0), show_default=True)
@data_options("mnist")
@click.option("--images", default=256, type=click.IntRange(min=1), show_default=True)
@json_option
def main(
    filter_folder: Path,
    classifier: Path,
    solver: Literal["gd", "adam", "lbfgs"],
    steps: int,
    data: str,
    settings: tuple[str, ...],
    images: int,
    output: Path | None,
) -> None:
    read = read_images(data, settings, images)
    config = ProjectionConfig(solver, steps=steps)
    filter, model = read.filter(filter_folder).configured(config), read.classifier(classifier)
    defended, x = DefendedClassifier(filter, model.requires_grad_(False)), read.x.requires_grad_(True)
    before = peak()
    (gradient,) = torch.autograd.grad(F.cross_entropy(defended(x), read.y, reduction="sum"), x)
    after, asked = peak(), int((gradient.flatten(1) != 0).any(1).sum())
    click.echo(
        f"{solver}, {steps} steps, {len(x)} images, {asked} with a gradient: "
        f"peak {after:.2f} GB, {before:.2f} before it"
    )
    if output is not None:
        facts = {"solver": solver, "steps": steps, "images": len(x), "peak_gb": after, "before_gb": before}
        output.write_text(json.dumps(facts) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
