"""INT8 a channel and INT4 a group: weights for serving (floor 1).

Shapes: N outputs, K inputs, G groups of inputs; any leading dimensions (experts).

INT8 is symmetric: value = number * scale, a scale an output. INT4 has a step and a least value a group of 32,
64 or 128 inputs, since sixteen levels are too few to waste one side of them:
value = number * scale + least. Its bytes lie so that sixteen of them become two vectors of sixteen
numbers with one mask and one shift (ops/packed.py).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dsv3.common.errors import UserError

GROUPS = (32, 64, 128)
SPAN = 32  # inputs whose INT4 numbers are packed together


@dataclass(frozen=True)
class Int8:
    """``values`` int8 ``[..., N, K]`` in -127 .. 127, ``scales`` FP32 ``[..., N, 1]``."""

    values: Tensor
    scales: Tensor

    def dequantise(self) -> Tensor:
        """FP32 ``[..., N, K]``."""
        return self.values.float() * self.scales


@dataclass(frozen=True)
class Int4:
    """Numbers 0 .. 15: ``values`` uint8 ``[..., N, 16 ceil(K / 32)]``.

    Of every 32 inputs, byte i of 16 holds number i in its low half and number i + 16 in its high half; the
    last 32 are filled up with zeros. ``scales`` and ``leasts`` FP32 ``[..., N, G]``; ``inputs`` is K; the
    last group may be smaller.
    """

    values: Tensor
    scales: Tensor
    leasts: Tensor
    group: int
    inputs: int

    def numbers(self) -> Tensor:
        """The numbers 0 .. 15, uint8 ``[..., N, K]``."""
        bytes_16 = self.values.unflatten(-1, (-1, SPAN // 2))
        return torch.cat((bytes_16 & 0xF, bytes_16 >> 4), dim=-1).flatten(-2)[..., : self.inputs]

    def dequantise(self) -> Tensor:
        """FP32 ``[..., N, K]``."""
        scales, leasts = (
            x.repeat_interleave(self.group, dim=-1)[..., : self.inputs] for x in (self.scales, self.leasts)
        )
        return self.numbers().float() * scales + leasts


def quantise_int8(w: Tensor) -> Int8:
    """Round a weight ``[..., N, K]`` to INT8, a scale an output. A row that is not finite becomes NaN."""
    w = w.float()
    amax = w.abs().amax(dim=-1, keepdim=True)
    scales = torch.where(amax == 0, 1.0, amax / 127).clamp(min=torch.finfo(torch.float32).tiny)
    scales = torch.where(amax.isfinite(), scales, torch.nan)
    values = (w / scales).nan_to_num(0.0).round().clamp(-127, 127).to(torch.int8)
    return Int8(values, scales)


def quantise_int4(w: Tensor, group: int = 128) -> Int4:
    """Round a weight ``[..., N, K]`` to INT4, a scale and a least value a group; NaN where one is not finite.

    Raises :class:`UserError` for a group other than 32, 64 or 128.
    """
    if group not in GROUPS:
        raise UserError(f"group ({group}) must be one of {', '.join(map(str, GROUPS))}; 128 is customary")
    w = w.float()
    inputs = w.shape[-1]
    # The edge group is filled up with its own last number, which changes neither its least nor its greatest.
    padded = F.pad(w.flatten(0, -2), (0, -inputs % group), mode="replicate").unflatten(0, w.shape[:-1])
    grouped = padded.unflatten(-1, (-1, group))
    least, greatest = grouped.aminmax(dim=-1)
    scales = ((greatest - least) / 15).clamp(min=torch.finfo(torch.float32).tiny)
    scales = torch.where(greatest == least, 1.0, scales)
    scales = torch.where((least.isfinite() & greatest.isfinite()), scales, torch.nan)
    numbers = ((grouped - least[..., None]) / scales[..., None]).nan_to_num(0.0).round()
    codes = numbers.clamp(0, 15).to(torch.uint8).flatten(-2)[..., :inputs]
    codes = F.pad(codes, (0, -inputs % SPAN))
    low, high = codes.unflatten(-1, (-1, 2, SPAN // 2)).unbind(-2)
    return Int4((low | (high << 4)).flatten(-2), scales, least, group, inputs)
