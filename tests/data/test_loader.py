from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dsv3.common.errors import UserError
from dsv3.data.loader import TokenLoader
from dsv3.data.shards import TokenShards

from .conftest import make_shards


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[TokenShards, float]]:
    folder = tmp_path_factory.mktemp("loader")
    a = make_shards(folder / "a", [37] * 50, per_shard=7)
    b = make_shards(folder / "b", [11] * 30, per_shard=4, seed=1)
    return [(a, 0.75), (b, 0.25)]


@given(
    first=st.integers(0, 10**12),
    share=st.integers(1, 6),
    world=st.integers(1, 5),
    seed=st.integers(0, 3),
    mask=st.booleans(),
)
def test_ranks_together_are_one_rank(
    two: list, first: int, share: int, world: int, seed: int, mask: bool
) -> None:
    def batch(rank: int, of: int):
        loader = TokenLoader(two, 16, 2, seed=seed, rank=rank, world=of, mask_documents=mask)
        return loader.batch(first, share * world)

    whole, parts = batch(0, 1), [batch(rank, world) for rank in range(world)]
    assert torch.equal(whole.tokens_BT, torch.cat([part.tokens_BT for part in parts]))
    assert whole.tokens_BT.shape == (share * world, 18)
    assert whole.tokens_BT.dtype == torch.int64
    if mask:
        assert torch.equal(whole.documents_BT, torch.cat([part.documents_BT for part in parts]))
    else:
        assert whole.documents_BT is None


def test_any_step_is_read_without_the_ones_before(two: list) -> None:
    loader = TokenLoader(two, 16, 2, seed=3)
    run = loader.batch(0, 400).tokens_BT
    for first in (399, 7, 250):
        assert torch.equal(TokenLoader(two, 16, 2, seed=3).batch(first, 1).tokens_BT[0], run[first])
    assert not torch.equal(run, TokenLoader(two, 16, 2, seed=4).batch(0, 400).tokens_BT)


def test_weights_are_exact_every_period(two: list) -> None:
    source, _, _ = TokenLoader(two, 16, 2).locate(0, 3000)
    period = 1000
    for start in range(0, 2000, 333):
        assert (source[start : start + period] == 0).sum() == 750


def test_an_epoch_reads_every_sample_once_and_the_next_one_in_another_order(two: list) -> None:
    loader = TokenLoader(two, 16, 2)
    source, epoch, start = loader.locate(0, 3000)
    orders = []
    for number in (0, 1):
        n = loader.samples[number]
        assert n == (len(two[number][0]) - 2) // 16
        mine, which = start[source == number], epoch[source == number]
        for e in range(3):
            assert sorted(mine[which == e].tolist()) == [16 * place for place in range(n)]
        orders += [mine[which == 0].tolist(), mine[which == 1].tolist()]
    assert orders[0] != orders[1]
    assert orders[2] != orders[3]


def test_samples_are_consecutive_tokens_with_their_documents(two: list) -> None:
    loader = TokenLoader(two, 16, 2, mask_documents=True)
    batch = loader.batch(5, 40)
    source, _, start = loader.locate(5, 40)
    assert batch.documents_BT is not None
    for row in range(40):
        shards, at = two[source[row]][0], int(start[row])
        assert batch.tokens_BT[row].tolist() == shards.tokens(at, at + 18).tolist()
        length = 37 if source[row] == 0 else 11
        expected = np.arange(at, at + 18) // length
        assert batch.documents_BT[row].tolist() == (expected - expected[0]).tolist()


def test_refusals(two: list, tmp_path: Path) -> None:
    small = make_shards(tmp_path / "small", [17], per_shard=1)
    TokenLoader([(small, 1.0)], 16, 1).batch(0, 3)
    with pytest.raises(UserError, match=r"small has 17 tokens, fewer than one sample of seq_len \(16\) \+ 2"):
        TokenLoader([*two, (small, 1.0)], 16, 2)
    with pytest.raises(UserError, match=r"weight \(0\)"):
        TokenLoader([(small, 0)], 16, 1)
    with pytest.raises(UserError, match="no sources"):
        TokenLoader([], 16, 1)
    with pytest.raises(ValueError, match="cannot be shared by 2 ranks"):
        TokenLoader(two, 16, 2, rank=0, world=2).batch(0, 3)
