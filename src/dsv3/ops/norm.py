"""RMSNorm, statistics in FP32 (floor 1). Shapes: D the normalised width, ... any leading dimensions."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm_reference(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """The specification: ``x / rms(x) * weight``, normalised in FP32, result in x's dtype."""
    x32 = x.float()
    normalised = x32 * torch.rsqrt(x32.pow(2).mean(dim=-1, keepdim=True) + eps)
    return weight_D.to(x.dtype) * normalised.to(x.dtype)


def _inverse_rms(x: Tensor, eps: float) -> Tensor:
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()


class _RMSNorm(torch.autograd.Function):
    """Two passes forward, four backward, and only the input kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        inverse = _inverse_rms(x, eps)
        ctx.save_for_backward(x, weight_D, inverse)
        return (x * inverse).mul_(weight_D)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight_D, inverse = ctx.saved_tensors
        normalised = (x * inverse).reshape(-1, x.shape[-1])
        grad = grad.reshape(normalised.shape)
        product = grad * normalised
        grad_weight = product.sum(dim=0)
        along = torch.mv(product, weight_D)[:, None].div_(x.shape[-1])
        grad_x = torch.mul(grad, weight_D, out=product)
        grad_x.addcmul_(normalised, along, value=-1).mul_(inverse.reshape(-1, 1))
        return grad_x.view_as(x), grad_weight, None


def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """``x / sqrt(mean(x^2) + eps) * weight``, same shape and dtype as ``x``; statistics in FP32."""
    exact = x.dtype in (torch.float32, torch.float64)
    if exact and x.device.type == "cpu" and not torch.compiler.is_compiling():
        if not torch.is_grad_enabled():  # a generated token passes many norms: no autograd node each
            return (x * _inverse_rms(x, eps)).mul_(weight_D)
        return _RMSNorm.apply(x, weight_D, eps)
    if x.device.type == "cuda":
        return F.rms_norm(x, weight_D.shape, weight_D.to(x.dtype), eps)
    return rms_norm_reference(x, weight_D, eps)
