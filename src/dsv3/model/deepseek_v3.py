"""The model as a list: embedding, layers, norm, head, MTP modules (report 2).

Shapes: B batch, T time, D hidden, V vocabulary, F = number of MTP modules.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from dsv3.config.model import ModelConfig
from dsv3.model.attention import Context
from dsv3.model.layer import DecoderLayer
from dsv3.model.linear import Embedding, Linear, RMSNorm
from dsv3.model.moe import Gate, MoE, RouterStats
from dsv3.model.mtp import MTPModule
from dsv3.ops.rope import inverse_frequencies, rotations


@dataclass(frozen=True)
class Output:
    """What the model says of a batch.

    ``logits_BTV``: next token. ``mtp_logits``: one ``[B, T - k, V]`` a depth k, predicting t_{i+k+1}.
    ``hidden_BTD``: the state the head read. ``router``: statistics by layer id.
    """

    logits_BTV: Tensor
    mtp_logits: list[Tensor]
    hidden_BTD: Tensor
    router: dict[int, RouterStats]


class Backbone(nn.Module):
    """Embedding, decoder layers (the MTP modules last, under the ids that follow) and the final norm."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        main, depth = config.num_hidden_layers, config.num_nextn_predict_layers
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            [DecoderLayer(config, layer) for layer in range(main)]
            + [MTPModule(config, main + k) for k in range(depth)]
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class DeepSeekV3(nn.Module):
    """DeepSeek-V3 with its MTP modules; parameters carry Hugging Face's names, routed experts stacked.

    Weights are drawn from N(0, ``initializer_range``) with ``seed``; norms are one, expert biases zero.
    Under ``torch.device("meta")`` nothing is allocated.
    """

    def __init__(self, config: ModelConfig, seed: int = 0):
        super().__init__()
        self.config = config
        self.model = Backbone(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size)
        self._frequency_P, self._rope_factor = inverse_frequencies(config)
        if not self.lm_head.weight.is_meta:
            self.initialise(seed)

    @torch.no_grad()
    def initialise(self, seed: int) -> None:
        """Draw the initial weights (report 4.2), the same on every device."""
        generator = torch.Generator("cpu").manual_seed(seed)
        for module in self.modules():
            if isinstance(module, RMSNorm):
                module.weight.fill_(1.0)
            elif isinstance(module, Gate):
                module.e_score_correction_bias.zero_()
        for parameter in self.parameters():
            if parameter.dim() > 1:
                drawn = torch.empty(parameter.shape, dtype=torch.float32, device="cpu")
                parameter.copy_(drawn.normal_(0.0, self.config.initializer_range, generator=generator))

    @property
    def main_layers(self) -> list[DecoderLayer]:
        """The decoder layers of the main model."""
        return cast(list[DecoderLayer], list(self.model.layers)[: self.config.num_hidden_layers])

    @property
    def mtp_modules(self) -> list[MTPModule]:
        """The MTP modules, by depth."""
        return cast(list[MTPModule], list(self.model.layers)[self.config.num_hidden_layers :])

    def moe_layers(self) -> dict[int, MoE]:
        """Layers with experts by id, MTP modules included."""
        layers = enumerate(cast(Iterable[DecoderLayer], self.model.layers))
        return {i: layer.mlp for i, layer in layers if isinstance(layer.mlp, MoE)}

    def context(self, positions: Tensor, documents_BT: Tensor | None = None) -> Context:
        """Rotations and documents, the same for all layers."""
        return Context(rotations(positions, self._frequency_P, self._rope_factor), documents_BT)

    def hidden_states(
        self,
        ids_BT: Tensor,
        *,
        future_ids_BF: Tensor | None = None,
        positions_BT: Tensor | None = None,
        documents_BT: Tensor | None = None,
        mtp: bool = True,
    ) -> tuple[list[Tensor], dict[int, RouterStats]]:
        """States that the head reads: the main model's ``[B, T, D]``, then one a depth; and statistics.

        Depth k needs the embeddings of the tokens k places on. ``future_ids_BF`` are the F tokens that
        follow ``ids_BT``; without them depth k covers the first T - k positions. ``documents_BT`` limits
        attention to tokens with the same number; ``positions_BT`` default to 0 .. T - 1.
        """
        length = ids_BT.shape[1]
        positions = torch.arange(length, device=ids_BT.device) if positions_BT is None else positions_BT
        context = self.context(positions, documents_BT)
        router: dict[int, RouterStats] = {}
        x = self.model.embed_tokens(ids_BT)
        for layer, module in enumerate(self.main_layers):
            x, stats = module(x, context)
            if stats is not None:
                router[layer] = stats
        states = [self.model.norm(x)]
        if not mtp or not self.mtp_modules:
            return states, router
        all_ids = ids_BT if future_ids_BF is None else torch.cat((ids_BT, future_ids_BF), dim=1)
        for k, module in enumerate(self.mtp_modules, start=1):
            covered = min(length, all_ids.shape[1] - k)
            if covered < 1:
                break
            if covered < states[-1].shape[1]:
                positions_k = positions[..., :covered]
                documents_k = None if documents_BT is None else documents_BT[:, :covered]
                context = self.context(positions_k, documents_k)
            embedded = self.model.embed_tokens(all_ids[:, k : k + covered])
            state, stats = module.predict(embedded, states[-1][:, :covered], context)
            states.append(state)
            if stats is not None:
                router[self.config.num_hidden_layers + k - 1] = stats
        return states, router

    def forward(
        self,
        ids_BT: Tensor,
        positions_BT: Tensor | None = None,
        documents_BT: Tensor | None = None,
        mtp: bool = True,
    ) -> Output:
        """Logits of every position of ``ids_BT`` (int64 ``[B, T]``) and of every MTP depth."""
        states, router = self.hidden_states(
            ids_BT, positions_BT=positions_BT, documents_BT=documents_BT, mtp=mtp
        )
        logits = [self.lm_head(state) for state in states]
        return Output(logits[0], logits[1:], states[0], router)
