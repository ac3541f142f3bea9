"""The README's picture: images attacked without and with knowledge of a filter, and what it makes of them.

    python benchmarks/picture.py --filter zoo/mnist/filter-windows --classifier zoo/mnist/undefended \\
        --data mnist --set data.root=PATH --output docs/images/projection.png

The first test images of the stratified order, one of each class; PGD of 40 steps, two losses from two starts,
against the classifier alone and through the filter's exact gradient.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import torch
from inputs import NEW_FILE, THREAT, benchmark, data_options, folder, read_images

from manifold_defense import DefendedClassifier, Threat
from manifold_defense.attacks import pgd
from pipelines.board import Strip, predictions, save_figure, strips


@benchmark(__doc__)
@folder("--filter", "filter_folder", required=True)
@folder("--classifier", required=True)
@data_options("mnist")
@click.option("--threat", default="linf:0.3", show_default=True, type=THREAT)
@click.option("--output", required=True, type=NEW_FILE, metavar="FILE")
def main(
    filter_folder: Path, classifier: Path, data: str, settings: tuple[str, ...], threat: Threat, output: Path
) -> None:
    read = read_images(data, settings, 200)
    first = [int((read.y == label).nonzero()[0, 0]) for label in read.y.unique()]
    x, y = read.x[first], read.y[first]
    filter, bare = read.filter(filter_folder), read.classifier(classifier)
    rows = [Strip("clean", x, predictions(bare, x))]
    for target, model in (("the classifier", bare), ("both", DefendedClassifier(filter, bare))):
        # To fool the classifier is not enough where the filter comes after: it goes on.
        bound: Any = {"norm": threat.norm, "eps": threat.eps, "stop_early": model is not bare}
        x_adv = pgd(model, x, y, **bound, steps=40, restarts=2, loss="both")
        with torch.no_grad():
            repaired = filter(x_adv)
        rows.append(Strip(f"attack on\n{target}", x_adv, predictions(bare, x_adv)))
        rows.append(Strip("its projection", repaired, predictions(bare, repaired)))
    save_figure(strips(rows, y.tolist(), read.dataset.classes), output)


if __name__ == "__main__":
    main()
