"""``dsv3 bench train``: training steps beside transformers, alternating, the ratio of medians."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from statistics import median
from types import TracebackType
from typing import Any

from dsv3.bench.machine import machine
from dsv3.common.errors import Failure
from dsv3.common.progress import Progress

# What both train on. MTP and the balance loss are off: the peer has neither.
CASES: dict[str, dict[str, Any]] = {
    "cpu-63m": {
        "device": "cpu", "precision": "fp32", "sequences": 8, "length": 512,
        "model": dict(
            vocab_size=8192, hidden_size=384, intermediate_size=1024, moe_intermediate_size=192,
            num_hidden_layers=8, first_k_dense_replace=1, n_routed_experts=32, n_shared_experts=1,
            num_experts_per_tok=4, n_group=4, topk_group=2, num_attention_heads=6, q_lora_rank=192,
            kv_lora_rank=128, qk_rope_head_dim=32, qk_nope_head_dim=64, v_head_dim=64,
            num_nextn_predict_layers=0, aux_loss_alpha=0.0, initializer_range=0.02,
            max_position_embeddings=2048,
        ),
    },
    "gpu-1b": {
        "device": "cuda", "precision": "bf16", "sequences": 8, "length": 2048,
        "model": dict(
            vocab_size=32768, hidden_size=1024, intermediate_size=2816, moe_intermediate_size=512,
            num_hidden_layers=12, first_k_dense_replace=1, n_routed_experts=48, n_shared_experts=1,
            num_experts_per_tok=6, n_group=8, topk_group=4, num_attention_heads=8, q_lora_rank=384,
            kv_lora_rank=512, qk_rope_head_dim=64, qk_nope_head_dim=128, v_head_dim=128,
            num_nextn_predict_layers=0, aux_loss_alpha=0.0, initializer_range=0.02,
            max_position_embeddings=4096,
        ),
    },
}  # fmt: skip


class Worker:
    """A contestant's process."""

    def __init__(self, job: dict[str, Any], **environment: str):
        self.peer = job["peer"]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "dsv3.bench.train_worker", json.dumps(job)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**os.environ, **environment},
        )  # fmt: skip

    def ask(self, what: str) -> dict[str, Any]:
        """``step`` or ``memory``."""
        assert self.process.stdin and self.process.stdout
        try:
            self.process.stdin.write(what + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            error = (self.process.communicate()[1] or "").strip().splitlines()
            raise Failure(f"{self.peer} stopped: {error[-1] if error else 'no message'}")
        return json.loads(line)

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.kill()
        self.process.communicate()


def bench(
    case: str, peers: list[str], steps: int = 9, warmup: int = 2, threads: int = 0, compiled: bool = False
) -> dict[str, Any]:
    """Medians and ratios of tokens a second and peak memory; every round runs each contestant once."""
    settings = CASES[case]
    names = ["ours:compile" if compiled else "ours", *peers]
    seconds: dict[str, list[float]] = {name: [] for name in names}
    with Progress("bench train", (steps + warmup) * len(names), "steps") as progress:
        workers = [Worker({**settings, "peer": name, "threads": threads}) for name in names]
        try:
            for step in range(warmup + steps):
                for worker in workers:
                    taken = worker.ask("step")["seconds"]
                    if step >= warmup:
                        seconds[worker.peer].append(taken)
                    progress.note(f"{worker.peer} {taken:.2f} s")
                    progress.advance(1)
            memory = {worker.peer: worker.ask("memory")["bytes"] for worker in workers}
        finally:
            for worker in workers:
                worker.__exit__(None, None, None)
    tokens = settings["sequences"] * settings["length"]
    figures = {
        name: {
            "tokens_per_second": tokens / median(taken),
            "peak_memory_bytes": memory[name],
            "step_seconds": [round(x, 4) for x in taken],
        }
        for name, taken in seconds.items()
    }
    own = figures.pop(names[0])
    ratios = {}
    for peer, found in figures.items():
        ratios[f"{peer}:tokens_per_second"] = own["tokens_per_second"] / found["tokens_per_second"]
        ratios[f"{peer}:peak_memory"] = own["peak_memory_bytes"] / found["peak_memory_bytes"]
    return {
        "case": case,
        "ratios": ratios,
        "ours": own,
        "peers": figures,
        "machine": {**machine(settings["device"]), "threads": threads or "default"},
    }


def report(result: dict[str, Any]) -> str:
    """The result as a small table."""
    lines = [f"{result['case']}: {'':<26} tokens/s   peak memory"]
    rows = {"dsv3": result["ours"], **result["peers"]}
    for name, found in rows.items():
        size = found["peak_memory_bytes"] / 2**20
        lines.append(f"  {name:<32} {found['tokens_per_second']:>10.0f}   {size:>7.0f} MiB")
    lines.append("ratios (ours / theirs):")
    lines += [f"  {name:<44} {ratio:.2f}" for name, ratio in result["ratios"].items()]
    return "\n".join(lines)
