"""Tiny models with awkward sizes and random weights everywhere, and their transformers twins."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dsv3.config.model import ModelConfig
from dsv3.model import DeepSeekV3

# No two widths are equal, so that a swapped dimension cannot hide.
TINY: dict[str, Any] = dict(
    vocab_size=61, hidden_size=40, intermediate_size=56, moe_intermediate_size=24, num_hidden_layers=3,
    num_nextn_predict_layers=0, first_k_dense_replace=1, num_attention_heads=3, q_lora_rank=28,
    kv_lora_rank=20, qk_nope_head_dim=10, qk_rope_head_dim=8, v_head_dim=14, n_routed_experts=16,
    n_shared_experts=1, num_experts_per_tok=3, n_group=4, topk_group=2, max_position_embeddings=4096,
)  # fmt: skip


def tiny_config(**changes: Any) -> ModelConfig:
    """A three-layer configuration with fields changed by keyword."""
    return ModelConfig(**{**TINY, **changes})


@torch.no_grad()
def randomise(model: DeepSeekV3, seed: int = 1) -> DeepSeekV3:
    """Random matrices, norm gains and expert biases, so that each of them matters."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        drawn = torch.randn(tensor.shape, generator=generator)
        if name.endswith("e_score_correction_bias"):
            tensor.copy_(0.2 * drawn)
        elif tensor.dim() == 1:  # a norm
            tensor.copy_(1 + 0.3 * drawn)
        elif name.endswith("embed_tokens.weight"):
            tensor.copy_(drawn)
        else:
            tensor.copy_(1.3 * drawn / tensor.shape[-1] ** 0.5)
    return model


def tiny_model(seed: int = 1, **changes: Any) -> DeepSeekV3:
    """A random model of :func:`tiny_config`."""
    return randomise(DeepSeekV3(tiny_config(**changes)), seed)


def ids(batch: int, length: int, vocab: int = TINY["vocab_size"], seed: int = 2) -> Tensor:
    """Random token ids ``[B, T]``."""
    return torch.randint(vocab, (batch, length), generator=torch.Generator().manual_seed(seed))
