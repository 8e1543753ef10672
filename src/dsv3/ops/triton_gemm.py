"""FP8 products of quantised operands on a GPU, sums in FP32 every 128 terms (Triton; report 3.3.2; floor 1).

Shapes: M rows (tokens), N outputs, K inputs, E experts. Hopper's FP8 instruction keeps about 14 bits of a
sum. So every 128 terms, as far as a scale reaches, a partial sum leaves it, is scaled, and is added to one in
FP32. The instruction wants the summed dimension contiguous in both operands: others are copied first. They
come through the copy engine (TMA), which reads zeros where a matrix has ended.

Rows sorted by expert are not padded: a tile ends with its expert, and every program finds out by itself, from
the rows an expert, which tile is whose. A dense product is the same without experts.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from dsv3.ops.blocks import BLOCK, COLUMN, ROW, Quantised
from dsv3.ops.formats import E4M3
from dsv3.ops.triton_segments import find_expert, find_tile, most_tiles

DEPTH = 128  # terms of a partial sum: as far as a scale reaches
TOGETHER = tl.constexpr(8)  # tiles of rows that walk along the other operand together, which then stays in L2


class Tiling(NamedTuple):
    """Size of the part of the output a program makes, its warps, and the loads it keeps in flight."""

    rows: int
    columns: int
    warps: int
    stages: int


# Large ones read less, small ones leave no multiprocessor idle: the first that fills the GPU is taken. Two
# sums are held in registers: 128 x 128 with 8 warps is the largest that does not spill. Untuned: no GPU yet.
TILINGS = (Tiling(128, 128, 8, 4), Tiling(64, 128, 4, 4), Tiling(64, 64, 4, 6), Tiling(64, 32, 4, 6))


@triton.jit
def place(program, row_tiles, column_tiles):
    """``(row tile, column tile)`` of a program: ``TOGETHER`` rows of tiles are walked column by column."""
    group = program // (TOGETHER * column_tiles)
    first = group * TOGETHER
    rows = tl.minimum(row_tiles - first, TOGETHER)
    within = program % (TOGETHER * column_tiles)
    return first + within % rows, within // rows


@triton.jit
def linear_kernel(
    x_MK, w_ENK, x_scales, w_scales, out_MN, counts_E, M, N, K,
    x_scale_row, x_scale_column, w_scale_expert, w_scale_row, w_scale_column,
    EXPERTS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, ROW_TILES,
):  # fmt: skip
    """``out = x w^T``: E4M3 operands, FP32 scales, sums promoted every 128 of K (report 3.3.2)."""
    row_tile, column_tile = place(tl.program_id(0), ROW_TILES, tl.cdiv(N, COLUMNS))
    if EXPERTS == 0:
        expert, first, end = 0, row_tile * ROWS, M
    else:
        expert, first, end = find_tile(row_tile, counts_E, EXPERTS, ROWS)
    if first >= end:
        return
    column = column_tile * COLUMNS
    row_M = first + tl.arange(0, ROWS)
    x_scale_M = x_scales + row_M * x_scale_row
    w_scale = w_scales + expert * w_scale_expert + column // DEPTH * w_scale_row
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for block in range(tl.cdiv(K, DEPTH)):
        x = x_MK.load([first, block * DEPTH])
        w = w_ENK.load([expert * N + column, block * DEPTH])
        scale_M = tl.load(x_scale_M + block * x_scale_column, mask=row_M < end, other=0.0)
        scale_M *= tl.load(w_scale + block * w_scale_column)
        total = tl.fma(tl.dot(x, w.T), scale_M[:, None], total)
    column_N = column + tl.arange(0, COLUMNS)
    out = out_MN + row_M.to(tl.int64)[:, None] * N + column_N[None, :]
    inside = (row_M < end)[:, None] & (column_N < N)[None, :]
    tl.store(out, total.to(out_MN.dtype.element_ty), mask=inside)


@triton.jit
def wgrad_kernel(
    g_NM, x_KM, g_scales, x_scales, out_ENK, counts_E, M, N, K,
    g_scale_row, g_scale_column, x_scale_row, x_scale_column,
    EXPERTS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """``out = g^T x`` an expert, FP32: E4M3 operands with the summed rows contiguous, promoted every 128."""
    row_tiles, column_tiles = tl.cdiv(N, ROWS), tl.cdiv(K, COLUMNS)
    expert = tl.program_id(0) // (row_tiles * column_tiles)
    row_tile, column_tile = place(tl.program_id(0) % (row_tiles * column_tiles), row_tiles, column_tiles)
    if EXPERTS == 0:
        first, tiles = 0, tl.cdiv(M, DEPTH)
    else:
        first, tiles = find_expert(expert, counts_E, EXPERTS, DEPTH)
    n, k = row_tile * ROWS, column_tile * COLUMNS
    out_N, out_K = n + tl.arange(0, ROWS), k + tl.arange(0, COLUMNS)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for tile in range(first, first + tiles):
        g = g_NM.load([n, tile * DEPTH])
        x = x_KM.load([k, tile * DEPTH])
        g_scale_N = tl.load(g_scales + tile * g_scale_row + out_N * g_scale_column, mask=out_N < N, other=0.0)
        x_scale_K = tl.load(x_scales + tile * x_scale_row + out_K * x_scale_column, mask=out_K < K, other=0.0)
        total = tl.fma(tl.dot(g, x.T) * g_scale_N[:, None], x_scale_K[None, :], total)
    out = out_ENK + (expert.to(tl.int64) * N + out_N[:, None]) * K + out_K[None, :]
    tl.store(out, total, mask=(out_N < N)[:, None] & (out_K < K)[None, :])


@triton.jit
def transpose_kernel(x_BNK, out_BKN, N, K, x_row, out_row, SIDE: tl.constexpr):
    """Bytes ``[B, N, K]`` to ``[B, K, N]``, a square of ``SIDE`` a program."""
    batch = tl.program_id(2).to(tl.int64)
    row = tl.program_id(0) * SIDE + tl.arange(0, SIDE)
    column = tl.program_id(1) * SIDE + tl.arange(0, SIDE)
    inside = (row < N)[:, None] & (column < K)[None, :]
    x = tl.load(x_BNK + (batch * N + row[:, None]) * x_row + column[None, :], mask=inside)
    tl.store(out_BKN + (batch * K + column[None, :]) * out_row + row[:, None], x, mask=inside)


def transposed(values: Tensor) -> Tensor:
    """A copy of FP8 ``[..., N, K]`` as ``[..., K, N]``."""
    values = _contiguous_rows(values)
    N, K = values.shape[-2:]
    pitch = -(-N // 16) * 16
    make = torch.empty if pitch == N else torch.zeros
    out = make((*values.shape[:-2], K, pitch), dtype=values.dtype, device=values.device)[..., :N]
    grid = (-(-N // 128), -(-K // 128), values.shape[:-2].numel())
    source, target = values.view(torch.uint8), out.view(torch.uint8)
    with torch.cuda.device_of(values):
        transpose_kernel[grid](
            source, target, N, K, values.stride(-2), pitch, SIDE=128, num_warps=8, enable_fp_fusion=False
        )
    return out


def _contiguous_rows(values: Tensor) -> Tensor:
    """The same numbers as the copy engine takes them: rows contiguous, 16 bytes and multiples apart."""
    pitch = values.stride(-2)
    stacked = all(
        values.stride(i) == values.stride(i + 1) * values.shape[i + 1] for i in range(values.dim() - 2)
    )
    if values.stride(-1) == 1 and pitch % 16 == 0 and stacked and values.data_ptr() % 16 == 0:
        return values
    width = values.shape[-1]
    padded = F.pad(values.contiguous().view(torch.uint8), (0, -width % 16))
    return padded.view(values.dtype)[..., :width]


def _descriptor(values: Tensor, rows: int) -> TensorDescriptor:
    """What the copy engine needs to know to load tiles of ``rows`` x 128 from contiguous rows."""
    flat = values.flatten(0, -2)
    return TensorDescriptor(flat, list(flat.shape), list(flat.stride()), [rows, DEPTH])


def _multiprocessors(x: Tensor) -> int:
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 132


def choose_tiling(rows: int, columns: int, matrices: int, multiprocessors: int) -> Tiling:
    """For ``matrices`` outputs of ``rows`` (on average) by ``columns``."""
    for tiling in TILINGS:
        tiles = matrices * -(-rows // tiling.rows) * -(-columns // tiling.columns)
        too_tall = rows <= tiling.rows // 2 and tiling.rows > TILINGS[-1].rows
        if tiles >= multiprocessors and not too_tall:
            return tiling
    return TILINGS[-1]


def takes_linear(x: Quantised, w: Quantised, counts_E: Tensor | None, dtype: torch.dtype) -> bool:
    """Whether :func:`linear` can do this: any size."""
    return x.tile == ROW and w.tile == BLOCK and x.kind == w.kind == E4M3


def takes_wgrad(g: Quantised, x: Quantised, counts_E: Tensor | None) -> bool:
    """Whether :func:`wgrad` can do this: any size; with experts, as ``triton_quantise`` lays tiles out."""
    tiles = g.tile == x.tile == COLUMN and g.kind == x.kind == E4M3
    rows = g.shape[0] if counts_E is None else DEPTH * most_tiles(g.shape[0], len(counts_E), DEPTH)
    return tiles and g.values.shape[0] == x.values.shape[0] == rows


def linear(
    x: Quantised, w: Quantised, counts_E: Tensor | None, dtype: torch.dtype, tiling: Tiling | None = None
) -> Tensor:
    """As :func:`dsv3.ops.fp8.linear`: ``[M, K]`` in 1x128 tiles times 128x128 weights, ``[M, N]``."""
    (M, K), N = x.shape, w.shape[-2]
    out = torch.empty((M, N), dtype=dtype, device=x.values.device)
    if not out.numel():
        return out
    experts = 0 if counts_E is None else len(counts_E)
    matrices = max(1, min(experts, M))
    chosen = tiling or choose_tiling(-(-M // matrices), N, matrices, _multiprocessors(out))
    row_tiles = most_tiles(M, max(1, experts), chosen.rows)
    x_values, w_values = _contiguous_rows(x.values), _contiguous_rows(w.values)
    w_scale_strides = w.scales.stride() if experts else (0, *w.scales.stride())
    with torch.cuda.device_of(out):
        linear_kernel[(row_tiles * -(-N // chosen.columns),)](
            _descriptor(x_values, chosen.rows), _descriptor(w_values, chosen.columns), x.scales, w.scales,
            out, counts_E, M, N, K, *x.scales.stride(), *w_scale_strides,
            EXPERTS=experts, ROWS=chosen.rows, COLUMNS=chosen.columns, DEPTH=DEPTH, ROW_TILES=row_tiles,
            num_warps=chosen.warps, num_stages=chosen.stages, enable_fp_fusion=False,
        )  # fmt: skip
    return out


def wgrad(g: Quantised, x: Quantised, counts_E: Tensor | None, tiling: Tiling | None = None) -> Tensor:
    """As :func:`dsv3.ops.fp8.wgrad`: ``[M, N]`` and ``[M, K]``, both in 128x1 tiles, to FP32 ``[N, K]``."""
    (M, N), K = g.shape, x.shape[-1]
    experts = 0 if counts_E is None else len(counts_E)
    lead = (experts,) if experts else ()
    if not M:
        return torch.zeros((*lead, N, K), dtype=torch.float32, device=g.values.device)
    out = torch.empty((*lead, N, K), dtype=torch.float32, device=g.values.device)
    matrices = max(1, experts)
    chosen = tiling or choose_tiling(N, K, matrices, _multiprocessors(out))
    g_values, x_values = _contiguous_rows(g.values.T), _contiguous_rows(x.values.T)
    with torch.cuda.device_of(out):
        wgrad_kernel[(matrices * -(-N // chosen.rows) * -(-K // chosen.columns),)](
            _descriptor(g_values, chosen.rows), _descriptor(x_values, chosen.columns), g.scales, x.scales,
            out, counts_E, M, N, K, *g.scales.stride(), *x.scales.stride(),
            EXPERTS=experts, ROWS=chosen.rows, COLUMNS=chosen.columns, DEPTH=DEPTH,
            num_warps=chosen.warps, num_stages=chosen.stages, enable_fp_fusion=False,
        )  # fmt: skip
    return out
