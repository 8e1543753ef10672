"""Products with weights as they are kept for serving: dense FP32 or BF16, FP8, INT8 or INT4 (floor 1).

Nothing is dequantised beforehand: a step of decoding reads every weight once, so what it costs is the bytes.
With INT8 and INT4 the activations are rounded too (ops/integers.py). Where there is a compiler,
``native/decode.cpp`` does the work; each of its sums has one order, so that a row's result does not depend on
how many rows there are.

Shapes: N outputs, K inputs, E experts, M rows sorted by expert, D hidden, F expert hidden.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dsv3.ops.blocks import Quantised, dequantise
from dsv3.ops.integers import Int4, Int8, rounded
from dsv3.ops.native import decode

Weight = Tensor | Int8 | Int4  # a packed model's
AnyWeight = Weight | Quantised  # FP8, as released files have it


def dense(w: AnyWeight) -> Tensor:
    """FP32 ``[..., N, K]``."""
    if isinstance(w, Quantised):
        return dequantise(w)
    return w.float() if isinstance(w, Tensor) else w.dequantise()


def _taken(x: Tensor, w: AnyWeight) -> Tensor:
    """Activations as a product with ``w`` takes them, FP32."""
    return rounded(x) if isinstance(w, Int8 | Int4) else x.float()


def linear_reference(x: Tensor, w: AnyWeight) -> Tensor:
    """``x W^T``: ``[..., K] -> [..., N]`` in x's dtype; the specification."""
    return F.linear(_taken(x, w), dense(w)).to(x.dtype)


def experts_reference(
    x_MD: Tensor, counts_E: Tensor, gate: AnyWeight, up: AnyWeight, down: AnyWeight
) -> Tensor:
    """Each expert's SwiGLU of its rows: ``[M, D] -> [M, D]`` in x's dtype; the specification.

    ``gate`` and ``up`` are ``[E, F, D]``, ``down`` is ``[E, D, F]``.
    """
    g_EFD, u_EFD, d_EDF = dense(gate), dense(up), dense(down)
    pieces = [
        F.linear(_taken(F.silu(F.linear(x, g)) * F.linear(x, u), down), d)
        for x, g, u, d in zip(_taken(x_MD, gate).split(counts_E.tolist()), g_EFD, u_EFD, d_EDF)
    ]
    return torch.cat(pieces).to(x_MD.dtype)


def linear(x: Tensor, w: AnyWeight) -> Tensor:
    """``x W^T``: ``[..., K] -> [..., N]`` in x's dtype, sums in FP32."""
    if decode.usable(x) and decode.packs(w):
        return decode.linear(x, w).to(x.dtype)
    return linear_reference(x, w)


def experts(x_MD: Tensor, counts_E: Tensor, gate: AnyWeight, up: AnyWeight, down: AnyWeight) -> Tensor:
    """Each expert's SwiGLU of its rows (see :func:`experts_reference`)."""
    if decode.usable(x_MD) and all(map(decode.packs, (gate, up, down))):
        return decode.experts(x_MD, counts_E, gate, up, down).to(x_MD.dtype)
    return experts_reference(x_MD, counts_E, gate, up, down)
