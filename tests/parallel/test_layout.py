"""Layouts: what fits, what is refused and with which way out, and where ranks stand in the meshes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv3.common.errors import UserError
from dsv3.config.model import ModelConfig
from dsv3.config.parallel import ParallelSection
from dsv3.parallel.layout import Layout, fitting, misfit, resolve
from tests.parallel.ranks import run_ranks

V3 = ModelConfig.preset("v3-671b")
TINY = ModelConfig.preset("tiny")


def test_the_reports_layout() -> None:
    layout = resolve(ParallelSection(pipeline=16, expert=64), V3, 2048)
    assert layout == Layout(16, 1, 128, 64)
    assert layout.data == 128 and layout.expert_shard == 2


def test_one_process_is_a_layout() -> None:
    assert resolve(ParallelSection(), V3, 1) == Layout()


@pytest.mark.parametrize(
    ("section", "world", "words"),
    [
        (dict(expert=6), 6, r"expert \(6\) must divide n_routed_experts \(256\).*expert 2"),
        (dict(expert=4), 6, r"expert \(4\) must divide data_shard \(6\); layouts that fit: .*expert 2"),
        (dict(data_shard=3), 4, r"is 3, there are 4 processes; layouts that fit: .*data_shard 4"),
        (dict(pipeline=3), 4, r"is 3, there are 4 processes"),
        (dict(pipeline=40), 40, r"needs 80 stages, the model has 61 layers"),
        (dict(expert=2), 1, r"expert \(2\) must divide data_shard \(1\).*torchrun --nproc-per-node"),
    ],
)
def test_a_misfit_is_named_with_layouts_that_fit(section: dict, world: int, words: str) -> None:
    with pytest.raises(UserError, match=words):
        resolve(ParallelSection(**section), V3, world)


def test_experts_need_a_model_with_experts() -> None:
    dense = ModelConfig.preset("tiny", first_k_dense_replace=TINY.num_hidden_layers)
    assert misfit(Layout(1, 1, 2, 2), dense, 2) == "expert (2) needs a model with experts"


@given(world=st.integers(1, 96), pipeline=st.integers(1, 8), expert=st.integers(1, 16))
def test_what_is_proposed_fits(world: int, pipeline: int, expert: int) -> None:
    """Every layout of the list fits, and the one wanted is refused exactly when it is not in it."""
    found = list(fitting(TINY, world))
    assert found and len(set(found)) == len(found)
    assert all(layout.world == world and misfit(layout, TINY, world) is None for layout in found)
    try:
        assert resolve(ParallelSection(pipeline=pipeline, expert=expert), TINY, world) in found
    except UserError:
        assert Layout(pipeline, 1, max(1, world // pipeline), expert) not in found


def places(_: None) -> dict:
    """In a rank: its neighbours along every axis."""
    import torch.distributed as dist

    from dsv3.parallel.layout import make_meshes

    dist.init_process_group("gloo")
    meshes = make_meshes(Layout(2, 1, 4, 2), "cpu")
    axes = ("pipeline", "replicate", "shard", "expert", "expert_shard", "data")
    return {axis: dist.get_process_group_ranks(meshes.group(axis)) for axis in axes} | {
        "dealt": meshes.dealt.mesh.tolist(),
        "place": [meshes.place("data"), meshes.place("expert")],
    }


@pytest.mark.slow
def test_neighbours() -> None:
    """Eight ranks, two stages of four: experts innermost."""
    found = run_ranks(8, "tests.parallel.test_layout:places")
    assert found[6] == {
        "pipeline": [2, 6],
        "replicate": [6],
        "shard": [4, 5, 6, 7],
        "expert": [6, 7],
        "expert_shard": [4, 6],
        "data": [4, 5, 6, 7],
        "dealt": [[[4, 6], [5, 7]]],
        "place": [2, 0],
    }
