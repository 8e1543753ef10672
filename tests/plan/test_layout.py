"""A layout rehearsed: parts add up to the model, the report's layout fits, misfits are refused at once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dsv3.cli import plan
from dsv3.common.errors import UserError
from dsv3.config import recipe as recipes
from dsv3.config.model import ModelConfig
from dsv3.config.train import PretrainRecipe
from dsv3.plan.hardware import hardware
from dsv3.plan.layout import rehearse, summary
from dsv3.plan.params import counts

REPORT = Path("recipes/pretrain-v3-671b.yaml")


def small(**parallel: object) -> PretrainRecipe:
    """The tiny model with seven layers, sixteen micro-batches of 64 tokens for each of four data ranks."""
    tree = {
        "model": {"preset": "tiny", "num_hidden_layers": 7},
        "total_tokens": 1_000_000,
        "sequence_length": 64,
        "batch": {"sequences": 64, "micro_sequences": 4},
        "parallel": parallel,
    }
    return recipes.validate(PretrainRecipe, tree)


@pytest.mark.parametrize("schedule", ["1f1b", "interleaved", "zbv", "dualpipev"])
def test_the_ranks_parts_add_up_to_the_model(schedule: str) -> None:
    recipe = small(pipeline=2, expert=2, data_shard=4, schedule=schedule)
    layout, ranks = rehearse(recipe, 8)
    assert (layout.world, len(ranks), sum(rank.layers for rank in ranks)) == (8, 2, 8)
    found, config = counts(recipe.model), recipe.model
    module = 3 * config.hidden_size * config.moe_intermediate_size * config.n_routed_experts
    routed = found.parts["routed experts"] + module
    copied = 0 if schedule in ("zbv", "dualpipev") else found.parts["embedding"]
    assert sum(rank.parameters for rank in ranks) == found.trained - routed + routed / 2 + copied
    for rank in ranks:
        assert rank.memory["weights"] == rank.memory["gradients"] == 4 * rank.parameters
        assert rank.memory["optimizer"] < 2 * 4 * rank.parameters  # moments are cut over the data ranks
        last = 1 if schedule == "1f1b" else 3
        assert ("head" in rank.memory) == (last in rank.stages)
    # A micro-batch's stream and its gradient pass each border between stages of different ranks.
    borders = {"1f1b": 1, "interleaved": 3, "zbv": 2, "dualpipev": 2}[schedule]
    sent = 4 * recipe.model.hidden_size * 64 * 64 // 4  # FP32, this data rank's tokens of a step
    assert sum(rank.traffic["pipeline"] for rank in ranks) == 2 * borders * sent


def test_a_context_shares_a_batchs_tokens() -> None:
    """Half the readers with twice the sequences, half of each: the same activations; latents travel."""
    plain, parts = (rehearse(small(pipeline=2, data_shard=4, context=c), 8)[1] for c in (1, 2))
    for one, other in zip(plain, parts):
        assert one.memory == other.memory and "context" not in one.traffic
        # FP32 latents and shared keys forth, their gradients back; 16 micro-batches of 64 tokens
        assert other.traffic["context"] == other.layers * 16 * 64 * (64 + 16) * (4 + 4)
    tree = {"sequence_length": 128, "batch": {"sequences": 16, "micro_sequences": 1}}
    one = recipes.validate(PretrainRecipe, {**small(context=4).model_dump(), **tree})
    _, (rank,) = rehearse(one, 4)  # one sequence for four ranks
    assert rank.memory["activations"] > 0
    with pytest.raises(UserError, match=r"must be a multiple of the data ranks \(2\); try 2"):
        rehearse(recipes.validate(PretrainRecipe, {**small(context=2).model_dump(), **tree}), 4)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(UserError, match=r"expert \(3\) must divide"):
        rehearse(small(expert=3, data_shard=3), 3)
    with pytest.raises(UserError, match=r"parallel.zero \(3\) is not rehearsed: use --parallel.zero 1"):
        rehearse(small(zero=3), 2)
    with pytest.raises(UserError, match=r"batch.micro_sequences \(4\) must be a multiple.*\(3\); try 6"):
        rehearse(small(), 3)


@pytest.mark.slow
def test_the_reports_layout_holds_in_80_gb() -> None:
    """Half a minute: 2,048 GPUs, the real model cut and spread for each of 16 pipeline ranks."""
    recipe = recipes.load(PretrainRecipe, REPORT, [])
    found = summary(recipe, 2048, hardware("h800"))
    assert found["holds"] and found["micro_batches"] == 120
    whole = counts(ModelConfig.preset("v3-671b"))
    held = sum(rank["parameters"] for rank in found["ranks"])
    assert 0.02 * whole.trained < held < 0.05 * whole.trained  # experts are dealt to 64
    assert found["ranks"][0]["stages"] == [0, 31] and "head" in found["ranks"][0]["bytes_by_part"]


def test_the_verb_prints_a_table_and_json(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "model: {preset: tiny, num_hidden_layers: 4}\ntotal_tokens: 1000000\n"
        "parallel: {pipeline: 2, schedule: zbv}\n"
    )
    plain = CliRunner().invoke(plan.app, ["layout", str(path), "--gpus", "2"])
    assert plain.exit_code == 0, plain.output
    assert "pipeline 2, expert 1" in plain.output and "80 GB: holds it" in plain.output
    given = ["layout", str(path), "--gpus", "2", "--json", "--parallel.schedule", "1f1b"]
    found = json.loads(CliRunner().invoke(plan.app, given).stdout)
    assert [rank["stages"] for rank in found["ranks"]] == [[0], [1]]
    assert found["fullest_bytes"] == max(rank["bytes"] for rank in found["ranks"])
