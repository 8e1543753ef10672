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
        exact = _exact(x)
        norm = torch.linalg.vector_norm(exact, dim=-1, keepdim=True)
        inverse = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight_D, inverse)
        return (exact * inverse).to(x.dtype).mul_(weight_D)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight_D, inverse = ctx.saved_tensors
        normalised = (_exact(x) * inverse).reshape(-1, x.shape[-1])
        grad = _exact(grad).reshape(normalised.shape)
        weight = weight_D.to(grad.dtype)
        product = grad * normalised
        grad_weight = product.sum(dim=0)
        along = torch.mv(product, weight)[:, None].div_(x.shape[-1])
        grad_x = torch.mul(grad, weight, out=product)
        grad_x.addcmul_(normalised, along, value=-1).mul_(inverse.reshape(-1, 1))
        return grad_x.view_as(x).to(x.dtype), grad_weight.to(weight_D.dtype), None


def _exact(x: Tensor) -> Tensor:
    """At least FP32."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """``x / sqrt(mean(x^2) + eps) * weight``, same shape and dtype as ``x``; statistics in FP32."""
    if x.device.type == "cpu" and not torch.compiler.is_compiling():
        if not torch.is_grad_enabled():  # a generated token passes many norms: no autograd node each
            return (x * _inverse_rms(x, eps)).mul_(weight_D)
        return _RMSNorm.apply(x, weight_D, eps)
    if x.device.type == "cuda":
        return F.rms_norm(x, weight_D.shape, weight_D.to(x.dtype), eps)
    return rms_norm_reference(x, weight_D, eps)
