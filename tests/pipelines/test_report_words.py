"""What the report says of figures: in words, and marked where they are bounds or masked."""

from typing import Any

import pytest

from pipelines.report import markdown_rows, summary, trade_offs


def worst(defence: str, share: float, **marks: bool) -> dict[str, Any]:
    facts = {"attack": "worst", "view": "all", "norm": "l2", "eps": 2.5, "n": 100}
    costs = dict.fromkeys(("forward", "backward", "generator"), 0.0)
    interval = {"ci_low": share - 0.1, "ci_high": share + 0.1}
    marks = {"settled": True, "masked": False, "trained": False} | marks
    return {"defence": defence, "robust_accuracy": share, **facts, **costs, **interval, **marks}


@pytest.mark.parametrize(
    ("before", "after", "found", "words"),
    [
        ({}, {}, (20, 1, 1e-5), "a 40.0 % → b 59.0 % (the filter helps: 20 images gained, 1 lost, p 1e-05)"),
        ({}, {}, (1, 20, 1e-5), "a 40.0 % → b 59.0 % (the filter harms: 1 images gained, 20 lost, p 1e-05)"),
        (
            {},
            {},
            (3, 2, 0.9),
            "a 40.0 % → b 59.0 % (no significant difference: 3 images gained, 2 lost, p 0.9)",
        ),
        (
            {"settled": False},
            {},
            (20, 1, 1e-5),
            "a ≤ 40.0 % → b 59.0 % (the filter helps: 20 images gained, 1 lost, p 1e-05, not settled)",
        ),
        (
            {},
            {"settled": False},
            (20, 1, 1e-5),
            "a 40.0 % → b ≤ 59.0 % (the filter helps: 20 images gained, 1 lost, p 1e-05, not settled)",
        ),
        (
            {},
            {"masked": True},
            (20, 1, 1e-5),
            "a 40.0 % → b 59.0 % (masked) (no verdict: a figure is masked)",
        ),
    ],
)
def test_the_summary_says_what_is_bound_and_what_is_masked(
    before: dict[str, bool], after: dict[str, bool], found: tuple[int, int, float], words: str
) -> None:
    rows = [worst("a", 0.4, **before), worst("b", 0.59, **after)]
    threat = {"norm": "l2", "eps": 2.5}
    compared = {
        "before": "a",
        "after": "b",
        **threat,
        **dict(zip(("gained", "lost", "p"), found, strict=True)),
    }
    assert summary(rows, [compared]) == [f"L2 2.5, worst of all attacks and views: {words}"]


def test_plots_and_the_table_of_all_rows_say_so_too() -> None:
    clean = [worst(name, 0.9) | {"attack": "clean", "norm": None, "eps": 0.0} for name in "abc"]
    rows = [*clean, worst("a", 0.4), worst("b", 0.5, settled=False), worst("c", 0.6, masked=True)]
    assert list(trade_offs(rows)["L2 2.5"]) == ["a", "≤ b", "c (masked)"]
    table = markdown_rows(rows)
    assert "| ≤ 50.0 % |" in table
    assert "| 40.0 % |" in table
