"""How fast and how well is the projection? The reference recipe and ours, interleaved in one process.

    python benchmarks/projection.py                        the filter of the digits run
    python benchmarks/projection.py --filter runs/mnist/export/filter --data mnist \\
        --set data.root=PATH --images 200 --json mnist.json

Every setting projects the same held-out images with the same generator, by turns, `--repeats` times;
speeds are medians. `gemm_share` is the FLOP rate of the filter's own setting against that of a large
matrix product on this machine, the generator's own passes counted alone.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import click
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from manifold_defense import REFERENCE, ManifoldFilter, ProjectionConfig, load_classifier, load_filter
from pipelines.config import load_config
from pipelines.data import load_data, subset, to_float


def settings(filter: ManifoldFilter) -> dict[str, ProjectionConfig]:
    """What is compared, by name; `single_shot` is the encoder alone, a preview and no defence."""
    own = filter.config
    lbfgs = replace(own, solver="lbfgs", steps=2 * own.steps)
    return {"reference": REFERENCE, "filter": own, "lbfgs": lbfgs, "single_shot": replace(own, steps=0)}


def seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def gemm_flops_per_second(device: torch.device, repeats: int = 5) -> float:
    """The fastest of a few 2048³ matrix products."""
    a = torch.randn(2048, 2048, device=device)
    a @ a
    return 2 * 2048**3 / min(seconds(lambda: a @ a) for _ in range(repeats))


@torch.no_grad()
def forward_flops(generator: torch.nn.Module, like: Tensor) -> int:
    """Of one image; a gradient in z costs twice as much, and a projection two forward passes more."""
    counter = FlopCounterMode(display=False)
    with counter:
        generator(torch.zeros(1, generator.latent_dim, device=like.device))
    return int(counter.get_total_flops())


@click.command(help=__doc__, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--filter", "folder", type=click.Path(path_type=Path), default="runs/digits/export/filter")
@click.option(
    "--classifier", type=click.Path(path_type=Path), help="Default: `classifier` beside the filter."
)
@click.option("--data", default="digits")
@click.option("--set", "changes", multiple=True, metavar="KEY=VALUE")
@click.option("--images", default=100, type=click.IntRange(min=1))
@click.option("--repeats", default=3, type=click.IntRange(min=1))
@click.option("--json", "output", type=click.Path(path_type=Path))
def main(
    folder: Path,
    classifier: Path | None,
    data: str,
    changes: tuple[str, ...],
    images: int,
    repeats: int,
    output: Path | None,
) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    filter = load_filter(folder).to(device)
    model = load_classifier(classifier or folder.parent / "classifier").to(device)
    test = load_data(load_config(None, [f"data.name={data}", *changes]).data).test
    test = subset(test, min(images, len(test.labels)))
    x, y = to_float(test.images).to(device), test.labels.to(device)

    times: dict[str, list[float]] = {}
    facts: dict[str, dict[str, float]] = {}
    for _ in range(repeats):
        for name, config in settings(filter).items():
            candidate = ManifoldFilter(filter.generator, filter.encoder, config)
            times.setdefault(name, []).append(seconds(lambda f=candidate: f.project(x)))  # type: ignore[misc]
            if name not in facts:
                facts[name] = measure(candidate, model, x, y)
    reference = statistics.median(times["reference"])
    presets = {
        name: {
            "images_per_second": len(x) / statistics.median(times[name]),
            "ratio_to_reference": reference / statistics.median(times[name]),
            **facts[name],
        }
        for name in times
    }
    evaluations = 2 * facts["filter"]["evaluations_per_image"] + 2
    flops = len(x) * forward_flops(filter.generator, x) * evaluations
    share = flops / statistics.median(times["filter"]) / gemm_flops_per_second(device)

    click.echo(f"{len(x)} images of {data}, {repeats} repeats, {torch.get_num_threads()} threads, {device}")
    columns = list(presets["reference"])
    click.echo("".join(f"{c:>22}" for c in ["", *columns]))
    for name, values in presets.items():
        click.echo(f"{name:>22}" + "".join(f"{values[c]:>22.5g}" for c in columns))
    click.echo(f"share of the GEMM peak: {share:.1%}")
    if output is not None:
        result = {"images": len(x), "data": data, "presets": presets, "gemm_share": share}
        output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


@torch.no_grad()
def measure(filter: ManifoldFilter, model: torch.nn.Module, x: Tensor, y: Tensor) -> dict[str, float]:
    result = filter.project(x)
    return {
        "mean_error": float(result.error.mean()),
        "p95_error": float(result.error.quantile(0.95)),
        "clean_accuracy": float((model(result.image).argmax(1) == y).float().mean()),
        "evaluations_per_image": float(result.steps.float().mean()),
    }


if __name__ == "__main__":
    main()
