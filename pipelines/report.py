"""The results in words and tables: for the terminal and for `report.md`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import itemgetter
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

Rows = Sequence[Mapping[str, Any]]
_HEADER = ("defence", "clean", "noise", "unaware", "approximate", "exact", "worst of all", "95 % interval")
MASKED, AT_MOST = " (masked)", "≤ "
_FEWEST = 10  # images on which checks find what they look for
_LEGEND = (
    "unaware: attacks that know the classifier alone. approximate: another gradient in place of the "
    "defence's own. exact: its own. worst of all: image by image, after those without gradients as well; the "
    "only figure of robustness. *: filter or classifier were trained for this threat. ≤: the last rounds of "
    "an attack, or the checks, still broke some, and more of the same may. (masked): the figure is too high, "
    "gradients are hidden or longer attacks break many more."
)
_NORMS = {"linf": "L∞", "l2": "L2", "l1": "L1", "l0": "L0", "union": "union of all threats"}


class Line(NamedTuple):
    """Of one defence, in the words and order of `_HEADER`."""

    defence: str
    clean: str
    noise: str
    unaware: str
    approximate: str
    exact: str
    worst: str
    interval: str

    def emphasised(self, mark: str, unmark: str) -> Line:
        """With the figure of robustness between the marks, unless it is masked and none."""
        return self if self.worst.endswith(MASKED) else self._replace(worst=f"{mark}{self.worst}{unmark}")


class ThreatTable(NamedTuple):
    """Per defence: what each kind of attack leaves under one threat, and the per-image worst.

    In an evaluation of mode `standard` a column is what is left after its attacks and all before
    them, in mode `full` the lowest figure of its own attacks. `approximate` are all gradients of a
    defence but the exact one. A figure that a check found masked says so.
    """

    title: str
    lines: list[Line]  # one a defence


def threat_tables(rows: Rows) -> list[ThreatTable]:
    """One table a threat, the union of all last, from the rows of `evaluate/stage.json`."""
    clean = {r["defence"]: r for r in rows if r["attack"] == "clean"}
    threats = list(dict.fromkeys((r["norm"], r["eps"]) for r in rows if r["attack"] == "worst"))
    threats.sort(key=lambda threat: threat[0] == "union")
    return [
        ThreatTable(
            _threat(norm, eps),
            [
                _line(defence, clean[defence], [r for r in rows if (r["norm"], r["eps"]) == (norm, eps)])
                for defence in clean
            ],
        )
        for norm, eps in threats
    ]


def _line(defence: str, clean: Mapping[str, Any], rows: Rows) -> Line:
    own = [r for r in rows if r["defence"] == defence]
    worst = next(r for r in own if r["attack"] == "worst")

    def lowest(column: str) -> str:
        found = [r for r in own if _column(r) == column]
        return _at_most(min(found, key=itemgetter("robust_accuracy"))) if found else "–"

    return Line(
        f"{defence}{' *' if worst['trained'] else ''}",
        percent(clean["robust_accuracy"]),
        noise=lowest("noise"),
        unaware=lowest("unaware"),
        approximate=lowest("approximate"),
        exact=lowest("exact"),
        worst=_figure(worst),
        interval=f"{percent(worst['ci_low'])} – {percent(worst['ci_high'])}",
    )


def _figure(worst: Mapping[str, Any]) -> str:
    """`12.5 %`, `≤ 12.5 %` for one that has not settled, `≤ 12.5 % (masked)`."""
    return f"{_at_most(worst)}{MASKED if worst['masked'] else ''}"


def _at_most(row: Mapping[str, Any]) -> str:
    return f"{'' if row['settled'] else AT_MOST}{percent(row['robust_accuracy'])}"


def _column(row: Mapping[str, Any]) -> str:
    """Which column a row belongs to; attacks without gradients and transfers count in the worst alone."""
    if row["attack"] == "noise":
        return "noise"
    if row["view"] in ("unaware", "exact"):
        return str(row["view"])
    return "" if row["view"] in ("deployed", "transfer", "checks", "all", None) else "approximate"


def summary(rows: Rows, comparisons: Rows) -> list[str]:
    """One sentence a threat: what the filter changes, by the worst of all attacks and views."""
    by_key = {(r["defence"], r["norm"], r["eps"]): r for r in rows if r["attack"] == "worst"}
    parts: dict[str, list[str]] = {}
    for found in comparisons:
        threat = (found["norm"], found["eps"])
        before, after = by_key[found["before"], *threat], by_key[found["after"], *threat]
        parts.setdefault(_threat(*threat), []).append(
            f"{found['before']} {_figure(before)} → {found['after']} {_figure(after)} "
            f"({_verdict(before, after, found)})"
        )
    return [f"{threat}, worst of all attacks and views: " + "; ".join(own) for threat, own in parts.items()]


def _verdict(before: Mapping[str, Any], after: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    """By the sign test at 5 %."""
    if before["masked"] or after["masked"]:
        return "no verdict: a figure is masked"
    gained, lost = found["gained"], found["lost"]
    figures = f"{gained} images gained, {lost} lost, p {found['p']:.2g}"
    if not (before["settled"] and after["settled"]):
        figures += ", not settled"
    if found["p"] > 0.05:
        return f"no significant difference: {figures}"
    return f"the filter {'helps' if gained > lost else 'harms'}: {figures}"


def trade_offs(rows: Rows) -> dict[str, dict[str, tuple[float, float]]]:
    """By threat: each defence's accuracy on clean images, and after the worst of all attacks."""
    clean = {r["defence"]: r["robust_accuracy"] for r in rows if r["attack"] == "clean"}
    found: dict[str, dict[str, tuple[float, float]]] = {}
    for r in rows:
        if r["attack"] == "worst":
            label = f"{'' if r['settled'] else AT_MOST}{r['defence']}{MASKED if r['masked'] else ''}"
            found.setdefault(_threat(r["norm"], r["eps"]), {})[label] = (
                clean[r["defence"]],
                r["robust_accuracy"],
            )
    return found


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _threat(norm: str | None, eps: float) -> str:
    """`L∞ 0.3`, `patch 7`, `union of all threats`."""
    name = _NORMS.get(norm or "", norm or "–")
    return f"{name} {eps:g}" if eps else name


def print_results(console: Console, metrics: Mapping[str, Any]) -> None:
    """The tables, the warnings above them and the summary below."""
    for warning in metrics["warnings"]:
        console.print(f"[bold red]not a robustness figure[/]: {warning}", highlight=False, soft_wrap=True)
    if unchecked := _unchecked(metrics):
        console.print(unchecked, highlight=False, soft_wrap=True)
    for table in threat_tables(metrics["rows"]):
        shown = Table(title=f"{table.title}: accuracy on {metrics['n']} test images", title_justify="left")
        for column in _HEADER:
            shown.add_column(column, justify="left" if column == "defence" else "right", no_wrap=True)
        for line in table.lines:
            shown.add_row(*line.emphasised("[bold]", "[/]"))
        console.print(shown)
    console.print(_LEGEND, highlight=False)
    for sentence in summary(metrics["rows"], metrics["comparisons"]):
        console.print(sentence, highlight=False, soft_wrap=True)


def _unchecked(metrics: Mapping[str, Any]) -> str:
    """What to say where too few images were examined for masked gradients, or none."""
    images = metrics["checked"]
    if images >= _FEWEST:
        return ""
    return f"Masked gradients were looked for on {images} images: too few to trust what is not marked."


def markdown_table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rule = ["---"] + ["---:"] * (len(header) - 1)
    return "".join("| " + " | ".join(line) + " |\n" for line in (header, rule, *lines))


def markdown_results(metrics: Mapping[str, Any]) -> str:
    """Warnings, the tables by threat, and the summary, as Markdown."""
    parts = [f"> **Not a robustness figure:** {w}.\n\n" for w in metrics["warnings"]]
    parts += [f"> {unchecked}\n\n" for unchecked in [_unchecked(metrics)] if unchecked]
    for table in threat_tables(metrics["rows"]):
        parts.append(f"**{table.title}**, {metrics['n']} test images\n\n")
        lines = [line.emphasised("**", "**") for line in table.lines]
        parts.append(markdown_table(_HEADER, lines) + "\n")
    parts += [f"- {sentence}\n" for sentence in summary(metrics["rows"], metrics["comparisons"])]
    return "".join(parts)


def markdown_rows(rows: Rows) -> str:
    """Every row of the evaluation; costs are passes for each of the n images, on average."""
    header = (
        "defence",
        "attack",
        "view",
        "threat",
        "accuracy",
        "95 % interval",
        "forward",
        "backward",
        "generator",
    )
    lines = [
        (
            r["defence"],
            r["attack"],
            r["view"] or "–",
            _threat(r["norm"], r["eps"]),
            _at_most(r),
            f"{percent(r['ci_low'])} – {percent(r['ci_high'])}",
            *(f"{r[cost] / max(r['n'], 1):.1f}" for cost in ("forward", "backward", "generator")),
        )
        for r in rows
    ]
    return markdown_table(header, lines)


def markdown_transfers(transfers: Rows) -> str:
    """Who fools whom: a table a threat, sources down and targets across."""
    parts = []
    for norm, eps in dict.fromkeys((t["norm"], t["eps"]) for t in transfers):
        cells = {
            (t["source"], t["target"]): t["fooled"] for t in transfers if (t["norm"], t["eps"]) == (norm, eps)
        }
        names = list(dict.fromkeys(name for pair in cells for name in pair))
        lines = [
            [source, *(percent(cells[source, name]) if (source, name) in cells else "–" for name in names)]
            for source in names
        ]
        parts.append(
            f"**{_threat(norm, eps)}**\n\n" + markdown_table(("broken ↓ fools →", *names), lines) + "\n"
        )
    return "".join(parts)


def markdown_certificates(lines: Rows) -> str:
    """Certified accuracy and what PGD leaves, a table a norm: proofs down, radii across."""
    parts = []
    for norm in dict.fromkeys(line["norm"] for line in lines):
        own = [line for line in lines if line["norm"] == norm]
        radii = list(own[0]["certified"])
        table = [
            [
                f"{line['defence']}, {line['method']}{' **!**' if line['contradicted'] else ''}",
                percent(line["clean"]),
                *(f"{percent(line['certified'][r])}{_tried(line, r)}" for r in radii),
            ]
            for line in own
        ]
        header = ("defence, proof", "clean", *(f"{_NORMS[norm]} {float(r):g}" for r in radii))
        parts.append(markdown_table(header, table) + "\n")
    return "".join(parts)


def _tried(line: Mapping[str, Any], radius: str) -> str:
    return f" (PGD {percent(line['pgd'][radius])})" if radius in line["pgd"] else ""


def markdown_detection(detection: Rows) -> str:
    """Areas under the residual's curve: defences down, threats across."""
    threats = list(dict.fromkeys((d["norm"], d["eps"]) for d in detection))
    areas = {(d["defence"], d["norm"], d["eps"]): f"{d['auc']:.2f}" for d in detection}
    lines = [
        [defence, *(areas.get((defence, *threat), "–") for threat in threats)]
        for defence in dict.fromkeys(d["defence"] for d in detection)
    ]
    return markdown_table(("defence", *(_threat(*threat) for threat in threats)), lines)


def markdown_checks(checks: Rows) -> str:
    """Every check of every defence and threat, by its figure; a failed one in bold."""
    names = list(dict.fromkeys(c["name"] for c in checks))
    by_key = {(c["defence"], c["norm"], c["eps"], c["name"]): c for c in checks}
    lines = []
    for defence, norm, eps in dict.fromkeys((c["defence"], c["norm"], c["eps"]) for c in checks):
        found = [by_key.get((defence, norm, eps, name)) for name in names]
        lines.append(
            [
                defence,
                _threat(norm, eps) if norm else "any",
                *(
                    "–" if c is None else f"{c['figure']:.2g}" if c["passed"] else f"**{c['figure']:.2g}**"
                    for c in found
                ),
            ]
        )
    return markdown_table(("defence", "threat", *names), lines)
