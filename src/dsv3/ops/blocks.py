"""Quantisation by tiles, each with a scale of its own (report 3.3.2; floor 1).

Shapes: M rows (tokens, or outputs of a weight), K columns, E experts. A tile is ``(rows, columns)``; tiles at
an edge are smaller, they only ever shared a scale. value = number times the scale of its tile.

``quantise_reference`` in plain PyTorch is the specification. On a CPU a compiled kernel does the same in one
pass (``native/``), on a GPU a Triton kernel; ``dsv3.ops.backend`` says which.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dsv3.ops import native
from dsv3.ops.formats import E4M3, Format, pack, power_of_two, unpack
from dsv3.ops.native import quantise as compiled


class Tile(NamedTuple):
    """Rows and columns that share a scale; 0 means all of them."""

    rows: int
    columns: int


ROW = Tile(1, 128)  # activations: a token and 128 channels
COLUMN = Tile(128, 1)  # the same where tokens are summed over: weight gradients
BLOCK = Tile(128, 128)  # weights
WHOLE = Tile(0, 0)  # one scale a tensor, what the report argues against
TILES = {"1x128": ROW, "128x1": COLUMN, "128x128": BLOCK, "tensor": WHOLE}

SMALLEST_AMAX = 1e-4  # activations: below it a tile's scale stays, as in DeepSeek's own kernels


@dataclass(frozen=True)
class Quantised:
    """Numbers in a format and the FP32 scales of their tiles.

    ``values``: torch's FP8 dtype with ``shape``, or the bytes of :func:`dsv3.ops.formats.pack`.
    ``scales``: ``[..., ceil(M / rows), ceil(K / columns)]``; with ``counts_E`` (rows sorted by expert) row
    tiles begin anew with every expert, and there are as many as that makes.
    """

    values: Tensor
    scales: Tensor
    shape: torch.Size
    tile: Tile
    kind: Format
    counts_E: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes held, scales included."""
        return self.values.nbytes + self.scales.nbytes


def _sizes(shape: torch.Size, tile: Tile) -> Tile:
    """The tile with its zeros replaced by the matrix's own size."""
    return Tile(tile.rows or max(1, shape[-2]), tile.columns or max(1, shape[-1]))


def _segments(rows: int, tile: Tile, counts_E: Tensor | None) -> list[int]:
    """Rows of the pieces that row tiles do not span."""
    return [rows] if counts_E is None or tile.rows in (0, 1) else counts_E.tolist()


def expand_scales(scales: Tensor, shape: torch.Size, tile: Tile, counts_E: Tensor | None = None) -> Tensor:
    """The scale of every number: ``[..., M, K]``."""
    rows, columns = _sizes(shape, tile)
    wide = scales.repeat_interleave(columns, dim=-1)[..., : shape[-1]]
    if rows == 1:
        return wide
    pieces, first = [], 0
    for count in _segments(shape[-2], tile, counts_E):
        tiles = -(-count // rows)
        pieces.append(wide[..., first : first + tiles, :].repeat_interleave(rows, dim=-2)[..., :count, :])
        first += tiles
    return torch.cat(pieces, dim=-2)


def _tile_maxima(x: Tensor, tile: Tile, counts_E: Tensor | None) -> Tensor:
    """Largest magnitude of every tile; a tile with a NaN has NaN."""
    rows, columns = _sizes(x.shape, tile)
    found = []
    for piece in x.abs().split(_segments(x.shape[-2], tile, counts_E), dim=-2):
        if not piece.shape[-2]:
            continue
        padded = F.pad(piece, (0, -piece.shape[-1] % columns, 0, -piece.shape[-2] % rows))
        found.append(padded.unflatten(-1, (-1, columns)).unflatten(-3, (-1, rows)).amax(dim=(-3, -1)))
    return torch.cat(found, dim=-2) if found else x.new_empty(*x.shape[:-2], 0, -(-x.shape[-1] // columns))


def quantise_reference(
    x: Tensor,
    tile: Tile,
    kind: Format = E4M3,
    power_of_two_scales: bool = False,
    smallest_amax: float = SMALLEST_AMAX,
    counts_E: Tensor | None = None,
) -> Quantised:
    """The specification of :func:`quantise`."""
    x = x.float()
    amax = _tile_maxima(x, tile, counts_E)
    # A tile of zeros without a floor on its maximum: any scale will do, 1 is one that can be inverted.
    scales = torch.where(amax == 0, 1.0, amax / kind.largest) if smallest_amax == 0 else None
    if scales is None:
        scales = amax.clamp(min=smallest_amax) / kind.largest
    scales = scales.clamp(min=torch.finfo(torch.float32).tiny)
    if power_of_two_scales:
        scales = power_of_two(scales)
    values = pack(x / expand_scales(scales, x.shape, tile, counts_E), kind)
    return Quantised(values, scales, x.shape, tile, kind, counts_E)


def dequantise_reference(q: Quantised) -> Tensor:
    """The specification of :func:`dequantise`."""
    numbers = unpack(q.values, q.kind, q.shape[-1])
    return numbers * expand_scales(q.scales, q.shape, q.tile, q.counts_E)


def quantise(
    x: Tensor,
    tile: Tile,
    kind: Format = E4M3,
    power_of_two_scales: bool = False,
    smallest_amax: float = SMALLEST_AMAX,
    counts_E: Tensor | None = None,
) -> Quantised:
    """Quantise a matrix ``[..., M, K]`` (FP32 or BF16), or a stack of them, online: scales from its maxima.

    ``counts_E``: rows an expert of a two-dimensional ``x`` sorted by expert; no tile spans two experts.
    A tile with an infinity or a NaN dequantises to NaN, so that a loss shows it.
    """
    if x.is_cuda:
        from dsv3.ops import backend  # it builds on this file

        return backend.quantise(x, tile, kind, power_of_two_scales, smallest_amax, counts_E)
    if native.usable(x, "quantise") and tile != WHOLE:
        values, scales = compiled.quantise(
            x, _sizes(x.shape, tile), kind, power_of_two_scales, smallest_amax, counts_E
        )
        return Quantised(values, scales, x.shape, tile, kind, counts_E)
    return quantise_reference(x, tile, kind, power_of_two_scales, smallest_amax, counts_E)


def dequantise(q: Quantised) -> Tensor:
    """FP32 values, with ``q.shape``."""
    if q.values.is_cuda:
        from dsv3.ops import backend

        return backend.dequantise(q)
    if native.usable(q.scales, "quantise") and q.tile != WHOLE:
        return compiled.dequantise(q.values, q.scales, q.shape, _sizes(q.shape, q.tile), q.kind, q.counts_E)
    return dequantise_reference(q)


def quantise_swiglu(gate_MF: Tensor, up_MF: Tensor, tile: Tile, counts_E: Tensor | None = None) -> Quantised:
    """``silu(gate) * up`` in E4M3; on a GPU one kernel, with nothing in between in memory."""
    if gate_MF.is_cuda:
        from dsv3.ops import backend

        return backend.swiglu(gate_MF, up_MF, tile, counts_E=counts_E)
    return quantise(F.silu(gate_MF) * up_MF, tile, counts_E=counts_E)
