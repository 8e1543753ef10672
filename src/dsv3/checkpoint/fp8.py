"""Weights between FP8, as the released files hold it, and wider dtypes (report 3.3; released weights).

An FP8 weight is two tensors: ``X.weight`` in E4M3 and ``X.weight_scale_inv``, an FP32 scale for every block
of 128 x 128 (blocks at the edges are smaller); value = number times scale. What is FP8 and stays so keeps its
bytes. What goes through FP32 and back gets the same numbers and scales; through BF16, the same numbers, and
scales within BF16's rounding, or the same where they are powers of two.

Shapes: R rows, K columns; r = ceil(R / 128), k = ceil(K / 128).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dsv3.checkpoint import names
from dsv3.checkpoint.errors import CheckpointError
from dsv3.checkpoint.safetensors_io import Kind
from dsv3.ops.blocks import BLOCK, Quantised, dequantise, quantise
from dsv3.ops.formats import E4M3

FP8 = torch.float8_e4m3fn
BAND = 2**18  # numbers handled at once: enough that Python costs nothing, in and out they stay in a cache

# A power of two as scale, the largest number at most 448: of 225 that is 1, and 224 is written. Read again,
# 224 gets the scale 1/2 and is written as 448. Up to 464 the largest number rounds to 448, so it may be that
# large; then the scale is at most as coarse, and what was written gets the same scale again.
E4M3_OF_POWERS = replace(E4M3, largest=464.0)

Rows = Callable[[str, int, int], Tensor]  # name, first row, row past the last: [R, K] as stored
Put = Callable[[str, int, Tensor], None]  # name, first element of the flat tensor, a piece of it


def quantization_config(ue8m0: bool) -> dict[str, Any]:
    """What ``config.json`` says of an FP8 folder; ``scale_fmt`` as the files of V3.1 have it."""
    tree = {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [*BLOCK],
    }
    return {**tree, "scale_fmt": "ue8m0"} if ue8m0 else tree


def scale_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of the scales of a weight."""
    return tuple(-(-size // side) for size, side in zip(shape, BLOCK, strict=True))


def outputs(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Kind]:
    """The tensors that hold a weight in ``dtype``: itself, and in FP8 its scales."""
    found: dict[str, Kind] = {name: (dtype, shape)}
    if dtype is FP8:
        found[names.scale_name(name)] = torch.float32, scale_shape(shape)
    return found


def bands(shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """Rows of a tensor, first and past the last: as many whole blocks as ``BAND`` allows, at least one."""
    count = shape[0] if shape else 1
    step = BLOCK.rows * max(1, BAND // max(1, BLOCK.rows * width(shape)))
    for first in range(0, count, step):
        yield first, min(first + step, count)


def width(shape: tuple[int, ...]) -> int:
    """Numbers in a row of a tensor."""
    return math.prod(shape[1:])


def read(name: str, kind: Kind, rows: Rows, dense: bool = True) -> Iterator[tuple[int, int, Tensor]]:
    """A tensor a band of rows at a time: first row, row past the last, ``[R, K]``.

    As stored, but FP8 (where ``dense``) in FP32.
    """
    stored, shape = kind
    scales = None
    if stored is FP8 and dense:
        scales = rows(names.scale_name(name), 0, scale_shape(shape)[0]).float()
    for first, last in bands(shape):
        x = rows(name, first, last)
        if scales is not None:
            of_band = scales[first // BLOCK.rows : -(-last // BLOCK.rows)]
            x = dequantise(Quantised(x, of_band, x.shape, BLOCK, E4M3))
        yield first, last, x


def translate(
    name: str, kind: Kind, dtype: torch.dtype, rows: Rows, put: Put, ue8m0: bool = False, anew: bool = False
) -> None:
    """Read a tensor (``kind`` as stored) a band of rows at a time and put it as ``dtype``, with its scales.

    FP8 that stays FP8 is copied, or with ``anew`` quantised again. ``ue8m0``: new scales are powers of two.
    ``put`` casts between wider dtypes. Raises :class:`CheckpointError` where an infinity or NaN would be FP8.
    """
    stored, shape = kind
    copied = stored is FP8 and dtype is FP8 and not anew
    made = []
    for first, _, x in read(name, kind, rows, dense=not copied):
        if dtype is FP8 and not copied:
            q = quantised(x, ue8m0)
            refuse_broken(name, q.scales, "FP8")
            x = q.values
            made.append(q.scales)
        put(name, first * width(shape), x)
    if dtype is FP8:
        scale_name = names.scale_name(name)
        kept = rows(scale_name, 0, scale_shape(shape)[0]).float() if copied else torch.cat(made)
        put(scale_name, 0, kept)


def refuse_broken(name: str, scales: Tensor, kind: str) -> None:
    """Raise :class:`CheckpointError` where the scales of a quantised weight are not finite."""
    if not scales.isfinite().all():
        raise CheckpointError(
            f"{name} cannot be written in {kind}: it holds an infinity or a NaN, so the model is broken;"
            " take an earlier checkpoint"
        )


def quantised(x_RK: Tensor, ue8m0: bool = False) -> Quantised:
    """A weight in FP8. Without a floor under a block's largest number: weights may be small as a whole."""
    q = quantise(x_RK, BLOCK, E4M3_OF_POWERS if ue8m0 else E4M3, ue8m0, smallest_amax=0.0)
    return q if ue8m0 or x_RK.dtype is not torch.float32 else replace(q, scales=_scales_again(x_RK, q))


def _scales_again(x_RK: Tensor, q: Quantised) -> Tensor:
    """The scales ``[r, k]`` with which numbers times scales are exactly x, where x was made so; else q's own.

    The largest number of a block is 448 times its scale, rounded to FP32. Its quotient by 448, rounded again,
    is that scale where a division by 448 made it, and for 10.7 % of all others the FP32 number beside it,
    never further away (tried with all 2^23).
    """
    x, first = (
        x_RK[:: BLOCK.rows],
        q.values[:: BLOCK.rows].float(),
    )  # a row of every block tells FP8 from others
    off = first * q.scales.repeat_interleave(BLOCK.columns, dim=1)[:, : x.shape[1]] - x
    if not _of_blocks(off.abs() <= 2.0**-22 * x.abs(), rows=1).any():
        return q.scales
    found, done = q.scales.clone(), torch.zeros_like(q.scales, dtype=torch.bool)
    for step in (0, -1, 1):
        beside = (q.scales.view(torch.int32) + step).view(torch.float32)
        fits = _of_blocks(dequantise(replace(q, scales=beside)) == x_RK, BLOCK.rows) & ~done
        found[fits] = beside[fits]
        done |= fits
        if done.all():
            break
    return found


def _of_blocks(true_RK: Tensor, rows: int) -> Tensor:
    """Whether all of a block ``rows`` x 128 is true: ``[ceil(R / rows), k]``."""
    height, columns = true_RK.shape
    padded = F.pad(true_RK, (0, -columns % BLOCK.columns, 0, -height % rows), value=True)
    return padded.unflatten(1, (-1, BLOCK.columns)).unflatten(0, (-1, rows)).all(dim=3).all(dim=1)
