"""The extension: each phase starts from the one before, a kill costs no finished phase, YaRN is written."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import dsv3
from dsv3.common.errors import UserError
from dsv3.config import recipe as recipes
from dsv3.config.extend import ExtendRecipe
from dsv3.config.model import ModelConfig
from dsv3.model import DeepSeekV3
from dsv3.train.extend import extend
from tests.train.conftest import MODEL
from tests.train.test_resume import same, wait_for


@pytest.fixture(scope="module")
def start(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("start") / "model"
    config = recipes.validate(ModelConfig, {**MODEL, "max_position_embeddings": 16})
    dsv3.save(DeepSeekV3(config), folder, tokenizer_files=[prepared / "tokenizer.json"])
    return folder


def tree(prepared: Path, start: Path, out: Path, **changes: Any) -> dict[str, Any]:
    return {
        "out": str(out), "start": str(start), "data": {"path": str(prepared)}, "device": "cpu",
        "model": {
            "max_position_embeddings": 640,
            "rope_scaling": {"factor": 40, "original_max_position_embeddings": 16},
        },
        "optimizer": {"lr": 1e-3}, "checkpoint": {"every": 2, "keep": 2},
        "validation": {"every": 50, "sequences": 2}, "samples": {"every": 100, "prompts": []},
        "phases": [
            {"sequence_length": 32, "steps": 6, "batch": {"sequences": 4, "micro_sequences": 2}},
            {"sequence_length": 64, "steps": 6, "batch": {"sequences": 2, "micro_sequences": 1}},
        ],
        **changes,
    }  # fmt: skip


@pytest.fixture(scope="module")
def unbroken(prepared: Path, start: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("extend") / "run"
    last = extend(recipes.validate(ExtendRecipe, tree(prepared, start, out)))
    assert last == out / "phase-2"
    return out


def test_the_config_says_yarn_and_the_weights_have_moved(start: Path, unbroken: Path) -> None:
    for phase in ("phase-1", "phase-2"):
        config = json.loads((unbroken / phase / "model" / "config.json").read_text())
        assert config["max_position_embeddings"] == 640
        assert config["rope_scaling"]["rope_type"] == "yarn" and config["rope_scaling"]["factor"] == 40
    folders = [start, unbroken / "phase-1" / "model", unbroken / "phase-2" / "model"]
    heads = [dsv3.load(folder).lm_head.weight for folder in folders]
    assert not torch.equal(heads[0], heads[1]) and not torch.equal(heads[1], heads[2])


def test_the_second_phase_begins_with_the_firsts_weights(
    prepared: Path, start: Path, unbroken: Path, tmp_path: Path
) -> None:
    one = tree(prepared, unbroken / "phase-1" / "model", tmp_path / "again")
    one["phases"] = one["phases"][1:]
    last = extend(recipes.validate(ExtendRecipe, one))
    assert last is not None and same(last / "model", unbroken / "phase-2" / "model")


@pytest.mark.parametrize(
    "checkpoint",
    [
        "phase-1/checkpoints/step-000002",
        pytest.param("phase-2/checkpoints/step-000004", marks=pytest.mark.slow),
    ],
)
@pytest.mark.slow
def test_a_killed_extension_ends_as_an_unbroken_one(
    prepared: Path, start: Path, unbroken: Path, tmp_path: Path, checkpoint: str
) -> None:
    out = tmp_path / "run"
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree(prepared, start, out)))
    command = [sys.executable, "-m", "dsv3", "extend", str(path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        wait_for((out / checkpoint).exists, process)
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    first = out / "phase-1" / "model" / "model.safetensors"
    written = first.stat().st_mtime_ns if first.exists() else None
    assert (written is not None) == checkpoint.startswith("phase-2")
    refused = subprocess.run(command, capture_output=True, text=True)
    assert refused.returncode == 2 and "--resume auto" in refused.stderr
    done = subprocess.run([*command, "--resume", "auto"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"dsv3 niah {out}/phase-2/model" in done.stdout
    assert same(out / "phase-2" / "model", unbroken / "phase-2" / "model")
    if written is not None:  # the finished phase was left alone
        assert first.stat().st_mtime_ns == written


def test_a_changed_phase_is_not_taken_for_finished(
    prepared: Path, start: Path, tmp_path: Path, unbroken: Path
) -> None:
    plan = tree(prepared, start, tmp_path / "run")
    extend(recipes.validate(ExtendRecipe, plan))
    plan["phases"][1]["steps"] = 8
    extend(recipes.validate(ExtendRecipe, plan), resume=True)
    assert (tmp_path / "run/phase-2/checkpoints/step-000008").exists()
    assert not same(tmp_path / "run/phase-2/model", unbroken / "phase-2/model")


def test_what_a_later_phase_lacks_is_said_before_the_first(
    prepared: Path, start: Path, tmp_path: Path
) -> None:
    plan = tree(prepared, start, tmp_path / "run")
    plan["phases"][1]["data"] = {"long_share": 0.5}
    plan["phases"][1]["sequence_length"] = 640
    with pytest.raises(UserError, match=r"long_share \(0.5\): no document .* has 642 tokens"):
        extend(recipes.validate(ExtendRecipe, plan))
    wrong = tree(prepared, start, tmp_path / "run")
    wrong["model"]["hidden_size"] = 48
    with pytest.raises(UserError, match="shape"):
        extend(recipes.validate(ExtendRecipe, wrong))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.7, 1.3)])
def test_transformers_agrees_on_positions_past_the_original(
    unbroken: Path, tmp_path: Path, weights: tuple[float, float]
) -> None:
    """By the files alone: 300 tokens where the model began with 16, with both of YaRN's scales at work."""
    from transformers import AutoModelForCausalLM

    model = dsv3.load(unbroken / "phase-2" / "model")
    yarn = model.config.rope_scaling
    assert yarn is not None
    if weights != (1.0, 1.0):  # the report's are equal: cosines and sines are not scaled
        changed = yarn.model_copy(update={"mscale": weights[0], "mscale_all_dim": weights[1]})
        model = DeepSeekV3(model.config.model_copy(update={"rope_scaling": changed}))
    torch.nn.init.normal_(model.model.embed_tokens.weight)  # so that attention is far from even
    for layer in model.main_layers:
        for matrix in (layer.self_attn.q_a_proj, layer.self_attn.kv_a_proj_with_mqa):
            torch.nn.init.normal_(matrix.weight, std=0.5)
    dsv3.save(model, tmp_path / "model")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    ids = torch.randint(0, model.config.vocab_size, (1, 300))
    with torch.no_grad():
        ours, wanted = model(ids, mtp=False).logits_BTV, theirs(ids).logits
        plain = DeepSeekV3(model.config.model_copy(update={"rope_scaling": None}))
        plain.load_state_dict(model.state_dict())
        without = plain(ids, mtp=False).logits_BTV
    torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-5)
    assert (without - wanted)[:, 16:].abs().max() > 100 * (ours - wanted).abs().max()
