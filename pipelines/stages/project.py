"""Stage `project`: how well the filter draws test images, clean and attacked, and the generator's quality."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from gan.quality import frechet_distance, precision_recall
from manifold_defense.attacks import pgd
from manifold_defense.classifiers import ImageClassifier
from manifold_defense.filter import ManifoldFilter
from pipelines.board import Strip, predictions, save_figure, strips
from pipelines.context import Context
from pipelines.defences import load_parts

CHUNK = 250


def run(context: Context) -> dict[str, Any]:
    config, seed = context.config.project, context.config.seed
    filter, classifier = load_parts(context)
    x, y = context.test_images(config.images)
    threat = config.threat
    started = time.perf_counter()
    projecting = 0.0

    with context.progress(len(x)) as advance:

        @torch.no_grad()
        def work(chunk: int, part: slice) -> tuple[Tensor, ...]:
            nonlocal projecting
            clean, labels = x[part], y[part]
            attacked = pgd(
                classifier,
                clean,
                labels,
                norm=threat.norm,
                eps=threat.eps,
                steps=20,
                stop_early=False,
                seed=seed + chunk,
            )
            started = time.perf_counter()
            result, under_attack = filter.project(clean), filter.project(attacked)
            under_attack.error.cpu()  # waits for the device
            projecting += time.perf_counter() - started
            advance(part.stop)
            return tuple(
                value.cpu()
                for value in (
                    result.error,
                    under_attack.error,
                    classifier(clean).argmax(1) == labels,
                    classifier(result.image).argmax(1) == labels,
                    classifier(under_attack.image).argmax(1) == labels,
                    result.steps,
                    attacked,
                    result.image,
                    under_attack.image,
                )
            )

        error, error_attacked, plain, filtered, filtered_attacked, steps, attacked, image, image_attacked = (
            context.map_images(work, len(x), CHUNK)
        )

    metrics = {
        "n": len(x),
        "clean_error": float(error.mean()),
        "clean_error_p95": float(error.quantile(0.95)),
        "attacked_error": float(error_attacked.mean()),
        "classifier_accuracy": float(plain.float().mean()),
        "accuracy_on_projection": float(filtered.float().mean()),
        "accuracy_on_projection_attacked_unaware": float(filtered_attacked.float().mean()),
        "generator_gradients_per_image": float(steps.float().mean()),
        "images_per_second": 2 * len(x) / max(projecting, 1e-9),
        "seconds": time.perf_counter() - started,
        **_quality(context, filter, classifier, x),
    }
    if context.main:
        shown, labels = slice(0, 10), y[:10].tolist()
        rows = [
            Strip("clean", x[shown], predictions(classifier, x[shown])),
            Strip("attacked", attacked[shown], predictions(classifier, attacked[shown].to(x))),
            Strip("G(z*)", image_attacked[shown], predictions(classifier, image_attacked[shown].to(x))),
            Strip("G(z*) of clean", image[shown], predictions(classifier, image[shown].to(x))),
        ]
        figure = strips(rows, labels, context.data.classes)
        save_figure(figure, context.folder / "strips.png")
        context.board.add_figure("clean | attacked | G(z*)", figure, 0)
        context.board.add_histogram("error of clean images", error, 0)
        for name, value in metrics.items():
            context.board.add_scalar(name, value, 0)
    return metrics


@torch.no_grad()
def _quality(
    context: Context, filter: ManifoldFilter, classifier: ImageClassifier, x: Tensor
) -> dict[str, float]:
    """Precision, recall and Fréchet distance of as many samples as there are test images (2,000 at most)."""
    x = x[:2000]
    rng = torch.Generator().manual_seed(context.config.seed)
    latent_dim: int = filter.generator.latent_dim  # type: ignore[assignment]
    z = torch.randn(len(x), latent_dim, generator=rng).to(x)
    features = classifier.features
    real = torch.cat([features(part) for part in x.split(500)])
    fake = torch.cat([features(filter.generator(part)) for part in z.split(500)])
    precision, recall = precision_recall(real, fake)
    return {"precision": precision, "recall": recall, "frechet_distance": frechet_distance(real, fake)}
