"""The block manager: sharing by beginning, eviction of the least recently used, nothing lost."""

from __future__ import annotations

import pytest

import dsv3.serve.blocks as blocks_module
from dsv3.serve.blocks import BlockManager
from dsv3.serve.params import SamplingParams
from dsv3.serve.sequence import Sequence
from dsv3.serve.text import Detokeniser

SIZE = 4


def sequence(tokens: list[int]) -> Sequence:
    return Sequence("r", 0, tokens, SamplingParams(), 0, 1000, frozenset(), Detokeniser(None))


def served(manager: BlockManager, tokens: list[int]) -> Sequence:
    """A sequence whose tokens are all computed and whose full blocks are named."""
    made = sequence(tokens)
    assert manager.admit(made, len(tokens))
    made.computed = len(tokens)
    manager.register(made)
    return made


def test_equal_beginnings_share_blocks() -> None:
    manager = BlockManager(10, SIZE)
    first = served(manager, [*range(10)])
    second = served(manager, [*range(8), 70, 71])
    assert second.blocks[:2] == first.blocks[:2] and second.blocks[2] != first.blocks[2]
    assert second.reused == second.cached_tokens == 8
    assert manager.used == 4
    assert second.slots.tolist()[8:] == [SIZE * second.blocks[2] + place for place in range(SIZE)]
    other = served(manager, [9, *range(1, 10)])  # the second block's tokens, after another first block
    assert other.reused == 0
    for made in (first, second, other):
        manager.release(made)
    assert manager.used == 0


def test_the_last_token_is_always_computed() -> None:
    manager = BlockManager(10, SIZE)
    manager.release(served(manager, [*range(8)]))
    again = sequence([*range(8)])
    assert manager.admit(again, 8) and again.reused == 4


def test_tokens_are_compared_and_not_the_digest_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks_module, "digest_of", lambda parent, tokens: b"the same")
    manager = BlockManager(10, SIZE)
    manager.release(served(manager, [*range(6)]))
    assert served(manager, [1, 2, 3, 4, 5]).reused == 0
    assert served(manager, [0, 1, 2, 3, 9]).reused == 4


def test_the_least_recently_used_goes_first_and_ends_before_beginnings() -> None:
    manager = BlockManager(6, SIZE)
    old, new = served(manager, [*range(9)]), served(manager, [*range(50, 59)])
    unnamed = {old.blocks[2], new.blocks[2]}
    manager.release(old)
    manager.release(new)
    large = sequence([99] * 12)
    assert manager.admit(large, 12)  # three blocks: those without a name, then the end of the older
    assert unnamed < set(large.blocks)
    for digest, number in manager._named.items():  # what was evicted is not found any more
        assert manager.blocks[number].digest == digest
    manager.release(large)
    manager.release(served(manager, [*range(50, 59)]))  # used again
    assert served(manager, [*range(5)]).reused == 4
    assert manager.used == 2


def test_no_room_changes_nothing() -> None:
    manager = BlockManager(3, SIZE)
    held = served(manager, [*range(8)])
    waiting = sequence([*range(4), *range(20, 29)])  # one block shared, three more wanted
    assert not manager.admit(waiting, 13)
    assert not waiting.blocks and manager.used == 2
    assert manager.grow(held, 12) and not manager.grow(held, 13) and len(held.blocks) == 3
    manager.release(held)
    assert not manager.admit(sequence([5] * 4), 4, spare=3)
    assert not manager.admit(waiting, 13)  # it needs four, there are three: two are its own beginning's kind
    assert manager.admit(sequence([*range(12)]), 12)


def test_equal_content_computed_twice_has_one_name() -> None:
    manager = BlockManager(6, SIZE)
    first, second = sequence([*range(6)]), sequence([*range(6)])
    for made in (first, second):
        assert manager.admit(made, 6)
        made.computed = 6
    manager.register(first)
    manager.register(second)
    assert first.blocks[0] != second.blocks[0]
    manager.release(first)
    manager.release(second)
    assert manager.used == 0 and served(manager, [*range(6)]).blocks[0] == first_block(manager)


def first_block(manager: BlockManager) -> int:
    (number,) = manager._named.values()
    return number
