"""Quantisation by tiles on a GPU, and back, in one pass (Triton; report 3.3.2; floor 1).

Shapes: M rows, K columns, B stacked matrices, E experts. ``dsv3.ops.blocks.quantise_reference`` is the
specification: the same scales and numbers, bit by bit. What differs is where they lie, for Hopper's FP8
instructions want the summed dimension contiguous and copied from multiples of 16 bytes:

* 128x1 tiles leave their values transposed in memory, 1x128 tiles their scales;
* 128x1 tiles of rows sorted by expert all have 128 rows of values, zeros past the end of an expert;
* how many of those there are only the GPU knows: memory is taken for as many as there can be.

SwiGLU can be computed on the way in: its product then never exists in BF16.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv3.ops.blocks import BLOCK, COLUMN, ROW, SMALLEST_AMAX, Quantised, Tile
from dsv3.ops.formats import E4M3, Format
from dsv3.ops.triton_segments import find_tile, most_tiles

# Rows and columns a program handles, and its warps. A tile of 128 lies within one program.
PROGRAMS = {ROW: (32, 128, 4), COLUMN: (128, 64, 4), BLOCK: (128, 128, 8)}
TINY = tl.constexpr(torch.finfo(torch.float32).tiny)
# The interpreter, in which tests run, casts to FP8 wrongly: it does not carry into the exponent.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def code_of(x, MANTISSA: tl.constexpr, SMALLEST_EXPONENT: tl.constexpr, BITS: tl.constexpr):
    """Bits of FP32 numbers in a format: nearest, ties to even; NaN has all bits but the sign.

    A number over its tile's scale is never too large for the format.
    """
    bits = x.to(tl.int32, bitcast=True)
    magnitude = (bits & 0x7FFFFFFF).to(tl.float32, bitcast=True)
    exponent = tl.maximum(((bits >> 23) & 0xFF) - (127 + SMALLEST_EXPONENT), 0)
    steps_in_one = ((127 - SMALLEST_EXPONENT + MANTISSA - exponent) << 23).to(tl.float32, bitcast=True)
    to_integer = 8388608.0  # 2^23: adding it leaves no bits for a fraction
    steps = ((magnitude * steps_in_one + to_integer) - to_integer).to(tl.int32)
    code = (exponent << MANTISSA) + steps  # a carry moves into the exponent by itself
    code = tl.where(magnitude != magnitude, (1 << (BITS - 1)) - 1, code)
    return (((bits >> 31) & 1) << (BITS - 1)) | code


@triton.jit
def scale_of(
    amax, smallest_amax, KEEP_SMALL: tl.constexpr, POWER_OF_TWO: tl.constexpr, LARGEST: tl.constexpr
):
    """Scale of tiles with this largest magnitude; infinity and NaN stay what they are."""
    largest = tl.full(amax.shape, LARGEST, tl.float32)
    if KEEP_SMALL:
        scale = tl.where(amax == 0.0, 1.0, tl.div_rn(amax, largest))
    else:
        scale = tl.div_rn(tl.where(amax < smallest_amax, smallest_amax, amax), largest)
    scale = tl.where(scale < TINY, TINY, scale)
    if POWER_OF_TWO:
        bits = scale.to(tl.int32, bitcast=True)
        upward = ((bits + 0x7FFFFF) & 0x7F800000).to(tl.float32, bitcast=True)
        scale = tl.where(bits < 0x7F800000, upward, scale)
    return scale


@triton.jit
def quantise_kernel(
    x_BMK, up_BMK, counts_E, values_BMK, scales_BMK, M, K, smallest_amax,
    x_batch, x_row, x_column, up_batch, up_row, up_column,
    value_batch, value_row, value_column, scale_batch, scale_row, scale_column,
    EXPERTS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    TILE_ROWS: tl.constexpr, TILE_COLUMNS: tl.constexpr, GATED: tl.constexpr,
    KEEP_SMALL: tl.constexpr, POWER_OF_TWO: tl.constexpr,
    LARGEST: tl.constexpr, MANTISSA: tl.constexpr, SMALLEST_EXPONENT: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """FP32 or BF16 (``GATED``: SwiGLU of two) to numbers and FP32 scales, one row of tiles a program."""
    tile, batch = tl.program_id(0).to(tl.int64), tl.program_id(2).to(tl.int64)
    if EXPERTS == 0:
        first, end = tile * ROWS, M
    else:
        _, first, end = find_tile(tile, counts_E, EXPERTS, ROWS)
    if first >= end:
        return
    row = (first + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    column = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)).to(tl.int64)[None, :]
    inside = (row < end) & (column < K)
    x = tl.load(x_BMK + batch * x_batch + row * x_row + column * x_column, mask=inside, other=0.0)
    x = x.to(tl.float32)
    if GATED:
        up = tl.load(up_BMK + batch * up_batch + row * up_row + column * up_column, mask=inside, other=0.0)
        x = x / (1.0 + tl.exp(-x)) * up.to(tl.float32)

    # As integers magnitudes keep their order, and a NaN is the greatest.
    bits = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    if TILE_COLUMNS > 1:
        bits = tl.max(bits, axis=1, keep_dims=True)
    if TILE_ROWS > 1:
        bits = tl.max(bits, axis=0, keep_dims=True)
    scale = scale_of(bits.to(tl.float32, bitcast=True), smallest_amax, KEEP_SMALL, POWER_OF_TWO, LARGEST)
    number = tl.div_rn(x, tl.broadcast_to(scale, (ROWS, COLUMNS)))

    if EXPERTS > 0 and TILE_COLUMNS == 1:  # whole tiles, zeros past the expert's end
        place = values_BMK + (tile * ROWS + tl.arange(0, ROWS)[:, None]) * value_row
        kept = tl.broadcast_to(column < K, (ROWS, COLUMNS))
    else:
        place = values_BMK + batch * value_batch + row * value_row
        kept = inside
    if BITS == 12:  # two numbers in three bytes, as dsv3.ops.formats.pack has them
        code = code_of(number, MANTISSA, SMALLEST_EXPONENT, BITS)
        a, b = tl.split(tl.reshape(code, (ROWS, COLUMNS // 2, 2)))
        pair = tl.program_id(1) * (COLUMNS // 2) + tl.arange(0, COLUMNS // 2)[None, :]
        place += 3 * pair
        kept = (row < end) & (2 * pair < K)
        tl.store(place, (a & 0xFF).to(tl.uint8), mask=kept)
        tl.store(place + 1, ((a >> 8) | ((b & 0xF) << 4)).to(tl.uint8), mask=kept)
        tl.store(place + 2, (b >> 4).to(tl.uint8), mask=kept)
    elif INTERPRETED:
        code = code_of(number, MANTISSA, SMALLEST_EXPONENT, BITS).to(tl.uint8)
        value = code.to(values_BMK.dtype.element_ty, bitcast=True)
        tl.store(place + column * value_column, value, mask=kept)
    else:
        tl.store(place + column * value_column, number.to(values_BMK.dtype.element_ty), mask=kept)

    if TILE_ROWS > 1:
        row, end = tl.full((1, 1), tile, tl.int64), tile + 1
    if TILE_COLUMNS > 1:
        column, K = tl.full((1, 1), tl.program_id(1), tl.int64), tl.num_programs(1)
    place = scales_BMK + batch * scale_batch + row * scale_row + column * scale_column
    tl.store(place, scale, mask=(row < end) & (column < K))


@triton.jit
def dequantise_kernel(
    values_BMK, scales_BMK, counts_E, out_BMK, M, K,
    value_batch, value_row, value_column, scale_batch, scale_row, scale_column,
    EXPERTS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    TILE_ROWS: tl.constexpr, TILE_COLUMNS: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """Numbers times the FP32 scales of their tiles, to FP32."""
    tile, batch = tl.program_id(0).to(tl.int64), tl.program_id(2).to(tl.int64)
    if EXPERTS == 0:
        first, end = tile * ROWS, M
    else:
        _, first, end = find_tile(tile, counts_E, EXPERTS, ROWS)
    row = (first + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    column = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)).to(tl.int64)[None, :]
    inside = (row < end) & (column < K)
    if EXPERTS > 0 and TILE_COLUMNS == 1:
        place = values_BMK + (tile * ROWS + tl.arange(0, ROWS)[:, None]) * value_row
    else:
        place = values_BMK + batch * value_batch + row * value_row
    if BITS == 12:
        pair = tl.program_id(1) * (COLUMNS // 2) + tl.arange(0, COLUMNS // 2)[None, :]
        place += 3 * pair
        kept = (row < end) & (2 * pair < K)
        low = tl.load(place, mask=kept, other=0).to(tl.int32)
        middle = tl.load(place + 1, mask=kept, other=0).to(tl.int32)
        high = tl.load(place + 2, mask=kept, other=0).to(tl.int32)
        a, b = low | ((middle & 0xF) << 8), (middle >> 4) | (high << 4)
        code = tl.reshape(tl.join(a, b), (ROWS, COLUMNS))
        number = (
            (code << 4).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
        )  # FP16 and four bits less
    else:
        number = tl.load(place + column * value_column, mask=inside, other=0.0).to(tl.float32)
    if TILE_ROWS > 1:
        scale_place = tl.full((1, 1), tile, tl.int64) * scale_row + column // TILE_COLUMNS * scale_column
    else:
        scale_place = row * scale_row + column // TILE_COLUMNS * scale_column
    scale = tl.load(scales_BMK + batch * scale_batch + scale_place, mask=inside, other=0.0)
    tl.store(out_BMK + (batch * M + row) * K + column, number * scale, mask=inside)


def _round_up(number: int, to: int) -> int:
    return -(-number // to) * to


def _stack(x: Tensor) -> Tensor:
    """``[..., M, K]`` as ``[B, M, K]``."""
    return x.flatten(0, -3) if x.dim() > 2 else x[None]


def _pitched(batch: int, rows: int, columns: int, pitch: int, dtype: torch.dtype, like: Tensor) -> Tensor:
    """``[B, rows, columns]``; the distance of rows is a multiple of ``pitch``, and zeros are in between."""
    width = _round_up(columns, pitch)
    make = torch.empty if width == columns else torch.zeros
    return make((batch, rows, width), dtype=dtype, device=like.device)[..., :columns]


def _grid(tile: Tile, M: int, K: int, batch: int, experts: int) -> tuple[int, int, int]:
    rows, columns, _ = PROGRAMS[tile]
    return most_tiles(M, experts, rows) if experts else -(-M // rows), -(-K // columns), batch


def _experts(tile: Tile, counts_E: Tensor | None) -> int:
    """Experts that row tiles have to mind; 0 where there are none."""
    return 0 if counts_E is None or tile.rows == 1 else len(counts_E)


def takes(tile: Tile, kind: Format) -> bool:
    """Whether :func:`quantise` knows such tiles of such numbers."""
    return tile in PROGRAMS and (kind.dtype is not None or tile == ROW)


def quantise(
    x: Tensor,
    tile: Tile,
    kind: Format = E4M3,
    power_of_two_scales: bool = False,
    smallest_amax: float = SMALLEST_AMAX,
    counts_E: Tensor | None = None,
    up: Tensor | None = None,
) -> Quantised:
    """What :func:`dsv3.ops.blocks.quantise` says, for what it :func:`takes`.

    ``up``: quantise ``silu(x) * up``, computed in FP32.
    """
    rows, columns, warps = PROGRAMS[tile]
    x_BMK = _stack(x)
    up_BMK = x_BMK if up is None else _stack(up)
    batch, M, K = x_BMK.shape
    experts = _experts(tile, counts_E)
    grid = _grid(tile, M, K, batch, experts)
    row_tiles = M if tile.rows == 1 else grid[0]
    column_tiles = -(-K // tile.columns)
    dtype = kind.dtype or torch.uint8
    if tile == COLUMN:
        held = rows * row_tiles if experts else M
        values = _pitched(batch, K, held, 16, dtype, x).transpose(1, 2)
    else:
        values = _pitched(batch, M, K if kind.dtype else 3 * -(-K // 2), 16, dtype, x)
    if tile == ROW:
        scales = _pitched(batch, column_tiles, M, 4, torch.float32, x).transpose(1, 2)
    else:
        scales = _pitched(batch, row_tiles, column_tiles, 1, torch.float32, x)
    if x.numel():
        with torch.cuda.device_of(x):
            quantise_kernel[grid](
                x_BMK, up_BMK, counts_E, values, scales, M, K, smallest_amax,
                *x_BMK.stride(), *up_BMK.stride(), *values.stride(), *scales.stride(),
                EXPERTS=experts, ROWS=rows, COLUMNS=columns, TILE_ROWS=tile.rows, TILE_COLUMNS=tile.columns,
                GATED=up is not None, KEEP_SMALL=smallest_amax == 0, POWER_OF_TWO=power_of_two_scales,
                LARGEST=kind.largest, MANTISSA=kind.mantissa, SMALLEST_EXPONENT=kind.smallest_exponent,
                BITS=kind.bits, num_warps=warps, enable_fp_fusion=False,
            )  # fmt: skip
    lead = x.shape[:-2]
    values, scales = (t.unflatten(0, lead) if lead else t[0] for t in (values, scales))
    return Quantised(values, scales, x.shape, tile, kind, counts_E)


def dequantise(q: Quantised) -> Tensor:
    """What :func:`dsv3.ops.blocks.dequantise` says, for what :func:`quantise` made."""
    rows, columns, warps = PROGRAMS[q.tile]
    values, scales = _stack(q.values), _stack(q.scales)
    out = torch.empty(q.shape, dtype=torch.float32, device=values.device)
    (M, K), batch, experts = q.shape[-2:], len(values), _experts(q.tile, q.counts_E)
    if out.numel():
        with torch.cuda.device_of(out):
            dequantise_kernel[_grid(q.tile, M, K, batch, experts)](
                values, scales, q.counts_E, out, M, K, *values.stride(), *scales.stride(),
                EXPERTS=experts, ROWS=rows, COLUMNS=columns,
                TILE_ROWS=q.tile.rows, TILE_COLUMNS=q.tile.columns, BITS=q.kind.bits,
                num_warps=warps, enable_fp_fusion=False,
            )  # fmt: skip
    return out
