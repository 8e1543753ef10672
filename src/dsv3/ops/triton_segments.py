"""Where a tile of rows lies when rows are sorted by expert (Triton; a piece of the other kernels; floor 1).

Tiles are numbered expert after expert, each expert beginning a new one: the first row of a tile and its
expert follow from the rows an expert alone, which never have to leave the GPU.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def find_tile(tile, counts_E, EXPERTS: tl.constexpr, TILE: tl.constexpr):
    """``(expert, first row, past the expert's last row)``; no rows are left where no tile has this number."""
    expert_E = tl.arange(0, triton.next_power_of_2(EXPERTS))
    rows_E = tl.load(counts_E + expert_E, mask=expert_E < EXPERTS, other=0).to(tl.int32)
    tiles_E = (rows_E + TILE - 1) // TILE
    expert = tl.sum((tl.cumsum(tiles_E, 0) <= tile).to(tl.int32), 0)
    before_E = expert_E < expert
    start = tl.sum(tl.where(before_E, rows_E, 0), 0)
    end = start + tl.sum(tl.where(expert_E == expert, rows_E, 0), 0)
    first = start + (tile - tl.sum(tl.where(before_E, tiles_E, 0), 0)) * TILE
    return expert, first, end


@triton.jit
def find_expert(expert, counts_E, EXPERTS: tl.constexpr, TILE: tl.constexpr):
    """``(first tile, tiles)`` of an expert."""
    expert_E = tl.arange(0, triton.next_power_of_2(EXPERTS))
    rows_E = tl.load(counts_E + expert_E, mask=expert_E < EXPERTS, other=0).to(tl.int32)
    tiles_E = (rows_E + TILE - 1) // TILE
    first = tl.sum(tl.where(expert_E < expert, tiles_E, 0), 0)
    return first, tl.sum(tl.where(expert_E == expert, tiles_E, 0), 0)


def most_tiles(rows: int, experts: int, tile: int) -> int:
    """Tiles that ``rows`` rows need at most, however the experts share them."""
    busy = min(rows, experts)
    return (rows - busy) // tile + busy
