"""Modules whose weight gradients may wait (``ops/weight_gradients.py``), in the places of the model's own.

Shapes: M rows (sorted by expert where there are experts), I inputs, O outputs, D hidden, F expert hidden, E
experts.

Autograd's own way to split a backward walks the graph twice, and a Python Function in it (every product in
FP8) computes both gradients both times. Here each Function computes its input's gradient and hands its
weight's over, so that every product runs exactly once in any schedule.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsv3.model.linear import Experts, Linear
from dsv3.ops.grouped import grouped_dgrad, grouped_linear, grouped_wgrad
from dsv3.ops.weight_gradients import WeightGradients
from dsv3.quant.fp8 import FP8MLP, FP8Experts, FP8Linear


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_MI: Tensor, weight_OI: Tensor, gradients: WeightGradients) -> Tensor:
        ctx.save_for_backward(x_MI)
        ctx.weight, ctx.gradients = weight_OI, gradients
        return x_MI @ weight_OI.to(x_MI.dtype).T

    @staticmethod
    def backward(ctx: Any, grad_MO: Tensor) -> tuple[Tensor, Tensor | None, None]:
        (x_MI,) = ctx.saved_tensors
        weight = ctx.weight

        def weight_gradient() -> tuple[Tensor]:
            return ((grad_MO.T @ x_MI).to(weight.dtype),)

        grad_x = grad_MO @ weight.to(grad_MO.dtype)
        return grad_x, *ctx.gradients.of((weight,), weight_gradient), None


class SplitLinear(Linear):
    """A Linear with the same parameter."""

    def __init__(self, linear: Linear, gradients: WeightGradients):
        nn.Module.__init__(self)
        self.weight, self.gradients = linear.weight, gradients

    def forward(self, x: Tensor) -> Tensor:
        """``[..., inputs] -> [..., outputs]`` in x's dtype."""
        return _Linear.apply(x.flatten(0, -2), self.weight, self.gradients).unflatten(0, x.shape[:-1])


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_MD: Tensor,
        gate_EFD: Tensor,
        up_EFD: Tensor,
        down_EDF: Tensor,
        counts_E: Tensor,
        gradients: WeightGradients,
    ) -> Tensor:
        gate_MF = grouped_linear(x_MD, gate_EFD.to(x_MD.dtype), counts_E)
        up_MF = grouped_linear(x_MD, up_EFD.to(x_MD.dtype), counts_E)
        ctx.save_for_backward(x_MD, gate_MF, up_MF, counts_E)
        ctx.weights, ctx.gradients = (gate_EFD, up_EFD, down_EDF), gradients
        return grouped_linear(F.silu(gate_MF) * up_MF, down_EDF.to(x_MD.dtype), counts_E)

    @staticmethod
    def backward(ctx: Any, grad_MD: Tensor) -> tuple[Tensor | None, ...]:
        x_MD, gate_MF, up_MF, counts_E = ctx.saved_tensors
        grad_MD = grad_MD.contiguous()
        weights = ctx.weights
        gate, up, down = (weight.to(grad_MD.dtype) for weight in weights)
        activated = F.silu(gate_MF)
        grad_hidden = grouped_dgrad(grad_MD, down, counts_E)
        gate_grad = torch.ops.aten.silu_backward(grad_hidden * up_MF, gate_MF)
        up_grad = activated * grad_hidden
        grad_x = grouped_dgrad(gate_grad, gate, counts_E) + grouped_dgrad(up_grad, up, counts_E)

        def weight_gradients() -> tuple[Tensor, ...]:
            pairs = ((gate_grad, x_MD), (up_grad, x_MD), (grad_MD, activated * up_MF))
            return tuple(
                grouped_wgrad(grad, x, counts_E).to(weight.dtype) for (grad, x), weight in zip(pairs, weights)
            )

        return grad_x, *ctx.gradients.of(weights, weight_gradients), None, None


class SplitExperts(Experts):
    """The routed experts of a layer with the same parameters."""

    def __init__(self, experts: Experts, gradients: WeightGradients):
        nn.Module.__init__(self)
        self.gate_proj, self.up_proj, self.down_proj = experts.gate_proj, experts.up_proj, experts.down_proj
        self.gradients = gradients

    def forward(self, x_MD: Tensor, counts_E: Tensor) -> Tensor:
        """Rows sorted by expert: ``[M, D] -> [M, D]``."""
        weights = (self.gate_proj.weight, self.up_proj.weight, self.down_proj.weight)
        return _Experts.apply(x_MD, *weights, counts_E, self.gradients)


def apply(module: nn.Module, gradients: WeightGradients) -> None:
    """Let every Linear and all experts below ``module``, in FP8 or not, hand weight gradients over.

    Not those of the norms, the gate and the embedding, which are small; nor the head's, which is made with
    the loss while the logits exist (``ops/cross_entropy.py``).
    """
    for name, child in list(module.named_children()):
        if isinstance(child, FP8Linear | FP8MLP | FP8Experts):
            child.gradients = gradients
        elif isinstance(child, Experts):
            setattr(module, name, SplitExperts(child, gradients))
        elif isinstance(child, Linear) and name != "lm_head":
            setattr(module, name, SplitLinear(child, gradients))
        else:
            apply(child, gradients)
