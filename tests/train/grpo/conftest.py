"""A tiny model's folder to begin from, with a tokenizer and an MTP module."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import dsv3
from dsv3.checkpoint.hf import tokenizer_files
from dsv3.config import recipe as recipes
from dsv3.config.grpo import GRPORecipe
from dsv3.config.model import ModelConfig
from dsv3.data.tokenizer import Tokenizer
from tests.model.build import randomise
from tests.train.conftest import MODEL


@pytest.fixture(scope="session")
def start(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights, calm enough for answers of several tokens to be likely."""
    folder = tmp_path_factory.mktemp("grpo") / "start"
    config = ModelConfig(**{**MODEL, "max_position_embeddings": 128})
    model = randomise(dsv3.DeepSeekV3(config), seed=5)
    with torch.no_grad():
        model.lm_head.weight *= 1.5
    dsv3.save(model, folder, tokenizer_files=tokenizer_files(prepared))
    return folder


@pytest.fixture(scope="session")
def tokenizer(start: Path) -> Tokenizer:
    return Tokenizer.load(start)


@pytest.fixture(scope="session")
def rewards_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Reward functions as a user writes them, in TRL's way and in verl's."""
    path = tmp_path_factory.mktemp("rewards") / "mine.py"
    path.write_text(
        "def spaces(prompts, completions, completion_ids, log_metric=None, log_extra=None, **columns):\n"
        "    log_metric('seen', len(completions))\n"
        "    log_extra('ids', [len(ids) for ids in completion_ids])\n"
        "    return [sum(token % 2 for token in ids) / len(ids) for ids in completion_ids]\n"
        "def some(prompts, completions, id, **columns):\n"
        "    return [None if name == 'a' else 1.0 for name in id]\n"
        "def crashes(prompts, completions, id, **columns):\n"
        "    if 'b' in id:\n"
        "        raise KeyError('no such column')\n"
        "    return [0.5] * len(completions)\n"
        "def compute_score(data_source, solution_str, ground_truth, extra_info=None):\n"
        "    return {'score': float(ground_truth in solution_str)}\n"
    )
    return path


@pytest.fixture(scope="session")
def prompts_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three rows: two texts, one conversation."""
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    path.write_text(
        '{"prompt": "the model", "id": "a", "ground_truth": "e"}\n'
        '{"prompt": "reads one token and writes", "id": "b", "ground_truth": "e"}\n'
        '{"prompt": [{"role": "user", "content": "until"}], "id": "c", "ground_truth": "zq"}\n'
    )
    return path


@pytest.fixture
def make(start: Path, rewards_file: Path, prompts_file: Path, tmp_path: Path):
    """A function from changed keys to a recipe of four short steps."""

    def build(**changes: Any) -> GRPORecipe:
        tree: dict[str, Any] = {
            "out": str(tmp_path / "run"),
            "start": str(start),
            "steps": 4,
            "sequence_length": 48,
            "device": "cpu",
            "prompts": {"paths": [str(prompts_file)]},
            "rewards": [{"function": f"{rewards_file}:spaces"}],
            "rollouts": {"answers": 4, "max_tokens": 8, "max_batch": 8},
            "batch": {"sequences": 16, "micro_sequences": 8},
            "optimizer": {"lr": 3e-3},
            "checkpoint": {"every": 100},
        }
        for key, value in changes.items():
            tree[key] = {**tree[key], **value} if isinstance(tree.get(key), dict) else value
        return recipes.validate(GRPORecipe, tree)

    return build
