"""Examples packed into sequences, masked from each other: a pure function of the sample index (report 5.1).

Shapes: B samples of this rank, X = length + extra tokens. Every epoch has its own order and its own packing.
Sample i of the run depends on the examples, the seed and i alone: the only state is the index of the next
sample, which a checkpoint stores.
"""

from __future__ import annotations

from bisect import bisect_left, insort

import numpy as np
import torch

from dsv3.data.examples import Examples
from dsv3.data.loader import Batch
from dsv3.data.permutation import combine, permute

OPEN = 1024  # sequences that wait for an example that fits; bounds the work an example makes


def pack(lengths: np.ndarray, room: int) -> list[list[int]]:
    """Best fit: each example in turn goes where it leaves the least room, to a new sequence if none has any.

    ``lengths``: tokens of each example, none above ``room``. Returns the examples of each sequence.
    """
    rows: list[list[int]] = []
    waiting: list[tuple[int, int]] = []  # (room left, sequence), the fullest first
    shortest = int(lengths.min(initial=room))
    for number, length in enumerate(lengths.tolist()):
        place = bisect_left(waiting, (length, -1))
        if place < len(waiting):
            left, row = waiting.pop(place)
        else:
            left, row = room, len(rows)
            rows.append([])
        rows[row].append(number)
        if left - length >= shortest:
            insort(waiting, (left - length, row))
            if len(waiting) > OPEN:
                del waiting[0]
    return rows


class ExampleLoader:
    """Sequences of ``length`` positions, each some whole examples and padding behind them.

    An example's tokens have a document number of their own, so that none attends to another's and positions
    begin at zero in each; the ``extra_tokens`` columns (1 + MTP depth) behind ``length`` are padding.
    Examples longer than ``length`` are a ValueError: :func:`dsv3.data.examples.gather` shortens them.
    Samples past the last one are all padding and bear no loss. ``rank`` of ``world``: this process's share
    of every batch.
    """

    def __init__(
        self,
        examples: Examples,
        length: int,
        extra_tokens: int = 1,
        epochs: int = 1,
        seed: int = 0,
        pad_id: int = 0,
        rank: int = 0,
        world: int = 1,
    ):
        if not 0 <= rank < world:
            raise ValueError(f"rank {rank} is not in [0, {world})")
        if len(examples) and examples.lengths.max() > length:
            raise ValueError(f"an example of {examples.lengths.max()} tokens does not fit into {length}")
        self.examples, self.length, self.extra_tokens, self.pad_id = examples, length, extra_tokens, pad_id
        self.rank, self.world = rank, world
        self.rows: list[np.ndarray] = []  # the examples of every sample of the run
        everything = np.arange(len(examples))
        for epoch in range(epochs):
            order = permute(everything, len(examples), combine(seed, epoch))
            self.rows += [order[row] for row in pack(examples.lengths[order], length)]

    def __len__(self) -> int:
        """Samples of the whole run."""
        return len(self.rows)

    @property
    def padding(self) -> float:
        """Share of the run's positions that hold no token of an example."""
        tokens = sum(int(self.examples.lengths[row].sum()) for row in self.rows)
        return 1 - tokens / max(1, len(self.rows) * self.length)

    def batch(self, first_sample: int, count: int) -> Batch:
        """This rank's share of samples ``first_sample`` .. ``first_sample + count`` of the run.

        Rank r gets the r-th of ``world`` equal consecutive pieces. ``count`` must be a multiple of ``world``.
        """
        if count % self.world:
            raise ValueError(f"{count} samples cannot be shared by {self.world} ranks: use a multiple")
        share = count // self.world
        first = first_sample + self.rank * share
        shape = (share, self.length + self.extra_tokens)
        tokens = np.full(shape, self.pad_id, dtype=np.int64)
        documents = np.zeros(shape, dtype=np.int32)
        bears = np.zeros(shape, dtype=np.bool_)
        for place, row in enumerate(self.rows[first : first + share]):
            at = 0
            for document, number in enumerate(row.tolist()):
                ids, marked = self.examples.example(number)
                here = slice(at, at + len(ids))
                tokens[place, here], bears[place, here], documents[place, here] = ids, marked, document
                at += len(ids)
            documents[place, at:] = len(row)
        return Batch(torch.from_numpy(tokens), torch.from_numpy(documents), torch.from_numpy(bears))
