"""Stage `report`: `report.md`, self-contained beside its pictures."""

from __future__ import annotations

import json
import shutil
from typing import Any

from pipelines.config import to_toml
from pipelines.context import Context
from pipelines.report import markdown_results, markdown_rows, markdown_table

_LEGEND = """\
*unaware*: the attack knows the classifier alone. *approximate*: another gradient stands in for the filter's,
that of its encoder, of the identity (BPDA) or of the range. *exact*: it differentiates every step of the
projection. Each of these columns is the
lowest figure of its attacks; *worst of all* counts an image only if it survives everything, and is the
figure to quote. Intervals are Wilson's.
"""
_PICTURES = """
## Pictures

First the projection of images attacked without knowledge of the filter, then attacks through its exact
gradient. Predictions stand below, wrong ones in red.

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
    for stage in ("project", "evaluate"):
        for source in sorted(context.inputs[stage].glob("strips*.png")):
            name = f"{stage}-{source.name}"
            shutil.copyfile(source, context.folder / name)
            pictures.append(name)
    projected = metrics["project"]
    facts = [(name.replace("_", " "), f"{value:.5g}") for name, value in projected.items()]
    config = context.config
    text = [
        f"# What the defence of run `{config.run}` is worth\n\n",
        f"Data `{config.data.name}`, seed {config.seed}. The whole configuration is at the end.\n\n",
        markdown_results(metrics["evaluate"]),
        "\n" + _LEGEND,
        _PICTURES,
        *(f"![{name}]({name})\n\n" for name in pictures),
        _PROJECTION,
        markdown_table(("measure", "value"), facts),
        "\n## Every attack\n\n",
        markdown_rows(metrics["evaluate"]["rows"]),
        "\nEvery image's outcome is in `evaluate/images.csv`.\n",
        f"\n## Configuration\n\n```toml\n{to_toml(config)}```\n",
    ]
    partial = context.folder / "report.partial"
    partial.write_text("".join(text), encoding="utf-8")
    partial.replace(context.folder / "report.md")
    return {"pictures": pictures}
