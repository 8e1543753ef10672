"""Sides answer in the same terms, ratios are ours over theirs, and llama.cpp's files are made when absent."""

from __future__ import annotations

import json
import shutil
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from dsv3.bench import decode, decode_worker, drafts, llama_cpp
from dsv3.checkpoint.hf import load, save
from dsv3.cli.main import app
from dsv3.common.errors import Failure, UserError
from dsv3.config.model import ModelConfig
from dsv3.data.shards import TokenShards, write_manifest, write_shard
from dsv3.plan.params import counts
from tests.model.build import TINY, tiny_config, tiny_model

JOB: dict[str, Any] = {
    "threads": 1, "prompt_tokens": 9, "tokens": 5, "batches": [1, 3], "seed": 0,
}  # fmt: skip
# Stands for llama.cpp: speeds that tell batch and prompt apart, the first of a batch to be thrown away.
FAKE = """#!/usr/bin/env python3
import sys
given = dict(zip(sys.argv[1::2], sys.argv[2::2]))
assert open(given["-m"]).read() == "GGUF" and given["-t"] == "2" and given["-c"] == "512"
print("llama.cpp says something first")
for place, batch in enumerate(given["-npl"].split(",")):
    speed = 1e9 if place == 0 else 10 * int(batch)
    print('{"pl": %s, "pp": %s, "speed_pp": %f, "speed_tg": %f}' % (batch, given["-npp"], speed, speed / 2))
"""


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BF16 folder with an MTP module."""
    path = tmp_path_factory.mktemp("bench") / "model"
    save(tiny_model(num_nextn_predict_layers=1), path)
    return path


def program(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    """A folder like llama.cpp's after its build."""
    program(tmp_path / "llama/build/bin/llama-batched-bench", FAKE)
    quantise = "#!/usr/bin/env python3\nimport shutil, sys\nassert sys.argv[3] in ('Q8_0', 'Q4_0')\n"
    program(tmp_path / "llama/build/bin/llama-quantize", quantise + "shutil.copy(*sys.argv[1:3])\n")
    converter = "import sys\nopen(sys.argv[5], 'w').write('GGUF')\n"
    program(tmp_path / "llama" / llama_cpp.CONVERTER, converter)
    return tmp_path / "llama"


@pytest.mark.parametrize("side", ["ours", "transformers:eager"])
def test_a_side_reads_and_answers_every_batch(side: str, folder: Path) -> None:
    found = decode_worker.measure({**JOB, "do": side, "model": str(folder)})
    assert set(found["batches"]) == {"1", "3"}
    assert all(speed > 0 for batch in found["batches"].values() for speed in batch.values())
    if side != "ours":
        assert found["experts"] == "eager"


@pytest.mark.parametrize("side", [decode_worker.ours, decode_worker.transformers])
def test_a_side_times_both_parts(side: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter(range(1000))
    monkeypatch.setattr(decode_worker.time, "perf_counter", lambda: next(ticks))
    answer, _ = side({**JOB, "do": "x", "model": str(folder)})
    before, after = answer([[5] * 9, [6] * 9], 5)
    assert before > 0 and after >= 1  # of the peer's clock: a tick a token
    assert side is decode_worker.ours or (before, after) == (1, 4)


def test_weight_bytes_are_those_activated(folder: Path) -> None:
    model = load(folder, dtype="bfloat16")
    wanted = 2 * counts(tiny_config(num_nextn_predict_layers=1)).activated
    biases = 2 * 4 * TINY["n_routed_experts"]  # FP32, two layers
    assert decode_worker.weight_bytes(model) == wanted + biases


def test_bandwidth_is_bytes_a_second() -> None:
    assert decode_worker.bandwidth(2**9, times=1) > 1e6


def test_the_benchmark_s_model_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert counts(ModelConfig.from_dict(decode.V3_1B)).main == pytest.approx(1.44e9, rel=0.01)
    monkeypatch.setattr(decode, "V3_1B", TINY)
    monkeypatch.chdir(tmp_path)
    folder = decode.default_model(None)
    assert load(folder).config.hidden_size == TINY["hidden_size"]
    written = (folder / "config.json").stat().st_mtime_ns
    assert decode.default_model(None) == folder and (folder / "config.json").stat().st_mtime_ns == written


def test_ours_alone_in_processes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "_bandwidth", lambda threads: 2e9)
    plan = decode.Plan(folder, 9, 5, (1, 2), 1)
    result = decode.bench(plan, ["bf16", "int8"], ["llama.cpp"], rounds=1)
    assert result["ratios"] == {} and result["peers"] == {}
    assert "--llama-cpp" in result["left_out"][0]
    one = result["ours"]["bf16:batch-1"]
    share = one["weight_bytes_per_token"] * one["decode_tokens_per_second"] / 2e9
    assert one["share_of_memory_read"] == pytest.approx(share)
    assert "share_of_memory_read" not in result["ours"]["bf16:batch-2"]
    assert 4 * result["ours"]["int8:batch-1"]["weight_bytes_per_token"] < 3 * one["weight_bytes_per_token"]
    assert result["machine"]["threads"] == 1 and result["machine"]["torch"]
    assert "left out: llama.cpp" in decode.report(json.loads(json.dumps(result)))


def test_ratios_are_ours_over_theirs(
    folder: Path, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = shutil.copytree(folder, tmp_path / "model")
    (model / "tokenizer.json").write_text("{}")
    rounds = iter([2.0, 400.0, 4.0, 4.0, 600.0, 6.0])  # medians 4 and 6

    def answer(module: str, job: dict[str, Any], name: str) -> dict[str, Any]:
        speed = next(rounds) if job["do"] == "ours" else 8.0
        batches = {str(batch): {"prefill": 30 * speed, "decode": speed} for batch in job["batches"]}
        return {"batches": batches, "weight_bytes_per_token": 10}

    monkeypatch.setattr(decode, "_bandwidth", lambda threads: 80.0)
    monkeypatch.setattr(decode, "answer_of", answer)
    plan = decode.Plan(model, 300, 5, (1,), 2)
    peers = ["transformers", "llama.cpp"]
    # The order of a round is int8, int4, then the peers: of int8 the 1st, 3rd and 5th speed.
    result = decode.bench(plan, ["int8", "int4"], peers, 3, llama)
    assert result["ratios"] == {
        "llama.cpp:int8:batch-1:prefill": pytest.approx(30 * 4 / 10),
        "llama.cpp:int8:batch-1:decode": pytest.approx(4 / 5),
        "llama.cpp:int4:batch-1:prefill": pytest.approx(30 * 6 / 10),
        "llama.cpp:int4:batch-1:decode": pytest.approx(6 / 5),
    }
    assert result["ours"]["int8:batch-1"]["decode_rounds"] == [2.0, 4.0, 600.0]
    assert result["ours"]["int8:batch-1"]["share_of_memory_read"] == pytest.approx(0.5)
    assert sorted(file.name for file in tmp_path.glob("model-*")) == [
        "model-bf16.gguf", "model-int4", "model-int8", "model-q4_0.gguf", "model-q8_0.gguf",
    ]  # fmt: skip
    text = decode.report(result)
    assert "llama.cpp int4:batch-1" in text and "transformers" not in text
    rounds = iter([4.0])
    assert decode.bench(plan, ["bf16"], ["transformers"], 1)["ratios"] == {
        "transformers:bf16:batch-1:prefill": pytest.approx(0.5),
        "transformers:bf16:batch-1:decode": pytest.approx(0.5),
    }


def test_llama_cpp_s_mistakes_are_told(tmp_path: Path, llama: Path) -> None:
    with pytest.raises(UserError, match=r"--llama-cpp .* has no llama-batched-bench"):
        llama_cpp.program(tmp_path, llama_cpp.BENCH)
    with pytest.raises(UserError, match="--tokenizer"):
        llama_cpp.gguf(llama, tmp_path, "int8")
    (llama / llama_cpp.CONVERTER).unlink()
    with pytest.raises(UserError, match=r"-bf16\.gguf does not exist"):
        llama_cpp.gguf(llama, tmp_path, "bf16")
    with pytest.raises(Failure, match="no figures for batch 4"):
        llama_cpp.parse('{"pl": 1, "speed_pp": 1, "speed_tg": 2}', (1, 4))
    program(tmp_path / "broken", "#!/bin/sh\necho no memory >&2\nexit 3\n")
    with pytest.raises(Failure, match="broken stopped: no memory"):
        llama_cpp.measure(tmp_path / "broken", tmp_path / "x", 1, 1, (1,), 1)


def test_a_side_that_stops_is_named(tmp_path: Path) -> None:
    with pytest.raises(Failure, match=r"ours bf16 stopped: .*is not a folder"):
        decode.answer_of(decode.WORKER, {**JOB, "do": "ours", "model": str(tmp_path / "no")}, "ours bf16")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--vs", "vllm"], "--vs (vllm) is unknown; there are transformers"),
        (["--formats", "bf16,int3"], "--formats (int3) is unknown"),
        (["--formats", ","], "--formats (,) names none"),
        (["--batch", "1,x"], "--batch (1,x) must be whole numbers"),
        (["--batch", "0"], "--batch (0) must be"),
        (["--model", "nowhere"], "nowhere"),
        (["--tokenizer", "nowhere"], "--tokenizer (nowhere) holds no tokenizer.json"),
    ],
)
def test_mistakes_are_told(
    options: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["bench", "decode", *options])
    assert isinstance(result.exception, UserError) and message in str(result.exception)
    assert not list(tmp_path.iterdir())


def test_too_long_for_the_model(folder: Path) -> None:
    with pytest.raises(UserError, match=r"--prompt-tokens \(4090\) and --tokens \(7\) exceed the 4096"):
        decode.bench(decode.Plan(folder, 4090, 7), ["bf16"], [])


def test_prompts_are_spread_over_the_text(tmp_path: Path) -> None:
    write_manifest(tmp_path, [write_shard(tmp_path, "shard-00000", [np.arange(100)], 100)])
    shards = TokenShards(tmp_path)
    assert drafts.cut(shards, 3, 4) == [[0, 1, 2, 3], [48, 49, 50, 51], [96, 97, 98, 99]]
    with pytest.raises(UserError, match="too few for 3 prompts of 98"):
        drafts.cut(shards, 3, 98)


def test_drafts_beside_none(folder: Path) -> None:
    prompts = {"code": [[1, 2, 3, 4, 5], [7, 8, 9]]}
    result = drafts.bench(folder, prompts, tokens=12, rounds=1)
    with_, without = result["ours"]["code"], result["peers"]["no-drafts"]["code"]
    wanted = with_["decode_tokens_per_second"] / without["decode_tokens_per_second"]
    assert result["ratios"] == {"no-drafts:code:batch-1:decode": pytest.approx(wanted)}
    assert 0 <= with_["acceptance"] <= 1 <= with_["tokens_per_step"]
    assert "code" in drafts.report(json.loads(json.dumps(result)))


def test_drafts_may_change_no_token() -> None:
    run = {
        "code": {
            "tokens_per_second": 3.0, "tokens": 6, "steps": 4, "drafted": 4, "accepted": 2, "answers": [[1]],
        }
    }  # fmt: skip
    slower = {"code": {**run["code"], "tokens_per_second": 2.0}}
    found = drafts.summary({1: [run], 0: [slower]}, 1)
    assert found["ratios"] == {"no-drafts:code:batch-1:decode": 1.5}
    assert found["ours"]["code"]["acceptance"] == 0.5 and found["ours"]["code"]["tokens_per_step"] == 1.5
    changed = {"code": {**run["code"], "answers": [[2]]}}
    with pytest.raises(Failure, match="greedy answers on code differ"):
        drafts.summary({1: [changed], 0: [run]}, 1)


def test_a_model_without_drafts_is_refused(tmp_path: Path) -> None:
    save(tiny_model(), tmp_path / "model")
    with pytest.raises(UserError, match="has no MTP module"):
        drafts.bench(tmp_path / "model", {})
