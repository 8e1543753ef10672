"""Means with their standard errors, and the difference of two models on the same questions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

NORMAL_95 = 1.959964  # standard errors on each side of a 95 % interval


@dataclass(frozen=True)
class Mean:
    """``stderr``: standard error of the mean over questions (their sample deviation over the root of ``n``);
    None for a single question."""

    value: float
    stderr: float | None
    n: int

    @property
    def interval(self) -> tuple[float, float]:
        """95 %, by the normal approximation."""
        half = NORMAL_95 * (self.stderr if self.stderr is not None else math.inf)
        return self.value - half, self.value + half


def mean(values: Sequence[float]) -> Mean:
    """Of one or more values."""
    n = len(values)
    value = math.fsum(values) / n
    if n == 1:
        return Mean(value, None, 1)
    variance = math.fsum((x - value) ** 2 for x in values) / (n - 1)
    return Mean(value, math.sqrt(variance / n), n)


def paired(first: Sequence[float], second: Sequence[float]) -> Mean:
    """Mean of ``second - first`` question by question: what both find easy or hard cancels."""
    return mean([b - a for a, b in zip(first, second, strict=True)])
