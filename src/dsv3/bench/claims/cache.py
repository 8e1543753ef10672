"""Claim 2: bytes of cache a token, counted in caches that hold one.

Ours: the engine answers a prompt and the rows that were written are counted. Peers: transformers runs a model
with as many layers and heads of full width on torch's meta device, whose tensors have sizes and no memory.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from dsv3.bench.claims.claim import CONTRARY, HOLDS, Claim, Measured, Options
from dsv3.bench.claims.pictures import bars, canvas, save
from dsv3.config.model import ModelConfig
from dsv3.model import DeepSeekV3
from dsv3.serve.engine import Engine
from dsv3.serve.options import Options as EngineOptions
from dsv3.serve.params import SamplingParams

# Only what the cache does not depend on is made small.
NARROW: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 64, "vocab_size": 128, "num_attention_heads": 4,
    "q_lora_rank": 32, "num_nextn_predict_layers": 0, "rope_scaling": None, "max_position_embeddings": 4096,
}  # fmt: skip
PROMPT, ANSWER = 100, 29  # the last token of an answer is never written
PUBLISHED = 70_272  # (512 + 64) values, 61 layers, BF16
HEADS, HEAD = 128, 128


def latent_bytes(kind: str) -> float:
    """Bytes a token in our engine's cache, after an answer."""
    released = ModelConfig.preset("v3-671b")
    config = ModelConfig.preset("v3-671b", **NARROW, first_k_dense_replace=released.num_hidden_layers)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = DeepSeekV3(config).to(torch.bfloat16)
    engine = Engine(model, options=EngineOptions(cache_dtype=kind, cache_tokens=256, max_batch=1))
    engine.add_request(
        list(range(3, 3 + PROMPT)), SamplingParams(temperature=0, max_tokens=ANSWER, ignore_eos=True)
    )
    while engine.busy:
        engine.step()
    rows = engine.cache.rows  # layers, slots, width
    written = rows.view(torch.uint8).any(dim=-1)
    return int(written.sum()) * rows[0, 0].nbytes / (PROMPT + ANSWER - 1)


def key_value_bytes(heads: int) -> float:
    """Bytes a token in transformers' cache, of a model with so many key and value heads."""
    from transformers import LlamaConfig, LlamaForCausalLM

    released = ModelConfig.preset("v3-671b")
    config = LlamaConfig(
        hidden_size=released.hidden_size, intermediate_size=64, vocab_size=128, head_dim=HEAD,
        num_hidden_layers=released.num_hidden_layers, num_attention_heads=HEADS, num_key_value_heads=heads,
        dtype="bfloat16",
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config).bfloat16()
        ids = torch.zeros(1, PROMPT, dtype=torch.int64)
        held = model(ids, use_cache=True).past_key_values
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in held.layers) / PROMPT


def measure(options: Options) -> Measured:
    """Every cache, and the ratio to the latent one."""
    ours = latent_bytes("bfloat16")
    found = {
        "MHA, 128 heads": key_value_bytes(128),
        "GQA, 8 heads": key_value_bytes(8),
        "MQA, 1 head": key_value_bytes(1),
        "MLA, BF16": ours,
        "MLA, FP8 as FlashMLA's": latent_bytes("fp8"),
    }
    return Measured(
        f"{ours:,.0f} bytes a token in BF16: 1/{found['MHA, 128 heads'] / ours:.0f} of MHA,"
        f" 1/{found['GQA, 8 heads'] / ours:.1f} of GQA-8, {ours / found['MQA, 1 head']:.2f} of MQA",
        HOLDS if ours == PUBLISHED else CONTRARY,
        ("61 layers, heads of 128", "bytes a token", "of MLA's"),
        [(name, f"{size:,.0f}", f"{size / ours:.2f}") for name, size in found.items()],
        {"bytes": found},
    )


def draw(data: dict[str, Any], path: Path) -> None:
    """A bar a cache."""
    figure, (axis,) = canvas(1, 7, 2.4)
    bars(axis, {name: size / 1024 for name, size in data["bytes"].items()}, "KiB a token, 61 layers")
    save(figure, path)


CACHE = Claim(
    2, "cache",
    "MLA caches (512 + 64) values a token and layer, far less than MHA: 70,272 bytes a token in BF16.",
    "2.1.1",
    "our engine with the released model's 61 layers and latent widths (hidden size and heads, which the cache"
    " does not depend on, small) after an answer of 129 tokens: rows written, counted; transformers' cache of"
    " Llama models with 61 layers and 128 heads of 128",
    "Exact: bytes do not depend on training. What quality GQA or MQA would lose is not measured here.",
    measure, draw,
)  # fmt: skip
