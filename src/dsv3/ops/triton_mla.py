"""Absorbed attention over the paged latent cache, where its rows lie (Triton; report 2.1.1; floor 1).

Every head's query, folded into the latent space, attends to the same rows: ``score = q . [latent ; rope]``,
``out = sum of weights x latent``. A program takes some rows of queries (new tokens and heads together, since
they read the same keys) and a share of a sequence's keys; a second kernel joins the shares by their
log-sum-exp (flash-decoding). How the keys are shared out follows from sizes the CPU knows, and the programs
find their own part from lengths that only the GPU need know, so that a CUDA graph may hold the launch.

Shapes: S sequences, T new tokens of each, M = S T, H heads, C latent, R rope, X = C + R, B blocks of a
sequence, Z splits. ``dsv3.serve.absorbed.attend_reference`` is the specification.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv3.ops.blocks import ROW
from dsv3.ops.paged import Table

TILE = ROW.columns  # numbers of an FP8 latent that share a scale
SPLIT_KEYS = 256  # a split of fewer keys costs more to join than it saves
MOST_SPLITS = 64
LOG2_E = 1.4426950408889634
# The interpreter, in which tests run, multiplies BF16 wrongly, and cuts numbers off that BF16 has to round.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


class Tiling(NamedTuple):
    """Rows of queries and keys a program works on at once, its warps, and the loads it keeps in flight."""

    rows: int
    keys: int
    warps: int
    stages: int


# The largest that do not spill with 512 latents, for many rows and for few. Untuned: no GPU yet.
WIDE, NARROW = Tiling(32, 64, 8, 2), Tiling(16, 32, 4, 2)
BYTES = Tiling(16, 32, 8, 2)  # FP8 rows, which are made BF16 in registers
EXACT = Tiling(16, 16, 4, 1)  # FP32 queries


@triton.jit
def product(a, b):
    """``a b`` summed in FP32; FP32 numbers are multiplied as they are."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def rounded(x, like: tl.constexpr):
    """``x`` in another dtype, to the nearest."""
    if INTERPRETED and x.dtype == tl.float32 and like == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        x = ((bits + 0x7FFF + ((bits >> 16) & 1)) & ~0xFFFF).to(tl.float32, bitcast=True)
    return x.to(like)


@triton.jit
def attend_kernel(
    q_MHX, latents, scales, ropes, blocks_SB, lengths_S, out, lse_ZMH, factor, first, rows, heads, row_tiles,
    all_rows, block_row,
    LATENT: tl.constexpr, ROPE: tl.constexpr, C: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr,
    SCALED: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr, LATENT_ROW: tl.constexpr,
    SCALE_ROW: tl.constexpr, ROPE_ROW: tl.constexpr, SPLITS: tl.constexpr, ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):  # fmt: skip
    """A split of a sequence's keys for some of its T H rows of queries.

    ``factor``: the softmax scale times log2(e). ``first``: the place of a sequence's first key. ``rows``:
    T H; ``all_rows``: M H. With one split ``out`` is the result in q's dtype; with more, ``[Z, M, H, C]`` in
    FP32 beside the log-sum-exp (base 2) of each, minus infinity and nothing written where there are no keys.
    """
    sequence = (tl.program_id(0) // row_tiles).to(tl.int64)
    row = tl.program_id(0) % row_tiles * ROWS + tl.arange(0, ROWS)
    split = tl.program_id(1)
    past = first + tl.load(lengths_S + sequence)  # one more than the sequence's last place
    share = tl.cdiv(tl.cdiv(past, KEYS), SPLITS) * KEYS
    begin = split * share
    end = tl.minimum(begin + share, past)

    flat = sequence * rows + row
    column, turn = tl.arange(0, C), tl.arange(0, R)
    inside = row < rows
    q = q_MHX + flat[:, None] * (LATENT + ROPE)
    q_latent = tl.load(q + column[None, :], mask=inside[:, None] & (column < LATENT)[None, :], other=0.0)
    q_rope = tl.load(q + LATENT + turn[None, :], mask=inside[:, None] & (turn < ROPE)[None, :], other=0.0)
    seen = past - rows // heads + row // heads + 1  # up to which place a row's query may see

    best = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    sums = tl.zeros((ROWS, C), tl.float32)
    for start in range(begin, end, KEYS):
        place = start + tl.arange(0, KEYS)
        there = (place >= first) & (place < end)
        blocks = blocks_SB + sequence * block_row
        if BLOCK % KEYS == 0:  # all in one block, one after the other: a base and offsets that never change
            slot = tl.load(blocks + start // BLOCK).to(tl.int64) * BLOCK + start % BLOCK
            offset = tl.arange(0, KEYS)
        else:
            slot = 0
            offset = tl.load(blocks + place // BLOCK, mask=there, other=0).to(tl.int64)
            offset = offset * BLOCK + place % BLOCK
        k = latents + slot * LATENT_ROW + (offset[:, None] * LATENT_ROW + column[None, :])
        k_latent = tl.load(k, mask=there[:, None] & (column < LATENT)[None, :], other=0.0)
        if SCALED:
            tile = tl.arange(0, TILES)
            k = scales + slot * SCALE_ROW + (offset[:, None] * SCALE_ROW + tile[None, :])
            scale = tl.load(k, mask=there[:, None] & (tile * TILE < LATENT)[None, :], other=0.0)
            apart = tl.reshape(k_latent.to(tl.float32), (KEYS, TILES, C // TILES)) * scale[:, :, None]
            k_latent = tl.reshape(apart, (KEYS, C))
        k_latent = rounded(k_latent, q_latent.dtype)
        k = ropes + slot * ROPE_ROW + (offset[:, None] * ROPE_ROW + turn[None, :])
        k_rope = tl.load(k, mask=there[:, None] & (turn < ROPE)[None, :], other=0.0)
        scores = product(q_latent, k_latent.T) + product(q_rope, rounded(k_rope, q_rope.dtype).T)
        visible = there[None, :] & (place[None, :] < seen[:, None])
        scores = tl.where(visible, scores * factor, float("-inf"))
        largest = tl.maximum(best, tl.max(scores, 1))
        level = tl.where(largest == float("-inf"), 0.0, largest)  # of a row that sees none of these keys
        weights = tl.exp2(scores - level[:, None])
        fading = tl.exp2(best - level)
        total = total * fading + tl.sum(weights, 1)
        sums = sums * fading[:, None] + product(rounded(weights, q_latent.dtype), k_latent)
        best = largest

    sums = sums / tl.where(total == 0.0, 1.0, total)[:, None]
    kept = (inside & (total > 0.0))[:, None] & (column < LATENT)[None, :]
    part = split.to(tl.int64) * all_rows + flat
    tl.store(out + part[:, None] * LATENT + column[None, :], rounded(sums, out.dtype.element_ty), mask=kept)
    if SPLITS > 1:
        lse = tl.where(total > 0.0, best + tl.log2(tl.where(total > 0.0, total, 1.0)), float("-inf"))
        tl.store(lse_ZMH + part, lse, mask=inside)


@triton.jit
def join_kernel(
    parts_ZMHC, lse_ZMH, out_MHC, all_rows,
    LATENT: tl.constexpr, C: tl.constexpr, SPLITS: tl.constexpr, SPLITS_UP: tl.constexpr,
):  # fmt: skip
    """The splits of one row, weighted by the sums of their exponentials."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, C)
    split = tl.arange(0, SPLITS_UP)
    lse_Z = tl.load(lse_ZMH + split * all_rows + row, mask=split < SPLITS, other=float("-inf"))
    largest = tl.max(lse_Z, 0)
    total = tl.sum(tl.exp2(lse_Z - largest), 0)
    sums = tl.zeros((C,), tl.float32)
    for number in range(SPLITS):
        place = number * all_rows + row
        weight = tl.exp2(tl.load(lse_ZMH + place) - largest) / total
        mask = column < tl.where(weight > 0.0, LATENT, 0)  # of a split without keys nothing was written
        sums += weight * tl.load(parts_ZMHC + place * LATENT + column, mask=mask, other=0.0)
    tl.store(out_MHC + row * LATENT + column, rounded(sums, out_MHC.dtype.element_ty), mask=column < LATENT)


def takes(q_MHX: Tensor, rows: Tensor, table: Table, latent: int) -> bool:
    """Whether :func:`attend` can do this: an FP8 row's scales must lie at multiples of 4 bytes."""
    known = rows.dtype in (torch.bfloat16, torch.float32) or (rows.dtype == torch.uint8 and latent % 4 == 0)
    return known and q_MHX.dtype in (torch.bfloat16, torch.float32)


def choose_tiling(rows: int, dtype: torch.dtype, row_dtype: torch.dtype) -> Tiling:
    """For sequences of ``rows`` rows of queries each."""
    if dtype == torch.float32:
        return EXACT
    if row_dtype == torch.uint8:
        return BYTES
    return WIDE if rows > NARROW.rows else NARROW


def choose_splits(programs: int, keys: int, multiprocessors: int) -> int:
    """Splits for the GPU to have a program a multiprocessor; ``keys``: the most that a sequence can have."""
    wanted = min(multiprocessors // programs, -(-keys // SPLIT_KEYS), MOST_SPLITS)
    return 1 << max(wanted, 1).bit_length() - 1  # powers of two: each number is compiled by itself


def _parts(rows: Tensor, latent: int) -> tuple[Tensor, Tensor | None, Tensor]:
    """Latents, their scales, and rope parts of cache rows, in their own dtypes, without a copy."""
    if rows.dtype != torch.uint8:
        return rows, None, rows[:, latent:]
    scales = latent + 4 * -(-latent // TILE)
    return (
        rows.view(torch.float8_e4m3fn),
        rows.view(torch.float32)[:, latent // 4 :],
        rows.view(torch.bfloat16)[:, scales // 2 :],
    )


def attend(
    q_MHX: Tensor,
    rows: Tensor,
    table: Table,
    latent: int,
    scale: float,
    splits: int | None = None,
    tiling: Tiling | None = None,
) -> Tensor:
    """Attention of each sequence's last T places to all its keys up to their own: ``[M, H, C]`` in q's dtype.

    ``rows``: a layer's cache, FP32 or BF16 ``[slots, X]``, or bytes as :mod:`dsv3.serve.cache` lays out FP8.
    """
    (M, heads, width), sequences = q_MHX.shape, len(table.lengths_S)
    q, each = q_MHX.contiguous(), M // sequences * heads
    chosen = tiling or choose_tiling(each, q.dtype, rows.dtype)
    row_tiles = -(-each // chosen.rows)
    if splits is None:
        keys = table.blocks_SB.shape[1] * table.block
        splits = choose_splits(sequences * row_tiles, keys, _multiprocessors(q))
    out = torch.empty((M, heads, latent), dtype=q.dtype, device=q.device)
    parts, lse = out, out  # unused with one split
    if splits > 1:
        parts = torch.empty((splits, M, heads, latent), dtype=torch.float32, device=q.device)
        lse = torch.empty((splits, M, heads), dtype=torch.float32, device=q.device)
    latents, scales, ropes = _parts(rows, latent)
    C, R = (max(16, triton.next_power_of_2(size)) for size in (latent, width - latent))
    with torch.cuda.device_of(q):
        attend_kernel[(sequences * row_tiles, splits)](
            q, latents, scales, ropes, table.blocks_SB, table.lengths_S, parts, lse, scale * LOG2_E,
            table.first, each, heads, row_tiles, M * heads, table.blocks_SB.stride(0),
            LATENT=latent, ROPE=width - latent, C=C, R=R, BLOCK=table.block, SCALED=scales is not None,
            TILE=TILE, TILES=max(1, C // TILE), LATENT_ROW=latents.stride(0),
            SCALE_ROW=0 if scales is None else scales.stride(0), ROPE_ROW=ropes.stride(0),
            SPLITS=splits, ROWS=chosen.rows, KEYS=chosen.keys,
            num_warps=chosen.warps, num_stages=chosen.stages, enable_fp_fusion=True,
        )  # fmt: skip
        if splits > 1:
            join_kernel[(M * heads,)](
                parts, lse, out, M * heads,
                LATENT=latent, C=C, SPLITS=splits, SPLITS_UP=triton.next_power_of_2(splits),
                num_warps=4, enable_fp_fusion=True,
            )  # fmt: skip
    return out


def _multiprocessors(x: Tensor) -> int:
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 132
