"""The modules with matrices: what ``quant.apply`` swaps and what a compute precision reaches.

Weights are stored in their own dtype (FP32 while training: the master weights) and used in the dtype of
the activations, so that the precision of a forward pass is set in one place, by what the embedding emits.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsv3.ops.grouped import grouped_linear, grouped_swiglu
from dsv3.ops.norm import rms_norm


class Linear(nn.Module):
    """``y = x W^T``, no bias; weight ``[outputs, inputs]``."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))

    def forward(self, x: Tensor) -> Tensor:
        """``[..., inputs] -> [..., outputs]`` in x's dtype."""
        return F.linear(x, self.weight.to(x.dtype))


class GroupedLinear(nn.Module):
    """One matrix an expert, stacked: weight ``[experts, outputs, inputs]``."""

    def __init__(self, experts: int, inputs: int, outputs: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, outputs, inputs))

    def forward(self, x_MI: Tensor, counts_E: Tensor) -> Tensor:
        """Rows sorted by expert, ``counts_E`` rows each: ``[M, inputs] -> [M, outputs]``."""
        return grouped_linear(x_MI, self.weight.to(x_MI.dtype), counts_E)


class Embedding(nn.Module):
    """Token embedding. ``compute_dtype`` is what the activations of the whole model will be."""

    def __init__(self, vocab: int, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab, width))
        self.compute_dtype: torch.dtype | None = None  # None: the weight's own

    def forward(self, ids_BT: Tensor) -> Tensor:
        """``[B, T]`` integers to ``[B, T, D]``."""
        out = F.embedding(ids_BT, self.weight)
        return out if self.compute_dtype is None else out.to(self.compute_dtype)


class RMSNorm(nn.Module):
    """Root-mean-square norm with a learnt gain; statistics in FP32."""

    def __init__(self, width: int, eps: float = 1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Same shape and dtype as ``x``."""
        return rms_norm(x, self.weight, self.eps)


class MLP(nn.Module):
    """SwiGLU: ``down(silu(gate x) * up x)``; a dense layer's, or the shared experts' as one."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.gate_proj = Linear(width, hidden)
        self.up_proj = Linear(width, hidden)
        self.down_proj = Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., D] -> [..., D]``."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Experts(nn.Module):
    """The routed experts of a layer: a SwiGLU each, one stacked tensor a projection."""

    def __init__(self, experts: int, width: int, hidden: int):
        super().__init__()
        self.gate_proj = GroupedLinear(experts, width, hidden)
        self.up_proj = GroupedLinear(experts, width, hidden)
        self.down_proj = GroupedLinear(experts, hidden, width)

    def forward(self, x_MD: Tensor, counts_E: Tensor) -> Tensor:
        """Rows sorted by expert: ``[M, D] -> [M, D]``."""
        gate, up, down = self.gate_proj, self.up_proj, self.down_proj
        if all(type(module) is GroupedLinear for module in (gate, up, down)):
            return grouped_swiglu(
                x_MD,
                gate.weight.to(x_MD.dtype),
                up.weight.to(x_MD.dtype),
                down.weight.to(x_MD.dtype),
                counts_E,
            )
        # Swapped from outside (another number format): its own products.
        return down(F.silu(gate(x_MD, counts_E)) * up(x_MD, counts_E), counts_E)
