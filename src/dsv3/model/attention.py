"""Multi-head Latent Attention (report 2.1.1).

Shapes: B batch, T time, D hidden, H heads, C latent, N nope, R rope, Q = N + R query/key width, V value
width, P = R / 2 rope pairs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dsv3.config.model import ModelConfig
from dsv3.model.linear import Linear, RMSNorm
from dsv3.ops.attention import causal_attention
from dsv3.ops.rope import rotate


@dataclass(frozen=True)
class Context:
    """What every layer's attention must know of the sequence.

    ``rotation``: cosines and sines of the positions, ``[T, P, 2]`` or ``[B, T, P, 2]``, FP32.
    ``documents_BT``: attention stays within tokens of the same number; None: plain causal.
    """

    rotation: Tensor
    documents_BT: Tensor | None = None


def keys_and_values(attention: MLA, latent_BTC: Tensor, k_rope_BTR: Tensor) -> tuple[Tensor, Tensor]:
    """Every head's, ``[B, T, H, Q]`` and ``[B, T, H, V]``."""
    kv_BTHX = attention.kv_b_proj(latent_BTC).unflatten(-1, (attention.heads, -1))
    k_nope, v = kv_BTHX.split([attention.nope, attention.value], dim=-1)
    k_rope = k_rope_BTR[:, :, None].expand(-1, -1, attention.heads, -1)
    return torch.cat((k_nope, k_rope), dim=-1), v


def expanded_attention(
    attention: MLA, q_BTHQ: Tensor, latent_BTC: Tensor, k_rope_BTR: Tensor, context: Context
) -> Tensor:
    """The default core: make every head's keys and values from the latent, then attend; ``[B, T, H V]``."""
    k, v = keys_and_values(attention, latent_BTC, k_rope_BTR)
    out = causal_attention(
        q_BTHQ.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attention.scale, context.documents_BT
    )
    return out.transpose(1, 2).flatten(2)


Core = Callable[["MLA", Tensor, Tensor, Tensor, Context], Tensor]


class MLA(nn.Module):
    """Queries from a latent (or plain, ``q_lora_rank: null``); keys and values from one shared latent.

    ``core`` is the seam: it gets the queries with positions applied, the normed latent and the rotated
    shared key, which are exactly what a generation cache holds.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        width, self.heads = config.hidden_size, config.num_attention_heads
        self.nope, self.rope, self.value = (
            config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim,
        )  # fmt: skip
        self.scale = config.softmax_scale
        queries = self.heads * config.qk_head_dim
        if config.q_lora_rank is None:
            self.q_proj = Linear(width, queries)
        else:
            self.q_a_proj = Linear(width, config.q_lora_rank)
            self.q_a_layernorm = RMSNorm(config.q_lora_rank)
            self.q_b_proj = Linear(config.q_lora_rank, queries)
        self.kv_a_proj_with_mqa = Linear(width, config.kv_lora_rank + self.rope)
        self.kv_a_layernorm = RMSNorm(config.kv_lora_rank)
        self.kv_b_proj = Linear(config.kv_lora_rank, self.heads * (self.nope + self.value))
        self.o_proj = Linear(self.heads * self.value, width)
        self.core: Core = expanded_attention

    def compress(self, x_BTD: Tensor) -> tuple[Tensor, Tensor]:
        """Down-projections: the query's latent (or x itself without one), and ``[latent ; k_rope]``."""
        q = self.q_a_proj(x_BTD) if hasattr(self, "q_a_proj") else x_BTD
        return q, self.kv_a_proj_with_mqa(x_BTD)

    def attend(self, q_latent: Tensor, kv_BTX: Tensor, context: Context) -> Tensor:
        """From the two compressed tensors to the heads' outputs ``[B, T, H V]``."""
        if hasattr(self, "q_a_proj"):
            q = self.q_b_proj(self.q_a_layernorm(q_latent))
        else:
            q = self.q_proj(q_latent)
        q_BTHQ = q.unflatten(-1, (self.heads, self.nope + self.rope))
        q_nope, q_rope = q_BTHQ.split([self.nope, self.rope], dim=-1)
        q_BTHQ = torch.cat((q_nope, rotate(q_rope, context.rotation[..., None, :, :])), dim=-1)
        latent, k_rope = kv_BTX.split([kv_BTX.shape[-1] - self.rope, self.rope], dim=-1)
        k_rope_BTR = rotate(k_rope, context.rotation)
        return self.core(self, q_BTHQ, self.kv_a_layernorm(latent), k_rope_BTR, context)

    def forward(self, x_BTD: Tensor, context: Context) -> Tensor:
        """``[B, T, D] -> [B, T, D]``."""
        return self.o_proj(self.attend(*self.compress(x_BTD), context))
