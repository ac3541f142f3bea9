"""Intervals and the sign test, against closed forms and published tables."""

import math
from typing import Any

import pytest
import torch

from manifold_defense.evaluation import wilson
from manifold_defense.evaluation.statistics import paired


@pytest.mark.parametrize(("successes", "n"), [(8, 10), (0, 10), (10, 10), (490, 1000), (1, 1)])
@pytest.mark.parametrize(("confidence", "z"), [(0.95, 1.959963984540054), (0.99, 2.5758293035489004)])
def test_wilson_is_the_closed_form(successes: int, n: int, confidence: float, z: float) -> None:
    p = successes / n
    centre = p + z**2 / (2 * n)
    half = z * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    low, high = wilson(successes, n, confidence)
    assert low == pytest.approx((centre - half) / (1 + z**2 / n), abs=1e-9)
    assert high == pytest.approx((centre + half) / (1 + z**2 / n), abs=1e-9)


def test_wilson_as_published() -> None:
    """Newcombe 1998, table I: 81 of 263 and 0 of 20."""
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)
    assert wilson(0, 0) == (0.0, 1.0)


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ([1, 1, 1, 0], [1, 1, 1, 0], (0, 0, 1.0)),
        ([0.0] * 5, [1.0] * 5, (5, 0, 2 / 2**5)),
        ([1.0] * 3 + [0.0], [0.0, 0.5, 0.0, 1.0], (1, 3, 2 * (1 + 4) / 2**4)),
        # Of a model that draws: right is what is right in most draws, however few more or less they are.
        ([1.0] * 5 + [0.2] * 3, [0.99] * 5 + [0.9] * 3, (3, 0, 2 / 2**3)),
        ([], [], (0, 0, 1.0)),
    ],
)
def test_the_sign_test_looks_at_what_changed(before: Any, after: Any, expected: Any) -> None:
    found = paired(torch.tensor(before), torch.tensor(after))
    assert found == (*expected[:2], pytest.approx(expected[2]))
    with pytest.raises(ValueError, match="expected scores of the same images"):
        paired(torch.tensor(before), torch.ones(9))
