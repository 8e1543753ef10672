"""A model small enough to write a hundred times, with every weight (norms and biases too) at random."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dsv3.config.model import ModelConfig
from dsv3.model import DeepSeekV3

SMALL = dict(
    vocab_size=96, hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=3,
    first_k_dense_replace=1, num_attention_heads=2, q_lora_rank=24, kv_lora_rank=16, qk_nope_head_dim=12,
    qk_rope_head_dim=8, v_head_dim=12, n_routed_experts=8, num_experts_per_tok=2, n_group=4, topk_group=2,
    max_position_embeddings=128, initializer_range=0.2,
)  # fmt: skip


def random_model(seed: int = 0, **changes: Any) -> DeepSeekV3:
    """The small model, all its tensors random."""
    model = DeepSeekV3(ModelConfig(**{**SMALL, **changes}), seed)
    generator = torch.Generator().manual_seed(seed)
    for tensor in model.state_dict().values():
        if tensor.dim() == 1:
            tensor.copy_(1 + 0.3 * torch.randn(tensor.shape, generator=generator))
    return model


def same(one: DeepSeekV3, other: DeepSeekV3) -> bool:
    """Whether two models hold the same parameters, dtypes and bits."""
    a, b = one.state_dict(), other.state_dict()
    return list(a) == list(b) and all(
        a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a
    )


@pytest.fixture
def model() -> DeepSeekV3:
    """The small model."""
    return random_model()
