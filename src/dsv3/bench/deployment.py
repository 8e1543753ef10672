"""What the report's deployment costs and brings here: handovers from prefill to decode, redundant experts.

Handovers: a random model with DeepSeek-V3's cache (61 layers and an MTP module, 576 numbers a token and
layer, BF16) hands an answer from one engine to another over a socket, with both ends on one thread; the peer
is a copy of the same bytes in memory. Processor seconds, not those on the wall: it is all one thread's work.

Experts: an engine answers prompts with its experts in slots, placed by the loads of other prompts. What a
step waits for is its busiest shard: its rows, step by step, over the mean shard's.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dsv3.bench.machine import machine
from dsv3.checkpoint.hf import load, read_config
from dsv3.common.errors import UserError
from dsv3.config.model import ModelConfig
from dsv3.config.recipe import validate
from dsv3.data.tokenizer import Tokenizer
from dsv3.model import DeepSeekV3
from dsv3.serve.channel import Channel, Frame
from dsv3.serve.engine import Engine
from dsv3.serve.handover import Handover, from_wire, give, take, to_wire
from dsv3.serve.options import Options
from dsv3.serve.params import SamplingParams
from dsv3.serve.placement import place
from dsv3.serve.replicas import Replicas

# DeepSeek-V3's cache; everything else as small as it goes.
SMALL: dict[str, Any] = dict(
    preset="v3-671b", vocab_size=64, hidden_size=64, intermediate_size=64, moe_intermediate_size=32,
    num_attention_heads=1, q_lora_rank=32, qk_nope_head_dim=16, v_head_dim=16, n_routed_experts=8,
    num_experts_per_tok=2, n_group=1, topk_group=1,
)  # fmt: skip
REPEATS = 7
PROMPTS = 64
WISH = SamplingParams(max_tokens=16, temperature=0, ignore_eos=True)


def _least(run: Callable[[], Any]) -> float:
    """Processor seconds of the fastest of some runs."""
    found = []
    for _ in range(REPEATS):
        begun = time.process_time()
        run()
        found.append(time.process_time() - begun)
    return min(found)


def _over_the_wire(handover: Handover) -> Handover:
    left, right = (Channel(end, "the other", largest=2**40) for end in socket.socketpair())
    left.send(*to_wire(handover))
    frames: list[Frame] = []
    while not frames:
        left.flush()
        frames = right.receive()
    left.close()
    right.close()
    return from_wire(frames[0].message, frames[0].payload)


def handover(tokens: int) -> dict[str, Any]:
    """Bytes of a token and GB/s of a handover's parts, for a prompt of so many tokens."""
    model = DeepSeekV3(validate(ModelConfig, SMALL))
    options = Options(
        draft_tokens=1, cache_dtype="bfloat16", cache_tokens=tokens + 64, max_length=tokens + 32
    )
    first, second = Engine(model, options=options), Engine(model, options=options)
    prompt = torch.randint(64, (tokens,), generator=torch.Generator().manual_seed(0)).tolist()
    seconds: dict[str, list[float]] = {"take": [], "send and receive": [], "give": []}
    for number in range(REPEATS):
        (sequence,) = first.requests[first.add_request(prompt, WISH)]
        while len(sequence.tokens) == tokens:
            first.step()
        at = [time.process_time()]
        taken = take(first, sequence)
        at.append(time.process_time())
        arrived = _over_the_wire(taken)
        at.append(time.process_time())
        give(second, arrived, str(number))
        at.append(time.process_time())
        second.abort(str(number))
        for found, begun, ended in zip(seconds.values(), at, at[1:]):
            found.append(ended - begun)
    rows = taken.arrays["rows"]
    there = torch.empty_like(rows)
    copy = _least(lambda: there.copy_(rows))
    size, layers = rows.nbytes / 1e9, model.config.num_hidden_layers
    rates = {name: size / min(found) for name, found in seconds.items()}
    whole = sum(min(found) for found in seconds.values())
    return {
        "tokens": rows.shape[1],
        "bytes_per_token": rows[:layers].nbytes / rows.shape[1],
        "bytes_per_token_with_mtp": rows.nbytes / rows.shape[1],
        "gigabytes_per_second": {**rates, "handover": size / whole, "memcpy": size / copy},
        "ratio": copy / whole,
    }


def experts(folder: Path, slots: int, shards: int) -> dict[str, Any]:
    """Imbalance of the shards for prompts of Python: in order of number, and placed by measured loads."""
    tokenizer = Tokenizer.load(folder)
    text = "\n".join(path.read_text() for path in sorted(Path(__file__).parents[1].rglob("*.py")))
    ids = tokenizer.encode(text)
    prompts = [ids[start : start + 96] for start in range(0, PROMPTS * 512, 512)]
    seen, unseen = prompts[::2], prompts[1::2]

    def run(slots: int, rebalance: bool) -> tuple[float, list[list[int]], Any]:
        model = load(folder)
        options = Options(cache_tokens=16 * 256, draft_tokens=int(bool(model.mtp_modules)))
        engine = Engine(model, tokenizer, options)
        replicas, moved = Replicas(engine, slots, shards), None
        if rebalance:
            _answer(engine, seen)
            moved = replicas.rebalance()
        answers = _answer(engine, unseen)
        return float(np.mean(replicas.imbalance())), answers, moved

    count = load(folder).config.n_routed_experts
    plain, answers, _ = run(count, False)
    packed, again, _ = run(count, True)
    placed, last, moved = run(slots, True)
    return {
        "slots": slots,
        "shards": shards,
        "imbalance": {"as they come": plain, "placed": packed, "placed, with replicas": placed},
        "moved_slots": moved.slots,
        "moved_bytes": moved.nbytes,
        "same_answers": answers == again == last,
    }


def _answer(engine: Engine, prompts: list[list[int]]) -> list[list[int]]:
    sequences = [engine.requests[engine.add_request(prompt, WISH)][0] for prompt in prompts]
    while engine.busy:
        engine.step()
    return [sequence.answer for sequence in sequences]


def placing() -> float:
    """Seconds to place DeepSeek-V3's experts: 58 layers of 256 in 288 slots of 32 GPUs on 4 nodes."""
    load_LE = np.random.default_rng(0).lognormal(size=(58, 256))
    return _least(lambda: place(load_LE, 288, 8, 4, 32))


def bench(tokens: int, folder: Path | None = None, slots: int = 0, shards: int = 8) -> dict[str, Any]:
    """All of it; the part about experts only with a model to answer with. ``slots`` 0: a quarter more than
    there are experts."""
    if folder is not None:
        if not (folder / "tokenizer.json").is_file():
            raise UserError(f"--model ({folder}) must be a folder with a model and its tokenizer.json")
        config = read_config(folder)
        count = config.n_routed_experts
        slots = slots or count + count // 4
        if slots < count or slots % shards or count % shards:
            raise UserError(
                f"--slots ({slots}) must be at least the {count} experts, and --shards ({shards}) divide both"
            )
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        handed = handover(tokens)
    finally:
        torch.set_num_threads(threads)
    found: dict[str, Any] = {
        "ratios": {"memcpy:handover": handed["ratio"]},
        "ours": {"handover": handed, "placing_v3_seconds": placing()},
        "machine": machine("cpu"),
    }
    if folder is not None:
        found["ours"]["experts"] = experts(folder, slots, shards)
    return found


def report(result: dict[str, Any]) -> str:
    """The figures, line by line."""
    ours = result["ours"]
    handed = ours["handover"]
    lines = [
        f"handover of {handed['tokens']} tokens: {handed['bytes_per_token']:,.0f} bytes a token,"
        f" {handed['bytes_per_token_with_mtp']:,.0f} with the MTP module's"
    ]
    for name, rate in handed["gigabytes_per_second"].items():
        lines.append(f"  {name:<18} {rate:6.2f} GB/s")
    lines.append(f"  handover : memcpy  {handed['ratio']:6.2f}")
    lines.append(f"placing V3's experts (58 layers, 288 slots, 32 GPUs): {ours['placing_v3_seconds']:.3f} s")
    if "experts" in ours:
        found = ours["experts"]
        lines.append(
            f"busiest of {found['shards']} shards over the mean ({found['slots']} slots with replicas):"
        )
        lines += [f"  {name:<24} {value:.3f}" for name, value in found["imbalance"].items()]
        lines.append(
            f"  moved {found['moved_slots']} slots, {found['moved_bytes'] / 1e6:.1f} MB;"
            f" the same answers: {'yes' if found['same_answers'] else 'no'}"
        )
    return "\n".join(lines)
