"""What is left of a preset of many restarts under the exact gradient of the one that wins?

    python benchmarks/restarts.py --filter zoo/mnist/filter --classifier zoo/mnist/classifier-pgd \\
        --preset reference --threat l2:1.5 --data mnist --set data.root=PATH --json restarts.json

The exact gradient of the best of several restarts is that of the restart which is best, so that one of ten
need be differentiated. Which it is changes seldom while an attack climbs: it is asked every `--every` steps.
First the preset meets what windows at the bare classifier, at its preset `robust` and at `--proxy` end in;
from where the last ended its own gradient goes on for `--steps` steps of cross-entropy. A line a phase says
how many images are still right. The deployed preset, all restarts, judges. With `--json FILE` finished
batches are kept in FILE.jobs until all are done, and the same command goes on from there.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import click
import torch
from inputs import THREAT, benchmark, data_options, folder, json_option, read_images
from kept import Kept, Row
from rich.progress import track
from torch import Tensor, nn

from manifold_defense import PRESETS, DefendedClassifier, ManifoldFilter, Threat
from manifold_defense.attacks import window_pgd
from manifold_defense.attacks.ascent import Climb, ascend_in_ball
from manifold_defense.attacks.objective import correct
from manifold_defense.evaluation import Defence, wilson
from manifold_defense.projection.starts import starts
from manifold_defense.types import Classifier, Generator
from pipelines.jobs import digest_of


class _Given(nn.Module):
    """In the place of an encoder: the starts that it is given."""

    def __init__(self, z: Tensor) -> None:
        super().__init__()
        self.z = z  # (N, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.z


class Winning(nn.Module):
    """A defended classifier, images (N, C, H, W) to logits (N, K), by the restart of each image that wins.

    Which one that is it asks at every so many calls that want a gradient. All calls are of the same N images.
    """

    def __init__(self, defended: DefendedClassifier, every: int) -> None:
        super().__init__()
        self.defended, self.every, self.calls = defended, every, 0
        self.single: nn.Module | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.single is None or (x.requires_grad and self.calls % self.every == 0):
            filter = self.defended.filter
            won = filter.project(x.detach()).restart
            z = starts(x.detach(), cast(Generator, filter.generator).latent_dim, filter.config)
            given = _Given(z[torch.arange(len(x)), won])
            config = replace(filter.config, restarts=1, start="encoder", chunk=len(x))
            single = ManifoldFilter(filter.generator, given, config)
            self.single = DefendedClassifier(single, self.defended.classifier)
        self.calls += x.requires_grad
        logits: Tensor = self.single(x)
        return logits


@benchmark(__doc__)
@folder("--filter", "filter_folder", required=True)
@folder("--classifier", required=True)
@click.option("--preset", default="reference", type=click.Choice(list(PRESETS)), show_default=True)
@click.option("--proxy", default="accurate", type=click.Choice(list(PRESETS)), show_default=True)
@click.option("--threat", default="l2:1.5", type=THREAT, show_default=True)
@data_options("mnist")
@click.option("--images", default=200, type=click.IntRange(min=1), show_default=True)
@click.option("--steps", default=20, type=click.IntRange(min=1), show_default=True)
@click.option("--every", default=10, type=click.IntRange(min=1), show_default=True)
@click.option("--batch", default=32, type=click.IntRange(min=1), show_default=True)
@json_option
def main(
    filter_folder: Path,
    classifier: Path,
    preset: str,
    proxy: str,
    threat: Threat,
    data: str,
    settings: tuple[str, ...],
    images: int,
    steps: int,
    every: int,
    batch: int,
    output: Path | None,
) -> None:
    config = PRESETS[preset]
    if config.restarts == 1 or config.uses_encoder or config.uses_bank:
        raise click.UsageError(f"--preset {preset}: expected one of several restarts from the prior")
    read = read_images(data, settings, images)
    filter, model = read.filter(filter_folder), read.classifier(classifier).requires_grad_(False)
    behind = {name: DefendedClassifier(filter.configured(PRESETS[name]), model) for name in PRESETS}
    deployed, norm, eps = behind[preset], threat.norm, threat.eps
    answers = digest_of([Defence.of("", behind["robust"])], read.x[:2])
    asked = (config, PRESETS[proxy], threat, steps, every, read.dataset.digest, read.config)
    kept = Kept(output, f"{answers} {asked}")

    # Of images and labels, from where the phase before it ended.
    def windows(surrogate: Classifier, x: Tensor, y: Tensor, _: Tensor) -> Tensor:
        draws: dict[str, Any] = {"steps": 40, "restarts": 4, "stop_early": False, "pieces": read.x}
        return window_pgd(surrogate, x, y, norm=norm, eps=eps, **draws)

    def own(x: Tensor, y: Tensor, begun: Tensor) -> Tensor:
        climb, winning = Climb(steps, 1, "ce", targeted=False, stop_early=False), Winning(deployed, every)
        start = begun.__getitem__
        return ascend_in_ball(winning, x, y, start, climb, norm=norm, eps=eps, longest=0.3 * eps)

    surrogates: dict[str, Classifier] = {"bare": model, "robust": behind["robust"], proxy: behind[proxy]}
    attacks: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
        **{f"windows at {name}": partial(windows, surrogate) for name, surrogate in surrogates.items()},
        "own gradient": own,
    }

    @torch.no_grad()
    def right(x: Tensor, y: Tensor) -> Tensor:
        return correct(deployed(x), y)

    def batch_of(at: Tensor) -> Row:
        """Of images `at` (n,) those that are right, (n,), after each phase, which meets what is left."""
        x, y = read.x[at], read.y[at]
        alive, ends = right(x, y), x.clone()
        left = {"clean": alive.tolist()}
        for name, attack in attacks.items():
            on = alive.nonzero()[:, 0]
            if len(on):
                ends[on] = attack(x[on], y[on], ends[on])
                alive[on] = right(ends[on], y[on])
            left[name] = alive.tolist()
        return left

    started = time.perf_counter()
    batches = torch.arange(len(read.x)).split(batch)
    parts = [
        kept.row(str(at.tolist()), partial(batch_of, at)) for at in track(batches, preset, transient=True)
    ]
    phases = {name: [alive for part in parts for alive in part[name]] for name in parts[0]}
    for name, alive in phases.items():
        low, high = wilson(sum(alive), len(alive))
        click.echo(f"{name:24} {sum(alive) / len(alive):6.1%}  ({low:.1%} to {high:.1%})")
    click.echo(f"{time.perf_counter() - started:.0f} s")
    if output is not None:
        facts = {"preset": preset, "norm": threat.norm, "eps": threat.eps, "steps": steps, "every": every}
        output.write_text(json.dumps({**facts, "alive": phases}) + "\n", encoding="utf-8")
    kept.finish()


if __name__ == "__main__":
    main()
