"""Tokens to text as they come: whole characters only, and stop texts found across token borders.

A byte-level token may end inside a character: its bytes wait until the character is whole. A text that may be
the beginning of a stop text waits too, so that nothing is shown that would have to be taken back.
"""

from __future__ import annotations

import codecs
from collections.abc import Container, Sequence


class Detokeniser:
    """The text of one answer.

    ``token_bytes``: the bytes each token id stands for (:attr:`dsv3.data.tokenizer.Tokenizer.token_bytes`);
    None: there is no text. ``hidden``: ids that are left out of it. ``stops``: texts that end it.
    """

    def __init__(
        self, token_bytes: Sequence[bytes] | None, hidden: Container[int] = (), stops: Sequence[str] = ()
    ):
        self._token_bytes, self._hidden, self._stops = token_bytes, hidden, tuple(stops)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._pending = ""  # decoded, and may yet turn out to begin a stop text
        self.text = ""

    def push(self, token: int, hidden: bool = False) -> bool:
        """Add a token; true if a stop text is complete now (it and what follows it is left out)."""
        if self._token_bytes is None or hidden or token in self._hidden:
            return False
        piece = self._token_bytes[token] if token < len(self._token_bytes) else b""
        self._pending += self._decoder.decode(piece)
        return self._settle()

    def _settle(self) -> bool:
        found = [
            (place + len(stop), place) for stop in self._stops if (place := self._pending.find(stop)) >= 0
        ]
        if found:  # the one complete first, so that it does not matter how the text was cut into tokens
            self.text += self._pending[: min(found)[1]]
            self._pending = ""
            return True
        kept = max((_overlap(self._pending, stop) for stop in self._stops), default=0)
        shown = len(self._pending) - kept
        self.text += self._pending[:shown]
        self._pending = self._pending[shown:]
        return False

    def close(self, matched: bool = False) -> None:
        """The answer has ended: show what still waited, unless a stop text ended it."""
        if not matched:
            self._pending += self._decoder.decode(b"", final=True)
            if not self._settle():
                self.text += self._pending
        self._pending = ""


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that is a beginning of ``stop``, but not all of it."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
