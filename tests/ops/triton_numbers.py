"""What the Triton kernels compute: run by ``test_triton_numbers.py``, interpreted on a CPU or on a GPU.

The interpreter takes milliseconds a program: matrices are small, and ragged on every side.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from dsv3.ops import backend, triton_gemm, triton_quantise
from dsv3.ops.blocks import BLOCK, COLUMN, ROW, Quantised, Tile, dequantise_reference, quantise_reference
from dsv3.ops.formats import E4M3, E5M2, E5M6, Format
from dsv3.ops.triton_segments import most_tiles

INTERPRETED = triton.knobs.runtime.interpret
DEVICE = "cpu" if INTERPRETED else "cuda"
CLOSE = 1e-6 if INTERPRETED else 2e-3  # a GPU adds 128 FP8 products with about 14 bits
COUNTS = {
    "dense": None,
    "experts": [33, 0, 130, 0, 7],
    "one has all": [0, 170],
    "full tiles": [128, 42],
}


def counts_of(name: str) -> Tensor | None:
    counts = COUNTS[name]
    return None if counts is None else torch.tensor(counts)


def on_device(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.to(DEVICE)


def values_by_row(q: Quantised) -> Tensor:
    """Values as the reference has them: without the rows that fill an expert's last tile."""
    values = q.values.cpu()
    if q.tile != COLUMN or q.counts_E is None:
        return values
    pieces, tile = [], 0
    for count in q.counts_E.tolist():
        whole = -(-count // 128) * 128
        piece = values[128 * tile : 128 * tile + whole]
        filling = piece[count:].float().nan_to_num()  # NaN where the tile has one
        assert not filling.any(), "an expert's last tile is filled with zeros"
        pieces.append(piece[:count])
        tile += whole // 128
    return torch.cat(pieces)


def awkward(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Magnitudes from tiny to huge, a token and a channel of zeros, numbers just between two of a format."""
    x = torch.randn(rows, columns) * torch.exp2(torch.randint(-30, 30, (rows, 1)))
    x[3], x[:, 5], x[7] = 0, 0, 1e-30
    x[9] = torch.arange(columns) / 16 * torch.tensor([1.0, -1.0]).repeat(columns // 2 + 1)[:columns]
    x[9, 0] = 448
    return x.to(dtype)


def same_bits(found: Quantised, wanted: Quantised) -> None:
    """Scales, values, and what they dequantise to."""
    scales, values = found.scales.cpu()[: len(wanted.scales)], values_by_row(found)
    assert torch.equal(scales.isnan(), wanted.scales.isnan())
    assert torch.equal(scales.nan_to_num(), wanted.scales.nan_to_num())
    nan = torch.zeros((), dtype=torch.bool)
    if wanted.kind != E5M6:
        nan = wanted.values.float().isnan()
        bits = values.view(torch.uint8), wanted.values.view(torch.uint8)
        assert torch.equal(torch.where(nan, 0, bits[0]), torch.where(nan, 0, bits[1]))
        assert values.float()[nan].isnan().all()
    if not (INTERPRETED and nan.any()):  # the interpreter reads FP8's NaN as a number
        again, reference = triton_quantise.dequantise(found).cpu(), dequantise_reference(wanted)
        assert torch.equal(again.isnan(), reference.isnan())
        assert torch.equal(again.nan_to_num(), reference.nan_to_num())


@pytest.mark.parametrize(
    "tile, kind, dtype, power_of_two, smallest_amax, counts",
    [
        (ROW, E4M3, torch.bfloat16, False, 1e-4, "dense"),
        (ROW, E4M3, torch.float32, True, 0.0, "experts"),
        (ROW, E5M2, torch.bfloat16, False, 0.0, "dense"),
        (ROW, E5M6, torch.bfloat16, True, 1e-4, "dense"),
        (COLUMN, E4M3, torch.float32, False, 1e-4, "dense"),
        (COLUMN, E4M3, torch.bfloat16, True, 0.0, "experts"),
        (COLUMN, E4M3, torch.float32, False, 0.0, "one has all"),
        (BLOCK, E4M3, torch.float32, False, 0.0, "dense"),
        (BLOCK, E4M3, torch.bfloat16, True, 1e-4, "experts"),
    ],
)
def test_quantise_bit_by_bit(
    tile: Tile, kind: Format, dtype: torch.dtype, power_of_two: bool, smallest_amax: float, counts: str
) -> None:
    counts_E, x = counts_of(counts), awkward(170, 201, dtype)
    options = (tile, kind, power_of_two, smallest_amax)
    found = triton_quantise.quantise(x.to(DEVICE), *options, on_device(counts_E))
    wanted = quantise_reference(x, *options, counts_E)
    assert wanted.kind == E5M6 or torch.equal(
        values_by_row(found).view(torch.uint8), wanted.values.view(torch.uint8)
    )
    same_bits(found, wanted)


@pytest.mark.parametrize(
    "tile, kind, counts", [(ROW, E4M3, "dense"), (ROW, E5M6, "dense"), (COLUMN, E4M3, "experts")]
)
def test_a_tile_with_infinity_or_nan_shows_it(tile: Tile, kind: Format, counts: str) -> None:
    counts_E, x = counts_of(counts), torch.randn(170, 40)
    x[20, 30], x[150, 3] = float("inf"), float("nan")
    found = triton_quantise.quantise(x.to(DEVICE), tile, kind, True, counts_E=on_device(counts_E))
    wanted = quantise_reference(x, tile, kind, True, counts_E=counts_E)
    assert dequantise_reference(wanted).isnan().sum() > 2
    same_bits(found, wanted)


def test_stacks_and_strides() -> None:
    x = torch.randn(2, 140, 130)
    for tile in (ROW, COLUMN, BLOCK):
        wanted = quantise_reference(x.mT, tile)
        found = triton_quantise.quantise(x.to(DEVICE).mT, tile)
        assert found.shape == wanted.shape and found.values.shape == wanted.values.shape
        assert torch.equal(found.scales.cpu(), wanted.scales)
        assert torch.equal(found.values.float().cpu(), wanted.values.float())
        assert torch.equal(triton_quantise.dequantise(found).cpu(), dequantise_reference(wanted))


def test_layouts_are_what_the_instructions_want() -> None:
    x = torch.randn(70, 200, device=DEVICE)
    rows, columns = triton_quantise.quantise(x, ROW), triton_quantise.quantise(x, COLUMN)
    assert rows.values.stride(1) == 1 and rows.values.stride(0) % 16 == 0
    assert rows.scales.stride(0) == 1 and rows.scales.stride(1) % 4 == 0
    assert columns.values.stride(0) == 1 and columns.values.stride(1) % 16 == 0
    # TMA clips a row at 16 bytes: what is between must be zero.
    assert not torch.as_strided(columns.values, (200, 80), (80, 1)).view(torch.uint8)[:, 70:].any()
    assert not torch.as_strided(rows.values, (70, 208), (208, 1)).view(torch.uint8)[:, 200:].any()


@pytest.mark.parametrize("tile, counts", [(ROW, "dense"), (COLUMN, "experts")])
def test_swiglu_on_the_way_in(tile: Tile, counts: str) -> None:
    counts_E = counts_of(counts)
    gate, up = torch.randn(2, 170, 150).bfloat16()
    exact = F.silu(gate.double()) * up.double()
    found = triton_quantise.quantise(gate.to(DEVICE), tile, counts_E=on_device(counts_E), up=up.to(DEVICE))
    wanted = quantise_reference(exact.float(), tile, counts_E=counts_E)
    scales = found.scales.cpu()[: len(wanted.scales)]
    torch.testing.assert_close(scales, wanted.scales, rtol=2e-6, atol=0)
    # Its exponential may round another way, which can only tip a number between two neighbours.
    differ = values_by_row(found).float() != wanted.values.float()
    assert differ.float().mean() < 1e-2
    error = (triton_quantise.dequantise(found).cpu() - exact).norm() / exact.norm()
    assert error == pytest.approx(
        float((dequantise_reference(wanted) - exact).norm() / exact.norm()), rel=1e-2
    )


def test_nothing_in_nothing_out() -> None:
    none, counts_E = torch.empty(0, 200, device=DEVICE), torch.zeros(2, dtype=torch.int64, device=DEVICE)
    x, g = (triton_quantise.quantise(none, COLUMN, counts_E=counts_E) for _ in range(2))
    assert torch.equal(triton_gemm.wgrad(g, x, counts_E).cpu(), torch.zeros(2, 200, 200))
    w = triton_quantise.quantise(torch.randn(2, 130, 200, device=DEVICE), BLOCK)
    rows = triton_quantise.quantise(none, ROW, counts_E=counts_E)
    assert triton_gemm.linear(rows, w, counts_E, torch.float32).shape == (0, 130)


def exactly(a: Tensor, b: Tensor) -> float:
    return float((a.cpu().double() - b).norm() / b.norm())


def multiplied(counts: str, rows: int, outputs: int, inputs: int, tiling: triton_gemm.Tiling | None) -> None:
    """All three products against float64 ones of the same quantised numbers, expert by expert."""
    counts_E = counts_of(counts)
    lead = () if counts_E is None else (len(counts_E),)
    kept = on_device(counts_E)
    x, g, w = (
        awkward(rows, inputs, torch.float32),
        torch.randn(rows, outputs),
        torch.randn(*lead, outputs, inputs),
    )
    x = torch.where(x.abs() < 1e3, x, 0)  # one token must not hide the others' errors
    x[:, 128:] *= 4
    make = triton_quantise.quantise
    x_row, g_row, w_block = (
        make(x.to(DEVICE), ROW, counts_E=kept),
        make(g.to(DEVICE), ROW, power_of_two_scales=True, counts_E=kept),
        make(w.to(DEVICE), BLOCK),
    )
    x_column, g_column = make(x.to(DEVICE), COLUMN, counts_E=kept), make(g.to(DEVICE), COLUMN, counts_E=kept)
    pieces = [rows] if counts_E is None else counts_E.tolist()

    def exact_rows(t: Tensor, tile: Tile, power_of_two: bool = False) -> tuple[Tensor, ...]:
        q = quantise_reference(t, tile, power_of_two_scales=power_of_two, counts_E=counts_E)
        return dequantise_reference(q).double().split(pieces)

    exact_x, exact_g = exact_rows(x, ROW), exact_rows(g, ROW, power_of_two=True)
    columns_x, columns_g = exact_rows(x, COLUMN), exact_rows(g, COLUMN)
    exact_w = dequantise_reference(quantise_reference(w, BLOCK)).double().reshape(-1, outputs, inputs)

    y = triton_gemm.linear(x_row, w_block, kept, torch.float32, tiling)
    assert exactly(y, torch.cat([a @ b.T for a, b in zip(exact_x, exact_w)])) < CLOSE

    turned = triton_gemm.transposed(w_block.values)
    assert torch.equal(turned.float(), w_block.values.float().mT) and turned.stride(-1) == 1
    w_turned = Quantised(turned, w_block.scales.mT, turned.shape, BLOCK, E4M3)
    grad = triton_gemm.linear(g_row, w_turned, kept, torch.bfloat16, tiling)
    assert grad.dtype == torch.bfloat16
    assert exactly(grad, torch.cat([a @ b for a, b in zip(exact_g, exact_w)])) < CLOSE + 4e-3

    grad_w = triton_gemm.wgrad(g_column, x_column, kept, tiling)
    exact = torch.stack([a.T @ b for a, b in zip(columns_g, columns_x)])
    assert grad_w.shape == (*lead, outputs, inputs)
    assert exactly(grad_w.reshape(exact.shape), exact) < CLOSE
    for expert, count in enumerate(pieces):
        assert count or not grad_w[expert].any(), "an idle expert's gradient is zero"


@pytest.mark.parametrize(
    "counts", ["dense", "experts", "full tiles", pytest.param("one has all", marks=pytest.mark.slow)]
)
def test_products(counts: str) -> None:
    multiplied(counts, 170, 136, 200, triton_gemm.Tiling(128, 128, 8, 4))


@pytest.mark.parametrize(
    "tiling",
    [triton_gemm.TILINGS[-1], *(pytest.param(t, marks=pytest.mark.slow) for t in triton_gemm.TILINGS[1:-1])],
)
def test_products_of_other_tilings(tiling: triton_gemm.Tiling) -> None:
    multiplied("experts", 170, 40, 136, tiling)


def test_products_of_few_rows_and_few_numbers() -> None:
    multiplied("dense", 10, 24, 40, None)


def test_rows_of_nobody_are_not_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor are an expert's by another's tile: programs run in any order, and the last to write would win."""
    counts_E = torch.tensor([5, 6], device=DEVICE)
    x = triton_quantise.quantise(torch.randn(30, 16, device=DEVICE), ROW)
    w = triton_quantise.quantise(torch.randn(2, 32, 16, device=DEVICE), BLOCK)
    monkeypatch.setattr(torch, "empty", lambda shape, **options: torch.full(shape, torch.nan, **options))
    y = triton_gemm.linear(x, w, counts_E, torch.float32)
    assert not y[:11].isnan().any() and y[11:].isnan().all()


def test_many_tiles_are_each_made_once() -> None:
    """More tiles of rows than walk together, and a last group that is not full."""
    x, w = torch.randn(64 * 9 + 1, 16), torch.randn(70, 16)
    q, b = triton_quantise.quantise(x.to(DEVICE), ROW), triton_quantise.quantise(w.to(DEVICE), BLOCK)
    y = triton_gemm.linear(q, b, None, torch.float32, triton_gemm.Tiling(64, 64, 4, 6))
    exact = (
        dequantise_reference(quantise_reference(x, ROW))
        @ dequantise_reference(quantise_reference(w, BLOCK)).T
    )
    assert exactly(y, exact.double()) < CLOSE


def test_as_many_tiles_as_there_can_be() -> None:
    for counts in ([5, 0, 260], [128, 128], [0, 0, 1], [1, 1, 1, 1], [129, 129, 127]):
        tiles = sum(-(-count // 128) for count in counts)
        assert tiles <= most_tiles(sum(counts), len(counts), 128) <= tiles + len(counts)


@pytest.mark.parametrize(
    "operator",
    [pytest.param(name, marks=() if "grouped" in name else pytest.mark.slow) for name in backend.ORDER],
)
def test_the_example_that_decides_whether_they_are_used(
    operator: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend, "choose", lambda operator, device: backend.Choice(operator, ("triton",), {}))
    assert backend.error_of("triton", operator, torch.device(DEVICE)) < CLOSE + 4e-3


def test_foreign_layouts_are_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the reference quantised is not laid out for the kernels, and is left to the reference."""
    order = ("triton", "reference")
    monkeypatch.setattr(backend, "choose", lambda operator, device: backend.Choice(operator, order, {}))
    counts_E, x = torch.tensor([33, 137]), torch.randn(170, 40)
    foreign = quantise_reference(x.to(DEVICE), COLUMN, counts_E=counts_E.to(DEVICE))
    assert torch.equal(
        backend.dequantise(foreign).cpu(),
        dequantise_reference(quantise_reference(x, COLUMN, counts_E=counts_E)),
    )
    native = backend.quantise(x.to(DEVICE), COLUMN, counts_E=counts_E.to(DEVICE))
    ours, theirs = (backend.wgrad(q, q, counts_E.to(DEVICE)).cpu() for q in (native, foreign))
    assert exactly(ours, theirs.double()) < CLOSE
