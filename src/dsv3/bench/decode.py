"""``dsv3 bench decode``: reading prompts and continuing them, beside transformers and llama.cpp.

A side is a contestant in one number format. Every round runs each side once, in turns, in a process of its
own that reads the model anew; what is told are medians over the rounds and their ratios. Prompts are random
tokens, different in every round and answer, so that nothing is found in a cache.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from dsv3.bench import llama_cpp
from dsv3.bench.machine import machine
from dsv3.checkpoint.convert import convert
from dsv3.checkpoint.init import init
from dsv3.common.errors import Failure, UserError
from dsv3.common.progress import Progress
from dsv3.config.model import ModelConfig
from dsv3.config.recipe import validate

WORKER = "dsv3.bench.decode_worker"
FORMATS = ("bf16", "int8", "int4")
# With their default kernels for the experts, or named ones.
TRANSFORMERS = ("transformers", "transformers:eager", "transformers:grouped_mm")
PEERS = (*TRANSFORMERS, "llama.cpp")

# 1.44B parameters, of which a token meets 0.34B; a machine of 16 GB holds it in every format.
V3_1B: dict[str, Any] = dict(
    vocab_size=129280, hidden_size=1024, intermediate_size=2816, moe_intermediate_size=512,
    num_hidden_layers=12, num_nextn_predict_layers=0, first_k_dense_replace=1, n_routed_experts=64,
    n_shared_experts=1, num_experts_per_tok=8, n_group=8, topk_group=4, num_attention_heads=8,
    q_lora_rank=384, kv_lora_rank=512, qk_rope_head_dim=64, qk_nope_head_dim=128, v_head_dim=128,
    max_position_embeddings=8192, initializer_range=0.02,
    rope_scaling=dict(factor=2.0, original_max_position_embeddings=4096),
)  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """What every side does: for each batch, ``prompt_tokens`` in and ``tokens`` out an answer."""

    model: Path
    prompt_tokens: int = 128
    tokens: int = 64
    batches: tuple[int, ...] = (1, 4, 16)
    threads: int = 1


@dataclass(frozen=True)
class Side:
    """``name``: ours, or a peer's. ``model``: folder or file. ``program``: llama.cpp's, for its own side."""

    name: str
    format: str
    model: Path
    program: Path | None = None

    def __str__(self) -> str:
        return f"{self.name} {self.format}"


def choices(text: str, option: str, known: tuple[str, ...]) -> list[str]:
    """``a,b`` as a list of known names, none of them twice; empty for an empty text."""
    found = [part.strip() for part in text.split(",") if part.strip()]
    for name in found:
        if name not in known:
            raise UserError(f"{option} ({name}) is unknown; there are {', '.join(known)}")
    return list(dict.fromkeys(found))


def sizes(text: str) -> tuple[int, ...]:
    """``1,4,16`` as batch sizes."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise UserError(f"--batch ({text}) must be whole numbers with commas between them, such as 1,4,16")
    return tuple(dict.fromkeys(int(part) for part in parts))


def default_model(tokenizer: Path | None) -> Path:
    """The folder of "v3-1b", made unless it is there. Without a tokenizer llama.cpp cannot read it."""
    folder = Path("runs/bench-decode/v3-1b")
    if not folder.exists():
        init(validate(ModelConfig, V3_1B), folder, tokenizer=tokenizer)
    return folder


def folder_of(model: Path, kind: str) -> Path:
    """The model in this format: converted, beside it, unless that is there."""
    if kind == "bf16":
        return model
    folder = model.with_name(f"{model.name}-{kind}")
    if not folder.exists():
        convert(model, folder, kind)
    return folder


def bench(
    plan: Plan, formats: list[str], peers: list[str], rounds: int = 3, llama: Path | None = None
) -> dict[str, Any]:
    """Medians and ratios. ``llama``: llama.cpp's folder; None: where it is a peer, it is left out."""
    model = plan.model.resolve()
    longest, wanted = ModelConfig.from_pretrained(model).max_position_embeddings, plan.prompt_tokens
    if wanted + plan.tokens > longest:
        raise UserError(
            f"--prompt-tokens ({wanted}) and --tokens ({plan.tokens}) exceed the {longest} positions of"
            f" {plan.model}; lower one of them"
        )
    theirs, left_out = [], []
    for peer in peers:
        if peer != "llama.cpp":
            theirs += [Side(peer, "bf16", model)] if "bf16" in formats else []
        elif llama is None:
            left_out.append("llama.cpp: say where it is with --llama-cpp or DSV3_LLAMA_CPP")
        else:
            program = llama_cpp.program(llama, llama_cpp.BENCH)
            theirs += [Side(peer, kind, llama_cpp.gguf(llama, model, kind), program) for kind in formats]
    sides = [*(Side("ours", kind, folder_of(model, kind)) for kind in formats), *theirs]
    measured: dict[Side, list[dict[str, Any]]] = {side: [] for side in sides}
    bandwidths = []
    with Progress("bench decode", rounds * len(sides), "runs") as progress:
        for number in range(rounds):
            bandwidths.append(_bandwidth(plan.threads))
            for side in sides:
                progress.note(str(side))
                measured[side].append(_run(side, plan, number))
                progress.advance(1)
    return {
        **_summary(measured, plan, median(bandwidths)),
        "machine": {
            **machine(),
            "threads": plan.threads,
            "memory_read_bytes_per_second": median(bandwidths),
        },
        "settings": {
            str(side): {key: value for key, value in runs[0].items() if key != "batches"}
            for side, runs in measured.items()
        },
        "left_out": left_out,
    }


def _run(side: Side, plan: Plan, number: int) -> dict[str, Any]:
    if side.program:
        return llama_cpp.measure(
            side.program, side.model, plan.prompt_tokens, plan.tokens, plan.batches, plan.threads
        )
    job = {**asdict(plan), "model": str(side.model), "do": side.name, "seed": number}
    return answer_of(WORKER, job, str(side))


def _bandwidth(threads: int) -> float:
    return answer_of(WORKER, {"do": "bandwidth", "threads": threads}, "bandwidth")["bytes_per_second"]


def answer_of(module: str, job: dict[str, Any], name: str) -> dict[str, Any]:
    """What a process of its own, running ``module``, answers to a job; both are JSON."""
    done = subprocess.run(
        [sys.executable, "-m", module], input=json.dumps(job), capture_output=True, text=True
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        raise Failure(f"{name} stopped: {lines[-1] if lines else 'no message'}")
    return json.loads(done.stdout.splitlines()[-1])


def _summary(measured: dict[Side, list[dict[str, Any]]], plan: Plan, bandwidth: float) -> dict[str, Any]:
    """Every run is ``{"batches": {"1": {"prefill": tokens/s, "decode": tokens/s}}, ...}``."""
    ours: dict[str, Any] = {}
    peers: dict[str, Any] = {}
    ratios: dict[str, float] = {}
    for side, runs in measured.items():
        found = ours if side.name == "ours" else peers.setdefault(side.name, {})
        for batch in map(str, plan.batches):
            speeds = {
                f"{what}_tokens_per_second": median(run["batches"][batch][what] for run in runs)
                for what in ("prefill", "decode")
            }
            rounds = {
                f"{what}_rounds": [round(run["batches"][batch][what], 2) for run in runs]
                for what in ("prefill", "decode")
            }
            found[f"{side.format}:batch-{batch}"] = {**speeds, **rounds}
    for side, runs in measured.items():
        if side.name == "ours":
            case = ours.get(f"{side.format}:batch-1")
            if case:
                size = runs[0]["weight_bytes_per_token"]
                case["weight_bytes_per_token"] = size
                case["share_of_memory_read"] = size * case["decode_tokens_per_second"] / bandwidth
    for name, cases in peers.items():
        for case, theirs in cases.items():
            for what in ("prefill", "decode"):
                key = f"{what}_tokens_per_second"
                ratios[f"{name}:{case}:{what}"] = ours[case][key] / theirs[key]
    return {"ratios": ratios, "ours": ours, "peers": peers}


def report(result: dict[str, Any]) -> str:
    """The result as a small table."""
    lines = [f"{'tokens/s':<34} prefill   decode"]
    rows = {"dsv3": result["ours"], **result["peers"]}
    for name, cases in rows.items():
        for case, found in cases.items():
            prefill, decode = found["prefill_tokens_per_second"], found["decode_tokens_per_second"]
            lines.append(f"  {name + ' ' + case:<32} {prefill:>7.1f}  {decode:>7.1f}")
    speed = result["machine"]["memory_read_bytes_per_second"]
    lines.append(f"memory is read at {speed / 1e9:.1f} GB/s by {result['machine']['threads']} threads")
    for case, found in result["ours"].items():
        if "weight_bytes_per_token" in found:
            size, share = found["weight_bytes_per_token"] / 1e9, found["share_of_memory_read"]
            lines.append(f"  dsv3 {case}: {size:.2f} GB of weights a token, {share:.0%} of that speed")
    for side, facts in result["settings"].items():
        if not side.startswith("ours"):
            lines.append(f"  {side}: {', '.join(f'{key} {value}' for key, value in facts.items())}")
    if result["ratios"]:
        lines.append("ratios (ours / theirs):")
        lines += [f"  {name:<44} {ratio:.2f}" for name, ratio in result["ratios"].items()]
    lines += [f"left out: {word}" for word in result["left_out"]]
    return "\n".join(lines)
