"""What is each preset worth against an attacker who knows it? The per-image worst over views and attacks.

    python benchmarks/robustness.py --filter zoo/mnist/filter \\
        --classifier plain=zoo/mnist/undefended --classifier hardened=zoo/mnist/classifier \\
        --data mnist --set data.root=PATH --images 200 --json robustness.json

Attacks run from cheap to dear, and only images that survived go on: first the images that broke the
classifier alone and the other presets before (transfer), then PGD through each view, each from a
random start of its own: `--approximate-steps` through the views that approximate, `--steps` through
the exact one, `--restarts` of each, by turns on cross-entropy and margin. A preset that normalises
its gradients meets the exact view once more, averaged over noise: what shatters can be smoothed.
Views of a preset with several restarts are those of its first restart alone, which is one of the
deployed ones: a step through all ten of the reference costs ten times as much.
Binarisation at 0.5 stands beside the filters, attacked through a soft threshold and the identity.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor, nn

from manifold_defense import PRESETS, DefendedClassifier, ManifoldFilter, load_classifier, load_filter
from manifold_defense.attacks import pgd
from manifold_defense.attacks.objective import correct
from manifold_defense.evaluation.statistics import wilson
from manifold_defense.types import Classifier, Norm, Threat
from pipelines.config import load_config
from pipelines.data import load_data, subset, to_float

THREATS = ("linf:0.3", "l2:2.5", "l2:1.5", "linf:0.1")


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


class Averaged(nn.Module):
    """The mean logits over Gaussian noise on the input: the gradient of what a shattered one hides."""

    def __init__(self, model: Classifier, draws: int = 3, sigma: float = 0.02) -> None:
        super().__init__()
        self.model, self.draws, self.sigma = model, draws, sigma

    def forward(self, x: Tensor) -> Tensor:
        rng = torch.Generator().manual_seed(0)
        noisy = [x + self.sigma * torch.randn(x.shape, generator=rng) for _ in range(self.draws)]
        return torch.stack([self.model(part.clamp(0, 1)) for part in noisy]).mean(0)


class Survivors:
    """Which images (N,) a defence still classifies correctly under one threat, and what broke the others."""

    def __init__(
        self, model: Classifier, targets: dict[str, Classifier], x: Tensor, y: Tensor, batch: int
    ) -> None:
        self.model, self.targets, self.x, self.y, self.batch = model, targets, x, y, batch
        self.adversarial = x.clone()
        self.alive = torch.cat(
            [self._right(a, b) for a, b in zip(x.split(batch), y.split(batch), strict=True)]
        )
        self.by = {"clean": float(self.alive.float().mean())}  # after each attack, the share still alive

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

    def attack(
        self, norm: Norm, eps: float, known: list[Tensor], steps: int, approximate_steps: int, restarts: int
    ) -> None:
        """Meet everything: images (N, C, H, W) that broke others, then PGD on each target."""
        for images in known:
            self.meet("transfer", lambda _x, _y, index, images=images: images[index])
        for name, target in self.targets.items():
            length = steps if name in ("exact", "unaware") else approximate_steps
            self.meet(
                name,
                lambda x, y, _, target=target, length=length, name=name: pgd(
                    target,
                    x,
                    y,
                    norm=norm,
                    eps=eps,
                    steps=length,
                    restarts=restarts,
                    loss="both" if restarts > 1 else "ce",
                    stop_early=name not in ("unaware", "averaged"),
                ),
            )


def make_defences(
    model: nn.Module, plain: ManifoldFilter, presets: tuple[str, ...]
) -> dict[str, tuple[Classifier, dict[str, Classifier]]]:
    """By name: what is deployed, and the models that an attack differentiates instead, cheap ones first."""
    slopes = {f"slope {slope}": Binarised(model, slope) for slope in (0, 5, 20)}
    defences: dict[str, tuple[Classifier, dict[str, Classifier]]] = {
        "none": (model, {"exact": model}),
        "binarised": (Binarised(model), {"unaware": model, **slopes}),
    }
    for name in presets:
        filter = plain.configured(PRESETS[name])
        defended = DefendedClassifier(filter, model)
        surrogate = DefendedClassifier(plain.configured(replace(PRESETS[name], restarts=1)), model)
        order = ("start", "identity", "tangent", "implicit", "exact")
        targets: dict[str, Classifier] = {
            view: surrogate.view(view) for view in order if view in filter.views()
        }
        if PRESETS[name].solver == "adam" and PRESETS[name].steps:
            targets["averaged"] = Averaged(defended)
        if not PRESETS[name].steps:  # no solver: the exact gradient is the start's
            targets = {"exact": defended}
        defences[name] = (defended, {"unaware": model, **targets})
    return defences


@click.command(help=__doc__, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--filter", "folder", type=click.Path(path_type=Path), required=True)
@click.option("--classifier", "classifiers", multiple=True, required=True, metavar="NAME=FOLDER")
@click.option(
    "--preset", "presets", multiple=True, default=("single_shot", "fast", "accurate", "robust", "reference")
)
@click.option("--threat", "threats", multiple=True, default=THREATS, metavar="NORM:EPS")
@click.option("--data", default="mnist")
@click.option("--set", "changes", multiple=True, metavar="KEY=VALUE")
@click.option("--images", default=200, type=click.IntRange(min=1))
@click.option("--steps", default=40, type=click.IntRange(min=1), help="Of PGD through the exact view.")
@click.option("--approximate-steps", default=10, type=click.IntRange(min=1), help="And through the others.")
@click.option("--restarts", default=2, type=click.IntRange(min=1))
@click.option("--batch", default=100, type=click.IntRange(min=1))
@click.option("--json", "output", type=click.Path(path_type=Path))
def main(
    folder: Path,
    classifiers: tuple[str, ...],
    presets: tuple[str, ...],
    threats: tuple[str, ...],
    data: str,
    changes: tuple[str, ...],
    images: int,
    steps: int,
    approximate_steps: int,
    restarts: int,
    batch: int,
    output: Path | None,
) -> None:
    plain = load_filter(folder)
    test = load_data(load_config(None, [f"data.name={data}", *changes]).data).test
    test = subset(test, min(images, len(test.labels)))
    x, y = to_float(test.images), test.labels
    table: list[dict[str, Any]] = []
    for entry in classifiers:
        label, _, path = entry.partition("=")
        model = load_classifier(Path(path)).requires_grad_(False)
        defences = make_defences(model, plain, presets)
        for threat in [Threat(norm, float(eps)) for norm, _, eps in (t.partition(":") for t in threats)]:
            norm, eps = threat.norm, threat.eps
            known: list[Tensor] = []  # what broke the defences before: tried on the next ones
            for name in defences:
                started = time.perf_counter()
                survivors = Survivors(*defences[name], x, y, batch)
                survivors.attack(norm, eps, known, steps, approximate_steps, restarts)
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
                        "approximate_steps": approximate_steps,
                        "restarts": restarts,
                        "rows": table,
                    }
                    output.write_text(json.dumps(facts) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
