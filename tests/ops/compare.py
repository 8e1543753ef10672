"""Values and gradients of an operator against its reference."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def agree(
    operator: Callable[..., Tensor],
    specification: Callable[..., Tensor],
    *inputs: object,
    tolerance: float = 1e-5,
) -> None:
    """Same value and same gradient of every input that is a floating tensor, within ``tolerance``.

    The tolerance is relative to the largest element (or one: inputs are drawn of that size, and a gradient
    may vanish by cancellation). Output and gradients keep the dtypes of the inputs.
    """
    results = []
    for function in (operator, specification):
        copies = [
            x.detach().clone().requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x
            for x in inputs
        ]
        out = function(*copies)
        generator = torch.Generator().manual_seed(5)
        out.backward(torch.randn(out.shape, generator=generator).to(out.dtype))
        floats = [x for x in copies if isinstance(x, Tensor) and x.is_floating_point()]
        assert all(x.grad is not None and x.grad.dtype == x.dtype for x in floats)
        results.append([out.detach(), *(x.grad for x in floats)])
    for ours, wanted in zip(*results, strict=True):
        assert ours.dtype == wanted.dtype and ours.shape == wanted.shape
        if ours.numel():
            scale = float(wanted.double().abs().max().clamp(min=1.0))
            assert float((ours.double() - wanted.double()).abs().max()) <= tolerance * scale
