"""AdamW on FP32 master weights, moments in FP32 or BF16 (report 4.2 and 5)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dsv3.common.errors import UserError
from dsv3.config.train import OptimizerSection
from dsv3.parallel.weights import Weights
from dsv3.parallel.world import World


class AdamWBF16Moments(torch.optim.Optimizer):
    """AdamW with FP32 parameters and arithmetic, moments stored in BF16.

    torch's own implementations refuse moments of another dtype than the parameters.
    """

    def __init__(self, params: Any, lr: float, betas: tuple[float, float], eps: float, weight_decay: float):
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state, grad = self.state[parameter], parameter.grad
                if not state:
                    state["step"] = torch.zeros((), dtype=torch.float32)
                    for name in ("exp_avg", "exp_avg_sq"):
                        state[name] = torch.zeros_like(parameter, dtype=torch.bfloat16)
                state["step"] += 1
                count = float(state["step"])
                first = state["exp_avg"].float().lerp_(grad, 1 - beta1)
                second = state["exp_avg_sq"].float().mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
                state["exp_avg"].copy_(first)
                state["exp_avg_sq"].copy_(second)
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                scale = second.div_(1 - beta2**count).sqrt_().add_(group["eps"])
                parameter.addcdiv_(first, scale, value=-group["lr"] / (1 - beta1**count))


def build(
    model: nn.Module | Weights, options: OptimizerSection, precision: str = "fp32"
) -> torch.optim.Optimizer:
    """AdamW over a model, or what of it this rank updates: matrices decay, gains (one dimension) do not."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    gains = [p for p in model.parameters() if p.dim() <= 1]
    groups = [
        {"params": matrices, "weight_decay": options.weight_decay},
        {"params": gains, "weight_decay": 0.0},
    ]
    betas = (options.beta1, options.beta2)
    if options.moments_in(precision) == "bf16":
        return AdamWBF16Moments(groups, options.lr, betas, options.eps, options.weight_decay)
    return torch.optim.AdamW(groups, options.lr, betas, options.eps, fused=True)


@torch.no_grad()
def clip_gradients(weights: Weights, limit: float, world: World | None = None) -> float:
    """Scale all gradients so that their norm over ``world`` is at most ``limit``; returns the norm before.

    A norm that is not finite is returned and nothing is scaled: the caller skips the step.
    """
    norm = (world or World()).norm(weights.pieces.values())
    gradients = [p.grad for p in weights.parameters() if p.grad is not None]
    if limit < norm < float("inf"):
        torch._foreach_mul_(gradients, limit / (norm + 1e-6))
    return norm


def state_tensors(optimizer: torch.optim.Optimizer, model: nn.Module | Weights) -> dict[str, Tensor]:
    """Moments and step counts by parameter name, ``exp_avg/NAME`` and so on, for a checkpoint."""
    return {
        f"{kind}/{name}": value
        for name, parameter in model.named_parameters()
        for kind, value in optimizer.state.get(parameter, {}).items()
    }


def load_state_tensors(
    optimizer: torch.optim.Optimizer, model: nn.Module | Weights, tensors: dict[str, Tensor]
) -> None:
    """Put back what :func:`state_tensors` gave; refuses a checkpoint with another dtype of moments."""
    for name, parameter in model.named_parameters():
        state = {
            kind: tensors[f"{kind}/{name}"]
            for kind in ("step", "exp_avg", "exp_avg_sq")
            if f"{kind}/{name}" in tensors
        }
        if not state:
            continue
        ours = isinstance(optimizer, AdamWBF16Moments)
        wanted = torch.bfloat16 if ours else parameter.dtype
        if state["exp_avg"].dtype != wanted:
            held = "bf16" if state["exp_avg"].dtype == torch.bfloat16 else "fp32"
            raise UserError(f"the checkpoint holds {held} moments; resume with --optimizer.moments {held}")
        optimizer.state[parameter] = {
            # torch's fused kernel reads the count on the parameter's device, ours on the host
            "step": state["step"].clone() if ours else state["step"].to(parameter.device, copy=True),
            "exp_avg": state["exp_avg"].to(parameter.device),
            "exp_avg_sq": state["exp_avg_sq"].to(parameter.device),
        }
