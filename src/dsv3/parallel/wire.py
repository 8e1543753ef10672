"""What rows look like while they travel: as they are, in BF16, or in FP8 with their scales (report 3.3.4).

Shapes: M rows, D hidden. gloo and NCCL move no FP8 between uneven splits, so a row in FP8 travels as bytes: D
numbers, then an FP32 scale for every 128 of them.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from dsv3.ops.blocks import ROW, SMALLEST_AMAX, Quantised, dequantise, quantise
from dsv3.ops.formats import E4M3


class Wire(Protocol):
    """How rows are written for a trip and read after it."""

    def encode(self, rows_MD: Tensor) -> Tensor:
        """``[M, X]``, a message a row."""
        ...

    def decode(self, message_MX: Tensor, width: int, dtype: torch.dtype) -> Tensor:
        """The rows ``[M, width]`` of the messages."""
        ...

    def row_bytes(self, width: int, dtype: torch.dtype) -> int:
        """Bytes a row of ``width`` numbers takes."""
        ...


class Cast:
    """In ``dtype``, or as they are."""

    def __init__(self, dtype: torch.dtype | None = None):
        self.dtype = dtype

    def encode(self, rows_MD: Tensor) -> Tensor:
        """See :class:`Wire`."""
        return rows_MD.to(self.dtype or rows_MD.dtype)

    def decode(self, message_MX: Tensor, width: int, dtype: torch.dtype) -> Tensor:
        """See :class:`Wire`."""
        return message_MX.to(dtype)

    def row_bytes(self, width: int, dtype: torch.dtype) -> int:
        """See :class:`Wire`."""
        return width * (self.dtype or dtype).itemsize


class FP8:
    """E4M3 with a power of two as the scale of each 1x128 tile.

    An expert's Linear quantises its rows in the same way, so nothing is rounded twice: of rows that came in
    FP8 it makes the same numbers again.
    """

    def __init__(self, smallest_amax: float = SMALLEST_AMAX):
        self.smallest_amax = smallest_amax

    def encode(self, rows_MD: Tensor) -> Tensor:
        """See :class:`Wire`."""
        made = quantise(rows_MD, ROW, power_of_two_scales=True, smallest_amax=self.smallest_amax)
        return torch.cat((made.values.view(torch.uint8), made.scales.contiguous().view(torch.uint8)), dim=1)

    def decode(self, message_MX: Tensor, width: int, dtype: torch.dtype) -> Tensor:
        """See :class:`Wire`."""
        values = message_MX[:, :width].contiguous().view(torch.float8_e4m3fn)
        scales = message_MX[:, width:].contiguous().view(torch.float32)
        return dequantise(Quantised(values, scales, values.shape, ROW, E4M3)).to(dtype)

    def row_bytes(self, width: int, dtype: torch.dtype) -> int:
        """See :class:`Wire`."""
        return width + 4 * -(-width // ROW.columns)
