"""Batches of tokens as a pure function of the sample index: any step is read without replaying earlier ones.

Shapes: B samples of this rank, T = seq_len + extra_tokens. The only state is the index of the next sample,
which the trainer keeps: a checkpoint stores one integer, and a run resumes on any number of ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from dsv3.common.errors import UserError
from dsv3.data.permutation import combine, period_table, permute


@dataclass(frozen=True)
class Batch:
    """Rows of tokens, all ``[B, T]``.

    ``tokens_BT`` int64. ``documents_BT`` int32, the document of each token, counted from 0 in its row; None:
    not told apart, as the report packs (4.1). ``bears_BT`` bool, tokens that bear loss as targets; None: all.
    ``positions_BT`` int64, for rows that are parts of sequences; None: from 0 on, in each document.
    """

    tokens_BT: torch.Tensor
    documents_BT: torch.Tensor | None = None
    bears_BT: torch.Tensor | None = None
    positions_BT: torch.Tensor | None = None

    def to(self, device: torch.device) -> Batch:
        """The same rows on a device."""
        rows = (self.tokens_BT, self.documents_BT, self.bears_BT, self.positions_BT)
        return Batch(*(None if x is None else x.to(device) for x in rows))  # type: ignore[arg-type]

    def slice(self, first: int, stop: int) -> Batch:
        """Rows ``first`` .. ``stop``."""
        rows = (self.tokens_BT, self.documents_BT, self.bears_BT, self.positions_BT)
        return Batch(*(None if x is None else x[first:stop] for x in rows))  # type: ignore[arg-type]


class Tokens(Protocol):
    """One source: tokens in a row, and where its documents begin."""

    folder: Path

    @property
    def document_starts(self) -> np.ndarray:
        """Where each document begins, ascending."""
        ...

    def __len__(self) -> int: ...

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """Tokens ``start`` to ``stop``, uint32."""
        ...


class TokenLoader:
    """Samples of ``seq_len + extra_tokens`` consecutive tokens, drawn from weighted sources.

    Sample i of the run comes from a source fixed by a periodic table (weights are met exactly every period)
    and from a place fixed by a shuffle that changes every epoch of that source. A sample starts at a multiple
    of ``seq_len``, so within an epoch the first ``seq_len`` positions of the samples never overlap; the
    ``extra_tokens`` (1 + MTP depth) after them give every position its targets.

    ``sources``: (shards, weight) pairs. ``rank`` of ``world``: this process's share of every batch.
    Raises :class:`UserError` naming a source that is too small for one sample.
    """

    def __init__(
        self,
        sources: Sequence[tuple[Tokens, float]],
        seq_len: int,
        extra_tokens: int = 1,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        mask_documents: bool = False,
    ):
        if not sources:
            raise UserError("the loader has no sources: give at least one folder of token shards")
        if not 0 <= rank < world:
            raise ValueError(f"rank {rank} is not in [0, {world})")
        self.shards = [shards for shards, _ in sources]
        self.seq_len, self.extra_tokens, self.seed = seq_len, extra_tokens, seed
        self.rank, self.world, self.mask_documents = rank, world, mask_documents
        for shards, weight in sources:
            if not weight > 0:
                raise UserError(f"source {shards.folder}: weight ({weight}) must be above 0")
            if len(shards) < seq_len + extra_tokens:
                raise UserError(
                    f"source {shards.folder} has {len(shards)} tokens, fewer than one sample of"
                    f" seq_len ({seq_len}) + {extra_tokens}: lower seq_len or add text"
                )
        # Samples in one epoch of each source.
        self.samples = [(len(shards) - extra_tokens) // seq_len for shards in self.shards]
        self._source = period_table([weight for _, weight in sources], seed)
        # For each place, how many earlier ones of the period have its source; for each source, its places.
        self._before = np.zeros_like(self._source)
        self._places = np.bincount(self._source, minlength=len(sources))
        for source, count in enumerate(self._places):
            self._before[self._source == source] = np.arange(count)

    def locate(self, first_sample: int, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Source, epoch of that source, and first token (int64 [count] each) of consecutive samples."""
        period, place = np.divmod(np.arange(first_sample, first_sample + count), len(self._source))
        source = self._source[place]
        within = period * self._places[source] + self._before[place]
        size = np.array(self.samples)[source]
        epoch, position = np.divmod(within, size)
        start = np.empty(count, dtype=np.int64)
        for number, samples in enumerate(self.samples):
            chosen = source == number
            if chosen.any():
                key = combine(self.seed, number, epoch[chosen])
                start[chosen] = permute(position[chosen], samples, key) * self.seq_len
        return source, epoch, start

    def batch(self, first_sample: int, count: int) -> Batch:
        """This rank's share of samples ``first_sample`` .. ``first_sample + count`` of the run.

        Rank r gets the r-th of ``world`` equal consecutive pieces: put together in rank order they are
        what one rank alone would get. ``count`` must be a multiple of ``world``.
        """
        if count % self.world:
            raise ValueError(f"{count} samples cannot be shared by {self.world} ranks: use a multiple")
        share = count // self.world
        source, _, start = self.locate(first_sample + self.rank * share, share)
        length = self.seq_len + self.extra_tokens
        tokens = np.empty((share, length), dtype=np.int64)
        documents = np.empty((share, length), dtype=np.int32) if self.mask_documents else None
        for row, (number, at) in enumerate(zip(source.tolist(), start.tolist())):
            shards = self.shards[number]
            tokens[row] = shards.tokens(at, at + length)
            if documents is not None:
                inside = np.searchsorted(shards.document_starts, np.arange(at, at + length), side="right")
                documents[row] = inside - inside[0]
        return Batch(torch.from_numpy(tokens), None if documents is None else torch.from_numpy(documents))
