"""The three products of a Linear on quantised operands: forward, dgrad, wgrad (report 3.3; floor 1).

On a GPU ``backend`` chooses among kernels that are tested against it.

Shapes: M rows (tokens), N outputs, K inputs, E experts. With ``counts_E`` (rows an expert) rows are sorted by
expert and weights stacked; without it there is one weight.

The specification is to dequantise both operands and multiply in FP32, and on a CPU, which has no FP8
arithmetic, that is also what runs. Tensor cores add FP8 products with about 14 bits and lose the rest unless
partial sums move to FP32 every 128 terms; ``Accumulation`` can imitate that, slowly, to see what it does.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from dsv3.ops import backend
from dsv3.ops.blocks import WHOLE, Quantised, dequantise
from dsv3.ops.grouped import grouped_dgrad, grouped_linear, grouped_wgrad

Accumulation = Literal["promoted", "emulated", "emulated-unpromoted"]

PROMOTE_EVERY = 128  # terms added before a partial sum moves to FP32 (report 3.3.2)
ADDED_AT_ONCE = 32  # terms of one tensor-core instruction in FP8
KEPT_BITS = 14  # of a sum inside Hopper's tensor cores (report 3.3.2)


def truncate(x: Tensor) -> Tensor:
    """FP32 numbers cut, not rounded, to 14 significant bits."""
    return (x.view(torch.int32) & -(1 << (24 - KEPT_BITS))).view(torch.float32)


def limited_product(a_MK: Tensor, b_KN: Tensor, promote: bool) -> Tensor:
    """``a b`` as tensor cores add it: 32 terms at once into a sum of 14 bits.

    With ``promote`` that sum moves to FP32 every 128 terms.
    """
    total = a_MK.new_zeros(a_MK.shape[0], b_KN.shape[1])
    partial = torch.zeros_like(total)
    for first in range(0, a_MK.shape[1], ADDED_AT_ONCE):
        terms = slice(first, first + ADDED_AT_ONCE)
        partial = truncate(torch.addmm(partial, a_MK[:, terms], b_KN[terms]))
        if promote and (first + ADDED_AT_ONCE) % PROMOTE_EVERY == 0:
            total += partial
            partial.zero_()
    return total + partial


def _on_gpu(accumulation: Accumulation, *operands: Quantised) -> bool:
    """Whether a GPU's own FP8 product does what is asked."""
    return accumulation == "promoted" and all(x.values.is_cuda and x.tile != WHOLE for x in operands)


def _one_by_one(left: list[Tensor], right: list[Tensor], accumulation: Accumulation) -> list[Tensor]:
    promote = accumulation == "emulated"
    return [limited_product(a, b, promote) for a, b in zip(left, right, strict=True)]


def _rows(x_MX: Tensor, counts_E: Tensor | None) -> list[Tensor]:
    return [x_MX] if counts_E is None else list(x_MX.split(counts_E.tolist()))


def _weights(w: Tensor) -> list[Tensor]:
    return [w] if w.dim() == 2 else list(w.unbind())


def linear(
    x: Quantised,
    w: Quantised,
    counts_E: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    accumulation: Accumulation = "promoted",
) -> Tensor:
    """``y = x w^T``: ``[M, K]`` and ``[N, K]`` (or ``[E, N, K]``) to ``[M, N]`` in ``dtype``."""
    if _on_gpu(accumulation, x, w):
        return backend.linear(x, w, counts_E, dtype)
    x_MK, w_NK = dequantise(x), dequantise(w)
    if accumulation != "promoted":
        right = [m.T for m in _weights(w_NK)]
        return torch.cat(_one_by_one(_rows(x_MK, counts_E), right, accumulation)).to(dtype)
    return (x_MK @ w_NK.T if counts_E is None else grouped_linear(x_MK, w_NK, counts_E)).to(dtype)


def dgrad(
    g: Quantised,
    w: Quantised,
    counts_E: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    accumulation: Accumulation = "promoted",
) -> Tensor:
    """``g w``: the gradient of the rows, ``[M, N]`` to ``[M, K]`` in ``dtype``."""
    if _on_gpu(accumulation, g, w):
        return backend.dgrad(g, w, counts_E, dtype)
    g_MN, w_NK = dequantise(g), dequantise(w)
    if accumulation != "promoted":
        return torch.cat(_one_by_one(_rows(g_MN, counts_E), _weights(w_NK), accumulation)).to(dtype)
    return (g_MN @ w_NK if counts_E is None else grouped_dgrad(g_MN, w_NK, counts_E)).to(dtype)


def wgrad(
    g: Quantised, x: Quantised, counts_E: Tensor | None = None, accumulation: Accumulation = "promoted"
) -> Tensor:
    """``g^T x``: the gradient of the weights, FP32 ``[N, K]`` (or ``[E, N, K]``, zero for an idle expert)."""
    if _on_gpu(accumulation, g, x):
        return backend.wgrad(g, x, counts_E)
    g_MN, x_MK = dequantise(g), dequantise(x)
    if accumulation != "promoted":
        left = [m.T for m in _rows(g_MN, counts_E)]
        found = _one_by_one(left, _rows(x_MK, counts_E), accumulation)
        return found[0] if counts_E is None else torch.stack(found)
    return g_MN.T @ x_MK if counts_E is None else grouped_wgrad(g_MN, x_MK, counts_E)
