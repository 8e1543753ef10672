from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from dsv3.data.permutation import combine, period_table, permute


@given(size=st.integers(1, 5000), seed=st.integers(0, 2**63))
def test_permute_is_a_bijection(size: int, seed: int) -> None:
    found = permute(np.arange(size), size, combine(seed))
    assert np.array_equal(np.sort(found), np.arange(size))


def test_permute_differs_by_key_and_mixes() -> None:
    n = 10_000
    a, b = permute(np.arange(n), n, combine(1, 0)), permute(np.arange(n), n, combine(1, 1))
    assert (a == b).mean() < 0.01
    assert (a == np.arange(n)).mean() < 0.01
    # Neighbours end up a third of the range apart, as in a uniform shuffle.
    assert abs(np.abs(np.diff(a)).mean() / n - 1 / 3) < 0.02


def test_permute_takes_a_key_for_each_element_and_huge_sizes() -> None:
    keys = combine(5, 0, np.array([0, 1, 0]))
    index = np.array([7, 7, 7])
    found = permute(index, 1000, keys)
    assert found[0] == found[2] == permute(index[:1], 1000, combine(5, 0, 0))[0]
    assert found[1] == permute(index[:1], 1000, combine(5, 0, 1))[0]
    huge = permute(np.array([0, 2**50 - 1]), 2**50, combine(1))
    assert ((huge >= 0) & (huge < 2**50)).all()


@given(
    weights=st.lists(st.decimals("0.01", 50, places=2).map(float), min_size=1, max_size=5),
    seed=st.integers(0, 99),
)
def test_period_table_meets_weights_exactly(weights: list[float], seed: int) -> None:
    table = period_table(weights, seed)
    counts = np.bincount(table, minlength=len(weights))
    assert np.allclose(counts / len(table), np.array(weights) / sum(weights), atol=1e-12)
    assert np.array_equal(table, period_table(weights, seed))


def test_period_table_of_awkward_weights_is_off_by_less_than_one() -> None:
    weights = [1 / 3, 0.1234567, 2**-20]
    table = period_table(weights, 0)
    shares = np.array(weights) / sum(weights) * len(table)
    assert (np.abs(np.bincount(table, minlength=3) - shares) < 1).all()
    assert len(table) <= 100_000
