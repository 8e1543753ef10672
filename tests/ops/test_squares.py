"""Sums of squares against FP64, of tensors as long as a vocabulary is wide."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dsv3.ops.squares import CHUNK, sums_of_squares


def test_a_large_tensor_is_summed_right_however_it_is_cut() -> None:
    x = torch.randn(3_000_017) * torch.rand(3_000_017) ** 4 * 1e-3
    exact = float(x.double().square().sum())
    assert abs(float(sums_of_squares([x])) / exact - 1) < 1e-8
    parts = sums_of_squares([x[:1_000_001], x[1_000_001:].view(4, -1)])
    assert abs(float(parts.sum()) / exact - 1) < 1e-8


@given(st.lists(st.integers(0, 3 * CHUNK), min_size=1, max_size=4))
def test_every_number_is_counted_once(sizes: list[int]) -> None:
    ones = [torch.full((size,), 3.0) for size in sizes]
    assert sums_of_squares(ones).tolist() == pytest.approx([9.0 * size for size in sizes], rel=1e-6)
