"""The same weights in transformers' ``DeepseekV3ForCausalLM``, mapped by hand (not through checkpoint/)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM
from transformers.modeling_layers import MtpModel

from dsv3.config.model import ModelConfig
from dsv3.model import DeepSeekV3


def twin_config(config: ModelConfig) -> DeepseekV3Config:
    """transformers' configuration of the main model, field by field."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.rope_scaling is not None:
        rope = {"rope_type": "yarn", "rope_theta": config.rope_theta, **config.rope_scaling.model_dump()}
    return DeepseekV3Config(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        moe_intermediate_size=config.moe_intermediate_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_attention_heads,
        n_shared_experts=config.n_shared_experts,
        n_routed_experts=config.n_routed_experts,
        routed_scaling_factor=config.routed_scaling_factor,
        kv_lora_rank=config.kv_lora_rank,
        q_lora_rank=config.q_lora_rank,
        qk_rope_head_dim=config.qk_rope_head_dim,
        qk_nope_head_dim=config.qk_nope_head_dim,
        v_head_dim=config.v_head_dim,
        n_group=config.n_group,
        topk_group=config.topk_group,
        num_experts_per_tok=config.num_experts_per_tok,
        first_k_dense_replace=config.first_k_dense_replace,
        norm_topk_prob=config.norm_topk_prob,
        rms_norm_eps=config.rms_norm_eps,
        max_position_embeddings=config.max_position_embeddings,
        rope_parameters=rope,
        num_mtp_layers=config.num_nextn_predict_layers,
        attn_implementation="eager",
    )


def to_twin(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our tensors by name (weights or gradients) under transformers' names and in its stacking."""
    found = {}
    for name, tensor in tensors.items():
        if name.endswith("experts.gate_proj.weight") and "shared" not in name:
            up = tensors[name.replace("gate_proj", "up_proj")]
            found[name.replace("gate_proj.weight", "gate_up_proj")] = torch.cat((tensor, up), dim=1)
        elif name.endswith("experts.up_proj.weight") and "shared" not in name:
            continue
        elif name.endswith("experts.down_proj.weight") and "shared" not in name:
            found[name.removesuffix(".weight")] = tensor
        else:
            found[name] = tensor
    return found


def twin_of(model: DeepSeekV3) -> DeepseekV3ForCausalLM:
    """A transformers model with the weights of ``model``'s main part; every tensor of both is used."""
    twin = DeepseekV3ForCausalLM(twin_config(model.config))
    main = tuple(f"model.layers.{i}." for i in range(model.config.num_hidden_layers))
    weights = {
        name: tensor
        for name, tensor in model.state_dict().items()
        if not name.startswith("model.layers.") or name.startswith(main)
    }
    missing, unexpected = twin.load_state_dict(to_twin(weights), strict=False)
    assert not unexpected, unexpected
    assert all(twin.get_parameter(name).numel() == 0 for name in missing), missing
    return twin.eval()


def mtp_name(name: str, main_layers: int) -> str:
    """``model.layers.{main + k}.x`` as transformers' ``MtpModel`` calls it."""
    _, _, index, rest = name.split(".", 3)
    if rest.startswith(("enorm", "hnorm", "eh_proj")):
        where = ""
    elif rest.startswith("shared_head.norm"):
        where, rest = "", rest.replace("shared_head.norm", "post_norm")
    else:
        where = "mtp_block."
    return f"layers.{int(index) - main_layers}.{where}{rest}"


def mtp_twin_of(model: DeepSeekV3, twin: DeepseekV3ForCausalLM) -> MtpModel:
    """transformers' MTP modules on top of ``twin``, with ``model``'s weights."""
    main, depth = model.config.num_hidden_layers, model.config.num_nextn_predict_layers
    mtp = MtpModel(twin, depth)
    own = {
        mtp_name(name, main): tensor
        for name, tensor in to_twin(dict(model.state_dict())).items()
        if any(name.startswith(f"model.layers.{main + k}.") for k in range(depth))
    }
    missing, unexpected = mtp.load_state_dict(own, strict=False)
    assert not unexpected, unexpected
    assert {name.split(".")[0] for name in missing} <= {"embed_tokens", "shared_head"}, missing  # shared
    return mtp.eval()
