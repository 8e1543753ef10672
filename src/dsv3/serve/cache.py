"""The latent cache: for every layer and token the normed latent and the rotated shared key, nothing else.

FP32 and BF16 rows are ``[latent ; rope]``. An FP8 row is laid out as FlashMLA's: the latent in E4M3, an FP32
scale for every 128 of it, and the rope part in BF16: 512 + 16 + 128 = 656 bytes for DeepSeek-V3, where a BF16
row takes 1,152. Attention always reads what the cache holds, also for tokens it has just written, so that an
answer does not depend on how its prompt was cut.

Shapes: N tokens written, M rows read, C latent, R rope, X = C + R, S slots (rows of the whole cache).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from dsv3.ops.blocks import ROW, Quantised, dequantise, quantise
from dsv3.ops.formats import E4M3

TILE = ROW.columns  # numbers of a latent that share a scale
FORMATS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "fp8": torch.uint8}


def row_bytes(latent: int, rope: int, kind: str) -> int:
    """Bytes a token and layer of a cache of this kind."""
    if kind == "fp8":
        return latent + 4 * -(-latent // TILE) + 2 * rope
    return (latent + rope) * FORMATS[kind].itemsize


class LatentCache:
    """``slots`` rows a layer. ``kind``: float32, bfloat16 or fp8; ``dtype``: what :meth:`read` gives.

    ``block``: slots that a sequence always has together, in order, from a multiple of that on. ``spare``: one
    more block of them, number ``scratch``, for rows that belong to no sequence.
    """

    def __init__(
        self, layers: int, slots: int, latent: int, rope: int, kind: str, dtype: torch.dtype,
        device: torch.device | str = "cpu", block: int = 1, spare: bool = False,
    ):  # fmt: skip
        self.latent, self.rope, self.kind, self.dtype, self.block = latent, rope, kind, dtype, block
        self.tiles = -(-latent // TILE)
        self.scratch = slots // block if spare else None
        slots += block * spare
        width = row_bytes(latent, rope, kind) if kind == "fp8" else latent + rope
        self.rows = _zeros((layers, slots, width), FORMATS[kind], torch.device(device))

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.rows.nbytes

    def write(self, layer: int, slots_N: Tensor, latent_NC: Tensor, rope_NR: Tensor) -> None:
        """Put the rows of N tokens into their slots."""
        if self.kind == "fp8":
            row = self._pack(latent_NC, rope_NR)
        else:
            row = torch.cat((latent_NC, rope_NR), dim=-1).to(self.rows.dtype)
        self.rows[layer].index_copy_(0, slots_N, row)

    def read(self, layer: int, slots: Tensor | slice) -> Tensor:
        """Rows ``[M, X]``; of a slice, where nothing needs converting, a view."""
        rows = self.rows[layer]
        found = rows[slots] if isinstance(slots, slice) else rows.index_select(0, slots)
        return self._unpack(found) if self.kind == "fp8" else found.to(self.dtype)

    def _pack(self, latent_NC: Tensor, rope_NR: Tensor) -> Tensor:
        q = quantise(latent_NC, ROW)
        parts = (q.values, q.scales, rope_NR.to(torch.bfloat16))
        return torch.cat([part.contiguous().view(torch.uint8) for part in parts], dim=-1)

    def _unpack(self, bytes_MX: Tensor) -> Tensor:
        parts = bytes_MX.split((self.latent, 4 * self.tiles, 2 * self.rope), dim=-1)
        # Copies: a number of several bytes cannot be seen at any offset.
        values, scales, rope = (part.clone(memory_format=torch.contiguous_format) for part in parts)
        shape = torch.Size((values.shape[0], self.latent))
        q = Quantised(values.view(E4M3.dtype), scales.view(torch.float32), shape, ROW, E4M3)
        return torch.cat((dequantise(q).to(self.dtype), rope.view(torch.bfloat16).to(self.dtype)), dim=-1)


def _zeros(shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> Tensor:
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    # torch writes its zeros; numpy asks the system for zeroed pages, and a page nobody used takes no memory.
    return torch.from_numpy(np.zeros((*shape[:2], shape[2] * dtype.itemsize), dtype=np.uint8)).view(dtype)
