"""What memory a model takes, served or trained, which machines hold it, and how fast it can decode there.

Served: the weights as our own formats keep them (quant/frozen.py: FP8; quant/packed.py: INT8 and INT4, with
the head and kv_b_proj of an INT4 model in INT8, the embedding in BF16) and the latent cache. Trained: the
report's choices (3.2.3, 3.3.3). Bytes throughout; GB are 1e9.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil
from typing import Any

import torch

from dsv3.common.errors import UserError, nearest
from dsv3.config.model import ModelConfig
from dsv3.model import DeepSeekV3
from dsv3.ops.blocks import BLOCK
from dsv3.ops.integers import GROUPS, LANES, SPAN
from dsv3.plan.cost import Layout, Run, check
from dsv3.plan.hardware import GIB, HARDWARE, Hardware
from dsv3.plan.params import PARTS, counts, part_of
from dsv3.plan.pipeline import Times, simulate
from dsv3.plan.schedules import schedule
from dsv3.quant.frozen import linears
from dsv3.quant.packed import FINER, matrices

FORMATS = ("bf16", "fp8", "int8", "int4")
FP32, BF16_BYTES = 4, 2
PC_KEEPS = 16 * GIB  # for its system and our buffers


def check_format(name: str) -> str:
    """The name, if it is a format of weights."""
    if name not in FORMATS:
        raise UserError(f"format ({name}) is unknown{nearest(name, FORMATS)}; there are {', '.join(FORMATS)}")
    return name


def tensor_bytes(kind: str, path: str, shape: torch.Size, group: int = 128) -> int:
    """Bytes of the matrix ``[..., O, I]`` at ``path`` with its scales, in fp8, int8 or int4."""
    rows, inputs = shape[:-1].numel(), shape[-1]
    if kind == "fp8":
        blocks = ceil(shape[-2] / BLOCK.rows) * ceil(inputs / BLOCK.columns)
        return rows * inputs + FP32 * blocks * shape[:-2].numel()
    filled = shape[:-2].numel() * ceil(shape[-2] / LANES) * LANES, ceil(inputs / SPAN) * SPAN
    if kind == "int8" or path.endswith(FINER):
        return filled[0] * (filled[1] + FP32)
    return filled[0] * (filled[1] // 2 + 2 * FP32 * ceil(inputs / group))


def weight_bytes(config: ModelConfig, kind: str, group: int = 128) -> dict[str, int]:
    """Bytes of a model's weights by part, the MTP modules' under ``MTP``, in one of :data:`FORMATS`.

    What the format leaves alone is as in the released files: BF16, the experts' biases FP32.
    """
    check_format(kind)
    if group not in GROUPS:
        raise UserError(f"group ({group}) must be one of {', '.join(map(str, GROUPS))}")
    with torch.device("meta"):
        model = DeepSeekV3(config)
    small = {} if kind == "bf16" else dict(linears(model) if kind == "fp8" else matrices(model))
    found = {part: 0 for part in (*PARTS, "MTP")}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        path = name.removesuffix(".weight")
        if path in small:
            size = tensor_bytes(kind, path, tensor.shape, group)
        else:
            size = tensor.numel() * (FP32 if name.endswith("e_score_correction_bias") else BF16_BYTES)
        found[_place(name, config)] += size
    return found


def _place(name: str, config: ModelConfig) -> str:
    if name.startswith("model.layers.") and int(name.split(".")[2]) >= config.num_hidden_layers:
        return "MTP"
    return part_of(name)


def cache_bytes(config: ModelConfig, kind: str = "bf16", mtp: bool = False) -> float:
    """Bytes of cache a token: BF16 latent and key, or FlashMLA's FP8 row (latent FP8 with scales, key BF16).

    With ``mtp`` the drafting modules' layers too.
    """
    latent, rope = config.kv_lora_rank, config.qk_rope_head_dim
    rows = {
        "bf16": BF16_BYTES * (latent + rope),
        "fp8": latent + FP32 * ceil(latent / 128) + BF16_BYTES * rope,
    }
    if kind not in rows:
        raise UserError(f"cache ({kind}) must be bf16 or fp8")
    return rows[kind] * (config.num_hidden_layers + (config.num_nextn_predict_layers if mtp else 0))


@dataclass(frozen=True)
class Serving:
    """How a model is served: ``sequences`` at once, each with ``context`` tokens of cache; ``mtp`` drafts.

    ``reserve``: share of a GPU's memory left to activations, buffers, fragmentation. ``acceptance``: of the
    drafted token (published: 85 to 90 %).
    """

    config: ModelConfig
    weights: str = "fp8"
    cache: str = "bf16"
    group: int = 128
    context: int = 4096
    sequences: int = 1
    mtp: bool = False
    reserve: float = 0.1
    acceptance: float = 0.85

    def __post_init__(self) -> None:
        for name in ("context", "sequences"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} ({getattr(self, name)}) must be at least 1")
        if not 0 <= self.reserve < 1:
            raise UserError(f"reserve ({self.reserve}) must be a share from 0 to below 1")
        if not 0 <= self.acceptance <= 1:
            raise UserError(f"acceptance ({self.acceptance}) must be a share from 0 to 1")
        if self.mtp and not self.config.num_nextn_predict_layers:
            raise UserError("mtp: this model has no MTP module to draft with")


@dataclass(frozen=True)
class Footprint:
    """Bytes a served model takes. ``parts``: of the weights that are loaded (MTP only if it drafts)."""

    parts: dict[str, int]
    cache_token: float
    cache: float

    @property
    def weights(self) -> int:
        """All weights."""
        return sum(self.parts.values())

    @property
    def total(self) -> float:
        """Weights and cache."""
        return self.weights + self.cache


def footprint(serving: Serving) -> Footprint:
    """Memory of serving."""
    parts = weight_bytes(serving.config, serving.weights, serving.group)
    if not serving.mtp:
        parts["MTP"] = 0
    token = cache_bytes(serving.config, serving.cache, serving.mtp)
    return Footprint(parts, token, token * serving.context * serving.sequences)


def usable(machine: Hardware, reserve: float) -> float:
    """Bytes of one machine for weights and cache: a GPU's less its share ``reserve``, a PC's less 16 GiB."""
    return machine.memory * (1 - reserve) if machine.bf16 else machine.memory - PC_KEEPS


def devices(found: Footprint, machine: Hardware, reserve: float) -> int:
    """How many of a machine hold weights and cache, split evenly."""
    return max(1, ceil(found.total / usable(machine, reserve)))


def room(found: Footprint, machine: Hardware, count: int, reserve: float) -> float:
    """Tokens of cache for which ``count`` machines have room beside the weights; negative: none."""
    return (count * usable(machine, reserve) - found.weights) / found.cache_token


def read_bytes(serving: Serving, found: Footprint, tokens: int) -> float:
    """Bytes of weights read in a step of ``tokens`` tokens a pass through the main model, head included.

    Routed experts: the E (1 - (1 - K/E)^tokens) that some token chose, as if all chose independently.
    """
    config = serving.config
    share = 1 - (1 - config.num_experts_per_tok / config.n_routed_experts) ** tokens
    parts = dict(found.parts)
    parts["routed experts"] = int(parts["routed experts"] * share)
    parts["embedding"] = parts["MTP"] = 0
    return sum(parts.values())


def decode_bound(serving: Serving, found: Footprint, machine: Hardware, count: int) -> float:
    """Tokens a second a sequence can have at most: what a step reads, at the bandwidth of ``count`` machines.

    With MTP a step checks two tokens a sequence and yields 1 + acceptance; the draft reads the module (its
    experts as above) and the shared head. Nothing but reading is counted: no products, links or launches.
    """
    config = serving.config
    per_sequence = 2 if serving.mtp else 1
    step = read_bytes(serving, found, per_sequence * serving.sequences) + found.cache
    gained = 1.0
    if serving.mtp:
        share = 1 - (1 - config.num_experts_per_tok / config.n_routed_experts) ** (2 * serving.sequences)
        module, layers = found.parts["MTP"], config.num_hidden_layers - config.first_k_dense_replace
        routed = found.parts["routed experts"] * config.num_nextn_predict_layers / max(1, layers)
        step += module - routed * (1 - share) + found.parts["head"] * config.num_nextn_predict_layers
        gained += serving.acceptance
    return gained * machine.bandwidth * count / step


# What people ask about first.
SETUPS = (
    ("h100", 1), ("h100", 4), ("h100", 8), ("h100", 16), ("h100", 24), ("h200", 4), ("h200", 8), ("h200", 16),
    ("b200", 4), ("b200", 8), ("b200", 16), ("pc-384", 1), ("server-768", 1),
)  # fmt: skip


def summary(serving: Serving) -> dict[str, Any]:
    """Plain data: weights by part, cache, machines needed, and :data:`SETUPS` with and without drafts.

    ``serving.mtp`` is not looked at: both are shown where the model can draft.
    """
    ways = {"": replace(serving, mtp=False)}
    if serving.config.num_nextn_predict_layers:
        ways["_mtp"] = replace(serving, mtp=True)
    prints = {suffix: footprint(way) for suffix, way in ways.items()}
    plain = prints[""]
    setups: list[dict[str, Any]] = []
    for name, count in SETUPS:
        machine = HARDWARE[name]
        row: dict[str, Any] = {
            "setup": f"{count} x {name}",
            "memory_bytes": count * machine.memory,
            "cache_room_tokens": max(0, int(room(plain, machine, count, serving.reserve))),
        }
        for suffix in ("", "_mtp"):
            fits = suffix in prints and devices(prints[suffix], machine, serving.reserve) <= count
            key = f"decode_bound{suffix}_tokens_per_s_per_sequence"
            row[key] = decode_bound(ways[suffix], prints[suffix], machine, count) if fits else None
        setups.append(row)
    return {
        "weight_bytes_by_part": weight_bytes(serving.config, serving.weights, serving.group),
        "weight_bytes": plain.weights,
        "cache_bytes_per_token": plain.cache_token,
        "cache_bytes": plain.cache,
        "machines_needed": {
            name: devices(plain, machine, serving.reserve) for name, machine in HARDWARE.items()
        },
        "setups": setups,
    }


def train_bytes(run: Run) -> dict[str, float]:
    """Bytes a GPU takes to train, by part; the greatest pipeline rank's, layers split evenly.

    DualPipe keeps two of the pipeline's stages a rank, their optimizer states once over both copies. Weights:
    FP8 or BF16 copies to compute with; gradients FP32; ZeRO-1: masters (FP32) and moments (BF16) sharded over
    the data-parallel ranks, experts over those that hold the same ones. Activations: for each micro-batch a
    rank holds (counted by playing the schedule), what the backward needs with the report's recomputing.
    """
    check(run)
    config, layout = run.config, run.layout
    found = counts(config)
    routed = found.parts["routed experts"] / (layout.pipeline * layout.expert)
    ends = found.parts["embedding"] + found.parts["head"]
    plain = (found.main - found.parts["routed experts"] - ends) / (layout.pipeline * layout.tensor)
    copies = 2 if layout.schedule == "dualpipe" else 1
    replicas = layout.gpus // (layout.pipeline * layout.tensor)
    expert_replicas = max(1, layout.gpus // (layout.pipeline * layout.expert))
    # Embedding and head lie on the ends of the pipeline: one rank has both in DualPipe, else either.
    end = (ends if copies == 2 else ends / 2) / layout.tensor
    mtp_routed = mtp_plain = 0.0
    if run.mtp and config.num_nextn_predict_layers:
        experts = 3 * config.n_routed_experts * config.hidden_size * config.moe_intermediate_size
        mtp_routed = config.num_nextn_predict_layers * experts / layout.expert
        mtp_plain = (found.mtp - config.num_nextn_predict_layers * experts) / layout.tensor
    held_routed, held_plain = copies * routed + mtp_routed, copies * plain + mtp_plain
    states = FP32 + 2 * BF16_BYTES  # master, two moments
    sharded = (held_routed / (copies * expert_replicas) + (held_plain + end) / (copies * replicas)) * states
    width = 1 if run.precision == "fp8" else BF16_BYTES
    kept = _activations_held(layout, run)
    per_layer = activation_bytes(config, run.precision == "fp8") / layout.tensor
    layers = config.num_hidden_layers / layout.pipeline
    return {
        "weights": held_routed * width + held_plain * width + end * BF16_BYTES,
        "gradients": (held_routed + held_plain + end) * FP32,
        "optimizer": sharded,
        "activations": kept * layers * run.seq_len * per_layer,
        "logits": 2.0 * FP32 * run.seq_len * config.vocab_size / layout.tensor,  # and their gradient
    }


def _activations_held(layout: Layout, run: Run) -> float:
    if layout.pipeline == 1:
        return 1.0
    made = schedule(layout.schedule, layout.pipeline, check(run), layout.virtual)
    return max(simulate(made, Times()).activations)


def activation_bytes(config: ModelConfig, fp8: bool, moe: bool = True) -> float:
    """Bytes a token and layer keeps for the backward, norms and up-projections made again (report 3.2.3).

    Residual stream twice (BF16), MLA's latents, attention's output (for its own backward and o_proj's; in FP8
    training in E5M6, 12 bits), the dispatched inputs and the SwiGLU inputs of the K routed and the shared
    experts (FP8 in FP8 training; the SwiGLU's output is made again); in a dense layer those of its MLP.
    """
    width = 1.0 if fp8 else 2.0
    latents = (config.q_lora_rank or 0) + config.kv_lora_rank + config.qk_rope_head_dim
    attended = config.num_attention_heads * config.v_head_dim
    visited = config.num_experts_per_tok + config.n_shared_experts
    experts = visited * 2 * config.moe_intermediate_size + config.num_experts_per_tok * config.hidden_size
    mlp = experts if moe else 2 * config.intermediate_size + config.hidden_size
    attention = attended * (1.5 if fp8 else 2.0) + FP32 * config.num_attention_heads
    return 2 * 2.0 * config.hidden_size + 2.0 * latents + attention + width * mlp
