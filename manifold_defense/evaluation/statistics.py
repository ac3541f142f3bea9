"""Intervals of a share of images, and what tells two shares of the same images apart."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


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


class Paired(NamedTuple):
    """What one defence gained and lost on the images of another; `p` of the two-sided sign test."""

    gained: int
    lost: int
    p: float


def paired(before: Tensor, after: Tensor) -> Paired:
    """Sign test of two scores (N,) of the same images: exact, and blind to images that did not change.

    It sees differences that two intervals, which take the images for different ones, do not. Of a model that
    draws, an image is right that is right in more than half of the draws.
    """
    from scipy.stats import binomtest

    if before.shape != after.shape:
        raise ValueError(f"expected scores of the same images, got {len(before)} and {len(after)}")
    right, was_right = after > 0.5, before > 0.5
    gained, lost = int((right & ~was_right).sum()), int((was_right & ~right).sum())
    p = float(binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0
    return Paired(gained, lost, p)
