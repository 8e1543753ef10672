"""Quantisation by tiles against a loop over tiles; the compiled kernel bit by bit; re-tiling."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dsv3.ops import native
from dsv3.ops.blocks import (
    BLOCK,
    COLUMN,
    ROW,
    WHOLE,
    Quantised,
    Tile,
    dequantise,
    dequantise_reference,
    quantise,
    quantise_reference,
)
from dsv3.ops.formats import E4M3, E5M2, E5M6, FORMATS, Format, round_to

TILES = [ROW, COLUMN, BLOCK, WHOLE]


def wide(*shape: int, seed: int = 0) -> Tensor:
    """Numbers over many magnitudes, some zero."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator) * torch.exp(3 * torch.randn(shape, generator=generator))
    return torch.where(torch.rand(shape, generator=generator) < 0.05, 0.0, x)


def by_loop(x: Tensor, tile: Tile, kind: Format, power: bool, smallest: float, counts: list[int]) -> Tensor:
    """Dequantised values of one matrix, tile by tile, with Python numbers for the scales."""
    out = torch.empty_like(x)
    start = 0
    for count in counts:
        rows = tile.rows or max(1, x.shape[0])
        columns = tile.columns or x.shape[1]
        for top in range(start, start + count, rows):
            for left in range(0, x.shape[1], columns):
                place = (slice(top, min(top + rows, start + count)), slice(left, left + columns))
                amax = torch.tensor(max(float(x[place].abs().max()), smallest))
                scale = float(amax / kind.largest) if float(amax) else 1.0
                scale = max(scale, 2.0**-126)
                if power:
                    mantissa, exponent = math.frexp(scale)
                    scale = math.ldexp(1.0, exponent - (mantissa == 0.5))
                out[place] = round_to(x[place] / scale, kind) * scale
        start += count
    return out


@pytest.mark.parametrize("kind", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize("power", [False, True])
def test_against_a_loop_over_tiles(tile: Tile, kind: Format, power: bool) -> None:
    x = wide(150, 300)
    for smallest in (0.0, 1e-4):
        q = quantise(x, tile, kind, power, smallest)
        assert torch.equal(dequantise(q), by_loop(x, tile, kind, power, smallest, [150]))


@pytest.mark.parametrize("tile", [COLUMN, BLOCK], ids=str)
def test_no_tile_spans_two_experts(tile: Tile) -> None:
    counts = [0, 130, 1, 0, 19]
    x = wide(150, 200)
    q = quantise(x, tile, counts_E=torch.tensor(counts))
    assert q.scales.shape[0] == 2 + 1 + 1
    assert torch.equal(dequantise(q), by_loop(x, tile, E4M3, False, 1e-4, counts))


def same(a: Quantised, b: Quantised) -> bool:
    """Bit by bit, NaN codes of any sign alike."""
    return (
        torch.equal(a.scales.nan_to_num(-1), b.scales.nan_to_num(-1))
        and torch.equal(a.values.float().nan_to_num(-1), b.values.float().nan_to_num(-1))
        and torch.equal(dequantise(a).nan_to_num(-1), dequantise_reference(b).nan_to_num(-1))
    )


@pytest.mark.usefixtures("two_threads")
@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 140), st.integers(1, 300), st.sampled_from([ROW, COLUMN, BLOCK]),
    st.sampled_from(list(FORMATS.values())), st.booleans(), st.sampled_from([0.0, 1e-4]), st.integers(0, 3),
)  # fmt: skip
def test_the_compiled_kernel_is_the_reference(
    rows: int, columns: int, tile: Tile, kind: Format, power: bool, smallest: float, experts: int
) -> None:
    if native.library("quantise") is None:
        pytest.skip("no C++ compiler here")
    x = wide(rows, columns, seed=rows * columns)
    counts = None
    if experts:
        cuts = sorted(torch.randint(0, rows + 1, (experts - 1,)).tolist())
        counts = torch.tensor([0, *cuts, rows]).diff()
    ours = quantise(x, tile, kind, power, smallest, counts)
    assert same(ours, quantise_reference(x, tile, kind, power, smallest, counts))


def test_stacked_weights_have_scales_of_their_own() -> None:
    w = wide(3, 130, 140)
    q = quantise(w, BLOCK, smallest_amax=0.0)
    assert q.scales.shape == (3, 2, 2)
    for one, expected in zip(dequantise(q), w):
        assert torch.equal(one, dequantise(quantise(expected, BLOCK, smallest_amax=0.0)))


@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_shows_in_its_tile_and_nowhere_else(tile: Tile, bad: float) -> None:
    x = wide(256, 256)
    x[3, 5] = bad
    for out in (dequantise(quantise(x, tile)), dequantise_reference(quantise_reference(x, tile))):
        rows, columns = tile.rows or 256, tile.columns or 256
        expected = torch.zeros(256, 256, dtype=torch.bool)
        top, left = 3 // rows * rows, 5 // columns * columns
        expected[top : top + rows, left : left + columns] = True
        assert torch.equal(out.isnan(), expected)


@pytest.mark.parametrize("kind", [E4M3, E5M2, E5M6])
def test_zeros_and_subnormals(kind: Format) -> None:
    """A tile of zeros stays zero and its scale can be inverted; FP32 subnormals do not divide by zero."""
    x = torch.zeros(4, 256)
    x[1] = 1e-42
    x[2, :128] = -0.0
    q = quantise(x, ROW, kind, smallest_amax=0.0)
    assert bool((q.scales > 0).all()) and bool(q.scales.isfinite().all())
    assert bool(dequantise(q).isfinite().all()) and bool((dequantise(q)[0] == 0).all())
    assert q.scales[0].tolist() == [1.0, 1.0]


def test_no_numbers_at_all() -> None:
    for shape in ((0, 256), (4, 0)):
        assert dequantise(quantise(torch.zeros(shape), ROW)).shape == shape
    idle = quantise(torch.zeros(0, 256), COLUMN, counts_E=torch.tensor([0, 0]))
    assert dequantise(idle).shape == (0, 256)


def retiling_error(power: bool) -> float:
    """What going from 1x128 to 128x1 adds to activations of many magnitudes, relative."""
    x = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0))
    x *= torch.exp(torch.randn(1024, 1, generator=torch.Generator().manual_seed(1)))
    once = dequantise(quantise(x, ROW, power_of_two_scales=power))
    twice = dequantise(quantise(once, COLUMN, power_of_two_scales=power))
    return float((twice - once).norm() / once.norm())


def test_retiling_is_lossless_with_powers_of_two_only() -> None:
    """Report 3.3.3: why scales of what is re-tiled are powers of two (claim 9)."""
    assert retiling_error(power=True) < 1e-6
    assert 1.5e-2 < retiling_error(power=False) < 3e-2


@given(st.integers(1, 40), st.integers(1, 300))
def test_the_error_is_bounded(rows: int, columns: int) -> None:
    """At most half a step of three mantissa bits, or of the smallest number, whatever comes in."""
    x = wide(rows, columns, seed=columns)
    q = quantise(x, ROW, smallest_amax=0.0)
    error = (dequantise(q) - x).abs()
    step = q.scales.repeat_interleave(128, dim=1)[:, :columns] * 2.0**-10
    assert bool((error <= torch.maximum(x.abs() * 2.0**-4, step) * (1 + 1e-5)).all())


def test_without_a_compiler_it_works_and_says_so() -> None:
    """DSV3_NATIVE=0 and a compiler that is not there: the same numbers from plain PyTorch."""
    program = (
        "import torch, logging; logging.basicConfig(level='INFO')\n"
        "from dsv3.ops.blocks import *; from dsv3.ops import native\n"
        "x = torch.arange(512.).view(2, 256)\n"
        "print(float(dequantise(quantise(x, ROW)).sum()), native.library('quantise'))"
    )
    found = {}
    for change in ({}, {"DSV3_NATIVE": "0"}, {"CXX": "no-such-compiler"}):
        done = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, env={**os.environ, **change}
        )
        assert done.returncode == 0, done.stderr
        found[tuple(change)] = (done.stdout.split()[0], done.stderr)
    assert len({number for number, _ in found.values()}) == 1
    assert "DSV3_NATIVE=0" in found["DSV3_NATIVE",][1]
    assert "no-such-compiler" in found["CXX",][1]
