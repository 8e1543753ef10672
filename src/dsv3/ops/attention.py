"""Causal attention over expanded heads, optionally within documents only (floor 1).

Shapes: B batch, H heads, T time, Q query/key width, V value width, G = B H, S keys a block of queries sees.

On a CPU, FP32 attention runs by blocks of queries against the keys they may see, as batched matrix products
and torch's fused softmax; the backward makes the weights again. It needs no equal widths of keys and values
and no T x T matrix, and takes about 0.7 of the time of torch's flash kernel there (docs/log.md).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 128  # queries at once
BLOCK_ELEMENTS = 1 << 19  # scores at once: 2 MiB, so that they stay in a core's own cache


def document_mask(documents_BT: Tensor) -> Tensor:
    """Boolean ``[B, 1, T, T]``: true where a query may see a key (same document, not later)."""
    length = documents_BT.shape[1]
    same = documents_BT[:, None, :, None] == documents_BT[:, None, None, :]
    earlier = torch.ones(length, length, dtype=torch.bool, device=documents_BT.device).tril()
    return same & earlier


def causal_attention_reference(
    q_BHTQ: Tensor, k_BHTQ: Tensor, v_BHTV: Tensor, scale: float, mask_B1TT: Tensor | None = None
) -> Tensor:
    """The specification: scores, softmax in FP32, weighted sum of values."""
    scores = (q_BHTQ @ k_BHTQ.transpose(-1, -2)).float() * scale
    if mask_B1TT is None:
        length = q_BHTQ.shape[2]
        mask_B1TT = torch.ones(length, length, dtype=torch.bool, device=q_BHTQ.device).tril()
    weights = scores.masked_fill(~mask_B1TT, float("-inf")).softmax(dim=-1)
    return weights.to(v_BHTV.dtype) @ v_BHTV


def _blocks(groups: int, length: int) -> Iterator[tuple[slice, slice]]:
    """Which heads and which queries are worked on together; any length fits the bound on the scores."""
    queries = max(1, min(BLOCK, length, BLOCK_ELEMENTS // length))
    heads = max(1, BLOCK_ELEMENTS // (queries * length))
    for first in range(0, groups, heads):
        for start in range(0, length, queries):
            yield slice(first, min(first + heads, groups)), slice(start, min(start + queries, length))


def _weights(q: Tensor, k: Tensor, scale: float, mask: Tensor | None, block: slice) -> Tensor:
    """Attention weights of some heads' block of queries over the keys up to its end: ``[G, block, S]``."""
    scores = torch.baddbmm(q.new_empty(1, 1, 1), q, k.transpose(1, 2), beta=0, alpha=scale)
    if mask is None:
        later = torch.full((q.shape[1], q.shape[1]), float("-inf"), dtype=q.dtype)
        scores[..., block].add_(later.triu_(1))
    else:
        scores.masked_fill_(~mask, float("-inf"))
    return torch.softmax(scores, dim=-1, out=scores)


def _cut(mask_B1TT: Tensor | None, groups: int, heads: slice, block: slice) -> Tensor | None:
    """The mask of these heads and queries: ``[G, block, S]``; heads of one sequence share its mask."""
    if mask_B1TT is None:
        return None
    sequence = torch.arange(heads.start, heads.stop) // (groups // mask_B1TT.shape[0])
    return mask_B1TT[sequence, 0, block, : block.stop]


def _flat(x_BHTX: Tensor) -> Tensor:
    return x_BHTX.reshape(-1, *x_BHTX.shape[2:])


@torch.library.custom_op("dsv3::causal_attention", mutates_args=(), device_types="cpu")
def _attention(q: Tensor, k: Tensor, v: Tensor, scale: float, mask_B1TT: Tensor | None) -> Tensor:
    out = v.new_empty(v.shape)
    q_GTQ, k_GTQ, v_GTV, out_GTV = _flat(q), _flat(k), _flat(v), out.view(-1, *v.shape[2:])
    groups, length = q_GTQ.shape[:2]
    for heads, block in _blocks(groups, length):
        keys, mask = k_GTQ[heads, : block.stop], _cut(mask_B1TT, groups, heads, block)
        weights = _weights(q_GTQ[heads, block], keys, scale, mask, block)
        out_GTV[heads, block] = torch.bmm(weights, v_GTV[heads, : block.stop])
    return out


@_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, scale: float, mask_B1TT: Tensor | None) -> Tensor:
    return v.new_empty(v.shape)


@torch.library.custom_op("dsv3::causal_attention_backward", mutates_args=(), device_types="cpu")
def _attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, scale: float, mask_B1TT: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    grad_q, grad_k, grad_v = q.new_empty(q.shape), k.new_zeros(k.shape), v.new_zeros(v.shape)
    q_GTQ, k_GTQ, v_GTV, g_GTV = _flat(q), _flat(k), _flat(v), _flat(grad)
    dq, dk, dv = (x.view(-1, *x.shape[2:]) for x in (grad_q, grad_k, grad_v))
    along_GT1 = (g_GTV * _flat(out)).sum(dim=-1, keepdim=True)
    groups, length = q_GTQ.shape[:2]
    for heads, block in _blocks(groups, length):
        seen = slice(0, block.stop)
        q_block, g_block, keys = q_GTQ[heads, block], g_GTV[heads, block], k_GTQ[heads, seen]
        weights = _weights(q_block, keys, scale, _cut(mask_B1TT, groups, heads, block), block)
        dv[heads, seen].baddbmm_(weights.transpose(1, 2), g_block)
        scores = torch.bmm(g_block, v_GTV[heads, seen].transpose(1, 2))
        scores.sub_(along_GT1[heads, block]).mul_(weights)
        dq[heads, block] = torch.bmm(scores, keys).mul_(scale)
        dk[heads, seen].baddbmm_(scores.transpose(1, 2), q_block, alpha=scale)
    return grad_q, grad_k, grad_v


@_attention_backward.register_fake
def _(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, scale: float, mask_B1TT: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    q, k, v, ctx.scale, mask = inputs
    ctx.save_for_backward(q, k, v, output, mask)


def _gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, out, mask = ctx.saved_tensors
    return (*_attention_backward(grad, q, k, v, out, ctx.scale, mask), None, None)


_attention.register_autograd(_gradient, setup_context=_save)


def causal_attention(
    q_BHTQ: Tensor, k_BHTQ: Tensor, v_BHTV: Tensor, scale: float, mask_B1TT: Tensor | None = None
) -> Tensor:
    """Causal attention ``[B, H, T, V]``; with a mask, attention where the mask is true (each row somewhere).

    Any float dtype; softmax in FP32 (FP64 for FP64).
    """
    on_cpu = q_BHTQ.device.type == "cpu"
    if on_cpu and q_BHTQ.dtype in (torch.float32, torch.float64):
        return _attention(q_BHTQ, k_BHTQ, v_BHTV, scale, mask_B1TT)
    width = v_BHTV.shape[-1]
    pad = q_BHTQ.shape[-1] - width if on_cpu else 0  # torch's flash kernel on a CPU wants equal widths
    if pad < 0:  # values wider than keys: pad those instead, zeros add nothing to a score
        q_BHTQ, k_BHTQ = F.pad(q_BHTQ, (0, -pad)), F.pad(k_BHTQ, (0, -pad))
    elif pad > 0:
        v_BHTV = F.pad(v_BHTV, (0, pad))
    out = F.scaled_dot_product_attention(
        q_BHTQ, k_BHTQ, v_BHTV, attn_mask=mask_B1TT, is_causal=mask_B1TT is None, scale=scale
    )
    return out[..., :width]
