"""What is refused before anything is sent or written, and what one process costs: nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dsv3.common.errors import UserError
from dsv3.config import recipe as recipes
from dsv3.config.model import ModelConfig
from dsv3.config.parallel import ParallelSection
from dsv3.config.train import PretrainRecipe
from dsv3.parallel.layout import Layout
from dsv3.parallel.world import World, enter
from dsv3.train.schedules import Extent
from dsv3.train.stage import check_shares, open_run
from tests.parallel.layouts import tree

TINY = ModelConfig.preset("tiny")
CPU = torch.device("cpu")


def recipe(out: Path, **changes: object) -> PretrainRecipe:
    return recipes.validate(PretrainRecipe, tree("data", str(out), 4, dict(changes)))


def test_one_process_is_a_world_that_sends_nothing() -> None:
    world = enter(ParallelSection(), TINY, CPU)
    x = torch.tensor([1, 2])
    assert world.is_first and world.size == 1 and world.add(x) is x and world.add_data(x) is x
    assert world.gather([1.5, 2.0]) == [[1.5, 2.0]]
    world.barrier()


def test_a_layout_without_processes_names_torchrun() -> None:
    with pytest.raises(UserError, match=r"expert \(2\) must divide .* torchrun --nproc-per-node"):
        enter(ParallelSection(expert=2), TINY, CPU)


def test_pipeline_and_zero_3_are_refused_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(UserError, match=r"use --parallel\.zero 1"):
        enter(ParallelSection(pipeline=2, zero=3), TINY, CPU)


def test_micro_batches_that_ranks_cannot_share(tmp_path: Path) -> None:
    extent = Extent("tokens", 4 * 16 * 32, 32)
    three = World(Layout(1, 1, 3, 1))
    with pytest.raises(UserError, match=r"micro_sequences \(4\) must be a multiple of the 3 .* try 6"):
        check_shares(recipe(tmp_path), extent, three)
    ramp = [{"until": 0, "to": 0.0625}, {"until": 0.5, "to": 1, "shape": "linear"}, {"until": 1, "to": 1}]
    small = recipe(tmp_path, schedule={"batch": ramp})
    check_shares(small, extent, World())
    with pytest.raises(UserError, match=r"steps of 1 sequences, which 4 data ranks .* begin with 4 or more"):
        check_shares(small, extent, World(Layout(1, 1, 4, 1)))


def test_the_tiny_recipe_is_for_many_too() -> None:
    """Its ramp begins below a micro batch: every batch on the way can be shared."""
    tiny = recipes.load(PretrainRecipe, "recipes/pretrain-tiny.yaml")
    extent = Extent("tokens", int(tiny.total_tokens), tiny.sequence_length)
    for ranks in (2, 4, 8):
        check_shares(tiny, extent, World(Layout(1, 1, ranks, 1)))


def test_a_stage_of_one_process_refuses_to_be_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="dsv3 pretrain runs in one process"):
        open_run(recipe(tmp_path / "a", parallel={"expert": 2}), None)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="runs in one process"):
        open_run(recipe(tmp_path / "b"), None)
    assert not list(tmp_path.iterdir())
