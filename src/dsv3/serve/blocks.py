"""The block manager: which cache blocks are whose, shared between sequences that begin alike.

A block holds the rows of ``size`` consecutive tokens. A full block gets a name: the digest of its tokens and
of the name of the block before it, so that equal names mean equal beginnings; the tokens are compared too. A
named block that nobody uses any more stays findable until its room is needed, the least recently used first.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np

from dsv3.serve.sequence import Sequence


@dataclass
class Block:
    """``users``: sequences that hold it. ``digest`` names its content (None: not full, or a duplicate)."""

    users: int = 0
    digest: bytes | None = None
    parent: bytes = b""
    tokens: tuple[int, ...] = ()


def digest_of(parent: bytes, tokens: tuple[int, ...]) -> bytes:
    """The name of a block: 16 bytes over its tokens and the name of the block before it."""
    return blake2b(np.asarray(tokens, dtype=np.int64).tobytes(), digest_size=16, key=parent).digest()


class BlockManager:
    """``count`` blocks of ``size`` tokens."""

    def __init__(self, count: int, size: int):
        self.size = size
        self.blocks = [Block() for _ in range(count)]
        self._idle: OrderedDict[int, None] = OrderedDict.fromkeys(range(count))  # the next to go first
        self._named: dict[bytes, int] = {}
        self._places = np.arange(size, dtype=np.int64)

    @property
    def idle(self) -> int:
        """Blocks nobody uses (some may still be found by name)."""
        return len(self._idle)

    @property
    def used(self) -> int:
        """Blocks in use."""
        return len(self.blocks) - len(self._idle)

    def needed(self, sequence: Sequence, places: int) -> int:
        """Blocks a sequence lacks to hold ``places`` rows."""
        return max(0, -(-places // self.size) - len(sequence.blocks))

    def _find(self, parent: bytes, tokens: tuple[int, ...]) -> tuple[bytes, int] | None:
        digest = digest_of(parent, tokens)
        number = self._named.get(digest)
        if number is None:
            return None
        block = self.blocks[number]
        return (digest, number) if block.tokens == tokens and block.parent == parent else None

    def admit(self, sequence: Sequence, places: int, spare: int = 0) -> bool:
        """Give a sequence without blocks those of its beginning that are known, and room for ``places`` rows.

        False, and nothing changed, unless ``spare`` blocks would be left. The tokens past its ``reusable``
        ones, the last at least, are left to be computed: their logits are wanted.
        """
        found: list[tuple[bytes, int]] = []
        for start in range(0, sequence.reusable // self.size * self.size, self.size):
            parent = found[-1][0] if found else b""
            match = self._find(parent, tuple(sequence.tokens[start : start + self.size]))
            if match is None:
                break
            found.append(match)
        revived = sum(self.blocks[number].users == 0 for _, number in found)
        if self.needed(sequence, places) - len(found) > self.idle - revived - spare:
            return False
        for digest, number in found:
            self._take(number)
            sequence.digests.append(digest)
        self._append(sequence, [number for _, number in found])
        sequence.computed = sequence.reused = len(found) * self.size
        if sequence.cached_tokens is None:
            sequence.cached_tokens = min(sequence.reused, sequence.prompt_length)
        return self.grow(sequence, places)

    def grow(self, sequence: Sequence, places: int) -> bool:
        """Room for ``places`` rows; False, and nothing changed, if there are not enough idle blocks."""
        wanted = self.needed(sequence, places)
        if wanted > self.idle:
            return False
        self._append(sequence, [self._fresh() for _ in range(wanted)])
        return True

    def register(self, sequence: Sequence) -> None:
        """Name the blocks of a sequence that have become full."""
        for place in range(len(sequence.digests), sequence.computed // self.size):
            parent = sequence.digests[-1] if sequence.digests else b""
            tokens = tuple(sequence.tokens[place * self.size : (place + 1) * self.size])
            digest = digest_of(parent, tokens)
            sequence.digests.append(digest)
            if digest not in self._named:  # else another sequence computed the same: its block is the one
                number = sequence.blocks[place]
                self._named[digest] = number
                block = self.blocks[number]
                block.digest, block.parent, block.tokens = digest, parent, tokens

    def release(self, sequence: Sequence) -> None:
        """Take all blocks back, at once; named ones can be found until they are needed."""
        for number in reversed(sequence.blocks):  # ends go before beginnings, which more sequences share
            block = self.blocks[number]
            block.users -= 1
            if block.users == 0:
                self._idle[number] = None
                if block.digest is None:
                    self._idle.move_to_end(number, last=False)
        sequence.blocks, sequence.digests = [], []
        sequence.slots = sequence.slots[:0]
        sequence.computed = sequence.reused = 0

    def forget(self) -> None:
        """Take the names away; to be called while no block is in use."""
        assert not self.used
        self._named.clear()
        for block in self.blocks:
            block.digest = None

    def _append(self, sequence: Sequence, numbers: list[int]) -> None:
        if numbers:
            sequence.blocks += numbers
            starts = np.asarray(numbers, dtype=np.int64) * self.size
            fresh = (starts[:, None] + self._places).ravel()
            sequence.slots = np.concatenate((sequence.slots, fresh))

    def _take(self, number: int) -> None:
        self._idle.pop(number, None)
        self.blocks[number].users += 1

    def _fresh(self) -> int:
        number, _ = self._idle.popitem(last=False)
        block = self.blocks[number]
        if block.digest is not None:
            del self._named[block.digest]
        self.blocks[number] = Block(users=1)
        return number
