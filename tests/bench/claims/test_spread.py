"""What is said of paired differences, and what follows from them."""

from __future__ import annotations

import pytest

from dsv3.bench.claims.claim import CONTRARY, HOLDS, OPEN
from dsv3.bench.claims.spread import above, at_most, below, spread, within

NEGATIVE, AROUND_ZERO = [-1.0, -1.1, -0.9], [-1.0, 1.1, 0.2]


def test_words_give_mean_and_interval() -> None:
    assert spread(NEGATIVE) == "-1.00 ± 0.25 %"  # 4.303 * 0.1 / sqrt(3)
    assert spread([0.5]) == "+0.50 % (one seed)"
    assert spread([10.0, 14.0], digits=0) == "+12 ± 25 %"


@pytest.mark.parametrize(
    "values, low, high",
    [
        (NEGATIVE, HOLDS, CONTRARY),
        (AROUND_ZERO, OPEN, OPEN),
        ([2.0, 2.1, 1.9], CONTRARY, HOLDS),
        ([-5.0], OPEN, OPEN),
    ],
)
def test_a_direction_is_claimed(values: list[float], low: str, high: str) -> None:
    assert below(values) == low
    assert above(values) == high


@pytest.mark.parametrize(
    "values, near, not_above",
    [
        ([0.1, 0.11, 0.09], HOLDS, HOLDS),
        ([0.2, 0.3, 0.25], OPEN, OPEN),
        ([-2.0, -2.1, -1.9], CONTRARY, HOLDS),
        ([2.0, 2.1, 1.9], CONTRARY, CONTRARY),
        ([0.0], OPEN, OPEN),  # one seed has no interval
    ],
)
def test_a_bound_is_claimed(values: list[float], near: str, not_above: str) -> None:
    assert within(values, 0.25) == near
    assert at_most(values, 0.25) == not_above
