"""Samples from inside long documents: packed shards hold few, and a context is only used where they are."""

from __future__ import annotations

import numpy as np

from dsv3.common.errors import UserError
from dsv3.data.loader import Tokens
from dsv3.data.shards import TokenShards


class LongDocuments:
    """A source's shards as a loader sees them, but only windows that lie inside one document.

    Token ``i * seq_len`` begins the i-th window of ``seq_len + extra`` tokens; a document of n windows has n
    of them, one behind the other. ``len`` is 0 where no document is long enough.
    """

    def __init__(self, shards: TokenShards, seq_len: int, extra: int):
        self.folder, self._shards, self._seq_len = shards.folder, shards, seq_len
        starts = shards.document_starts
        lengths = np.diff(np.append(starts, len(shards)))
        counts = np.maximum(0, (lengths - extra) // seq_len)
        self.longest = int(lengths.max(initial=0))
        places = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        self._windows = np.repeat(starts, counts) + places * seq_len
        self._size = len(self._windows) * seq_len + extra if len(self._windows) else 0

    @property
    def document_starts(self) -> np.ndarray:
        """A window knows one document."""
        return np.zeros(1, dtype=np.int64)

    def __len__(self) -> int:
        return self._size

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """Tokens of the window that begins at ``start``, a multiple of ``seq_len``: uint32."""
        window, rest = divmod(start, self._seq_len)
        if rest:
            raise IndexError(f"token {start} begins no window of {self._seq_len}")
        at = int(self._windows[window])
        return self._shards.tokens(at, at + stop - start)


def mix(
    sources: list[tuple[TokenShards, float]], share: float, seq_len: int, extra: int
) -> list[tuple[Tokens, float]]:
    """Sources for a loader: ``share`` of each one's samples from long documents, the rest packed.

    A source without any keeps its weight for packed samples. Raises :class:`UserError` if none has any.
    """
    if not share:
        return [*sources]
    long = [LongDocuments(shards, seq_len, extra) for shards, _ in sources]
    if not any(map(len, long)):
        found = max(source.longest for source in long)
        raise UserError(
            f"data.long_share ({share:g}): no document of {long[0].folder.parent} has {seq_len + extra}"
            f" tokens, the longest {found}; lower sequence_length, or set data.long_share 0"
        )
    mixed: list[tuple[Tokens, float]] = []
    for (shards, weight), windows in zip(sources, long):
        inside = share if len(windows) else 0.0
        parts: list[tuple[Tokens, float]] = [(windows, weight * inside), (shards, weight * (1 - inside))]
        mixed += [(part, portion) for part, portion in parts if portion]
    return mixed
