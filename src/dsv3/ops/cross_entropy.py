"""Cross-entropy of a linear head by chunks: a tensor of N x V logits never exists (floor 1).

Shapes: N flattened tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK_ELEMENTS = 1 << 21  # logits alive at once: 8 MiB of FP32, near the caches
IGNORE = -100  # label of a position that bears no loss


def linear_cross_entropy_reference(h_ND: Tensor, w_VD: Tensor, labels_N: Tensor) -> Tensor:
    """The specification: FP32 sum of the negative log-likelihoods, positions labelled -100 left out."""
    return F.cross_entropy((h_ND @ w_VD.T).float(), labels_N, ignore_index=IGNORE, reduction="sum")


class _LinearCrossEntropy(torch.autograd.Function):
    """Gradients are made chunk by chunk in the forward pass, while the chunk's logits exist."""

    @staticmethod
    def forward(ctx: Any, h_ND: Tensor, w_VD: Tensor, labels_N: Tensor) -> Tensor:
        w = w_VD.to(h_ND.dtype)
        total = torch.zeros((), dtype=torch.float32, device=h_ND.device)
        needs_h, needs_w = ctx.needs_input_grad[:2]
        grad_h = torch.empty_like(h_ND) if needs_h else None
        grad_w = torch.zeros_like(w_VD, dtype=torch.float32) if needs_w else None
        rows = max(1, CHUNK_ELEMENTS // w.shape[0])
        # Two buffers for all chunks: fresh memory would cost a page fault every 4 KiB.
        products = h_ND.new_empty(min(rows, h_ND.shape[0]), w.shape[0])
        softmax = torch.empty_like(products, dtype=torch.float32)
        for start in range(0, h_ND.shape[0], rows):
            h, labels = h_ND[start : start + rows], labels_N[start : start + rows]
            counted = labels != IGNORE
            target = torch.where(counted, labels, 0)[:, None]
            logits = torch.mm(h, w.T, out=products[: len(h)])
            log_p = torch.log_softmax(logits, dim=-1, dtype=torch.float32, out=softmax[: len(h)])
            total -= log_p.gather(1, target)[:, 0].masked_fill_(~counted, 0.0).sum()
            if grad_h is None and grad_w is None:
                continue
            probability = log_p.exp_()  # in place: the logarithms are not needed again
            probability.scatter_add_(1, target, torch.full_like(target, -1, dtype=torch.float32))
            probability *= counted[:, None]
            grad_logits = probability.to(h.dtype)
            if grad_h is not None:
                torch.mm(grad_logits, w, out=grad_h[start : start + rows])
            if grad_w is not None:
                if h.dtype == torch.float32:
                    grad_w.addmm_(grad_logits.T, h)
                else:
                    grad_w += grad_logits.T @ h
        ctx.save_for_backward(grad_h, grad_w)
        ctx.weight_dtype = w_VD.dtype
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        grad_h, grad_w = ctx.saved_tensors
        if grad_h is not None:
            grad_h = grad_h * grad.to(grad_h.dtype)
        if grad_w is not None:
            grad_w = (grad_w * grad).to(ctx.weight_dtype)
        return grad_h, grad_w, None


def linear_cross_entropy(h_ND: Tensor, w_VD: Tensor, labels_N: Tensor) -> Tensor:
    """Sum over tokens of -log softmax(h w^T)[label], FP32 scalar; labels of -100 are left out.

    ``h_ND`` in FP32 or BF16 (the products run in that dtype, the softmax in FP32), ``w_VD`` in any float
    dtype, ``labels_N`` int64. Gradients flow to ``h_ND`` and ``w_VD``; twice differentiating is an error.
    """
    if not torch.is_grad_enabled():  # autograd would still ask for the gradients, and they cost two thirds
        h_ND, w_VD = h_ND.detach(), w_VD.detach()
    return _LinearCrossEntropy.apply(h_ND, w_VD, labels_N)
