"""Stage `report`: `report.md`, self-contained beside its pictures."""

from __future__ import annotations

import json
import shutil
from typing import Any

from pipelines.board import save_figure, scatter
from pipelines.context import Context
from pipelines.files import whole
from pipelines.report import (
    markdown_certificates,
    markdown_checks,
    markdown_detection,
    markdown_results,
    markdown_rows,
    markdown_table,
    markdown_transfers,
    trade_offs,
)
from pipelines.settings import to_toml

_LEGEND = """\
{columns} *unaware*: the attack knows the classifier alone. *approximate*: another gradient stands in for
that of the preprocessing: its encoder's, the identity's (BPDA), the range's, a smooth function's.
*exact*: it differentiates every step of the projection. *worst of all* counts an image only if it survives
everything, attacks without gradients and the images that broke the other defences included; it is the
figure to quote. *: filter or classifier were trained for this threat. ≤: the last rounds of an attack, or
the checks, still broke some, and more of the same may. (masked): a check says that this is no robustness
figure. Intervals are Wilson's.
"""
_COLUMNS = {
    "standard": "Each column is what is left after its attacks and those of the columns before it.",
    "full": "Each column is the lowest figure of its own attacks.",
}
_CHECKS = """
## Signs of masked gradients

The figure of each check (`manifold_defense/evaluation/checks.py`); those in bold failed.

"""
_CERTIFIED = """
## What is proved

Share of {n} test images that are right and proved so within a radius. In brackets what PGD leaves there: no
proof may exceed it, and one that an attack contradicts is marked **!**. A proof of smoothing is of the vote
under noise, behind the filter or not, wrong for an image with the probability that the configuration gives.

"""
_DETECTION = """
## Telling attacked images by their residual

Area under the curve of the residual, clean images against those that broke the defence; 0.5 is chance.

"""
_TRANSFERS = """
## Who fools whom

Of the images that broke one defence, the share that fools another.

"""
_PICTURES = """
## Pictures

Robust against clean accuracy by threat; proofs by radius; the projection of images attacked without knowledge
of the filter, and attacks through its exact gradient, with predictions below, wrong ones in red.

"""
_PROJECTION = """\
## The projection

Errors are mean squared distances per pixel; quality is measured in the features of the classifier.

"""


def run(context: Context) -> dict[str, Any]:
    if not context.main:
        return {}
    metrics = {
        name: json.loads((path / "stage.json").read_text())["metrics"]
        for name, path in context.inputs.items()
    }
    pictures = []
    for stage in ("project", "evaluate", "certify"):
        for source in sorted(context.inputs[stage].glob("*.png")):
            name = f"{stage}-{source.name}"
            shutil.copyfile(source, context.folder / name)
            pictures.append(name)
    projected, evaluated, certified = metrics["project"], metrics["evaluate"], metrics["certify"]
    for i, (threat, points) in enumerate(trade_offs(evaluated["rows"]).items()):
        name = f"trade-off-{i}.png"
        figure = scatter(points, threat, "accuracy on clean images", "after the worst of all attacks")
        save_figure(figure, context.folder / name)
        context.board.add_figure(f"trade-off: {threat}", figure, 0)
        pictures.append(name)
    facts = [(name.replace("_", " "), f"{value:.5g}") for name, value in projected.items()]
    config = context.config
    text = [
        f"# What the defence of run `{config.run}` is worth\n\n",
        f"Data `{config.data.name}`, seed {config.seed}. The whole configuration is at the end.\n\n",
        markdown_results(evaluated),
        "\n" + _LEGEND.format(columns=_COLUMNS[evaluated["mode"]]),
        _CHECKS if evaluated["checks"] else "",
        markdown_checks(evaluated["checks"]) if evaluated["checks"] else "",
        _CERTIFIED.format(n=certified["n"]) if certified["lines"] else "",
        markdown_certificates(certified["lines"]),
        _PICTURES,
        *(f"![{name}]({name})\n\n" for name in pictures),
        _PROJECTION,
        markdown_table(("measure", "value"), facts),
        *([_DETECTION, markdown_detection(evaluated["detection"])] if evaluated["detection"] else []),
        _TRANSFERS,
        markdown_transfers(evaluated["transfers"]),
        "\n## Every attack\n\n",
        "Costs are an image's: passes through the model forward and backward, drawings of the generator.\n\n",
        markdown_rows(evaluated["rows"]),
        "\nEvery image's outcome is in `evaluate/images.csv`.\n",
        f"\n## Configuration\n\n```toml\n{to_toml(config)}```\n",
    ]
    with whole(context.folder / "report.md") as partial:
        partial.write_text("".join(text), encoding="utf-8")
    return {"pictures": pictures}
