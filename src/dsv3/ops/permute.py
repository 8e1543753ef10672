"""Gathering the rows each expert works on, and the weighted sum back (floor 1).

Shapes: N tokens, K experts a token, M = N K rows sorted by expert, D hidden.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def expert_order(indices_NK: Tensor) -> tuple[Tensor, Tensor]:
    """Rows sorted by expert, ties by token: ``(order_M, inverse_NK)``.

    ``order_M[m]`` is the flat (token, choice) pair that row m serves; ``inverse_NK[n, k]`` is the row of
    that pair. The sort is stable, so the result does not depend on threads.
    """
    order_M = indices_NK.flatten().argsort(stable=True)
    inverse_M = torch.empty_like(order_M)
    inverse_M[order_M] = torch.arange(order_M.numel(), device=order_M.device)
    return order_M, inverse_M.view_as(indices_NK)


def gather_rows_reference(x_ND: Tensor, order_M: Tensor, inverse_NK: Tensor) -> Tensor:
    """The specification of :func:`gather_rows`."""
    return x_ND[order_M // inverse_NK.shape[1]]


def weighted_sum_reference(y_MD: Tensor, gates_NK: Tensor, order_M: Tensor, inverse_NK: Tensor) -> Tensor:
    """The specification of :func:`weighted_sum`."""
    return (y_MD[inverse_NK] * gates_NK[..., None].to(y_MD.dtype)).sum(dim=1)


def sum_rows(y_MD: Tensor, inverse_NK: Tensor, gates_NK: Tensor | None) -> Tensor:
    """Sum of K rows a token, weighted if gates are given, without an N x K x D tensor on a CPU."""
    if y_MD.device.type == "cpu" and y_MD.dtype == torch.float32:
        return F.embedding_bag(inverse_NK, y_MD, mode="sum", per_sample_weights=gates_NK)
    y_NKD = y_MD[inverse_NK]
    if gates_NK is None:
        return y_NKD.sum(dim=1)
    return torch.bmm(gates_NK[:, None].to(y_MD.dtype), y_NKD)[:, 0]


def _row_products(
    grad_ND: Tensor, y_MD: Tensor, order_M: Tensor, inverse_NK: Tensor, dtype: torch.dtype
) -> Tensor:
    """``grad[n] . y[inverse[n, k]]``, ``[N, K]``: the gradient of each gate."""
    if y_MD.device.type == "cpu" and y_MD.dtype == torch.float32:  # what torch's embedding_bag calls itself
        tokens, chosen = inverse_NK.shape
        starts = torch.arange(0, tokens * chosen, chosen)
        token = torch.arange(tokens).repeat_interleave(chosen)
        products = torch.ops.aten._embedding_bag_per_sample_weights_backward(
            grad_ND, y_MD, inverse_NK.flatten(), starts, token, 0
        )
        return products.view_as(inverse_NK)
    grad_MD = grad_ND.index_select(0, order_M // inverse_NK.shape[1])
    return (grad_MD.to(dtype) * y_MD).sum(dim=-1)[inverse_NK]


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, order_M: Tensor, inverse_NK: Tensor) -> Tensor:
        ctx.save_for_backward(inverse_NK)
        return x_ND.index_select(0, order_M // inverse_NK.shape[1])

    @staticmethod
    def backward(ctx: Any, grad_MD: Tensor) -> tuple[Tensor, None, None]:
        (inverse_NK,) = ctx.saved_tensors
        return sum_rows(grad_MD, inverse_NK, None), None, None


class _WeightedSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_MD: Tensor, gates_NK: Tensor, order_M: Tensor, inverse_NK: Tensor) -> Tensor:
        ctx.save_for_backward(y_MD, gates_NK, order_M, inverse_NK)
        return sum_rows(y_MD, inverse_NK, gates_NK)

    @staticmethod
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor, Tensor, None, None]:
        y_MD, gates_NK, order_M, inverse_NK = ctx.saved_tensors
        grad_gates = _row_products(grad_ND, y_MD, order_M, inverse_NK, gates_NK.dtype)
        grad_y = grad_ND.index_select(0, order_M // inverse_NK.shape[1])
        grad_y *= gates_NK.flatten()[order_M, None].to(grad_y.dtype)
        return grad_y, grad_gates, None, None


def gather_rows(x_ND: Tensor, order_M: Tensor, inverse_NK: Tensor) -> Tensor:
    """``x_ND`` repeated for its K experts and sorted by expert: ``[M, D]``.

    The gradient is a gather and a sum (each token's rows are known), not a scatter with collisions.
    """
    if not torch.is_grad_enabled():
        return x_ND.index_select(0, order_M // inverse_NK.shape[1])
    return _Gather.apply(x_ND, order_M, inverse_NK)


def weighted_sum(y_MD: Tensor, gates_NK: Tensor, order_M: Tensor, inverse_NK: Tensor) -> Tensor:
    """Back from rows to tokens: ``out[n] = sum_k gates[n, k] y[inverse[n, k]]``, ``[N, D]`` in y's dtype."""
    if not torch.is_grad_enabled():
        return sum_rows(y_MD, inverse_NK, gates_NK)
    return _WeightedSum.apply(y_MD, gates_NK, order_M, inverse_NK)
