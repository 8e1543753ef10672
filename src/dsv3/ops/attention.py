"""Causal attention over expanded heads, optionally within documents only (floor 1).

There may be more keys than queries: the queries are then the last ones of the sequence.

Shapes: B batch, H heads, T time, Q query/key width, V value width, G heads at once, S keys a block of
queries sees (and the keys of all), X any width.

On a CPU, FP32 attention runs by blocks of queries against the keys they may see, as batched matrix products
and torch's fused softmax. The backward makes the weights again, whole rows of them, so it needs neither the
output nor a running maximum. It asks for no equal widths of keys and values and no T x T matrix, not even of
documents, and takes about 0.7 of the time of torch's flash kernel there (docs/log.md).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 128  # queries at once
BLOCK_ELEMENTS = 1 << 19  # scores at once: 2 MiB, so that they stay in a core's own cache


def causal_mask(queries: int, keys: int, device: torch.device) -> Tensor:
    """Boolean ``[queries, keys]``: where one of the last ``queries`` of ``keys`` tokens may see a key."""
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)


def document_mask(documents_BS: Tensor, queries: int) -> Tensor:
    """Boolean ``[B, 1, queries, S]``: where one of the last ``queries`` tokens may see a key."""
    own_BT = documents_BS[:, documents_BS.shape[1] - queries :]
    same = own_BT[:, None, :, None] == documents_BS[:, None, None, :]
    return same & causal_mask(queries, documents_BS.shape[1], documents_BS.device)


def causal_attention_reference(
    q_BHTQ: Tensor, k_BHTQ: Tensor, v_BHTV: Tensor, scale: float, documents_BS: Tensor | None = None
) -> Tensor:
    """The specification: scores, softmax in FP32, weighted sum of values."""
    scores = (q_BHTQ @ k_BHTQ.transpose(-1, -2)).float() * scale
    queries, keys = q_BHTQ.shape[2], k_BHTQ.shape[2]
    if documents_BS is None:
        mask = causal_mask(queries, keys, q_BHTQ.device)
    else:
        mask = document_mask(documents_BS, queries)
    weights = scores.masked_fill(~mask, float("-inf")).softmax(dim=-1)
    return weights.to(v_BHTV.dtype) @ v_BHTV


def _blocks(q: Tensor, k: Tensor) -> Iterator[tuple[int, slice, slice, slice]]:
    """Which heads and queries of a sequence are worked on together, and the keys that those see.

    Any length fits the bound on scores.
    """
    (batch, heads, length, _), keys = q.shape, k.shape[2]
    queries = max(1, min(BLOCK, length, BLOCK_ELEMENTS // keys))
    together = max(1, min(heads, BLOCK_ELEMENTS // (queries * keys)))
    for sequence in range(batch):
        for first in range(0, heads, together):
            for start in range(0, length, queries):
                stop = min(start + queries, length)
                yield (
                    sequence,
                    slice(first, min(first + together, heads)),
                    slice(start, stop),
                    slice(0, keys - length + stop),
                )


class _Weights:
    """Attention weights of some heads' block of queries over the keys up to its end: ``[G, block, S]``."""

    def __init__(self, q: Tensor, k: Tensor, scale: float, documents_BS: Tensor | None):
        self.q, self.k, self.scale, self.documents = q, k, scale, documents_BS
        size = min(BLOCK, q.shape[2])
        self.later = torch.full((size, size), float("-inf"), dtype=q.dtype).triu_(1)

    def __call__(self, sequence: int, heads: slice, block: slice, seen: slice) -> Tensor:
        q, k = self.q[sequence, heads, block], self.k[sequence, heads, seen]
        scores = torch.baddbmm(q.new_empty(1, 1, 1), q, k.transpose(1, 2), beta=0, alpha=self.scale)
        scores[..., -q.shape[1] :].add_(self.later[: q.shape[1], : q.shape[1]])
        if self.documents is not None:
            documents_S = self.documents[sequence, seen]
            scores.masked_fill_(documents_S[-q.shape[1] :, None] != documents_S, float("-inf"))
        return torch.softmax(scores, dim=-1, out=scores)


def _by_token(like_BHTX: Tensor, *, zero: bool = False) -> Tensor:
    """``[B, H, T, X]`` in the order the neighbours want, ``[B, T, H, X]``: no copy on the way in or out."""
    batch, heads, length, width = like_BHTX.shape
    make = like_BHTX.new_zeros if zero else like_BHTX.new_empty
    return make(batch, length, heads, width).transpose(1, 2)


def _output(q: Tensor, v: Tensor) -> Tensor:
    """Room for the result: as many rows as queries, as wide as values."""
    return _by_token(v[:, :, : q.shape[2]])


@torch.library.custom_op("dsv3::causal_attention", mutates_args=(), device_types="cpu")
def _attention(q: Tensor, k: Tensor, v: Tensor, scale: float, documents_BS: Tensor | None) -> Tensor:
    out, weights = _output(q, v), _Weights(q, k, scale, documents_BS)
    for b, heads, block, seen in _blocks(q, k):
        out[b, heads, block] = torch.bmm(weights(b, heads, block, seen), v[b, heads, seen])
    return out


@_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, scale: float, documents_BS: Tensor | None) -> Tensor:
    return _output(q, v)


@torch.library.custom_op("dsv3::causal_attention_backward", mutates_args=(), device_types="cpu")
def _attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float, documents_BS: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    grad_q, grad_k, grad_v = _by_token(q), _by_token(k, zero=True), _by_token(v, zero=True)
    weights = _Weights(q, k, scale, documents_BS)
    for b, heads, block, seen in _blocks(q, k):
        q_block, g_block = q[b, heads, block], grad[b, heads, block]
        weight = weights(b, heads, block, seen)
        # A batched product and a sum, not baddbmm_: into a strided result that would run head by head.
        grad_v[b, heads, seen] += torch.bmm(weight.transpose(1, 2), g_block)
        scores = torch.bmm(g_block, v[b, heads, seen].transpose(1, 2))
        scores = torch.ops.aten._softmax_backward_data(scores, weight, -1, scores.dtype)
        grad_q[b, heads, block] = torch.bmm(scores, k[b, heads, seen]).mul_(scale)
        grad_k[b, heads, seen].add_(torch.bmm(scores.transpose(1, 2), q_block), alpha=scale)
    return grad_q, grad_k, grad_v


@_attention_backward.register_fake
def _(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float, documents_BS: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    return _by_token(q), _by_token(k), _by_token(v)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    q, k, v, ctx.scale, documents = inputs
    ctx.save_for_backward(q, k, v, documents)


def _gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, documents = ctx.saved_tensors
    return (*_attention_backward(grad, q, k, v, ctx.scale, documents), None, None)


_attention.register_autograd(_gradient, setup_context=_save)


def causal_attention(
    q_BHTQ: Tensor, k_BHTQ: Tensor, v_BHTV: Tensor, scale: float, documents_BS: Tensor | None = None
) -> Tensor:
    """Causal attention ``[B, H, T, V]``; with documents, to keys of the query's own document only.

    ``k_BHTQ`` and ``v_BHTV`` may have more tokens than ``q_BHTQ``, which are then the last of them.
    ``documents_BS``: the document of each key, any integers. Away from a CPU, and for BF16 on one, a mask
    ``[B, 1, T, S]`` is made of them.

    Any float dtype; softmax in FP32 (FP64 for FP64).
    """
    on_cpu = q_BHTQ.device.type == "cpu"
    if on_cpu and q_BHTQ.dtype in (torch.float32, torch.float64):
        return _attention(q_BHTQ, k_BHTQ, v_BHTV, scale, documents_BS)
    width = v_BHTV.shape[-1]
    queries, keys, mask = q_BHTQ.shape[2], k_BHTQ.shape[2], None
    if documents_BS is not None:
        mask = document_mask(documents_BS, queries)
    elif queries < keys:  # torch's own mask has queries come first
        mask = causal_mask(queries, keys, q_BHTQ.device)
    pad = q_BHTQ.shape[-1] - width if on_cpu else 0  # torch's flash kernel on a CPU wants equal widths
    if pad < 0:  # values wider than keys: pad those instead, zeros add nothing to a score
        q_BHTQ, k_BHTQ = F.pad(q_BHTQ, (0, -pad)), F.pad(k_BHTQ, (0, -pad))
    elif pad > 0:
        v_BHTV = F.pad(v_BHTV, (0, pad))
    out = F.scaled_dot_product_attention(
        q_BHTQ, k_BHTQ, v_BHTV, attn_mask=mask, is_causal=mask is None, scale=scale
    )
    return out[..., :width]
