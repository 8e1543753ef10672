"""A decoder layer as five steps, cut where communication can happen.

``attend_and_route`` | ``dispatch`` | ``experts`` | ``combine`` | ``aggregate``. :meth:`DecoderLayer.forward`
composes them; a pipeline schedule may interleave the steps of two micro-batches, so that one computes while
the other's tokens travel.

Shapes: B batch, T time, D hidden, N = B T tokens, M rows sorted by expert, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from dsv3.config.model import ModelConfig
from dsv3.model.attention import MLA, Context
from dsv3.model.linear import MLP, RMSNorm
from dsv3.model.moe import MoE, RouterStats, Routing


@dataclass(frozen=True)
class Step:
    """What passes from one step of a layer to the next.

    ``residual_BTD``: the stream after attention; ``u_BTD``: its norm, what the MLP reads. The rest is for
    layers with experts: ``rows`` are what travels (tokens out, results back), ``shared_BTD`` the shared
    experts' output.
    """

    residual_BTD: Tensor
    u_BTD: Tensor
    routing: Routing | None = None
    stats: RouterStats | None = None
    rows: Tensor | None = None
    counts_E: Tensor | None = None
    handle: Any = None
    shared_BTD: Tensor | None = None


class DecoderLayer(nn.Module):
    """Attention and an MLP, dense or with experts, each behind a norm and around the residual stream."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = MLA(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp: MLP | MoE = (
            MoE(config) if config.is_moe(layer) else MLP(config.hidden_size, config.intermediate_size)
        )

    def prepare(self, x_BTD: Tensor) -> tuple[Tensor, Tensor]:
        """Norm and attention's down-projections."""
        return self.self_attn.compress(self.input_layernorm(x_BTD))

    def attend_and_route(self, x_BTD: Tensor, context: Context) -> Step:
        """Attention, norm, and (with experts) the choice of experts."""
        attention = self.self_attn
        residual = x_BTD + attention.o_proj(attention.attend(*self.prepare(x_BTD), context))
        u = self.post_attention_layernorm(residual)
        if isinstance(self.mlp, MLP):
            return Step(residual, u)
        routing, stats = self.mlp.route(u)
        return Step(residual, u, routing, stats)

    def dispatch(self, step: Step) -> Step:
        """Send each token to its experts."""
        if step.routing is None or step.stats is None:
            return step
        assert isinstance(self.mlp, MoE)
        rows, counts, handle = self.mlp.dispatcher.dispatch(
            step.u_BTD.flatten(0, 1), step.routing, step.stats.load_E
        )
        return replace(step, rows=rows, counts_E=counts, handle=handle)

    def experts(self, step: Step) -> Step:
        """The shared experts' work while rows are on their way, and the experts' on the rows that arrived."""
        if step.rows is None:
            return step
        assert isinstance(self.mlp, MoE)
        shared = self.mlp.shared(step.u_BTD)
        rows = self.mlp.dispatcher.arrive(step.rows, step.handle)
        return replace(step, rows=self.mlp.experts(rows, step.counts_E), shared_BTD=shared)

    def combine(self, step: Step) -> Step:
        """Bring the results back to their tokens, weighted and summed."""
        if step.rows is None or step.routing is None:
            return step
        assert isinstance(self.mlp, MoE)
        return replace(step, rows=self.mlp.dispatcher.combine(step.rows, step.routing, step.handle))

    def aggregate(self, step: Step) -> Tensor:
        """The sum of the residual stream and what the experts (or the dense MLP) say: ``[B, T, D]``."""
        if isinstance(self.mlp, MLP):
            return step.residual_BTD + self.mlp(step.u_BTD)
        assert step.rows is not None and step.routing is not None
        rows = self.mlp.dispatcher.settle(step.rows, step.routing, step.handle)
        out = step.residual_BTD + rows.view_as(step.residual_BTD)
        return out if step.shared_BTD is None else out + step.shared_BTD

    def forward(self, x_BTD: Tensor, context: Context) -> tuple[Tensor, RouterStats | None]:
        """``[B, T, D] -> [B, T, D]`` and the layer's routing statistics (None in a dense layer)."""
        step = self.attend_and_route(x_BTD, context)
        step = self.combine(self.experts(self.dispatch(step)))
        return self.aggregate(step), step.stats
