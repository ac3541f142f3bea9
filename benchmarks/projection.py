"""How fast and how well does each preset project? All interleaved, in one process, on the same images.

    python benchmarks/projection.py                        the filter of the digits run
    python benchmarks/projection.py --filter zoo/mnist/filter --classifier runs/mnist/train-classifier \\
        --data mnist --set data.root=PATH --images 1000 --json mnist.json

Every preset projects the same held-out images with the same generator, by turns, `--repeats` times (of
presets with the same settings one does); speeds are medians, ratios are of medians. `--compiled` adds
`accurate` by way of torch.compile (a C++ compiler is needed, and a minute at first). Then each projects
images attacked with PGD that knows the classifier alone. `gemm_share` is the FLOP rate of the generator's
forward and backward pass, in the batches that the presets use, against that of a large matrix product in
the same precision; a preset's own `gemm_share` counts its generator passes against all of its time.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import click
import torch
from inputs import benchmark, data_options, folder, json_option, read_images
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from gan import Encoder, Generator, NetworkConfig
from manifold_defense import PRESETS, ManifoldFilter, Projection
from manifold_defense.attacks import pgd
from manifold_defense.evaluation.statistics import paired
from manifold_defense.projection import stationarity
from manifold_defense.projection.rounding import Rounded, has_bfloat16
from manifold_defense.types import Generator as LatentGenerator

Result = TypeVar("Result")


def timed(work: Callable[[], Result]) -> tuple[float, Result]:
    started = time.perf_counter()
    result = work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started, result


def gemm_flops_per_second(device: torch.device, dtype: torch.dtype, repeats: int = 5) -> float:
    """The fastest of a few 2048³ matrix products."""
    a = torch.randn(2048, 2048, device=device, dtype=dtype)
    a @ a
    return 2 * 2048**3 / min(timed(lambda: a @ a)[0] for _ in range(repeats))


@torch.no_grad()
def forward_flops(generator: LatentGenerator, device: torch.device) -> int:
    """Of one image; the gradient in z costs as much again."""
    with FlopCounterMode(display=False) as counter:
        generator(torch.zeros(1, generator.latent_dim, device=device))
    return int(counter.get_total_flops())


def gradient_flops_per_second(
    generator: Callable[[Tensor], Tensor], z: Tensor, flops: int, repeats: int = 7
) -> float:
    """Of the forward and backward pass on latents z, `flops` an image and pass; the median of a few."""
    z.requires_grad_(True)

    def work() -> None:
        torch.autograd.grad(generator(z).sum(), z)

    work()
    seconds = statistics.median(timed(work)[0] for _ in range(repeats))
    return 2 * len(z) * flops / seconds


def growth(config: NetworkConfig, side: int, device: torch.device) -> dict[str, dict[str, float]]:
    """Images per second of the preset `accurate` on untrained networks, one size varied at a time."""

    def speed(images: int, network: NetworkConfig, size: int) -> float:
        shape = (1, size, size)
        filter = ManifoldFilter(Generator(shape, network), Encoder(shape, network), PRESETS["accurate"])
        filter, x = filter.to(device), torch.rand(images, *shape, device=device)
        filter.project(x[:1])
        return images / statistics.median(timed(lambda: filter.project(x))[0] for _ in range(3))

    batches = {str(n): speed(n, config, side) for n in (1, 8, 64, 256, 1024)}
    latents = {str(d): speed(128, replace(config, latent_dim=d), side) for d in (16, 32, 64, 128)}
    sides = {str(s): speed(32, config, s) for s in (8, 16, 32, 64)}
    return {"batch": batches, "latent_dim": latents, "image_side": sides}


@benchmark(__doc__)
@folder("--filter", "filter_folder", default="runs/digits/export/filter")
@folder("--classifier", help="Default: `classifier` beside the filter.")
@data_options("digits")
@click.option("--images", default=100, type=click.IntRange(min=1))
@click.option("--attacked", default=100, type=click.IntRange(min=1), help="Images that are attacked as well.")
@click.option("--repeats", default=3, type=click.IntRange(min=1))
@click.option("--compiled", is_flag=True, help="Measure `accurate` compiled as well.")
@json_option
def main(
    filter_folder: Path,
    classifier: Path | None,
    data: str,
    settings: tuple[str, ...],
    images: int,
    attacked: int,
    repeats: int,
    compiled: bool,
    output: Path | None,
) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    read = read_images(data, settings, images)
    filter = read.filter(filter_folder, device)
    model = read.classifier(classifier or filter_folder.parent / "classifier", device).requires_grad_(False)
    x, y = read.x.to(device), read.y.to(device)
    eps = 0.3 if data == "mnist" else 0.15
    x_adv = pgd(model, x[:attacked], y[:attacked], norm="linf", eps=eps, steps=20, stop_early=False)

    configs = dict(PRESETS)
    if compiled:
        configs["accurate_compiled"] = replace(PRESETS["accurate"], compiled=True)
    # Of presets that are the same one is measured.
    same = {name: list(configs)[list(configs.values()).index(config)] for name, config in configs.items()}
    filters = {name: filter.configured(configs[name]) for name in dict.fromkeys(same.values())}
    results: dict[str, Projection] = {}
    times: dict[str, list[float]] = {name: [] for name in filters}
    for name, candidate in filters.items():
        if name != "reference":
            candidate.project(x)  # the metric is made, what is compiled is, and the machine is warm
    for _ in range(repeats):
        for name, candidate in filters.items():
            seconds, results[name] = timed(lambda f=candidate: f.project(x))  # type: ignore[misc]
            times[name].append(seconds)

    generator: Any = filter.generator
    flops = forward_flops(generator, device)
    z = torch.randn(filter.config.chunk_on(device.type), generator.latent_dim, device=device)
    peaks = {"full": gemm_flops_per_second(device, torch.float32)}
    shares = {"full": gradient_flops_per_second(generator, z, flops) / peaks["full"]}
    if has_bfloat16(device):
        peaks["bfloat16"] = gemm_flops_per_second(device, torch.bfloat16)
        rate = gradient_flops_per_second(Rounded(generator), z, flops)
        shares["bfloat16"] = rate / peaks["bfloat16"]
    medians = {name: statistics.median(values) for name, values in times.items()}
    right = {name: hits(model, result.image, y) for name, result in results.items()}
    measured = {}
    for name, candidate in filters.items():
        result, attacked_result = results[name], candidate.project(x_adv)
        config = configs[name]
        last = config.restarts if config.chooses else 0  # the losses of where each ended
        passes = 2 * float(result.steps.float().mean()) + last + 1  # and the image
        flops_per_second = passes * flops * len(x) / medians[name]
        measured[name] = {
            "images_per_second": len(x) / medians[name],
            "ratio_to_reference": medians["reference"] / medians[name],
            "mean_error": float(result.error.mean()),
            "p95_error": float(result.error.quantile(0.95)),
            "clean_accuracy": float(right[name].mean()),
            "evaluations_per_image": float(result.steps.float().mean()),
            "attacked_mean_error": float(attacked_result.error.mean()),
            "attacked_p95_error": float(attacked_result.error.quantile(0.95)),
            "attacked_unaware_accuracy": float(hits(model, attacked_result.image, y[:attacked]).mean()),
            "stationarity": float(stationarity(generator, x[:100], result.z[:100], config).median()),
            "gemm_share": flops_per_second / peaks.get(config.precision, peaks["full"]),
        }
    presets = {name: measured[first] for name, first in same.items()}
    beside = {name: paired(right["reference"], right[first])._asdict() for name, first in same.items()}

    click.echo(
        f"{len(x)} images of {data}, {repeats} repeats, {torch.get_num_threads()} threads, {device}; "
        f"{flops / 2e6:.2f} million multiply-adds for a drawing"
    )
    columns = list(presets["reference"])
    click.echo(f"{'':>18}" + "".join(f"{c:>26}" for c in columns))
    for name, values in presets.items():
        click.echo(f"{name:>18}" + "".join(f"{values[c]:>26.5g}" for c in columns))
    for name, found in beside.items():
        if name != "reference":
            figures = f"{found['gained']} gained, {found['lost']} lost, p {found['p']:.2g}"
            click.echo(f"{name} beside reference, clean: {figures}")
    for kind, share in shares.items():
        peak = f"the GEMM peak of {peaks[kind] / 1e9:.0f} GFLOP/s"
        click.echo(f"generator forward and backward, {kind}: {share:.1%} of {peak}")
    grown = growth(filter.generator.config, x.shape[-1], device)  # type: ignore[arg-type]
    for what, speeds in grown.items():
        click.echo(
            f"accurate, images a second by {what}: " + ", ".join(f"{k}: {v:.0f}" for k, v in speeds.items())
        )
    if output is not None:
        facts = {
            "images": len(x),
            "data": data,
            "multiply_adds": flops / 2,
            "presets": presets,
            "clean_beside_reference": beside,
            "gemm_share": shares["full"],
            "gemm_share_by_precision": shares,
            "gemm_peak_flops_per_second": peaks,
            "growth_images_per_second": grown,
        }
        output.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


@torch.no_grad()
def hits(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """1 for each of N images that is right, 0 for the others, (N,)."""
    right: Tensor = model(x).argmax(1) == y
    return right.float()


if __name__ == "__main__":
    main()
