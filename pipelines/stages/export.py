"""Stage `export`: folders to deploy: the filter, the classifier, its hardened variants."""

from __future__ import annotations

import json
from typing import Any

import torch

from manifold_defense.artifact import load_classifier, load_filter, save_classifier, save_filter
from pipelines.context import Context
from pipelines.stage import StageError


def run(context: Context) -> dict[str, Any]:
    if not context.main:
        return {}
    filter = load_filter(context.inputs["train-encoder"]).configured(context.config.projection)
    save_filter(filter, context.folder / "filter")
    hardened = {variant.name: context.inputs["harden"] / variant.name for variant in context.config.harden}
    for name, source in {"classifier": context.inputs["train-classifier"], **hardened}.items():
        names = json.loads((source / "classifier.json").read_text())["class_names"]
        save_classifier(load_classifier(source), context.folder / name, class_names=tuple(names))

    # What was written must do what was measured.
    x, _ = context.test_images(8)
    x = x.cpu()
    if not torch.equal(load_filter(context.folder / "filter")(x), filter(x)):
        raise StageError(f"{context.folder / 'filter'}: the exported filter differs from the run's")
    size = sum(f.stat().st_size for f in (context.folder / "filter").iterdir())
    return {"filter_bytes": size}
