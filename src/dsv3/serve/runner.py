"""Runs the model's own modules on a scheduled batch: all tokens in one flat row, each with its position.

Shapes: N tokens of the batch, D hidden.
"""

from __future__ import annotations

from collections.abc import Sequence as Many
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from dsv3.model import DeepSeekV3
from dsv3.serve.attention import Span, arrange
from dsv3.serve.cache import LatentCache
from dsv3.serve.scheduler import Chunk


@dataclass(frozen=True)
class States:
    """``hidden_ND``: the states the head reads. ``begins``: the first row of each chunk."""

    hidden_ND: Tensor
    begins: list[int]


def first_rows(order: Many[int], lengths: Many[int]) -> list[int]:
    """Where each piece begins when they lie in this order."""
    begins, at = [0] * len(order), 0
    for number in order:
        begins[number] = at
        at += lengths[number]
    return begins


class Runner:
    """The main model over the paged cache (layers 0 to ``num_hidden_layers`` - 1 of it)."""

    def __init__(self, model: DeepSeekV3, cache: LatentCache):
        self.model, self.cache = model, cache
        self.layers = model.main_layers

    def run(self, chunks: list[Chunk]) -> States:
        """Compute the chunks' tokens; their rows are in the cache afterwards."""
        spans = [Span(chunk.sequence.slots, chunk.start, chunk.stop) for chunk in chunks]
        order, pages = arrange(self.model, self.cache, spans)
        ids = list(chain.from_iterable(chunks[number].token_ids for number in order))
        x = self.model.model.embed_tokens(torch.tensor([ids], device=self.cache.rows.device))
        for layer in self.layers:
            x, _ = layer(x, pages)
        begins = first_rows(order, [chunk.stop - chunk.start for chunk in chunks])
        return States(self.model.model.norm(x)[0], begins)
