"""Runs the model on a scheduled batch: all tokens in one flat row, each with its position.

Shapes: N tokens of the batch, D hidden.
"""

from __future__ import annotations

from collections.abc import Sequence as Many
from dataclasses import dataclass
from itertools import accumulate, chain

import torch
from torch import Tensor

from dsv3.model import DeepSeekV3
from dsv3.serve.attention import Span
from dsv3.serve.cache import LatentCache
from dsv3.serve.layers import Layers
from dsv3.serve.scheduler import Chunk


@dataclass(frozen=True)
class States:
    """``hidden_ND``: the states the head reads. ``begins``: the first row of each chunk."""

    hidden_ND: Tensor
    begins: list[int]


def first_rows(lengths: Many[int]) -> list[int]:
    """Where each piece begins when they lie one after the other."""
    return [0, *accumulate(lengths)][:-1]


class Runner:
    """The main model over the paged cache (layers 0 to ``num_hidden_layers`` - 1 of it)."""

    def __init__(self, model: DeepSeekV3, cache: LatentCache):
        self.model, self.device = model, cache.rows.device
        self.layers = Layers(model, model.main_layers, 0, cache, model.model.norm)

    def run(self, chunks: list[Chunk]) -> States:
        """Compute the chunks' tokens; their rows are in the cache afterwards."""
        ids = list(chain.from_iterable(chunk.token_ids for chunk in chunks))
        x_ND = self.model.model.embed_tokens(torch.tensor(ids, device=self.device))
        x_ND = self.layers.run(
            [Span(chunk.sequence.slots, chunk.start, chunk.stop) for chunk in chunks], x_ND
        )
        begins = first_rows([chunk.stop - chunk.start for chunk in chunks])
        return States(x_ND, begins)
