"""What is each preset worth against an attacker who knows it? The per-image worst over views and attacks.

    python benchmarks/robustness.py --filter zoo/mnist/filter \\
        --classifier plain=zoo/mnist/undefended --classifier hardened=zoo/mnist/classifier-pgd \\
        --data mnist --set data.root=PATH --images 200 --json robustness.json

Attacks run from cheap to dear, and only images that survived go on: PGD that knows the classifier alone,
PGD of `--approximate-steps` through the views that approximate, of `--steps` through the exact one, APGD of
five times as many, PGD from ten times as many windows as `--restarts`, a search of the generator's range,
feature matching, PGD from where 2,000 queries of Square end, and Square, which needs no gradient (neither
with `--queries 0`); at the end each meets the images that broke the others.
Every preset is set beside the first of them, image by image, by a sign test. Threats beyond a ball, such as
`--threat patch:7`, meet the attacks that are for them.
Views of a preset with several restarts are those of its first restart alone, which is one of the deployed
ones: a step through all ten of the reference costs ten times as much. `--proxy reference=accurate` puts the
exact gradient of the one, at the latents that it finds, in the place of the other's: weaker, which flatters
it, but it can be afforded. Attacks press on after they fooled what only stands in for the deployed preset.
With `--beside FILE` each preset is set beside those of an earlier run's JSON as well, of the same images.
Baselines stand beside the filters. Every row is examined for masked gradients on `--checks` images, and
says so. Hours of it may be stopped: with `--json FILE` finished attacks are kept beside it, in FILE.jobs,
until all are done, and the same command goes on from there.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import torch
from inputs import NAMED_FOLDER, THREAT, benchmark, data_options, folder, json_option, read_images
from lightning_fabric import Fabric
from rich.console import Console
from torch import nn

from manifold_defense import (
    PRESETS,
    DefendedClassifier,
    ManifoldFilter,
    Threat,
)
from manifold_defense.evaluation import AttackConfig, Defence, Evaluation, evaluate, in_batches
from manifold_defense.evaluation.baselines import Binarise, Blur, Jpeg, Preprocess, Preprocessed
from manifold_defense.evaluation.defence import ViewName
from manifold_defense.evaluation.statistics import paired as sign_test
from pipelines.jobs import JobStore, digest_of
from pipelines.progress import progress_bar

THREATS = ("linf:0.3", "l2:2.5", "l2:1.5", "linf:0.1")
BASELINES: dict[str, Callable[[], Preprocess]] = {"binarised": Binarise, "jpeg": Jpeg, "blurred": Blur}
# The views of each kind of attack; what is left after each stands in the table.
KINDS: dict[str, tuple[ViewName, ...]] = {
    "unaware": ("unaware",),
    "approximate": ("start", "identity", "soft", "sharp", "tangent", "implicit"),
    "exact": ("exact",),
    "queries": ("deployed",),
}


def make_defences(
    model: nn.Module,
    filter: ManifoldFilter,
    presets: tuple[str, ...],
    proxies: Mapping[str, str],
    baselines: bool,
) -> list[Defence]:
    """The classifier bare and behind the baselines, if these are wanted, and behind each preset.

    An attacker of a preset that has a proxy takes that one's exact gradient in place of its own.
    """

    def first_restart(of: str) -> DefendedClassifier:
        return DefendedClassifier(filter.configured(replace(PRESETS[of], restarts=1)), model)

    defences = []
    if baselines:
        defences.append(Defence.bare("none", model))
        for name, made in BASELINES.items():
            defences.append(Defence.preprocessed(name, Preprocessed(made(), model)))
    for name in presets:
        deployed = DefendedClassifier(filter.configured(PRESETS[name]), model)
        views = dict(Defence.filtered(name, first_restart(name)).attacked)
        if name in proxies:
            views["exact"] = first_restart(proxies[name])
        surrogates = {"unaware"} | ({"exact"} if name in proxies else set())
        if PRESETS[name].restarts > 1:
            surrogates |= set(views)
        defences.append(Defence(name, deployed, views, surrogates=frozenset(surrogates)))
    return defences


def make_attacks(steps: int, approximate_steps: int, restarts: int, queries: int) -> list[AttackConfig]:
    """Cheap ones climb the margin, so that rows of the two strengths of PGD have two names."""
    found = [
        AttackConfig("pgd", approximate_steps, restarts, "margin", views=KINDS["approximate"]),
        AttackConfig("pgd", steps, restarts, "both" if restarts > 1 else "ce", views=("unaware", "exact")),
        AttackConfig("apgd", 5 * steps, views=("exact",)),
        AttackConfig("window_pgd", steps, 10 * restarts, views=("exact",)),
        AttackConfig("range", steps),
        AttackConfig("feature_matching", approximate_steps, views=("exact",)),
        AttackConfig("pgd_l0", steps, restarts, views=("unaware", "exact")),
        AttackConfig("stroke_search", restarts=restarts, views=("exact",)),
        AttackConfig("patch", approximate_steps, restarts, views=("unaware", "exact")),
        AttackConfig("corruption", steps=3),
    ]
    if queries:
        # At L2 it breaks a third of what all of the above leave behind an encoder that met windows.
        found += [AttackConfig("square_pgd", steps, restarts, views=("exact",))]
        found += [AttackConfig(name, steps=queries) for name in ("square", "sparse_rs")]
    return found


def line(evaluation: Evaluation, defence: str, threat: Threat) -> dict[str, Any]:
    """One cell of the table: the worst, its interval, and what is left after each kind of attack."""
    rows = [r for r in evaluation.rows if r.defence == defence]
    own = [r for r in rows if (r.norm, r.eps) == (threat.norm, threat.eps)]
    worst = next(r for r in own if r.attack == "worst")
    after = {"clean": rows[0].robust_accuracy}
    for kind, views in {**KINDS, "transfer": ("transfer",)}.items():
        left = [r.robust_accuracy for r in own if r.view in views]
        if left:
            after[kind] = min(left)
    return {
        "preset": defence,
        "norm": threat.norm,
        "eps": threat.eps,
        "robust_accuracy": worst.robust_accuracy,
        "ci_low": worst.ci_low,
        "ci_high": worst.ci_high,
        "masked": worst.masked,
        "settled": worst.settled,
        "after": after,
        "alive": [score > 0 for score in evaluation.worst[defence, threat].tolist()],
    }


def set_beside(cell: dict[str, Any], earlier: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A cell and those of an earlier run for the same classifier and threat, by the sign test.

    Of runs of different length, on the images of the shorter one.
    """
    keys = ("classifier", "norm", "eps")
    found = []
    for other in earlier:
        if any(cell[key] != other[key] for key in keys) or other["preset"] not in PRESETS:
            continue
        common = min(len(row["alive"]) for row in (other, cell))  # the first images are the same
        alive = [torch.tensor(row["alive"][:common]).float() for row in (other, cell)]
        names = {"before": other["preset"], "after": cell["preset"]}
        found.append({**{key: cell[key] for key in keys}, **names, **sign_test(*alive)._asdict()})
    return found


@benchmark(__doc__)
@folder("--filter", "filter_folder", required=True)
@click.option("--classifier", "classifiers", multiple=True, required=True, type=NAMED_FOLDER)
@click.option(
    "--preset",
    "presets",
    multiple=True,
    type=click.Choice(list(PRESETS)),
    default=("robust", "accurate", "reference"),
)
@click.option("--proxy", "proxies", multiple=True, metavar="PRESET=PRESET", help="Attacked instead.")
@click.option("--baselines/--no-baselines", default=True, show_default=True, help="No filter; other ones.")
@click.option("--threat", "threats", multiple=True, default=THREATS, type=THREAT)
@data_options("mnist")
@click.option("--images", default=200, type=click.IntRange(min=1))
@click.option("--steps", default=40, type=click.IntRange(min=1), help="Of PGD through the exact view.")
@click.option("--approximate-steps", default=10, type=click.IntRange(min=1), help="And through the others.")
@click.option("--restarts", default=2, type=click.IntRange(min=1))
@click.option("--queries", default=300, type=click.IntRange(min=0), help="Of Square, 0: none.")
@click.option("--checks", default=30, type=click.IntRange(min=0), help="Images, 0: none.")
@click.option("--batch", default=100, type=click.IntRange(min=1))
@click.option("--beside", type=click.Path(exists=True, path_type=Path), help="JSON of an earlier run.")
@json_option
def main(
    filter_folder: Path,
    classifiers: tuple[tuple[str, Path], ...],
    presets: tuple[str, ...],
    proxies: tuple[str, ...],
    baselines: bool,
    threats: tuple[Threat, ...],
    data: str,
    settings: tuple[str, ...],
    images: int,
    steps: int,
    approximate_steps: int,
    restarts: int,
    queries: int,
    checks: int,
    batch: int,
    beside: Path | None,
    output: Path | None,
) -> None:
    instead = {name: other for name, _, other in (pair.partition("=") for pair in proxies)}
    for name in (*instead, *instead.values()):
        if name not in PRESETS:
            raise click.UsageError(f"--proxy: expected PRESET=PRESET of {', '.join(PRESETS)}, got {name!r}")
    fabric, console = Fabric(accelerator="cpu", devices=1), Console(stderr=True)
    kept = output.with_name(f"{output.name}.jobs") if output is not None else None
    earlier = json.loads(beside.read_text(encoding="utf-8"))["rows"] if beside else []
    read = read_images(data, settings, images)
    filter, x, y = read.filter(filter_folder), read.x, read.y
    table: list[dict[str, Any]] = []
    paired: list[dict[str, Any]] = []
    for label, path in classifiers:
        model = read.classifier(path).requires_grad_(False)
        defences = make_defences(model, filter, presets, instead, baselines)
        for threat in threats:
            started = time.perf_counter()
            digest = f"{digest_of(defences, x[:2])} {len(x)} {batch}"
            store = JobStore(kept, fabric, digest) if kept is not None else None
            title = f"{label} {threat.norm}:{threat.eps:g}"
            with progress_bar(title, 0, "jobs", console, shown=console.is_terminal) as advance:
                evaluation = evaluate(
                    defences,
                    make_attacks(steps, approximate_steps, restarts, queries),
                    [threat],
                    x,
                    y,
                    checks=checks,
                    compute=in_batches(batch),
                    store=store,
                    on_progress=advance,
                )
            click.echo(f"{label}, {threat.norm}:{threat.eps:g}: {time.perf_counter() - started:.0f} s")
            for defence in defences:
                cell = {"classifier": label, **line(evaluation, defence.name, threat)}
                table.append(cell)
                after = "  ".join(f"{kind} {share:.1%}" for kind, share in cell["after"].items())
                interval = f"[{cell['ci_low']:.1%}, {cell['ci_high']:.1%}]"
                mark = "  masked: not a robustness figure" if cell["masked"] else ""
                bound = " " if cell["settled"] else "≤"
                click.echo(
                    f"  {defence.name:12} {bound}{cell['robust_accuracy']:6.1%}  {interval}  {after}{mark}"
                )
            comparisons = [
                {"classifier": label, **found}
                for other in presets[1:]
                for found in evaluation.comparisons(presets[0], other)
            ]
            for cell in table[-len(presets) :]:
                comparisons += set_beside(cell, earlier)
            for found in comparisons:
                figures = f"{found['gained']} gained, {found['lost']} lost, p {found['p']:.2g}"
                click.echo(f"  {found['after']} beside {found['before']}: {figures}")
            paired += comparisons
            if output is not None:
                facts = {
                    "images": len(x),
                    "steps": steps,
                    "approximate_steps": approximate_steps,
                    "restarts": restarts,
                    "queries": queries,
                    "rows": table,
                    "paired": paired,
                }
                output.write_text(json.dumps(facts) + "\n", encoding="utf-8")
    if kept is not None:
        shutil.rmtree(kept)


if __name__ == "__main__":
    main()
