"""Intervals of a share of images."""

from __future__ import annotations

from typing import NamedTuple


class Interval(NamedTuple):
    low: float
    high: float


def wilson(successes: int, n: int, confidence: float = 0.95) -> Interval:
    """Wilson score interval of `successes` out of `n` (Wilson 1927), by scipy; (0, 1) for n = 0."""
    from scipy.stats import binomtest

    if n == 0:
        return Interval(0.0, 1.0)
    interval = binomtest(successes, n).proportion_ci(confidence, method="wilson")
    return Interval(float(interval.low), float(interval.high))
