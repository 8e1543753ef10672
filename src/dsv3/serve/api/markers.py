"""Texts in a stream that mean something, found across the borders of its pieces, and the thinking before one.

An end that may be the beginning of a marker waits until it is known: what has been sent cannot be taken back.
How the stream was cut never changes what comes out.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from dsv3.data.special import END_THINK, THINK


class Markers:
    """Takes a stream apart into text and markers."""

    def __init__(self, markers: Sequence[str]):
        self._markers = markers
        self._beginnings = {marker[:length] for marker in markers for length in range(1, len(marker))}
        self._longest = max(map(len, markers)) - 1
        self._split = re.compile("(" + "|".join(map(re.escape, markers)) + ")")
        self._waiting = ""

    def feed(self, text: str) -> list[str]:
        """The pieces known by now; a piece that is a marker is one of the markers, whole."""
        pieces = self._split.split(self._waiting + text)
        last = pieces.pop()
        kept = next(
            (n for n in range(min(len(last), self._longest), 0, -1) if last[-n:] in self._beginnings), 0
        )
        self._waiting = last[len(last) - kept :]
        return [piece for piece in [*pieces, last[: len(last) - kept]] if piece]

    def close(self) -> list[str]:
        """What still waited: it began no marker after all."""
        rest, self._waiting = self._waiting, ""
        return [rest] if rest else []


class Thinking:
    """Divides an answer into what is thought and what is said.

    Thinking begins with a ``<think>`` that nothing but white space precedes (or had begun in the prompt:
    ``begun``) and ends with ``</think>``. Line breaks around it belong to neither. Tags elsewhere are text.
    """

    def __init__(self, begun: bool = False):
        self._markers = Markers((THINK, END_THINK))
        self.state = (
            "thinking" if begun else "start"
        )  # then after, where only line breaks have been, and said
        self._begun = False  # whether anything but line breaks has been thought
        self._blank = ""  # line breaks or white space that may turn out to be left out

    def feed(self, text: str) -> tuple[str, str]:
        """More of the answer: what is thought and what is said of it."""
        return self._take(self._markers.feed(text))

    def close(self) -> tuple[str, str]:
        """What still waited."""
        thought, said = self._take(self._markers.close())
        return thought, said + (self._blank if self.state == "start" else "")

    def _take(self, pieces: list[str]) -> tuple[str, str]:
        thought = said = ""
        for piece in pieces:
            if self.state == "start" and piece == THINK:
                self.state, self._blank = "thinking", ""
            elif self.state == "start":
                self._blank += piece
                if self._blank.strip():
                    self.state = "said"
                    said += self._blank
            elif self.state == "thinking" and piece == END_THINK:
                self.state = "after"
            elif self.state == "thinking":
                text = self._blank + piece if self._begun else piece.lstrip("\n")
                self._begun |= bool(text)
                kept = text.rstrip("\n")
                self._blank = text[len(kept) :]
                thought += kept
            elif self.state == "after":
                said += piece.lstrip("\n")
                self.state = "said" if said else "after"
            else:
                said += piece
        return thought, said
