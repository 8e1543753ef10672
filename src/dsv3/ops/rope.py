"""Rotary positions with YaRN (report 2.1.1 and 4.3).

Shapes: T time, P pairs (half the rope width), ... any leading dimensions.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from dsv3.config.model import ModelConfig, yarn_mscale


def inverse_frequencies(config: ModelConfig) -> tuple[Tensor, float]:
    """Angle a token of each pair, FP32 ``[P]`` on the CPU, and YaRN's factor on cos and sin.

    With YaRN, pairs that turn more than ``beta_fast`` times within the original length keep their
    frequency, those that turn less than ``beta_slow`` times are slowed by ``factor``, the rest are mixed.
    """
    width = config.qk_rope_head_dim
    exponents = torch.arange(0, width, 2, dtype=torch.float32, device="cpu") / width
    frequency_P = 1.0 / config.rope_theta**exponents
    yarn = config.rope_scaling
    if yarn is None:
        return frequency_P, 1.0

    def pair_turning(rotations: float) -> float:
        """The (fractional) pair that makes this many rotations within the original length."""
        length = yarn.original_max_position_embeddings / (rotations * 2 * math.pi)
        return width * math.log(length) / (2 * math.log(config.rope_theta))

    low = max(math.floor(pair_turning(yarn.beta_fast)), 0)
    high = min(math.ceil(pair_turning(yarn.beta_slow)), width - 1)
    span = max(high - low, 0.001)  # never divide by zero
    slowed_P = ((torch.arange(width // 2, dtype=torch.float32, device="cpu") - low) / span).clamp(0, 1)
    frequency_P = frequency_P * (1 - slowed_P) + frequency_P / yarn.factor * slowed_P
    if yarn.mscale and yarn.mscale_all_dim:
        factor = yarn_mscale(yarn.factor, yarn.mscale) / yarn_mscale(yarn.factor, yarn.mscale_all_dim)
    else:
        factor = yarn_mscale(yarn.factor, 1.0)
    return frequency_P, factor


def rotations(positions: Tensor, frequency_P: Tensor, factor: float) -> Tensor:
    """Cosines and sines of integer positions ``[...]`` as one FP32 tensor ``[..., P, 2]``."""
    angle = positions[..., None].float() * frequency_P.to(positions.device)
    return torch.stack((angle.cos() * factor, angle.sin() * factor), dim=-1)


def rotate_reference(x: Tensor, rotation: Tensor) -> Tensor:
    """The specification of :func:`rotate`."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = rotation.to(x.dtype).unbind(-1)
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2)


def _turn(x: Tensor, turn: Tensor) -> Tensor:
    return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * turn).flatten(-2)


class _Rotate(torch.autograd.Function):
    """A pair is a complex number and a rotation a product: one pass forward, one backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rotation: Tensor) -> Tensor:
        turn = torch.view_as_complex(rotation.to(x.dtype))
        ctx.save_for_backward(turn)
        return _turn(x, turn)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (turn,) = ctx.saved_tensors
        pairs = torch.view_as_complex(grad.contiguous().unflatten(-1, (-1, 2)))
        return torch.view_as_real(pairs * turn.conj()).flatten(-2), None


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Turn interleaved pairs ``(x0, x1), (x2, x3), ...`` of ``x [..., 2P]`` by ``rotation [..., P, 2]``.

    ``rotation`` broadcasts against the leading dimensions of ``x``; the result has ``x``'s dtype.
    """
    exact = x.dtype in (torch.float32, torch.float64)
    even_strides = x.stride(-1) == 1 and all(s % 2 == 0 for s in (*x.stride()[:-1], x.storage_offset()))
    if exact and even_strides and not torch.compiler.is_compiling():
        if not torch.is_grad_enabled():
            return _turn(x, torch.view_as_complex(rotation.to(x.dtype)))
        return _Rotate.apply(x, rotation)
    return rotate_reference(x, rotation)
