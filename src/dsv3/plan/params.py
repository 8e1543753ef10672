"""How many parameters, how much cache, how many FLOPs a token (report 1 and 2).

Everything is counted on the real model, built on the meta device (no memory, no time), not from formulas.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from dsv3.common.errors import UserError, nearest
from dsv3.config.model import PRESETS, ModelConfig
from dsv3.model import DeepSeekV3

PARTS = (
    "embedding", "attention", "dense MLP", "routed experts", "shared experts", "gate", "norms", "head",
)  # fmt: skip
BF16 = 2  # bytes a value


@dataclass(frozen=True)
class ParamCounts:
    """Parameters of a model.

    ``parts``: the main model's, by :data:`PARTS`. ``activated_parts``: those of them that multiply a token's
    activations: of the routed experts K in E, of the embedding none (a lookup copies one row).
    ``mtp``: the MTP modules' own; ``mtp_activated``: those a token meets there, the shared head included.
    ``expert_biases``: values of ``e_score_correction_bias``, buffers that the files hold beside the weights.
    ``repeated``: embedding and head once more for every MTP module, as the released files repeat them.
    """

    parts: dict[str, int]
    activated_parts: dict[str, int]
    mtp: int
    mtp_activated: int
    expert_biases: int
    repeated: int

    @property
    def main(self) -> int:
        """The main model: 671.0B for DeepSeek-V3."""
        return sum(self.parts.values())

    @property
    def activated(self) -> int:
        """Activated a token in the main model, head counted, embedding not: 36.6B for DeepSeek-V3.

        This is the 37B of the report and, within 0.2 %, the 36.7B of README_WEIGHTS. That file says its
        number includes 0.9B each for embedding and head; with both it would be 37.6B
        (:attr:`activated_with_embedding`), with neither 35.7B.
        """
        return sum(self.activated_parts.values())

    @property
    def activated_with_embedding(self) -> int:
        """:attr:`activated` and the whole embedding: 37.6B for DeepSeek-V3."""
        return self.activated + self.parts["embedding"]

    @property
    def trained(self) -> int:
        """Every parameter the optimizer sees: the main model and the MTP modules, shared ones once."""
        return self.main + self.mtp

    @property
    def files(self) -> int:
        """Values in a checkpoint's files, expert biases and repetitions included, FP8 scales not: 684.5B."""
        return self.trained + self.repeated + self.expert_biases


def part_of(name: str) -> str:
    """The part a parameter's name belongs to."""
    *_, module, _ = name.split(".")
    if module.endswith("norm"):
        return "norms"
    for mark, part in (
        ("embed_tokens.", "embedding"),
        ("lm_head.", "head"),
        (".self_attn.", "attention"),
        (".shared_experts.", "shared experts"),
        (".experts.", "routed experts"),
        (".mlp.gate.", "gate"),
        (".mlp.", "dense MLP"),
        (".eh_proj.", "MTP joining"),
    ):
        if mark in name:
            return part
    raise ValueError(f"parameter {name} belongs to no known part")


def _activated(part: str, size: int, config: ModelConfig) -> int:
    """How many of a tensor's ``size`` parameters multiply one token's activations."""
    if part == "embedding":
        return 0
    if part == "routed experts":
        return size // config.n_routed_experts * config.num_experts_per_tok
    return size


def _on_meta(config: ModelConfig) -> DeepSeekV3:
    with torch.device("meta"):
        return DeepSeekV3(config)


def counts(config: ModelConfig) -> ParamCounts:
    """Count the parameters of the model that ``config`` describes."""
    model = _on_meta(config)
    parts, activated = dict.fromkeys(PARTS, 0), dict.fromkeys(PARTS, 0)
    mtp = mtp_activated = 0
    modules = tuple(
        f"model.layers.{config.num_hidden_layers + k}." for k in range(config.num_nextn_predict_layers)
    )
    for name, parameter in model.named_parameters():
        part, size = part_of(name), parameter.numel()
        if modules and name.startswith(modules):
            mtp += size
            mtp_activated += _activated(part, size, config)
        else:
            parts[part] += size
            activated[part] += _activated(part, size, config)
    depth = config.num_nextn_predict_layers
    return ParamCounts(
        parts=parts,
        activated_parts=activated,
        mtp=mtp,
        mtp_activated=mtp_activated + depth * parts["head"],
        expert_biases=sum(buffer.numel() for buffer in model.buffers()),
        repeated=depth * (parts["embedding"] + parts["head"]),
    )


def billions(count: int) -> str:
    """``671.0B``, ``15.2M``."""
    return f"{count / 1e9:.1f}B" if count >= 1e9 else f"{count / 1e6:.1f}M"


def describe(config: ModelConfig) -> str:
    """Size and shape in a line."""
    found, layers, modules = counts(config), config.num_hidden_layers, config.num_nextn_predict_layers
    routed = sum(map(config.is_moe, range(layers)))
    mtp = f" and {billions(found.mtp)} for MTP (depth {modules})" if modules else ""
    shape = f"{layers} layers, none with experts"
    if routed:
        chosen = f"{config.num_experts_per_tok} of {config.n_routed_experts} experts"
        shape = f"{layers} layers, {routed} with {chosen} a token"
    return (
        f"{billions(found.main)} parameters{mtp}, {billions(found.activated)} activated a token;"
        f" {shape}; vocabulary {config.vocab_size:,}"
    )


def train_flops_by_part(config: ModelConfig, seq_len: int, mtp: bool = True) -> dict[str, int]:
    """Floating-point operations of training on one token, forward and backward, in sequences of ``seq_len``.

    The usual convention (Chinchilla, PaLM): 6 for each activated matrix parameter (a multiply and an add,
    once forward and twice backward), and attention's two products counted as far as the causal mask lets
    them go: 3 * 2 * heads * (query/key width + value width) for each of the (seq_len + 1) / 2 keys a query
    sees on average. Counted: every matrix a token meets (K of the routed experts, shared experts, gate,
    head; with ``mtp`` the MTP modules, and the head once more for each). Not counted: the embedding (a
    lookup), norms, softmax, activations, RoPE, the router's choice, the optimizer, and whatever is computed
    twice to save memory, so that a utilisation computed with it is an MFU.

    The MTP modules' parts are named ``MTP ...``; "attention scores" are the two products, "attention" MLA's
    matrices.
    """
    if seq_len < 1:
        raise UserError(f"seq_len ({seq_len}) must be at least 1 token")
    model = _on_meta(config)
    depth = config.num_nextn_predict_layers if mtp else 0
    score = 3 * config.num_attention_heads * (config.qk_head_dim + config.v_head_dim) * (seq_len + 1)
    flops: dict[str, int] = {"attention scores": config.num_hidden_layers * score}
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            part = part_of(name)
            index = int(name.split(".")[2]) if name.startswith("model.layers.") else 0
            module = index >= config.num_hidden_layers
            label = f"MTP {part.removeprefix('MTP ')}" if module else part
            if part != "embedding" and (mtp or not module):
                flops[label] = flops.get(label, 0) + 6 * _activated(part, parameter.numel(), config)
    if depth:
        flops["MTP attention scores"] = depth * score
        flops["MTP head"] = depth * flops["head"]
    return flops


def train_flops_per_token(config: ModelConfig, seq_len: int, mtp: bool = True) -> int:
    """The sum of :func:`train_flops_by_part`."""
    return sum(train_flops_by_part(config, seq_len, mtp).values())


def kv_bytes_per_token(config: ModelConfig, bytes_per_value: int = BF16) -> int:
    """Bytes of MLA's cache for one token in the main model's layers: normed latent and rotated shared key."""
    return config.num_hidden_layers * (config.kv_lora_rank + config.qk_rope_head_dim) * bytes_per_value


def resolve(model: str) -> ModelConfig:
    """The configuration behind a preset's name or a checkpoint folder (or its ``config.json``).

    Raises :class:`UserError` for anything else.
    """
    if model in PRESETS:
        return ModelConfig.preset(model)
    if Path(model).exists():
        return ModelConfig.from_pretrained(model)
    raise UserError(
        f"model {model!r} is neither a preset{nearest(model, PRESETS)} nor a folder; "
        f"presets are {', '.join(PRESETS)}"
    )


def summary(config: ModelConfig, seq_len: int) -> dict[str, int | dict[str, int]]:
    """All counts of this module in plain data; keys name their units."""
    found = counts(config)
    return {
        "parameters_main": found.main,
        "parameters_activated": found.activated,
        "parameters_activated_with_embedding": found.activated_with_embedding,
        "parameters_mtp": found.mtp,
        "parameters_mtp_activated": found.mtp_activated,
        "parameters_trained": found.trained,
        "parameters_files": found.files,
        "parameters_by_part": found.parts,
        "parameters_activated_by_part": found.activated_parts,
        "kv_bytes_per_token": kv_bytes_per_token(config),
        "seq_len_tokens": seq_len,
        "train_flops_per_token": train_flops_per_token(config, seq_len),
        "train_flops_per_token_without_mtp": train_flops_per_token(config, seq_len, mtp=False),
    }
