"""What is each preset worth against an attacker who knows it? The per-image worst over views and attacks.

    python benchmarks/robustness.py --filter zoo/mnist/filter --robust zoo/mnist/robust \\
        --classifier plain=runs/mnist/train-classifier --classifier hardened=runs/mnist/harden \\
        --data mnist --set data.root=PATH --images 200 --json robustness.json

Attacks run from cheap to dear, and only images that survived go on: first the images that broke the
classifier alone and the other presets before (transfer), then PGD through each view, which starts
again from the clean image with a random start, both losses, one a restart. Binarisation at 0.5
stands beside the filters, attacked through a soft threshold and through the identity. The
`reference` is the one defence attacked less: see `--reference-steps`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor, nn

from manifold_defense import PRESETS, DefendedClassifier, ManifoldFilter, load_classifier, load_filter
from manifold_defense.attacks import pgd
from manifold_defense.attacks.objective import correct
from manifold_defense.evaluation.statistics import wilson
from manifold_defense.types import Classifier, Norm
from pipelines.config import load_config
from pipelines.data import load_data, subset, to_float

THREATS: list[tuple[Norm, float]] = [("linf", 0.1), ("linf", 0.3), ("l2", 1.5), ("l2", 2.5)]


class Binarised(nn.Module):
    """`classifier(1[x > 0.5])`; with a slope its gradient is that of such a sigmoid (0: of the identity)."""

    def __init__(self, classifier: nn.Module, slope: float | None = None) -> None:
        super().__init__()
        self.classifier, self.slope = classifier, slope

    def forward(self, x: Tensor) -> Tensor:
        hard = (x > 0.5).to(x)
        if self.slope is not None:
            soft = torch.sigmoid(self.slope * (x - 0.5)) if self.slope else x
            hard = hard.detach() + soft - soft.detach()
        logits: Tensor = self.classifier(hard)
        return logits


class Survivors:
    """Which images (N,) a defence still classifies correctly under one threat, and what broke the others."""

    def __init__(self, model: Classifier, x: Tensor, y: Tensor, batch: int) -> None:
        self.model, self.x, self.y, self.batch = model, x, y, batch
        self.adversarial = x.clone()
        self.alive = torch.cat(
            [self._right(a, b) for a, b in zip(x.split(batch), y.split(batch), strict=True)]
        )
        self.by: dict[str, float] = {}  # after each attack, the share still alive

    @torch.no_grad()
    def _right(self, x: Tensor, y: Tensor) -> Tensor:
        return correct(self.model(x), y)

    def meet(self, name: str, attack: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        """Attack those alive; `attack` takes images, labels and their indices."""
        for index in self.alive.nonzero().squeeze(1).split(self.batch):
            x_adv = attack(self.x[index], self.y[index], index)
            broken = ~self._right(x_adv, self.y[index])
            self.adversarial[index[broken]] = x_adv[broken]
            self.alive[index[broken]] = False
        self.by[name] = float(self.alive.float().mean())


@click.command(help=__doc__, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--filter", "folder", type=click.Path(path_type=Path), required=True)
@click.option("--robust", type=click.Path(path_type=Path), help="Filter with the encoder of preset robust.")
@click.option("--classifier", "classifiers", multiple=True, required=True, metavar="NAME=FOLDER")
@click.option(
    "--preset", "presets", multiple=True, default=("single_shot", "fast", "accurate", "robust", "reference")
)
@click.option("--data", default="mnist")
@click.option("--set", "changes", multiple=True, metavar="KEY=VALUE")
@click.option("--images", default=200, type=click.IntRange(min=1))
@click.option("--steps", default=40, type=click.IntRange(min=1), help="Of PGD, for each of two restarts.")
@click.option("--reference-steps", default=10, help="Steps of PGD against the preset `reference`.")
@click.option("--batch", default=100, type=click.IntRange(min=1))
@click.option("--json", "output", type=click.Path(path_type=Path))
def main(
    folder: Path,
    robust: Path | None,
    classifiers: tuple[str, ...],
    presets: tuple[str, ...],
    data: str,
    changes: tuple[str, ...],
    images: int,
    steps: int,
    reference_steps: int,
    batch: int,
    output: Path | None,
) -> None:
    plain = load_filter(folder)
    other = load_filter(robust) if robust else plain
    test = load_data(load_config(None, [f"data.name={data}", *changes]).data).test
    test = subset(test, min(images, len(test.labels)))
    x, y = to_float(test.images), test.labels
    table: list[dict[str, Any]] = []
    for entry in classifiers:
        label, _, path = entry.partition("=")
        model = load_classifier(Path(path)).requires_grad_(False)
        for norm, eps in THREATS:
            known: list[Tensor] = []  # what broke the defences before: tried on the next ones
            for name in ("none", "binarised", *presets):
                started = time.perf_counter()
                survivors = attacked(
                    name, model, plain, other, x, y, norm, eps, steps, reference_steps, batch, known
                )
                known.append(survivors.adversarial)
                alive = int(survivors.alive.sum())
                low, high = wilson(alive, len(x))
                table.append(
                    {
                        "classifier": label,
                        "preset": name,
                        "norm": norm,
                        "eps": eps,
                        "robust_accuracy": alive / len(x),
                        "ci_low": low,
                        "ci_high": high,
                        "after": survivors.by,
                        "seconds": time.perf_counter() - started,
                        "alive": survivors.alive.tolist(),
                    }
                )
                after = "  ".join(f"{key} {value:.1%}" for key, value in survivors.by.items())
                interval = f"[{low:.1%}, {high:.1%}]"
                click.echo(f"{label:9} {norm} {eps:<4} {name:12} {alive / len(x):6.1%}  {interval}  {after}")
                if output is not None:
                    facts = {
                        "images": len(x),
                        "steps": steps,
                        "reference_steps": reference_steps,
                        "rows": table,
                    }
                    output.write_text(json.dumps(facts) + "\n", encoding="utf-8")


def attacked(
    name: str,
    model: nn.Module,
    plain: ManifoldFilter,
    robust: ManifoldFilter,
    x: Tensor,
    y: Tensor,
    norm: Norm,
    eps: float,
    steps: int,
    reference_steps: int,
    batch: int,
    known: list[Tensor],
) -> Survivors:
    """One defence against everything, cheap attacks first."""

    def climb(target: Classifier, length: int, *, unaware: bool = False) -> Callable[..., Tensor]:
        def attack(images: Tensor, labels: Tensor, index: Tensor) -> Tensor:
            return pgd(
                target,
                images,
                labels,
                norm=norm,
                eps=eps,
                steps=length,
                restarts=2,
                loss="both",
                stop_early=not unaware,
            )

        return attack

    targets: dict[str, Classifier]
    if name == "none":
        deployed: Classifier = model
        targets = {"exact": model}
    elif name == "binarised":
        deployed = Binarised(model)
        targets = {f"slope {slope}": Binarised(model, slope) for slope in (0, 5, 20)}
    else:
        source = robust if name == "robust" else plain
        filter = source.configured(PRESETS[name])
        defended = DefendedClassifier(filter, model)
        deployed = defended
        order = ("start", "identity", "tangent", "implicit", "exact")
        targets = {view: defended.view(view) for view in order if view in filter.views()}
    survivors = Survivors(deployed, x, y, batch)
    survivors.by["clean"] = float(survivors.alive.float().mean())
    for images in known:
        survivors.meet("transfer", lambda _x, _y, index, images=images: images[index])
    length = reference_steps if name == "reference" else steps
    if name not in ("none",):
        survivors.meet("unaware", climb(model, steps, unaware=True))
    for view, target in targets.items():
        survivors.meet(view, climb(target, length))
    return survivors


if __name__ == "__main__":
    main()
