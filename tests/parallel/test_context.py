"""Sequences cut for a context: every token on one rank, with what follows it; what does not fit is refused.

That a run over them equals one process's is in the table of layouts (layouts.py).
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from dsv3.common.errors import UserError
from dsv3.config.parallel import ParallelSection
from dsv3.data.loader import Batch
from dsv3.data.targets import labels, positions, restarted_positions
from dsv3.model import DeepSeekV3
from dsv3.model.moe import balance_loss, hits
from dsv3.ops.cross_entropy import IGNORE
from dsv3.parallel.clock import Clock
from dsv3.parallel.context import ContextParallel, chunks, in_order, part
from dsv3.parallel.layout import Layout, misfit, resolve
from dsv3.parallel.world import World
from dsv3.train.schedules import Extent
from dsv3.train.stage import check_shares
from tests.parallel.test_world import TINY, recipe

with torch.device("meta"):
    MODEL = DeepSeekV3(TINY)


@given(ranks=st.integers(1, 4), rows=st.integers(1, 3), size=st.integers(1, 5), extra=st.integers(1, 3))
def test_parts_make_the_whole(ranks: int, rows: int, size: int, extra: int) -> None:
    """Tokens, positions, targets of every depth and what bears loss: put together, one process's."""
    length = 2 * ranks * size
    shape = (rows, length + extra)
    documents = (torch.rand(shape) < 0.3).int().cumsum(1).int()
    batch = Batch(torch.randint(1000, shape), documents, torch.rand(shape) < 0.7)
    parts = [part(batch, length, rank, ranks) for rank in range(ranks)]
    for found in parts:
        assert found.tokens_BT.shape == (2 * rows, size + extra)

    def whole(rows_of: list[torch.Tensor]) -> torch.Tensor:
        return in_order(torch.stack(rows_of)[..., None])[..., 0]

    assert torch.equal(whole([p.tokens_BT[:, :size] for p in parts]), batch.tokens_BT[:, :length])
    turned = [positions(p, size) for p in parts]
    assert torch.equal(whole(turned), restarted_positions(documents[:, :length]))  # type: ignore[arg-type]
    for depth in range(extra):
        wanted = labels(batch, length, depth)
        assert torch.equal(whole([labels(p, size, depth) for p in parts]), wanted)
        assert (wanted == IGNORE).any() or rows * length < 40
    plain = part(Batch(batch.tokens_BT), length, 0, ranks)
    assert positions(plain, size)[0].tolist() == list(range(size))  # type: ignore[index]


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_parts_of_the_balance_loss(ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shares of rows times their losses add up to the whole's; so do gradients of the scores."""
    sequences, length, chosen = 3, 6 * ranks, 2
    scores = torch.rand(sequences, length, 8, requires_grad=True)
    wanted = sequences * balance_loss(scores, chosen)
    (gradient,) = torch.autograd.grad(wanted, scores)
    monkeypatch.setattr(dist, "get_rank", lambda group: rank)
    monkeypatch.setattr(dist, "get_world_size", lambda group: ranks)
    monkeypatch.setattr(dist, "all_reduce", lambda own, group: own.copy_(hits(scores, chosen)))
    total = torch.zeros(())
    for rank in range(ranks):
        parallel = ContextParallel(MODEL, None, Clock())  # type: ignore[arg-type]
        starts = [chunk * 3 for chunk in chunks(rank, ranks)]
        own = torch.cat([scores[:, start : start + 3] for start in starts])
        total = total + len(own) * parallel.balance_loss(own, chosen)
    assert total.item() == pytest.approx(wanted.item(), rel=1e-6)
    assert torch.allclose(torch.autograd.grad(total, scores)[0], gradient, atol=1e-7)


@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_causal_work_is_even(ranks: int) -> None:
    """Chunks a rank's queries see, in all."""
    assert len({sum(chunk + 1 for chunk in chunks(rank, ranks)) for rank in range(ranks)}) == 1
    assert sorted(c for rank in range(ranks) for c in chunks(rank, ranks)) == list(range(2 * ranks))


def test_ranks_of_a_context_share_a_batch() -> None:
    layout = resolve(ParallelSection(expert=2, context=2), TINY, 4)
    assert layout == Layout(1, 1, 4, 2, 2) and layout.readers == 2
    assert World(layout).data_size == 2 and World(layout).part_length(32) == 8
    assert misfit(Layout(1, 1, 4, 1, 3), TINY, 4) == "context (3) must divide data_shard (4)"
    with pytest.raises(UserError, match=r"context \(3\) must divide .* layouts that fit: .*data_shard 4"):
        resolve(ParallelSection(context=3), TINY, 4)
    with pytest.raises(UserError, match=r"layouts that fit: .*data_shard 4, expert 2, context 2 \|"):
        resolve(ParallelSection(expert=3, context=2), TINY, 4)


def test_lengths_that_cannot_be_cut(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"sequence_length \(32\) must be a multiple of 6, .*; try 36"):
        check_shares(recipe(tmp_path), Extent("tokens", 4096, 32), World(Layout(1, 1, 3, 1, 3)))
    check_shares(recipe(tmp_path), Extent("tokens", 4096, 32), World(Layout(1, 1, 4, 1, 4)))
