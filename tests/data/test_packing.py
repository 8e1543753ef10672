from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dsv3.data import packing
from dsv3.data.examples import Examples
from dsv3.data.packing import ExampleLoader, pack

LENGTH, EXTRA, PAD = 16, 2, 9


def examples(lengths: list[int]) -> Examples:
    """Example i is the tokens 100 i, 100 i + 1, ...; every third token bears loss."""
    ids = np.concatenate([np.arange(100 * i, 100 * i + n) for i, n in enumerate(lengths)]).astype(np.uint32)
    return Examples(ids, ids % 3 == 0, np.cumsum([0, *lengths]), len(lengths))


some = st.lists(st.integers(1, LENGTH), min_size=1, max_size=60)


@given(lengths=some)
def test_every_example_is_packed_once_and_fits(lengths: list[int]) -> None:
    rows = pack(np.array(lengths), LENGTH)
    assert sorted(number for row in rows for number in row) == list(range(len(lengths)))
    assert all(sum(lengths[number] for number in row) <= LENGTH for row in rows)
    # Best fit uses at most 1.7 times the fewest sequences there could be, plus one.
    assert len(rows) <= 1.7 * -(-sum(lengths) // LENGTH) + 1


def test_packing_leaves_little_room(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    lengths = np.minimum(rng.lognormal(5, 0.9, 20_000).astype(np.int64) + 4, 2048)
    share = [lengths.sum() / 2048 / len(pack(lengths, 2048))]
    monkeypatch.setattr(packing, "OPEN", 8)
    share.append(lengths.sum() / 2048 / len(pack(lengths, 2048)))
    assert share[0] > 0.995
    assert 0.9 < share[1] < share[0]


@given(lengths=some, seed=st.integers(0, 3))
def test_an_epoch_holds_every_example_whole_and_apart(lengths: list[int], seed: int) -> None:
    data = examples(lengths)
    loader = ExampleLoader(data, LENGTH, EXTRA, epochs=2, seed=seed, pad_id=PAD)
    batch = loader.batch(0, len(loader))
    assert batch.documents_BT is not None and batch.bears_BT is not None
    assert batch.tokens_BT.shape == (len(loader), LENGTH + EXTRA)
    found = []
    for tokens, documents, bears in zip(batch.tokens_BT, batch.documents_BT, batch.bears_BT):
        last = int(documents[-1])
        assert documents.tolist() == sorted(documents.tolist())
        for document in range(last):
            mine = documents == document
            number = int(tokens[mine][0]) // 100
            ids, marked = data.example(number)
            assert tokens[mine].tolist() == ids.tolist() and bears[mine].tolist() == marked.tolist()
            found.append(number)
        padding = documents == last
        assert (tokens[padding] == PAD).all() and not bears[padding].any() and padding[LENGTH:].all()
    assert sorted(found) == sorted([*range(len(lengths))] * 2)
    filled = 2 * sum(lengths) / (len(loader) * LENGTH)
    assert loader.padding == pytest.approx(1 - filled)


def test_epochs_and_seeds_have_their_own_order() -> None:
    data = examples([3, 5, 7, 2, 9, 4, 6, 8] * 4)
    loader = ExampleLoader(data, LENGTH, EXTRA, epochs=2, seed=0)
    half = next(i for i in range(len(loader)) if sum(map(len, loader.rows[:i])) == len(data))
    first, second = (np.concatenate(part).tolist() for part in (loader.rows[:half], loader.rows[half:]))
    assert sorted(first) == sorted(second) and first != second
    other = ExampleLoader(data, LENGTH, EXTRA, epochs=1, seed=1)
    assert np.concatenate(other.rows).tolist() != first


@given(first=st.integers(0, 12), count=st.integers(1, 3))
def test_a_batch_is_a_function_of_its_place_and_ranks_share_it(first: int, count: int) -> None:
    data = examples([3, 5, 7, 2, 9, 4, 6, 8] * 3)
    whole = ExampleLoader(data, LENGTH, EXTRA, epochs=2)
    everything = whole.batch(0, 40)
    alone = ExampleLoader(data, LENGTH, EXTRA, epochs=2).batch(first, 2 * count)
    shares = [
        ExampleLoader(data, LENGTH, EXTRA, epochs=2, rank=rank, world=2).batch(first, 2 * count)
        for rank in range(2)
    ]
    for name in ("tokens_BT", "documents_BT", "bears_BT"):
        one = getattr(alone, name)
        assert torch.equal(one, getattr(everything, name)[first : first + 2 * count])
        assert torch.equal(one, torch.cat([getattr(share, name) for share in shares]))
    with pytest.raises(ValueError, match="cannot be shared by 2 ranks"):
        ExampleLoader(data, LENGTH, rank=0, world=2).batch(0, 3)


def test_past_the_end_is_padding_and_too_long_is_refused() -> None:
    loader = ExampleLoader(examples([3, 5]), LENGTH, EXTRA, pad_id=PAD)
    batch = loader.batch(len(loader), 2)
    assert (batch.tokens_BT == PAD).all() and batch.bears_BT is not None and not batch.bears_BT.any()
    with pytest.raises(ValueError, match="example of 17 tokens does not fit into 16"):
        ExampleLoader(examples([3, 17]), LENGTH)
