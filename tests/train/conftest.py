"""A small prepared data folder and a recipe over it, shared by the training tests."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from dsv3.config import recipe as recipes
from dsv3.config.data import DataRecipe
from dsv3.config.train import PretrainRecipe
from dsv3.data.prepare import prepare

WORDS = (
    "the",
    "model",
    "reads",
    "one",
    "token",
    "and",
    "writes",
    "another",
    "until",
    "nothing",
    "is",
    "left",
)

# A model of a few thousand parameters with everything on: MLA with latents, groups, a shared expert, MTP.
MODEL = dict(
    vocab_size=384, hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=3,
    num_nextn_predict_layers=1, first_k_dense_replace=1, num_attention_heads=2, q_lora_rank=16,
    kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8, n_routed_experts=8,
    n_shared_experts=1, num_experts_per_tok=2, n_group=4, topk_group=2, max_position_embeddings=64,
    initializer_range=0.05, aux_loss_alpha=1e-3,
)  # fmt: skip


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Token shards of a few hundred small documents."""
    return prepare_words(tmp_path_factory.mktemp("prepared"))


def prepare_words(folder: Path) -> Path:
    """The same below a folder of one's own."""
    random.seed(0)
    (folder / "text").mkdir()
    for number in range(300):
        words = " ".join(random.choice(WORDS) for _ in range(60))
        (folder / "text" / f"{number}.txt").write_text(f"{number}. {words}\n", encoding="utf-8")
    recipe = recipes.validate(
        DataRecipe,
        {
            "out": str(folder / "data"),
            "sources": [{"name": "words", "weight": 1.0, "paths": [str(folder / "text")]}],
            "tokenizer": {"vocab_size": 350},
            "valid_fraction": 0.1,
            "workers": 1,
        },
    )
    return prepare(recipe)


@pytest.fixture
def make_recipe(prepared: Path, tmp_path: Path):
    """A function from changed keys to a pre-training recipe of twelve short steps."""

    def make(**changes: object) -> PretrainRecipe:
        tree: dict = {
            "out": str(tmp_path / "run"),
            "model": dict(MODEL),
            "data": {"path": str(prepared)},
            "sequence_length": 32,
            "total_tokens": 12 * 8 * 32,
            "batch": {"sequences": 8, "micro_sequences": 4},
            "optimizer": {"lr": 1e-2},
            "checkpoint": {"every": 4, "keep": 3},
            "validation": {"every": 6, "sequences": 4},
            "samples": {"every": 100, "prompts": ["the"], "tokens": 4},
            "device": "cpu",
        }
        for key, value in changes.items():
            if isinstance(value, dict) and isinstance(tree.get(key), dict):
                tree[key] = {**tree[key], **value}
            else:
                tree[key] = value
        return recipes.validate(PretrainRecipe, tree)

    return make
