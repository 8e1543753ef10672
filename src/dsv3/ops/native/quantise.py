"""The compiled quantisers of ``quantise.cpp`` (floor 1)."""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor

from dsv3.ops.formats import Format
from dsv3.ops.native import library

PARALLEL_FROM = 1 << 15  # numbers; below, waking a second thread costs more than it saves


@functools.cache
def _library() -> ctypes.CDLL:
    found = library("quantise")
    assert found is not None, "usable() comes first"
    pointer, long, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
    found.dsv3_quantise.argtypes = [
        ctypes.c_int, pointer, pointer, pointer, pointer, long, long, long, long, number, ctypes.c_int,
        number, ctypes.c_int,
    ]  # fmt: skip
    found.dsv3_dequantise.argtypes = [
        ctypes.c_int, pointer, pointer, pointer, pointer, long, long, long, long, ctypes.c_int,
    ]  # fmt: skip
    return found


def _threads(numbers: int) -> int:
    return torch.get_num_threads() if numbers >= PARALLEL_FROM else 1


def _kind(kind: Format) -> int:
    return 10 * kind.exponent + kind.mantissa


def _counts(shape: torch.Size, counts_E: Tensor | None) -> Tensor:
    if counts_E is not None:
        return counts_E.to("cpu", torch.int64).contiguous()
    return torch.full((shape[:-2].numel(),), shape[-2], dtype=torch.int64)


def quantise(
    x: Tensor,
    tile: tuple[int, int],
    kind: Format,
    power_of_two_scales: bool,
    smallest_amax: float,
    counts_E: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Values and scales as :func:`dsv3.ops.blocks.quantise_reference` has them, bit by bit."""
    found = _library()
    x = x.detach().float().contiguous()
    counts = _counts(x.shape, counts_E)
    rows, columns = tile
    width = x.shape[-1] if kind.dtype is not None else 3 * -(-x.shape[-1] // 2)
    values = torch.empty((*x.shape[:-1], width), dtype=kind.dtype or torch.uint8)
    if counts_E is None:
        tiles = (*x.shape[:-2], -(-x.shape[-2] // rows))
    else:
        tiles = (int((-(-counts // rows)).sum()),)
    scales = torch.empty((*tiles, -(-x.shape[-1] // columns)), dtype=torch.float32)
    found.dsv3_quantise(
        _kind(kind), x.data_ptr(), values.data_ptr(), scales.data_ptr(), counts.data_ptr(), len(counts),
        x.shape[-1], rows, columns, kind.largest, power_of_two_scales, smallest_amax, _threads(x.numel()),
    )  # fmt: skip
    return values, scales


def dequantise(
    values: Tensor,
    scales: Tensor,
    shape: torch.Size,
    tile: tuple[int, int],
    kind: Format,
    counts_E: Tensor | None,
) -> Tensor:
    """FP32 values as :func:`dsv3.ops.blocks.dequantise_reference` has them, bit by bit."""
    found = _library()
    values, scales = values.contiguous(), scales.contiguous()
    counts = _counts(shape, counts_E)
    out = torch.empty(shape, dtype=torch.float32)
    found.dsv3_dequantise(
        _kind(kind), values.data_ptr(), scales.data_ptr(), out.data_ptr(), counts.data_ptr(), len(counts),
        shape[-1], *tile, _threads(out.numel()),
    )  # fmt: skip
    return out
