"""Samples from inside long documents: every window lies in one, and every one is met once an epoch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv3.common.errors import UserError
from dsv3.data.loader import TokenLoader
from dsv3.data.long import LongDocuments, mix
from tests.data.conftest import make_shards

LENGTHS = [5, 40, 8, 17, 100, 3, 33, 16]


@given(st.lists(st.integers(1, 60), min_size=1, max_size=20), st.integers(1, 20), st.integers(1, 3))
def test_windows_lie_inside_documents(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], length: int, extra: int
) -> None:
    shards = make_shards(tmp_path_factory.mktemp("long"), lengths, 3)
    windows = LongDocuments(shards, length, extra)
    expected = [
        shards.tokens(start + i * length, start + (i + 1) * length + extra).tolist()
        for start, size in zip(shards.document_starts.tolist(), lengths)
        for i in range((size - extra) // length if size > extra else 0)
    ]
    assert len(windows) == (len(expected) * length + extra if expected else 0)
    found = [windows.tokens(i * length, (i + 1) * length + extra).tolist() for i in range(len(expected))]
    assert found == expected
    assert windows.longest == max(lengths)


def test_a_loader_draws_the_share_asked_for(tmp_path: Path) -> None:
    shards = make_shards(tmp_path, LENGTHS, 3)
    length, extra = 16, 2
    loader = TokenLoader(mix([(shards, 1.0)], 0.75, length, extra), length, extra, seed=5)
    source, epoch, _ = loader.locate(0, 400)
    assert abs(np.count_nonzero(source == 0) - 300) < 15
    batch = loader.batch(0, 400).tokens_BT.numpy()
    inside = {
        tuple(shards.tokens(start + i * length, start + (i + 1) * length + extra).tolist())
        for start, size in zip(shards.document_starts.tolist(), LENGTHS)
        for i in range((size - extra) // length if size > extra else 0)
    }
    first = [tuple(row) for row in batch[(source == 0) & (epoch == 0)].tolist()]
    assert len(first) == len(inside) == 9 and set(first) == inside
    assert all(tuple(row) in inside for row in batch[source == 0].tolist())
    assert any(tuple(row) not in inside for row in batch[source == 1].tolist())


def test_a_source_without_long_documents_stays_packed(tmp_path: Path) -> None:
    long, short = make_shards(tmp_path / "a", [50, 5], 2), make_shards(tmp_path / "b", [9] * 9, 2)
    mixed = mix([(long, 2.0), (short, 1.0)], 0.5, 16, 1)
    assert [(type(part).__name__, weight) for part, weight in mixed] == [
        ("LongDocuments", 1.0), ("TokenShards", 1.0), ("TokenShards", 1.0),
    ]  # fmt: skip
    assert mix([(short, 1.0)], 0.0, 16, 1) == [(short, 1.0)]
    with pytest.raises(UserError, match=r"long_share \(0.5\).*17 tokens, the longest 9"):
        mix([(short, 1.0)], 0.5, 16, 1)


def test_documents_of_a_window_are_one(tmp_path: Path) -> None:
    shards = make_shards(tmp_path, LENGTHS, 3)
    loader = TokenLoader(mix([(shards, 1.0)], 1.0, 16, 2), 16, 2, mask_documents=True)
    documents = loader.batch(0, 10).documents_BT
    assert documents is not None and not documents.any()
