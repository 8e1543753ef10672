"""Attention over the paged latent cache: what the engine puts at the ``MLA.core`` seam.

Two forms of the same product, from the same ``kv_b_proj`` (report 2.1.1). Expanded: make every head's keys
and values from the latents; cheaper when many tokens of a sequence are computed at once. Absorbed: fold the
key part of ``kv_b_proj`` into the query and the value part into the output, and attend to the latents
themselves; cheaper when few are. Which one a piece of a sequence takes follows from counting multiplications
(:func:`absorbs`), hence from the piece alone and never from what else is in the batch.

Sequences of a batch that have equally many new tokens (and, expanded, equally many keys) are one
:class:`Group` and run as one set of matrix products; keys of shorter sequences are padded and masked.

Shapes: N new tokens of the batch, S sequences of a group, T new tokens of each, L keys of each, H heads,
C latent, R rope, X = C + R, K nope, Q = K + R, V value width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import cast

import numpy as np
import torch
from torch import Tensor

from dsv3.model import DeepSeekV3
from dsv3.model.attention import MLA, Context, Core
from dsv3.model.layer import DecoderLayer
from dsv3.model.linear import Linear
from dsv3.ops.paged import Table
from dsv3.serve.absorbed import attend, attend_rows, by_blocks, fold, softmax, unfold
from dsv3.serve.cache import LatentCache

BLOCK = 256  # queries at once in the expanded form: bounds the scores held to H x 256 x L


@dataclass(frozen=True)
class Span:
    """Places ``start`` to ``stop`` of a sequence, to be computed; ``slots``: where its rows are, by place.

    Queries see keys from place ``first`` on, up to their own.
    """

    slots: np.ndarray
    start: int
    stop: int
    first: int = 0


@dataclass(frozen=True)
class Group:
    """Spans worked on together: rows ``begin`` to ``end`` of the flat batch.

    ``keys``: the cache rows of the S x L keys, or a table of their blocks, where nothing is gathered.
    ``later_STL``: added to the scores, -inf where a query must not look; None where every query may see every
    key, or a table tells it.
    """

    begin: int
    end: int
    sequences: int
    absorbed: bool
    keys: Tensor | slice | Table
    later_STL: Tensor | None


@dataclass(frozen=True)
class Pages(Context):
    """The context of a batch: positions, the cache, the slots its rows go to, and its groups."""

    cache: LatentCache = field(kw_only=True)
    slots_N: Tensor = field(kw_only=True)
    groups: tuple[Group, ...] = field(kw_only=True)


def absorbs(attention: MLA, queries: int, keys: int) -> bool:
    """Whether the absorbed form takes fewer multiplications (a head's, both sides)."""
    latent, rope = attention.kv_a_layernorm.weight.shape[0], attention.rope
    folding = latent * (attention.nope + attention.value)  # a query's, absorbed; a key's, expanded
    wide, narrow = 2 * latent + rope, attention.nope + rope + attention.value
    return queries * (folding + keys * wide) <= keys * folding + queries * keys * narrow


def arrange(model: DeepSeekV3, cache: LatentCache, spans: Sequence[Span]) -> tuple[list[int], Pages]:
    """The order in which the spans lie in the flat batch (as indices into ``spans``), and its context."""
    device = cache.rows.device
    attention = model.main_layers[0].self_attn
    tables = by_blocks(cache)
    together: dict[tuple[bool, int, int], list[int]] = {}
    for number, span in enumerate(spans):
        new, keys = span.stop - span.start, span.stop - span.first
        absorbed = absorbs(attention, new, keys)
        together.setdefault((absorbed, new, 0 if absorbed else keys), []).append(number)
    order, groups, begin = [], [], 0
    for (absorbed, new, _), members in together.items():
        order += members
        end = begin + new * len(members)
        own = [spans[number] for number in members]
        if absorbed and tables:
            groups.append(Group(begin, end, len(own), True, table_of(own, cache), None))
        else:
            groups.append(_group(begin, end, absorbed, own, device))
        begin = end
    pieces = [spans[number] for number in order]
    positions = np.concatenate([np.arange(s.start - s.first, s.stop - s.first) for s in pieces])
    slots = np.concatenate([s.slots[s.start : s.stop] for s in pieces])
    rotation = model.context(torch.from_numpy(positions)[None].to(device)).rotation
    return order, Pages(
        rotation, cache=cache, slots_N=torch.from_numpy(slots).to(device), groups=tuple(groups)
    )


def table_of(spans: Sequence[Span], cache: LatentCache) -> Table:
    """Where the keys of spans with the same first place lie."""
    (first,) = {span.first for span in spans}
    lengths = [span.stop - span.first for span in spans]
    return Table.of([span.slots for span in spans], lengths, cache.block, first, cache.rows.device)


def _group(begin: int, end: int, absorbed: bool, spans: list[Span], device: torch.device) -> Group:
    new = spans[0].stop - spans[0].start
    lengths = [span.stop - span.first for span in spans]
    longest = max(lengths)
    index = np.empty((len(spans), longest), dtype=np.int64)
    for row, span, length in zip(index, spans, lengths):
        row[:length] = span.slots[span.first : span.stop]
        row[length:] = row[0]  # a row of its own: masked, but what it holds must be a number
    flat = index.ravel()
    keys: Tensor | slice
    if len(spans) == 1 and flat[-1] - flat[0] == longest - 1 and (flat[1:] - flat[:-1] == 1).all():
        keys = slice(int(flat[0]), int(flat[-1]) + 1)
    else:
        keys = torch.from_numpy(flat).to(device)
    later = None
    if new > 1 or min(lengths) < longest:
        last_ST = torch.tensor(lengths)[:, None] - new + torch.arange(new)  # the key of the query itself
        hidden_STL = torch.arange(longest) > last_ST[..., None]
        later = torch.zeros(hidden_STL.shape).masked_fill_(hidden_STL, float("-inf")).to(device)
    return Group(begin, end, len(spans), absorbed, keys, later)


def expanded(
    q_STHQ: Tensor, k_rope_SLR: Tensor, kv_SLHY: Tensor, scale: float, later_STL: Tensor | None
) -> Tensor:
    """Attend with each head's own keys and values, ``kv = [k_nope ; v]``: ``[S, T, H V]``."""
    sequences, new, heads, width = q_STHQ.shape
    keys, nope = k_rope_SLR.shape[1], width - k_rope_SLR.shape[-1]
    k_nope, v = kv_SLHY.split([nope, kv_SLHY.shape[-1] - nope], dim=-1)
    k = torch.cat((k_nope, k_rope_SLR[:, :, None].expand(-1, -1, heads, -1)), dim=-1)
    k_SHQL, v_SHLV = k.permute(0, 2, 3, 1), v.transpose(1, 2)
    q_SHTQ = (q_STHQ * scale).transpose(1, 2)
    out = q_STHQ.new_empty(sequences, new, heads, v.shape[-1])
    for start in range(0, new, BLOCK):
        stop = min(start + BLOCK, new)
        seen = keys - new + stop  # no query of this block sees more
        scores = q_SHTQ[:, :, start:stop] @ k_SHQL[..., :seen]
        later = None if later_STL is None else later_STL[:, None, start:stop, :seen]
        weights = softmax(scores, later)
        out[:, start:stop] = (weights @ v_SHLV[:, :, :seen]).transpose(1, 2)
    return out.flatten(2)


class PagedAttention:
    """The core of one layer: writes the batch's rows to the cache, then attends to what is there.

    It holds no state of an engine, which all comes with the context: several may share a model. In any other
    context the layer attends as it did before.
    """

    def __init__(self, attention: MLA, layer: int):
        self.plain: Core = attention.core
        self.layer = layer
        self._dense = None if type(attention.kv_b_proj) is Linear else _weight_of(attention)

    def __call__(
        self, attention: MLA, q_BTHQ: Tensor, latent_BTC: Tensor, k_rope_BTR: Tensor, context: Context
    ) -> Tensor:
        """See :class:`dsv3.model.attention.MLA`; ``B`` is 1 and ``T`` the whole flat batch."""
        if not isinstance(context, Pages):
            return self.plain(attention, q_BTHQ, latent_BTC, k_rope_BTR, context)
        context.cache.write(self.layer, context.slots_N, latent_BTC[0], k_rope_BTR[0])
        out = [self._attend(attention, q_BTHQ[0, g.begin : g.end], context.cache, g) for g in context.groups]
        return (out[0] if len(out) == 1 else torch.cat(out))[None]

    def _attend(self, attention: MLA, q_MHQ: Tensor, cache: LatentCache, group: Group) -> Tensor:
        heads, nope, scale = attention.heads, attention.nope, attention.scale
        if group.absorbed:
            weight = attention.kv_b_proj.weight if self._dense is None else self._dense
            kv_b_HYC = weight.to(q_MHQ.dtype).view(heads, -1, cache.latent)
            q_MHX = fold(q_MHQ, kv_b_HYC, nope)
            if isinstance(group.keys, Table):
                out_MHC = attend(q_MHX, cache, self.layer, group.keys, scale)
            else:
                rows_SLX = self._rows(cache, group)
                out_MHC = attend_rows(q_MHX, rows_SLX, cache.latent, scale, group.later_STL)
            return unfold(out_MHC, kv_b_HYC, nope)
        latent, rope = self._rows(cache, group).split([cache.latent, cache.rope], dim=-1)
        kv_SLHY = attention.kv_b_proj(latent).unflatten(-1, (heads, -1))
        q_STHQ = q_MHQ.unflatten(0, (group.sequences, -1))
        return expanded(q_STHQ, rope, kv_SLHY, scale, group.later_STL).flatten(0, 1)

    def _rows(self, cache: LatentCache, group: Group) -> Tensor:
        assert not isinstance(group.keys, Table)
        return cache.read(self.layer, group.keys).unflatten(0, (group.sequences, -1))


@torch.no_grad()
def _weight_of(attention: MLA) -> Tensor:
    """The matrix of a ``kv_b_proj`` in another number format: what it makes of each unit vector."""
    latent = attention.kv_a_layernorm.weight
    units = torch.eye(latent.shape[0], dtype=latent.dtype, device=latent.device)
    return attention.kv_b_proj(units).T.contiguous()


def install(model: DeepSeekV3) -> None:
    """Let every layer (MTP modules come last) attend through the cache of its context."""
    for number, layer in enumerate(model.model.layers):
        attention = cast(DecoderLayer, layer).self_attn
        core = attention.core
        attention.core = core.plain if isinstance(core, PagedAttention) else core  # of an engine before
        attention.core = PagedAttention(attention, number)
