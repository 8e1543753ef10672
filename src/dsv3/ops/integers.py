"""INT8 a channel and INT4 a group: weights for serving, and activations rounded for them (floor 1).

Shapes: N outputs, K inputs, G groups of inputs, B blocks of 16 outputs; any leading dimensions (experts).

INT8 is symmetric: value = number * scale, a scale an output. INT4 has a step and a least value a group of 32,
64 or 128 inputs, since sixteen levels are too few to waste one side of them:
value = number * scale + least.

Activations are rounded to 8 bits too, with a scale for every 128 of a row, as the tiles of the report's FP8
are (3.3): sums of 128 products are then whole numbers, which processors make four at a time and exactly.

Bytes lie as products read them, front to back: 16 outputs beside each other, 4 inputs of each. The last block
is filled up with outputs of no meaning, and inputs are filled up to a multiple of 8.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dsv3.common.errors import UserError

GROUPS = (32, 64, 128)
LANES, QUAD = 16, 4  # outputs beside each other, inputs of one
SPAN = 2 * QUAD  # inputs are filled up to a multiple of it
ZERO = 128  # INT8's bytes are not negative: that which stands for 0
TILE = 128  # activations with one scale
SMALLEST_AMAX = 1e-30  # of a tile of activations: its inverse is finite


@dataclass(frozen=True)
class Int8:
    """``values`` uint8 ``[..., B, K / 4, 16, 4]``: numbers -127 .. 127, plus 128.

    ``scales`` FP32 ``[..., B, 16]``; ``outputs`` is N, ``inputs`` is K.
    """

    values: Tensor
    scales: Tensor
    outputs: int
    inputs: int

    def numbers(self) -> Tensor:
        """The numbers, FP32 ``[..., N, K]``."""
        return _rows(self.values, self.outputs, self.inputs).float() - ZERO

    def dequantise(self) -> Tensor:
        """FP32 ``[..., N, K]``."""
        return self.numbers() * self.scales.flatten(-2)[..., : self.outputs, None]


@dataclass(frozen=True)
class Int4:
    """Numbers 0 .. 15: ``values`` uint8 ``[..., B, K / 8, 16, 4]``.

    Of every 8 inputs, byte i of 4 holds number i in its low half and number i + 4 in its high half.
    ``scales`` and ``leasts`` FP32 ``[..., B, G, 16]``; ``outputs`` is N, ``inputs`` is K; the last group may
    be smaller.
    """

    values: Tensor
    scales: Tensor
    leasts: Tensor
    group: int
    outputs: int
    inputs: int

    def numbers(self) -> Tensor:
        """The numbers 0 .. 15, FP32 ``[..., N, K]``."""
        halves = torch.stack((self.values & 0xF, self.values >> 4), dim=-3).flatten(-4, -3)
        return _rows(halves, self.outputs, self.inputs).float()

    def dequantise(self) -> Tensor:
        """FP32 ``[..., N, K]``."""
        scales, leasts = (
            x.transpose(-1, -2).flatten(-3, -2)[..., : self.outputs, :].repeat_interleave(self.group, dim=-1)
            for x in (self.scales, self.leasts)
        )
        return self.numbers() * scales[..., : self.inputs] + leasts[..., : self.inputs]


def _blocks(x: Tensor, fill: int = 0) -> Tensor:
    """``[..., N, K]`` to ``[..., B, K / 4, 16, 4]``, filled up."""
    x = F.pad(x, (0, -x.shape[-1] % SPAN, 0, -x.shape[-2] % LANES), value=fill)
    return x.unflatten(-1, (-1, QUAD)).unflatten(-3, (-1, LANES)).transpose(-3, -2).contiguous()


def _rows(x: Tensor, outputs: int, inputs: int) -> Tensor:
    """``[..., B, K / 4, 16, 4]`` to ``[..., N, K]``."""
    return x.transpose(-3, -2).flatten(-4, -3).flatten(-2)[..., :outputs, :inputs]


def _lanes(x: Tensor) -> Tensor:
    """``[..., N, G]`` to ``[..., B, G, 16]``, filled up with zeros."""
    return F.pad(x, (0, 0, 0, -x.shape[-2] % LANES)).unflatten(-2, (-1, LANES)).transpose(-1, -2).contiguous()


def quantise_int8(w: Tensor) -> Int8:
    """Round a weight ``[..., N, K]`` to INT8, a scale an output. A row that is not finite becomes NaN."""
    w = w.float()
    amax = w.abs().amax(dim=-1, keepdim=True)
    scales = torch.where(amax == 0, 1.0, amax / 127).clamp(min=torch.finfo(torch.float32).tiny)
    scales = torch.where(amax.isfinite(), scales, torch.nan)
    numbers = (w / scales).nan_to_num(0.0).round().clamp(-127, 127)
    values = _blocks((numbers + ZERO).to(torch.uint8), ZERO)
    return Int8(values, _lanes(scales).squeeze(-2), *w.shape[-2:])


def quantise_int4(w: Tensor, group: int = 128) -> Int4:
    """Round a weight ``[..., N, K]`` to INT4, a scale and a least value a group; NaN where one is not finite.

    Raises :class:`UserError` for a group other than 32, 64 or 128.
    """
    if group not in GROUPS:
        raise UserError(f"group ({group}) must be one of {', '.join(map(str, GROUPS))}; 128 is customary")
    w = w.float()
    outputs, inputs = w.shape[-2:]
    # The edge group is filled up with its own last number, which changes neither its least nor its greatest.
    padded = F.pad(w.flatten(0, -2), (0, -inputs % group), mode="replicate").unflatten(0, w.shape[:-1])
    grouped = padded.unflatten(-1, (-1, group))
    least, greatest = grouped.aminmax(dim=-1)
    scales = ((greatest - least) / 15).clamp(min=torch.finfo(torch.float32).tiny)
    scales = torch.where(greatest == least, 1.0, scales)
    scales = torch.where((least.isfinite() & greatest.isfinite()), scales, torch.nan)
    numbers = ((grouped - least[..., None]) / scales[..., None]).nan_to_num(0.0).round()
    codes = numbers.clamp(0, 15).to(torch.uint8).flatten(-2)[..., :inputs]
    low, high = _blocks(codes).unflatten(-3, (-1, 2)).unbind(-3)
    return Int4(low | (high << 4), _lanes(scales), _lanes(least), group, outputs, inputs)


def rounded(x: Tensor) -> Tensor:
    """Activations ``[..., K]`` as integer products take them: 8 bits, a scale for every 128; FP32.

    A tile with an infinity or a NaN becomes NaN.
    """
    x = x.float()
    tiles = F.pad(x, (0, -x.shape[-1] % TILE)).unflatten(-1, (-1, TILE))
    amax = tiles.abs().amax(dim=-1, keepdim=True).clamp(min=SMALLEST_AMAX)
    return ((tiles * (127 / amax)).round() * (amax / 127)).flatten(-2)[..., : x.shape[-1]]
