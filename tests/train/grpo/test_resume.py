"""A run killed with kill -9, also in the middle of a batch of rollouts, goes on bit-equal."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from dsv3.config import recipe as recipes
from dsv3.config.grpo import GRPORecipe
from dsv3.train.grpo.batch import Batch
from dsv3.train.grpo.run import grpo
from dsv3.train.run import read_lines
from tests.train.test_resume import last_step, same, wait_for

STEPS = 7


@pytest.fixture(scope="module")
def tree(start: Path, rewards_file: Path, prompts_file: Path) -> dict:
    return {
        "start": str(start), "steps": STEPS, "sequence_length": 48, "device": "cpu",
        "prompts": {"paths": [str(prompts_file)]}, "rewards": [{"function": f"{rewards_file}:spaces"}],
        "rollouts": {
            "answers": 4, "max_tokens": 8, "max_batch": 8, "minibatches": 2, "epochs": 2,
            "replay_routing": True,
        },
        "policy": {"preset": "v3", "redraw": 1, "off_policy": 0.5},
        "batch": {"sequences": 8, "micro_sequences": 4}, "optimizer": {"lr": 3e-3},
        "checkpoint": {"every": 2, "keep": 5}, "shown": {"rows": 0},
    }  # fmt: skip


def told(out: Path, name: str) -> list[dict]:
    """Lines without what the clock says."""
    clocks = ("_time", "per_second", "memory_bytes")
    lines = read_lines(out / name)
    return [{k: v for k, v in line.items() if not k.endswith(clocks)} for line in lines]


@pytest.mark.slow
def test_kill_nine_then_resume_is_bit_equal(tree: dict, tmp_path: Path) -> None:
    unbroken = grpo(recipes.validate(GRPORecipe, {**tree, "out": str(tmp_path / "unbroken")}))
    assert unbroken is not None
    path, out = tmp_path / "killed.yaml", tmp_path / "killed"
    path.write_text(yaml.safe_dump({**tree, "out": str(out)}))
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}

    def run(*arguments: str) -> subprocess.Popen:
        return subprocess.Popen(
            [sys.executable, "-m", "dsv3", "grpo", str(path), *arguments],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment,
        )  # fmt: skip

    first = run()
    # The checkpoint of step 2 holds a batch of rollouts that has served two of its four steps.
    wait_for(lambda: last_step(out) >= 3, first)
    first.send_signal(signal.SIGKILL)
    first.wait()
    second = run("--resume", "auto")
    text = second.communicate(timeout=200)[0]
    assert second.returncode == 0, text
    assert "next: dsv3 chat" in text and "resumed from step-" in text
    assert same(out / "model", unbroken / "model")
    assert told(out, "metrics.jsonl") == told(unbroken, "metrics.jsonl")
    assert told(out, "samples.jsonl") == told(unbroken, "samples.jsonl")
    state = json.loads((out / f"checkpoints/step-{STEPS:06d}/trainer/state.json").read_text())
    assert state["progress"]["samples"] == STEPS * 8


def test_a_batch_of_rollouts_survives_a_checkpoint() -> None:
    full = Batch(
        tokens_SX=torch.arange(12).view(2, 6), prompt_S=torch.tensor([1, 2]), length_S=torch.tensor([4, 6]),
        advantages_S=torch.tensor([1.0, -1.0]), sampled_ST=torch.rand(2, 4), reference_ST=torch.rand(2, 4),
        routes_STLK=torch.ones(2, 5, 1, 2, dtype=torch.int16),
    )  # fmt: skip
    again = Batch.of_tensors(full.tensors())
    assert again is not None and again.old_ST is None
    assert all(torch.equal(value, again.tensors()[name]) for name, value in full.tensors().items())
    assert Batch.of_tensors({"exp_avg/x": torch.zeros(1)}) is None
    short = full.pick(torch.tensor([0]))
    assert short.tokens_SX.tolist() == [[0, 1, 2, 3]] and short.sampled_ST.shape == (1, 3)
    assert short.routes_STLK is not None and short.routes_STLK.shape == (1, 3, 1, 2)
