"""Paired differences in words: mean, 95 % interval, and what follows from them."""

from __future__ import annotations

import math
from collections.abc import Sequence

from dsv3.bench.claims.claim import CONTRARY, HOLDS, OPEN
from dsv3.bench.paired import interval


def spread(values: Sequence[float], unit: str = " %", digits: int = 2) -> str:
    """``-0.12 ± 0.35 %``: the mean of paired differences and its 95 % interval; one value has none."""
    mean, half = interval(values)
    if math.isinf(half):
        return f"{mean:+.{digits}f}{unit} (one seed)"
    return f"{mean:+.{digits}f} ± {half:.{digits}f}{unit}"


def below(values: Sequence[float]) -> str:
    """The verdict where the differences are claimed to be negative."""
    mean, half = interval(values)
    if abs(mean) <= half or not values:
        return OPEN
    return HOLDS if mean < 0 else CONTRARY


def above(values: Sequence[float]) -> str:
    """The verdict where they are claimed to be positive."""
    return below([-value for value in values])


def within(values: Sequence[float], bound: float) -> str:
    """The verdict where their mean is claimed to lie within ``bound`` of zero."""
    mean, half = interval(values)
    if abs(mean) + half <= bound:
        return HOLDS
    return CONTRARY if abs(mean) - half > bound else OPEN


def at_most(values: Sequence[float], bound: float) -> str:
    """The verdict where their mean is claimed not to exceed ``bound``."""
    mean, half = interval(values)
    if mean + half <= bound:
        return HOLDS
    return CONTRARY if mean - half > bound else OPEN
