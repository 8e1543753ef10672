"""One contestant of ``dsv3 bench train``, in a process of its own so that its memory is its own.

Reads lines from standard input, answers each with a line of JSON: ``step`` runs a training step and says how
long it took; ``memory`` says the peak. Both contestants get the same batches, optimizer and clipping.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Step = Callable[[Tensor], float]  # a batch [B, T + 1] to the loss
LEARNING_RATE, CLIP = 2.2e-4, 1.0


def ours(job: dict[str, Any]) -> Step:
    """dsv3's model, objective and optimizer as the trainer puts them together."""
    from dsv3.config.model import ModelConfig
    from dsv3.config.recipe import validate
    from dsv3.config.train import OptimizerSection
    from dsv3.data.loader import Batch
    from dsv3.model import DeepSeekV3
    from dsv3.parallel.weights import Weights
    from dsv3.train import recompute
    from dsv3.train.objective import Share, language_loss
    from dsv3.train.optimizer import build, clip_gradients

    with torch.device(job["device"]):
        model = DeepSeekV3(validate(ModelConfig, job["model"]))
    if job["precision"] == "bf16":
        model.model.embed_tokens.compute_dtype = torch.bfloat16
    recompute.apply(model, job.get("recompute", "none"))
    if job["peer"].endswith(":compile"):
        for layer in model.model.layers:
            layer.compile()
    optimizer = build(model, OptimizerSection(lr=LEARNING_RATE, clip=CLIP))
    weights = Weights(model)

    def step(rows: Tensor) -> float:
        length = rows.shape[1] - 1
        share = Share([rows.shape[0] * length], rows.shape[0])
        loss, _ = language_loss(model, Batch(rows), length, share, mtp_weight=0.0)
        loss.backward()
        clip_gradients(weights, CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    return step


def theirs(job: dict[str, Any]) -> Step:
    """transformers' DeepseekV3ForCausalLM with its SDPA attention; ``transformers:X``: experts by X."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    from dsv3.config.model import ModelConfig
    from dsv3.config.recipe import validate

    config = DeepseekV3Config(**validate(ModelConfig, job["model"]).to_dict())
    config._experts_implementation = job["peer"].split(":")[1]
    with torch.device(job["device"]):
        model = DeepseekV3ForCausalLM(config).train()
    options: dict[str, Any] = dict(lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    optimizer = torch.optim.AdamW(model.parameters(), **options)
    low = torch.bfloat16 if job["precision"] == "bf16" else None

    def step(rows: Tensor) -> float:
        inputs = rows[:, :-1]
        with torch.autocast(job["device"], low, enabled=low is not None):
            loss = model(input_ids=inputs, labels=inputs, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    return step


def peak_bytes(device: str) -> int:
    """Peak memory of this process: the device's, or the resident set (not inherited from the parent)."""
    if device.startswith("cuda"):
        return int(torch.cuda.max_memory_allocated())
    with open("/proc/self/status", encoding="utf-8") as file:
        line = next(line for line in file if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def main() -> None:
    """Serve steps until standard input closes."""
    job = json.loads(sys.argv[1])
    if job["threads"]:
        torch.set_num_threads(job["threads"])
    torch.manual_seed(0)
    step = ours(job) if job["peer"].startswith("ours") else theirs(job)
    generator = torch.Generator().manual_seed(1)
    shape = (job["sequences"], job["length"] + 1)
    for line in sys.stdin:
        if line.strip() == "memory":
            answer: dict[str, Any] = {"bytes": peak_bytes(job["device"])}
        else:
            rows = torch.randint(0, job["model"]["vocab_size"], shape, generator=generator).to(job["device"])
            started = time.perf_counter()
            loss = step(rows)
            if job["device"].startswith("cuda"):
                torch.cuda.synchronize()
            answer = {"seconds": time.perf_counter() - started, "loss": loss}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
