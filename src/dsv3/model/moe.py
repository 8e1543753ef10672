"""DeepSeekMoE: routing without an auxiliary loss, experts, and how tokens reach them (report 2.1.2).

Shapes: B batch, T time, N = B T tokens, D hidden, E experts, K experts a token, G groups, M = N K rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsv3.config.model import ModelConfig
from dsv3.model.linear import MLP, Experts
from dsv3.ops.permute import expert_order, gather_rows, weighted_sum


@dataclass(frozen=True)
class Routing:
    """Where each token goes: expert ids and gate values, and every affinity (FP32)."""

    indices_NK: Tensor
    gates_NK: Tensor
    scores_NE: Tensor


@dataclass(frozen=True)
class RouterStats:
    """What training needs to know of one layer's routing.

    ``load_E``: tokens each expert was chosen for, int64. ``balance_loss``: before its weight alpha; None when
    alpha is zero.
    """

    load_E: Tensor
    balance_loss: Tensor | None


class Gate(nn.Module):
    """Affinities and the choice of experts, in FP32.

    ``e_score_correction_bias`` steers the choice only; it has no gradient and is moved between steps by the
    balancing rule (``train/balance.py``).
    """

    e_score_correction_bias: Tensor

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.chosen, self.groups, self.kept = config.num_experts_per_tok, config.n_group, config.topk_group
        self.normalise, self.factor = config.norm_topk_prob, config.routed_scaling_factor
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        self.register_buffer("e_score_correction_bias", torch.zeros(config.n_routed_experts))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Gate:
        # model.bfloat16() must not round the bias: steps of 0.001 vanish beside a bias of 0.5 in BF16.
        exact = self.e_score_correction_bias
        super()._apply(fn, recurse)
        moved = self.e_score_correction_bias
        if moved.dtype != exact.dtype:
            self.e_score_correction_bias = exact.to(moved.device)
        return self

    def scores(self, x_ND: Tensor) -> Tensor:
        """Affinities sigmoid(u . e), FP32 ``[N, E]``."""
        return F.linear(x_ND.float(), self.weight.float()).sigmoid()

    def choose(self, scores_NE: Tensor) -> Tensor:
        """The K experts of each token, ``[N, K]``: best of s + b within the best groups."""
        biased_NE = scores_NE + self.e_score_correction_bias
        if self.kept < self.groups:
            biased_NGX = biased_NE.unflatten(-1, (self.groups, -1))
            group_NG = biased_NGX.topk(2, dim=-1)[0].sum(dim=-1)
            out_NG = torch.ones_like(group_NG, dtype=torch.bool)
            out_NG.scatter_(1, group_NG.topk(self.kept, dim=-1, sorted=False)[1], False)
            biased_NE = biased_NGX.masked_fill(out_NG[..., None], float("-inf")).flatten(-2)
        return biased_NE.topk(self.chosen, dim=-1, sorted=False)[1]

    def forward(self, x_ND: Tensor) -> Routing:
        """Route ``[N, D]`` tokens. Gates are the raw affinities of the chosen, normalised, times a factor."""
        scores_NE = self.scores(x_ND)
        with torch.no_grad():
            indices_NK = self.choose(scores_NE)
        gates_NK = scores_NE.gather(1, indices_NK)
        if self.normalise:
            gates_NK = gates_NK / (gates_NK.sum(dim=-1, keepdim=True) + 1e-20)
        return Routing(indices_NK, gates_NK * self.factor, scores_NE)


@torch.no_grad()
def hits(scores_BTE: Tensor, chosen: int) -> Tensor:
    """How often expert i is among a sequence's K best by s alone, ``[B, E]`` in s's dtype."""
    top = scores_BTE.topk(chosen, dim=-1, sorted=False)[1].flatten(1)
    hits_BE = torch.zeros(top.shape[0], scores_BTE.shape[-1], dtype=scores_BTE.dtype, device=top.device)
    return hits_BE.scatter_add_(1, top, torch.ones_like(top, dtype=scores_BTE.dtype))


def balance_loss(scores_BTE: Tensor, chosen: int) -> Tensor:
    """Sequence-wise balance loss (report 2.1.2) before alpha: mean over sequences of sum_i f_i P_i.

    One sequence of all tokens makes it the batch-wise loss of report 4.5.3.
    """
    _, length, experts = scores_BTE.shape
    f_BE = hits(scores_BTE, chosen) * (experts / (length * chosen))  # 1 when even
    p_BE = (scores_BTE / scores_BTE.sum(dim=-1, keepdim=True)).mean(dim=1)
    return (f_BE * p_BE).sum(dim=-1).mean()


class Dispatcher(Protocol):
    """Moves tokens to experts and back: the seam where ranks, replicas and recordings come in."""

    def dispatch(self, x_ND: Tensor, routing: Routing, load_E: Tensor) -> tuple[Tensor, Tensor, Any]:
        """Rows sorted by local expert ``[M, D]``, rows an expert, and a handle for the other two.

        The rows may still be on their way: only :meth:`arrive` makes them fit to be read.
        """
        ...

    def arrive(self, rows_MD: Tensor, handle: Any) -> Tensor:
        """The rows of :meth:`dispatch`, waited for."""
        ...

    def combine(self, y_MD: Tensor, routing: Routing, handle: Any) -> Tensor:
        """Rows back to tokens, weighted by the gates: ``[N, D]``; or on their way, until :meth:`settle`."""
        ...

    def settle(self, rows: Tensor, routing: Routing, handle: Any) -> Tensor:
        """``[N, D]`` of :meth:`combine`, waited for."""
        ...


class LocalDispatcher:
    """All experts are here: sort rows by expert, sum them back."""

    def dispatch(self, x_ND: Tensor, routing: Routing, load_E: Tensor) -> tuple[Tensor, Tensor, Any]:
        """See :class:`Dispatcher`."""
        order = expert_order(routing.indices_NK)
        return gather_rows(x_ND, *order), load_E, order

    def arrive(self, rows_MD: Tensor, handle: Any) -> Tensor:
        """See :class:`Dispatcher`: nothing travels."""
        return rows_MD

    def combine(self, y_MD: Tensor, routing: Routing, handle: Any) -> Tensor:
        """See :class:`Dispatcher`."""
        return weighted_sum(y_MD, routing.gates_NK, *handle)

    def settle(self, rows: Tensor, routing: Routing, handle: Any) -> Tensor:
        """See :class:`Dispatcher`: nothing travels."""
        return rows


class MoE(nn.Module):
    """Routed experts, shared experts, and the gate. The layer calls its parts one by one.

    ``balance_loss`` is a seam: where sequences are cut, their parts must be counted together.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        hidden = config.moe_intermediate_size
        self.alpha, self.by_sequence = config.aux_loss_alpha, config.seq_aux
        self.gate = Gate(config)
        self.experts = Experts(config.n_routed_experts, config.hidden_size, hidden)
        if config.n_shared_experts:
            self.shared_experts = MLP(config.hidden_size, hidden * config.n_shared_experts)
        self.dispatcher: Dispatcher = LocalDispatcher()
        self.balance_loss: Callable[[Tensor, int], Tensor] = balance_loss

    def route(self, u_BTD: Tensor) -> tuple[Routing, RouterStats]:
        """Choose experts for ``[B, T, D]`` and say how the load fell."""
        routing = self.gate(u_BTD.flatten(0, 1))
        experts = routing.scores_NE.shape[-1]
        chosen = routing.indices_NK.flatten()
        load_E = torch.zeros(experts, dtype=torch.int64, device=chosen.device)
        load_E.scatter_add_(0, chosen, torch.ones_like(chosen))
        loss = None
        if self.alpha and torch.is_grad_enabled():
            cut = u_BTD.shape[:2] if self.by_sequence else (1, -1)
            loss = self.balance_loss(routing.scores_NE.unflatten(0, cut), self.gate.chosen)
        return routing, RouterStats(load_E, loss)

    def shared(self, u_BTD: Tensor) -> Tensor | None:
        """The shared experts' output, None where the model has none."""
        return self.shared_experts(u_BTD) if hasattr(self, "shared_experts") else None
