"""Fleets of prefill and decode nodes: tokens a second from products, bandwidth and network (report 3.4).

Both fleets keep attention and shared experts on every GPU (data parallel) and share the routed experts, with
redundant copies, among ``expert`` GPUs; two micro-batches run in turns, so that one's all-to-all hides behind
the other's products. Two figures each: the bound, at the peaks of the data sheet, and the estimate, with the
products' efficiency fitted to the report's training run (plan/cost.py) and nothing fitted to serving. Loads
are taken as even, time as spent on nothing else.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Any

from dsv3.common.errors import UserError
from dsv3.config.model import ModelConfig
from dsv3.plan import alltoall
from dsv3.plan.hardware import Hardware, hardware
from dsv3.plan.memory import cache_bytes, weight_bytes
from dsv3.plan.params import counts

NODE = 8  # GPUs


@dataclass(frozen=True)
class Demand:
    """Traffic; the defaults are DeepSeek's published day (its mean prompt follows from the other figures).

    ``hit``: share of input tokens whose cache is there already; ``prompt``: mean tokens of a prompt;
    ``context``: mean tokens of cache an output token reads.
    """

    input_rate: float = 608e9 / 86400
    output_rate: float = 168e9 / 86400
    hit: float = 0.563
    prompt: int = 4383
    context: int = 4989

    def __post_init__(self) -> None:
        for field in ("input_rate", "output_rate"):
            if not 0 <= getattr(self, field) < math.inf:
                raise UserError(
                    f"{field} ({getattr(self, field):g}) must be a finite number of tokens a second"
                )


@dataclass(frozen=True)
class Fleet:
    """``expert`` GPUs share the experts and ``redundant`` copies of busy ones."""

    expert: int
    redundant: int = 32


@dataclass(frozen=True)
class Rate:
    """A node's tokens a second, and seconds a GPU spends on a token (prefill) or a step (decode)."""

    tokens_s_node: float
    products: float
    reading: float
    network: float
    batch: int = 0
    stream: float = 0.0

    @property
    def limit(self) -> str:
        """Which of the three takes longest."""
        spent = {"products": self.products, "memory bandwidth": self.reading, "network": self.network}
        return max(spent, key=lambda name: spent[name])


def check(config: ModelConfig, fleet: Fleet, name: str) -> int:
    """Experts a GPU holds in each layer. Raises :class:`UserError` if they do not come out even."""
    if fleet.expert < 1:
        raise UserError(f"{name}-expert ({fleet.expert}) must be at least 1 GPU")
    held = config.n_routed_experts + fleet.redundant
    if fleet.redundant < 0 or held % fleet.expert:
        fits = max(0, fleet.redundant) + -(config.n_routed_experts + max(0, fleet.redundant)) % fleet.expert
        raise UserError(
            f"{name}-redundant ({fleet.redundant}) and n_routed_experts ({config.n_routed_experts}) must "
            f"share out evenly over {name}-expert ({fleet.expert}) GPUs; try --{name}-redundant {fits}"
        )
    return held // fleet.expert


@cache
def _sizes(config: str) -> tuple[float, float, dict[str, int]]:
    """FLOPs a token of the Linears (FP8) and of the head (BF16), forward; bytes of the weights in FP8."""
    read = ModelConfig.model_validate_json(config)
    active = counts(read).activated_parts
    linear = sum(active.values()) - active["head"] - active["norms"] - active["embedding"]
    return 2.0 * linear, 2.0 * active["head"], weight_bytes(read, "fp8")


def prefill(config: ModelConfig, fleet: Fleet, machine: Hardware, demand: Demand, efficiency: float) -> Rate:
    """Input tokens a second a node, cached ones counted: they cost nothing. The head sees one token only.

    A computed token sees all cached ones and half of the computed ones, with keys and values expanded.
    """
    check(config, fleet, "prefill")
    assert machine.bf16 and machine.fp8
    if not 0 <= demand.hit < 1:
        raise UserError(f"hit ({demand.hit}) must be a share from 0 to below 1")
    keys = demand.prompt * (1 + demand.hit) / 2
    widths = config.num_attention_heads * (config.qk_head_dim + config.v_head_dim)
    linear, _, _ = _sizes(config.model_dump_json())
    attention = 2.0 * config.num_hidden_layers * widths * keys
    products = linear / (machine.fp8 * efficiency) + attention / (machine.bf16 * efficiency)
    way = alltoall.route(config, fleet.expert, machine)
    network = alltoall.seconds(config, alltoall.moe_layers(config, False), way)
    return Rate(NODE / max(products, network) / (1 - demand.hit), products, 0.0, network)


def decode(
    config: ModelConfig, fleet: Fleet, machine: Hardware, demand: Demand, efficiency: float,
    batch: int | None = None, mtp: bool = False, acceptance: float = 0.85, reserve: float = 0.1,
) -> Rate:  # fmt: skip
    """Output tokens a second a node, FP8 weights, BF16 cache, absorbed attention, a copy sent an expert.

    ``batch``: sequences a GPU; None: as many as memory holds. With ``mtp`` a step runs two tokens a sequence
    and yields 1 + acceptance; the module's own layer counts as one more.
    """
    held = check(config, fleet, "decode")
    assert machine.bf16 and machine.fp8
    linear, head, parts = _sizes(config.model_dump_json())
    routed = parts["routed experts"] / config.n_routed_experts * held
    weights = sum(parts.values()) - parts["routed experts"] - parts["MTP"] + routed
    if mtp:
        weights += parts["MTP"] / config.n_routed_experts * held  # nearly all of it is experts
    a_sequence = cache_bytes(config, "bf16", mtp) * demand.context
    most = int((machine.memory * (1 - reserve) - weights) // a_sequence)
    if most < 1:
        raise UserError(
            f"decode-expert ({fleet.expert}): {weights / 1e9:.0f} GB of weights leave a {machine.name} no "
            f"room for a sequence of {demand.context} tokens; share the experts among more GPUs"
        )
    if batch is not None and not 1 <= batch <= most:
        raise UserError(f"batch ({batch}) must be 1 to {most}: more sequences do not fit beside the weights")
    batch = batch or most
    rows = batch * (2 if mtp else 1)
    depth = 1 + (config.num_nextn_predict_layers / config.num_hidden_layers if mtp else 0)
    width = config.num_attention_heads * (2 * config.kv_lora_rank + config.qk_rope_head_dim)
    scores = 2.0 * config.num_hidden_layers * width * demand.context
    fp8, bf16 = machine.fp8 * efficiency, machine.bf16 * efficiency
    # Each kernel takes the longer of its products and its reading.
    attention = max(rows * depth * scores / bf16, batch * a_sequence / machine.bandwidth)
    matrices = max(rows * depth * (linear / fp8 + head / bf16), weights / machine.bandwidth)
    way = alltoall.route(config, fleet.expert, machine, deduplicated=False)
    network = rows * alltoall.seconds(config, alltoall.moe_layers(config, mtp), way)
    step = max(attention + matrices, network)
    stream = (1 + acceptance if mtp else 1) / step
    return Rate(
        tokens_s_node=NODE * batch * stream,
        products=rows * depth * (scores / bf16 + linear / fp8 + head / bf16),
        reading=(batch * a_sequence + weights) / machine.bandwidth,
        network=network,
        batch=batch,
        stream=stream,
    )


def published(efficiency: float) -> list[dict[str, Any]]:
    """What others measured on a node, beside bound and estimate for their settings.

    DeepSeek-V3/R1 inference system overview (a day of February 2025, cache hits counted); RTP-LLM (4K in, 2K
    out, no hits; its layout taken as DeepSeek's); SGLang (96 GPUs, 2K in, short answers, EP32 and EP72,
    decoding 256 sequences a GPU).
    """
    config = ModelConfig.preset("v3-671b")
    day, long = Demand(), Demand(hit=0, prompt=4096, context=5120)
    short = Demand(hit=0, prompt=2000, context=2050)
    rows = []
    for who, machine, demand, way, expert, batch, said in (
        ("DeepSeek, its fleet, H800", "h800", day, "in", 32, None, 73_700),
        ("DeepSeek, its fleet, H800", "h800", day, "out", 144, None, 14_800),
        ("RTP-LLM, benchmark, H800", "h800", long, "in", 32, None, 42_600),
        ("RTP-LLM, benchmark, H800", "h800", long, "out", 144, None, 14_700),
        ("SGLang, benchmark, H100", "h100", short, "in", 32, None, 52_300),
        ("SGLang, benchmark, H100", "h100", short, "out", 72, 256, 22_300),
    ):
        bound, ours = (
            prefill(config, Fleet(expert), hardware(machine), demand, share)
            if way == "in"
            else decode(config, Fleet(expert), hardware(machine), demand, share, batch)
            for share in (1.0, efficiency)
        )
        rows.append(
            {
                "who": who,
                "direction": way,
                "bound_tokens_per_s_node": bound.tokens_s_node,
                "estimate_tokens_per_s_node": ours.tokens_s_node,
                "published_tokens_per_s_node": said,
                "published_over_estimate": said / ours.tokens_s_node,
            }
        )
    return rows


# DeepSeek's day: nodes in use, and the two rates its overview gives.
PUBLISHED_NODES, PUBLISHED_IN, PUBLISHED_OUT = 226.75, 73_700, 14_800


def summary(
    config: ModelConfig, machine: Hardware, demand: Demand, efficiency: float,
    into: Fleet, out: Fleet, batch: int | None, mtp: bool, acceptance: float,
) -> dict[str, Any]:  # fmt: skip
    """Plain data of both fleets; keys name their units."""
    reading = [prefill(config, into, machine, demand, share) for share in (1.0, efficiency)]
    writing = [
        decode(config, out, machine, demand, share, batch, mtp, acceptance) for share in (1.0, efficiency)
    ]
    day = Demand()

    def side(fleet: Fleet, rates: list[Rate], rate: float, name: str) -> dict[str, Any]:
        return {
            "expert_gpus": fleet.expert,
            "experts_per_gpu": check(config, fleet, name),
            "bound_tokens_per_s_node": rates[0].tokens_s_node,
            "estimate_tokens_per_s_node": rates[1].tokens_s_node,
            "limit": rates[1].limit,
            "nodes": rate / rates[1].tokens_s_node,
        }

    return {
        "efficiency": efficiency,
        "prefill": side(into, reading, demand.input_rate, "prefill"),
        "decode": {
            **side(out, writing, demand.output_rate, "decode"),
            "sequences_per_gpu": writing[1].batch,
            "stream_tokens_per_s": writing[1].stream,
        },
        "published": published(efficiency),
        "published_rates_nodes": day.input_rate / PUBLISHED_IN + day.output_rate / PUBLISHED_OUT,
        "published_nodes": PUBLISHED_NODES,
    }
