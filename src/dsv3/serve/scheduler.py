"""Which tokens of which sequences are computed next: continuous batching under a budget of tokens a step.

Sequences that wait for their next token go first, each with its last token and its drafts. What is left of
the budget goes to prompts, in the order they came, cut where the budget ends. A new sequence is let in when
the cache has room for all it brings. When a growing answer finds no room, the sequence let in last gives its
blocks back and waits to be computed again (its beginning may still be found by name). Nothing of this changes
an answer: see ``tests/serve/test_schedules.py``.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from dsv3.serve.blocks import BlockManager
from dsv3.serve.sequence import Sequence


@dataclass(frozen=True)
class Chunk:
    """Places ``start`` to ``stop`` of a sequence's tokens and drafts. ``samples``: its next token comes of
    it."""

    sequence: Sequence
    start: int
    stop: int
    samples: bool

    @property
    def token_ids(self) -> list[int]:
        """The tokens to compute."""
        known = self.sequence.tokens
        if self.stop <= len(known):
            return known[self.start : self.stop]
        return (known[self.start :] + self.sequence.drafts)[: self.stop - self.start]


class Scheduler:
    """``max_sequences`` at once, ``max_tokens`` a step; ``ahead``: rows a sequence needs past its tokens."""

    def __init__(self, blocks: BlockManager, max_sequences: int, max_tokens: int, ahead: int):
        self.blocks = blocks
        self.max_sequences, self.max_tokens, self.ahead = max_sequences, max_tokens, ahead
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.preemptions = 0

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence."""
        self.waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """A sequence has ended: its blocks are free at once."""
        if sequence in self.running:
            self.running.remove(sequence)
            self.blocks.release(sequence)
        else:
            self.waiting.remove(sequence)

    def schedule(self) -> list[Chunk]:
        """The next step's work; empty only if there is none."""
        chunks: list[Chunk] = []
        budget = self.max_tokens
        for sequence in list(self.running):
            if sequence not in self.running or not _decoding(sequence):
                continue  # given back for one before it, or a prompt
            if self._grow(sequence):
                chunks.append(_cut(sequence, budget))
                budget -= chunks[-1].stop - chunks[-1].start
        for sequence in self.running:
            if budget and not _decoding(sequence):
                chunk = _cut(sequence, budget)
                if chunk.stop > chunk.start:
                    chunks.append(chunk)
                    budget -= chunk.stop - chunk.start
        for sequence in list(self.waiting):
            if not budget or len(self.running) >= self.max_sequences:
                break
            if _follows(sequence):
                continue
            if not self.blocks.admit(sequence, self._places(sequence), spare=len(self.running)):
                break
            self.waiting.remove(sequence)
            self.running.append(sequence)
            chunk = _cut(sequence, budget)
            if chunk.stop > chunk.start:
                chunks.append(chunk)
                budget -= chunk.stop - chunk.start
        return chunks

    def _places(self, sequence: Sequence) -> int:
        return len(sequence.tokens) + len(sequence.drafts) + self.ahead

    def _grow(self, sequence: Sequence) -> bool:
        """Room for what a sequence will compute, taken from those let in after it; false if it had to go."""
        while not self.blocks.grow(sequence, self._places(sequence)):
            last = self.running.pop()
            self.blocks.release(last)
            self.waiting.appendleft(last)
            last.preemptions += 1
            self.preemptions += 1
            if last is sequence:
                return False
        return True


def _decoding(sequence: Sequence) -> bool:
    return sequence.computed == len(sequence.tokens) - 1


def _follows(sequence: Sequence) -> bool:
    """Whether a sequence waits for another answer to the same prompt to fill the cache with it."""
    leader = sequence.leader
    return leader is not None and not leader.finished and len(leader.tokens) == leader.prompt_length


def _cut(sequence: Sequence, budget: int) -> Chunk:
    """As much as fits; the last token and all drafts stay together, for the next token depends on both."""
    start, known = sequence.computed, len(sequence.tokens)
    end = known + len(sequence.drafts)
    if end - start <= budget:
        return Chunk(sequence, start, end, True)
    return Chunk(sequence, start, min(start + budget, known - 1), False)
