"""Compiled products with packed weights against plain PyTorch, and against themselves in other batches."""

from __future__ import annotations

import platform
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dsv3.ops import native, packed
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
def _compiled(two_threads: None) -> None:
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


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != "x86_64", reason="names processors of x86-64")
@pytest.mark.parametrize("processor", ["x86-64", "haswell", "skylake-avx512"])
def test_older_processors_have_the_same_sums(
    processor: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cases = [
        (drawn(rows, inputs), KINDS[kind](drawn(40, inputs, seed=1)))
        for kind in ("int8", "int4-32", "int4-128")
        for rows, inputs in ((1, 300), (9, 128), (3, 40))
    ]
    wanted = [packed.linear(x, w) for x, w in cases]
    flags = tuple(f"-march={processor}" if flag == "-march=native" else flag for flag in native.FLAGS)
    monkeypatch.setattr(native, "FLAGS", flags)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    try:
        for cached in (native.library, decode._library):
            cached.cache_clear()
        found = [packed.linear(x, w) for x, w in cases]
        assert list(tmp_path.glob("dsv3/decode-*.so"))
    finally:
        for cached in (native.library, decode._library):
            cached.cache_clear()
    for one, other in zip(found, wanted):  # whole sums are exact; a product and a sum may round as one or two
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-5)


def test_a_tile_that_is_not_finite_shows() -> None:
    x = drawn(3, 256)
    x[1, 200], x[2, 3] = float("inf"), float("nan")
    for kind in ("int8", "int4-32", "int4-128"):
        found = packed.linear(x, KINDS[kind](drawn(20, 256, seed=1)))
        assert found.isnan().all(dim=1).tolist() == [False, True, True]
        assert bool(found[0].isfinite().all())
