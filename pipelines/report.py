"""The results in words and tables: for the terminal and for `report.md`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

Rows = Sequence[Mapping[str, Any]]
COLUMNS = ("defence", "clean", "noise", "unaware", "approximate", "exact", "worst of all", "95 % interval")


class ThreatTable(NamedTuple):
    """Per defence: the lowest accuracy of each kind of view under one threat, and the per-image worst.

    `approximate` are all gradients of a filter but the exact one.
    """

    title: str
    lines: list[tuple[str, ...]]  # one tuple a defence, in the order of COLUMNS


def threat_tables(rows: Rows) -> list[ThreatTable]:
    """One table a threat, from the rows of `evaluate/stage.json`."""
    clean = {r["defence"]: r for r in rows if r["attack"] == "clean"}
    threats = list(dict.fromkeys((r["norm"], r["eps"]) for r in rows if r["attack"] == "worst"))
    return [
        ThreatTable(
            f"{_norm(norm)} {eps:g}",
            [
                _line(defence, clean[defence], [r for r in rows if (r["norm"], r["eps"]) == (norm, eps)])
                for defence in clean
            ],
        )
        for norm, eps in threats
    ]


def _line(defence: str, clean: Mapping[str, Any], rows: Rows) -> tuple[str, ...]:
    own = [r for r in rows if r["defence"] == defence]
    worst = next(r for r in own if r["attack"] == "worst")

    def lowest(rows: Rows) -> str:
        return percent(min(r["robust_accuracy"] for r in rows)) if rows else "–"

    noise = [r for r in own if r["attack"] == "noise"]
    attacks = [r for r in own if r["attack"] not in ("noise", "worst")]

    return (
        defence,
        percent(clean["robust_accuracy"]),
        lowest(noise),
        lowest([r for r in attacks if r["view"] == "unaware"]),
        lowest([r for r in attacks if r["view"] not in ("unaware", "exact")]),
        lowest([r for r in attacks if r["view"] == "exact"]),
        percent(worst["robust_accuracy"]),
        f"{percent(worst['ci_low'])} – {percent(worst['ci_high'])}",
    )


def summary(rows: Rows) -> list[str]:
    """One sentence a threat: what the filter changes, by the worst of all attacks and views."""
    by_key = {(r["defence"], r["norm"], r["eps"]): r for r in rows if r["attack"] == "worst"}
    threats = list(dict.fromkeys((norm, eps) for _, norm, eps in by_key))
    lines = []
    for norm, eps in threats:
        parts = []
        for bare, filtered in (("undefended", "filter"), ("hardened", "hardened+filter")):
            before, after = by_key[bare, norm, eps], by_key[filtered, norm, eps]
            verdict = _verdict(before, after)
            parts.append(
                f"{bare} {percent(before['robust_accuracy'])} → {filtered} "
                f"{percent(after['robust_accuracy'])} ({verdict})"
            )
        lines.append(f"{_norm(norm)} {eps:g}, worst of all attacks and views: " + "; ".join(parts))
    return lines


def _verdict(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    if after["ci_low"] > before["ci_high"]:
        return "the filter helps"
    if after["ci_high"] < before["ci_low"]:
        return "the filter harms"
    return "no difference beyond the interval"


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _norm(norm: str | None) -> str:
    return {"linf": "L∞", "l2": "L2"}.get(norm or "", norm or "")


def print_results(console: Console, metrics: Mapping[str, Any]) -> None:
    """The tables, the warnings above them and the summary below."""
    for warning in metrics["warnings"]:
        console.print(f"[bold red]warning[/]: {warning}; not a robustness figure", highlight=False)
    for table in threat_tables(metrics["rows"]):
        shown = Table(title=f"{table.title}: accuracy on {metrics['n']} test images", title_justify="left")
        for column in COLUMNS:
            shown.add_column(column, justify="left" if column == "defence" else "right", no_wrap=True)
        for line in table.lines:
            shown.add_row(*line[:6], f"[bold]{line[6]}[/]", line[7])
        console.print(shown)
    for sentence in summary(metrics["rows"]):
        console.print(sentence, highlight=False, soft_wrap=True)


def markdown_table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rule = ["---"] + ["---:"] * (len(header) - 1)
    return "".join("| " + " | ".join(line) + " |\n" for line in (header, rule, *lines))


def markdown_results(metrics: Mapping[str, Any]) -> str:
    """Warnings, the tables by threat, and the summary, as Markdown."""
    parts = [f"> **Warning:** {w}; not a robustness figure.\n\n" for w in metrics["warnings"]]
    for table in threat_tables(metrics["rows"]):
        parts.append(f"**{table.title}**, {metrics['n']} test images\n\n")
        lines = [[*line[:6], f"**{line[6]}**", line[7]] for line in table.lines]
        parts.append(markdown_table(COLUMNS, lines) + "\n")
    parts += [f"- {sentence}\n" for sentence in summary(metrics["rows"])]
    return "".join(parts)


def markdown_rows(rows: Rows) -> str:
    """Every row of the evaluation."""
    header = ("defence", "attack", "view", "threat", "n", "accuracy", "95 % interval")
    lines = [
        (
            r["defence"],
            r["attack"],
            r["view"] or "–",
            f"{_norm(r['norm'])} {r['eps']:g}" if r["norm"] else "–",
            str(r["n"]),
            percent(r["robust_accuracy"]),
            f"{percent(r['ci_low'])} – {percent(r['ci_high'])}",
        )
        for r in rows
    ]
    return markdown_table(header, lines)
