"""Multi-token prediction modules (report 2.2).

Shapes: B batch, T time, D hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dsv3.config.model import ModelConfig
from dsv3.model.attention import Context
from dsv3.model.layer import DecoderLayer
from dsv3.model.linear import Linear, RMSNorm
from dsv3.model.moe import RouterStats


class SharedHead(nn.Module):
    """The norm before the shared output head; the head itself is the main model's."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class MTPModule(DecoderLayer):
    """Depth k: joins the state of depth k - 1 with the embedding of the token k places on, one full layer.

    Embedding and head are the main model's own; the module holds neither.
    """

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__(config, layer)
        self.enorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.hnorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.eh_proj = Linear(2 * config.hidden_size, config.hidden_size)
        self.shared_head = SharedHead(config)

    def join(self, embedded: Tensor, state: Tensor) -> Tensor:
        """What the layer works on, of the embeddings of t_{i+k} and the states h^{k-1}_i: ``[..., D]``."""
        return self.eh_proj(torch.cat((self.enorm(embedded), self.hnorm(state)), dim=-1))

    def predict(
        self, embedded_BTD: Tensor, state_BTD: Tensor, context: Context
    ) -> tuple[Tensor, RouterStats | None]:
        """From the embeddings of t_{i+k} and the states h^{k-1}_i to h^k_i, after ``shared_head.norm``.

        The result goes to the shared head (it predicts t_{i+k+1}) and to the next depth.
        """
        out, stats = self(self.join(embedded_BTD, state_BTD), context)
        return self.shared_head.norm(out), stats
