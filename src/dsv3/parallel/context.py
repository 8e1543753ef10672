"""Context parallel: the neighbours of a context share each sequence, a part of its tokens each.

Shapes: B sequences, T tokens of a sequence, P ranks of the context, L = T / 2P tokens of a chunk, X any width
(of a batch: with the extra tokens that follow), C latent, R rope, H heads, E experts.

A sequence is cut into 2P chunks, and rank r has chunks r and 2P - 1 - r, so that causal attention is as much
work for one rank as for another. The two are rows of their own: a batch ``[B, T]`` becomes ``[2B, L]``, early
chunks first. Everything but attention and the balance loss goes token by token and knows nothing of it; the
tokens that MTP looks up follow a chunk as they follow a sequence.

Attention gathers the latents and shared keys of all tokens, C + R numbers each (576 in V3, where all heads'
keys and values are 40,960), and expands them on every rank; gradients come home in a sum that scatters.

A model in evaluation reads whole sequences: only while it trains are they cut.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dsv3.data.loader import Batch
from dsv3.data.targets import positions
from dsv3.model import DeepSeekV3
from dsv3.model.attention import MLA, Context, expanded_attention, keys_and_values
from dsv3.model.moe import balance_loss, hits
from dsv3.ops.attention import causal_attention
from dsv3.parallel.clock import Clock
from dsv3.parallel.collectives import all_gather, reduce_scatter


def chunks(rank: int, ranks: int) -> tuple[int, int]:
    """Which of a sequence's 2P chunks a rank has."""
    return rank, 2 * ranks - 1 - rank


def part(batch: Batch, length: int, rank: int, ranks: int) -> Batch:
    """A rank's two chunks of sequences of ``length`` tokens, each with the extra tokens that follow it."""
    rows, width = batch.tokens_BT.shape
    size = length // (2 * ranks)
    where = positions(batch, width)
    if where is None:
        where = torch.arange(width, device=batch.tokens_BT.device).expand(rows, width)

    def cut(x_BX: Tensor | None) -> Tensor | None:
        if x_BX is None:
            return None
        starts = [chunk * size for chunk in chunks(rank, ranks)]
        return torch.cat([x_BX[:, start : start + size + width - length] for start in starts])

    tokens = cut(batch.tokens_BT)
    assert tokens is not None
    return Batch(tokens, cut(batch.documents_BT), cut(batch.bears_BT), cut(where))


class _Gather(torch.autograd.Function):
    """``[...]`` of every rank, ``[P, ...]``; the gradients of all ranks are summed, in FP32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup, clock: Clock) -> Tensor:
        ctx.group, ctx.clock = group, clock
        everyone = x.new_empty(dist.get_world_size(group), *x.shape)
        with clock.waiting("in the gathering of latents"):
            all_gather(everyone.view(-1), x.contiguous().view(-1), group=group)
        return everyone

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        own = torch.empty(grad.shape[1:], dtype=torch.float32, device=grad.device)
        with ctx.clock.waiting("in the sum of latents' gradients"):
            reduce_scatter(own.view(-1), grad.float().contiguous().view(-1), group=ctx.group)
        return own.to(grad.dtype), None, None


def in_order(rows_PBLX: Tensor) -> Tensor:
    """Whole sequences ``[B, T, X]`` from every rank's two chunks of them, ``[P, 2B, L, X]``."""
    early, late = rows_PBLX.unflatten(1, (2, -1)).unbind(1)
    return torch.cat((early, late.flip(0))).transpose(0, 1).flatten(1, 2)


class ContextParallel:
    """Attention and the balance loss over sequences of which this rank has two chunks."""

    def __init__(self, model: DeepSeekV3, group: dist.ProcessGroup, clock: Clock):
        self.model, self.group, self.clock = model, group, clock
        self.rank, self.ranks = dist.get_rank(group), dist.get_world_size(group)

    @torch.compiler.disable
    def attend(
        self, attention: MLA, q_BTHQ: Tensor, latent_BTC: Tensor, k_rope_BTR: Tensor, context: Context
    ) -> Tensor:
        """A core of :class:`dsv3.model.attention.MLA`."""
        if not self.model.training:
            return expanded_attention(attention, q_BTHQ, latent_BTC, k_rope_BTR, context)
        widths = [latent_BTC.shape[-1], k_rope_BTR.shape[-1]]
        packed = torch.cat((latent_BTC, k_rope_BTR), dim=-1)
        latent, k_rope = in_order(_Gather.apply(packed, self.group, self.clock)).split(widths, dim=-1)
        k_BHTQ, v_BHTV = (x.transpose(1, 2) for x in keys_and_values(attention, latent, k_rope))
        documents = context.documents_BT
        if documents is not None:
            documents = in_order(_Gather.apply(documents[..., None], self.group, self.clock))[..., 0]
        size, out = q_BTHQ.shape[1], []
        for chunk, q in zip(chunks(self.rank, self.ranks), q_BTHQ.chunk(2)):
            seen = slice(0, (chunk + 1) * size)
            visible = None if documents is None else documents[:, seen]
            k, v = k_BHTQ[:, :, seen], v_BHTV[:, :, seen]
            out.append(causal_attention(q.transpose(1, 2), k, v, attention.scale, visible))
        return torch.cat(out).transpose(1, 2).flatten(2)

    @torch.compiler.disable
    def balance_loss(self, scores_BTE: Tensor, chosen: int) -> Tensor:
        """This rank's part of :func:`dsv3.model.moe.balance_loss`: f of whole sequences, P of its tokens."""
        if not self.model.training:
            return balance_loss(scores_BTE, chosen)
        experts, tokens = scores_BTE.shape[-1], 2 * self.ranks * scores_BTE.shape[1]
        with torch.no_grad():
            hits_BE = hits(scores_BTE, chosen).unflatten(0, (2, -1)).sum(dim=0)
            with self.clock.waiting("in the sum of experts' hits"):
                dist.all_reduce(hits_BE, group=self.group)
            f_BE = hits_BE.repeat(2, 1) * (experts / (tokens * chosen))
        p_BE = (scores_BTE / scores_BTE.sum(dim=-1, keepdim=True)).sum(dim=1) / tokens
        return (f_BE * p_BE).sum(dim=-1).mean()


def apply(model: DeepSeekV3, group: dist.ProcessGroup, clock: Clock) -> None:
    """Let a model, or this rank's stages of it, train on the rows of :func:`part`."""
    parallel = ContextParallel(model, group, clock)
    for module in model.modules():
        if isinstance(module, MLA):
            module.core = parallel.attend
    for moe in model.moe_layers().values():
        moe.balance_loss = parallel.balance_loss
