"""Slow and broken ranks are named in the log; what travels between nodes is counted."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest

from dsv3.train.run import read_lines
from tests.parallel.layouts import tree
from tests.parallel.ranks import run_ranks
from tests.train.conftest import prepare_words


def train(trees: list[dict[str, Any]]) -> None:
    """In a rank: rank 1 sleeps in the forward passes of the first run, and has a NaN in the second."""
    from dsv3.config import recipe as recipes
    from dsv3.config.train import PretrainRecipe
    from dsv3.train import objective
    from dsv3.train.callbacks import ranks
    from dsv3.train.pretrain import pretrain

    os.environ["LOCAL_WORLD_SIZE"] = "1"  # every rank a node of its own
    ranks.WINDOW = 2
    plain, rank = objective.language_loss, int(os.environ["RANK"])
    broken = False

    def language_loss(*arguments: Any) -> Any:
        if rank == 1 and not broken:
            time.sleep(0.8)
        loss, parts = plain(*arguments)
        if rank == 1 and broken:
            parts.main.fill_(float("nan"))
        return loss, parts

    objective.language_loss = language_loss
    for broken, run in zip((False, True), trees):  # noqa: B007
        pretrain(recipes.validate(PretrainRecipe, run), None)


@pytest.mark.slow
def test_slow_and_broken_ranks_are_named(tmp_path: Path) -> None:
    data = prepare_words(tmp_path)
    parallel = {"parallel": {"expert": 2}}
    trees = [tree(str(data), str(tmp_path / name), 4, parallel) for name in ("slow", "broken")]
    run_ranks(2, "tests.parallel.test_ranks:train", trees)
    log = (tmp_path / "slow/log.txt").read_text()
    assert "step 4: rank 1 is slow" in log
    assert "rank 0 is slow" not in log
    log = (tmp_path / "broken/log.txt").read_text()
    assert "step 2: rank 1 has a part of the loss that is not finite" in log
    assert "step 2 skipped: loss nan" in log
    (line,) = [
        line
        for line in read_lines(tmp_path / "slow/metrics.jsonl")
        if "nodes_a_token" in line and line["step"] == 4
    ]
    assert 1 < line["nodes_a_token"] < 2 and line["nodes_a_token_most"] == 2
    # 2 steps of 16 sequences of 32 tokens, 2 experts each, 3 layers and MTP: no more rows than that travel
    rows = 16 * 32 * 2 * 4
    row = 32 * 4 * 4  # numbers, FP32, there and back in both passes
    assert 0 < line["bytes_with_one_copy_a_node"] <= line["bytes_between_nodes_a_step"] < rows * row
