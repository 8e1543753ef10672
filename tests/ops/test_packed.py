"""Compiled products with packed weights against plain PyTorch, and against themselves in other batches."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dsv3.ops import packed
from dsv3.ops.blocks import BLOCK, quantise
from dsv3.ops.integers import quantise_int4, quantise_int8, rounded
from dsv3.ops.native import decode
from dsv3.ops.packed import Weight

KINDS: dict[str, Callable[[Tensor], Weight]] = {
    "fp32": lambda w: w,
    "bf16": lambda w: w.bfloat16(),
    "int8": quantise_int8,
    "int4-32": lambda w: quantise_int4(w, 32),
    "int4-128": quantise_int4,
    "fp8": lambda w: quantise(w, BLOCK),
}
kinds = st.sampled_from(sorted(KINDS))


@pytest.fixture(autouse=True)
def _compiled() -> None:
    if not decode.usable(torch.ones(1)):
        pytest.skip("no C++ compiler here")


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=60, deadline=None)
@given(kinds, st.integers(1, 19), st.integers(1, 70), st.integers(1, 300))
def test_a_product_is_the_references(kind: str, rows: int, outputs: int, inputs: int) -> None:
    x, w = drawn(rows, inputs), KINDS[kind](drawn(outputs, inputs, seed=1))
    taken = rounded(x) if kind.startswith("int") else x
    exact = taken.double() @ packed.dense(w).double().T
    error = (packed.linear(x, w) - exact).abs().max()
    assert float(error) <= 3e-6 * inputs**0.5 * float(packed.dense(w).abs().max())


@settings(max_examples=40, deadline=None)
@given(kinds, st.integers(2, 21), st.integers(1, 40), st.integers(1, 200))
def test_a_row_does_not_know_the_others(kind: str, rows: int, outputs: int, inputs: int) -> None:
    x, w = drawn(rows, inputs), KINDS[kind](drawn(outputs, inputs, seed=1))
    together = packed.linear(x, w)
    assert all(torch.equal(packed.linear(x[i : i + 1], w)[0], together[i]) for i in range(rows))


@settings(max_examples=40, deadline=None)
@given(kinds, st.lists(st.integers(0, 12), min_size=1, max_size=5), st.integers(1, 80), st.integers(1, 80))
def test_experts_are_the_references(kind: str, counts: list[int], width: int, hidden: int) -> None:
    if not sum(counts):
        counts[0] = 1
    x, counts_E = drawn(sum(counts), width), torch.tensor(counts)
    shapes = ((hidden, width), (hidden, width), (width, hidden))
    stacks = [KINDS[kind](drawn(len(counts), *shape, seed=i)) for i, shape in enumerate(shapes)]
    ours = packed.experts(x, counts_E, *stacks)
    exact = packed.experts_reference(x, counts_E, *stacks)
    torch.testing.assert_close(ours, exact, rtol=2e-5, atol=2e-5 * float(exact.abs().max() + 1))


def test_leading_dimensions_and_other_dtypes() -> None:
    x, w = drawn(2, 3, 64), quantise_int8(drawn(8, 64, seed=1))
    out = packed.linear(x, w)
    assert out.shape == (2, 3, 8) and torch.equal(out[1, 2], packed.linear(x[1, 2][None], w)[0])
    half = packed.linear(x.bfloat16(), w)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), packed.linear(x.bfloat16().float(), w), rtol=2**-8, atol=0)


def test_what_is_not_finite_stays_so() -> None:
    w = drawn(8, 64)
    w[3, 5] = float("nan")
    for name, pack in KINDS.items():
        spread = name == "fp8"  # a scale of all eight outputs
        found = packed.linear(torch.ones(1, 64), pack(w)).isnan()[0].tolist()
        assert found == [spread or i == 3 for i in range(8)]
