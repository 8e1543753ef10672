"""Number formats of fewer bits, and rounding to them (report 3.3; floor 1).

E4M3 for matrix products, E5M2 beside it, E5M6 for the input of the Linear after attention (no hardware and
no torch dtype knows it: twelve bits, kept two numbers in three bytes), and powers of two for scales (UE8M0
holds nothing else). Rounding is to the nearest, ties to even; what is too large becomes the largest.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Format:
    """A sign bit, ``exponent`` bits and ``mantissa`` bits; ``largest`` is the greatest finite number.

    ``dtype``: how torch holds it; None where torch has no such dtype (:func:`pack` then makes bytes).
    """

    name: str
    exponent: int
    mantissa: int
    largest: float
    dtype: torch.dtype | None

    @property
    def smallest_exponent(self) -> int:
        """Exponent of the smallest normal number; below it the spacing stays the same."""
        return 2 - (1 << (self.exponent - 1))

    @property
    def bits(self) -> int:
        """Bits a number."""
        return 1 + self.exponent + self.mantissa


E4M3 = Format("e4m3", 4, 3, 448.0, torch.float8_e4m3fn)
E5M2 = Format("e5m2", 5, 2, 57344.0, torch.float8_e5m2)
E5M6 = Format("e5m6", 5, 6, 65024.0, None)
FORMATS = {kind.name: kind for kind in (E4M3, E5M2, E5M6)}


def round_to(x: Tensor, kind: Format) -> Tensor:
    """FP32 values on the format's grid, same shape: nearest, ties to even, clamped; NaN stays NaN."""
    clamped = x.float().clamp(-kind.largest, kind.largest)
    exponent = (clamped.view(torch.int32) >> 23) & 0xFF
    exponent = exponent.clamp(min=127 + kind.smallest_exponent) - kind.mantissa
    spacing = (exponent << 23).view(torch.float32)
    return torch.round(clamped / spacing) * spacing


def power_of_two(scale: Tensor) -> Tensor:
    """The power of two at or above each positive, normal FP32 number; infinity and NaN stay what they are."""
    bits = scale.view(torch.int32)
    return torch.where(scale.isfinite(), ((bits + 0x7FFFFF) & 0x7F800000).view(torch.float32), scale)


def pack(x: Tensor, kind: Format) -> Tensor:
    """Store FP32 numbers in the format, rounding them: torch's dtype, or for E5M6 bytes.

    E5M6 takes half its last dimension again: ``[..., W]`` becomes uint8 ``[..., 3 ceil(W / 2)]``; of a pair
    (a, b) the bytes are a's low eight bits, a's high four below b's low four, b's high eight.
    """
    if kind.dtype is not None:
        return x.float().clamp(-kind.largest, kind.largest).to(kind.dtype)
    # FP16 has the same exponents and four bits more of mantissa: its upper twelve bits are E5M6.
    halves = round_to(x, kind).to(torch.float16).view(torch.int16).to(torch.int32)
    code = (halves & 0xFFFF) >> 4
    if code.shape[-1] % 2:
        code = torch.nn.functional.pad(code, (0, 1))
    first, second = code.unflatten(-1, (-1, 2)).unbind(-1)
    middle = (first >> 8) | ((second & 0xF) << 4)
    return torch.stack((first & 0xFF, middle, second >> 4), dim=-1).flatten(-2).to(torch.uint8)


def unpack(packed: Tensor, kind: Format, width: int) -> Tensor:
    """FP32 numbers of what :func:`pack` made; ``width`` is the last dimension's, before packing."""
    if kind.dtype is not None:
        return packed.float()
    low, middle, high = packed.to(torch.int32).unflatten(-1, (-1, 3)).unbind(-1)
    code = torch.stack((low | ((middle & 0xF) << 8), (middle >> 4) | (high << 4)), dim=-1).flatten(-2)
    signed = (code[..., :width] << 4).to(torch.int16)  # wraps into the sign bit, as it should
    return signed.view(torch.float16).float()
