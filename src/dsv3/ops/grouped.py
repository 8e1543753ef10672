"""Matrix products of all experts at once, on rows sorted by expert (floor 1).

Shapes: M rows sorted by expert, E experts, I inputs, O outputs, D hidden, F expert hidden.

Three forms of the same thing: the reference is a loop over experts in plain PyTorch; on a CPU a loop
inside one operator (no Python autograd node an expert, work that stays in the caches); on a GPU torch's
grouped product. The CPU operators are ``torch.library`` ops, so torch.compile treats them as one node:
torch's own ``grouped_mm`` refuses FP32 under compile.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def grouped_linear_reference(x_MI: Tensor, w_EOI: Tensor, counts_E: Tensor) -> Tensor:
    """The specification of :func:`grouped_linear`: one product an expert."""
    pieces = x_MI.split(counts_E.tolist())
    return torch.cat([piece @ w_OI.T for piece, w_OI in zip(pieces, w_EOI)])


def grouped_swiglu_reference(
    x_MD: Tensor, gate_EFD: Tensor, up_EFD: Tensor, down_EDF: Tensor, counts_E: Tensor
) -> Tensor:
    """The specification of :func:`grouped_swiglu`."""
    gate_MF = grouped_linear_reference(x_MD, gate_EFD, counts_E)
    up_MF = grouped_linear_reference(x_MD, up_EFD, counts_E)
    return grouped_linear_reference(F.silu(gate_MF) * up_MF, down_EDF, counts_E)


def _segments(counts_E: Tensor) -> list[tuple[int, int, int]]:
    """``(expert, first row, past the last row)`` of every expert that has rows."""
    found, start = [], 0
    for expert, count in enumerate(counts_E.tolist()):
        if count:
            found.append((expert, start, start + count))
        start += count
    return found


def _zero_where_idle(grad_EOI: Tensor, counts_E: Tensor) -> Tensor:
    """A gradient for stacked weights, zero where an expert has no rows; the rest is still to be written."""
    for expert in (counts_E == 0).nonzero().flatten().tolist():
        grad_EOI[expert].zero_()
    return grad_EOI


@torch.library.custom_op("dsv3::grouped_linear", mutates_args=(), device_types="cpu")
def _grouped_linear(x_MI: Tensor, w_EOI: Tensor, counts_E: Tensor) -> Tensor:
    out = x_MI.new_empty(x_MI.shape[0], w_EOI.shape[1])
    for expert, start, stop in _segments(counts_E):
        torch.mm(x_MI[start:stop], w_EOI[expert].T, out=out[start:stop])
    return out


@_grouped_linear.register_fake
def _(x_MI: Tensor, w_EOI: Tensor, counts_E: Tensor) -> Tensor:
    return x_MI.new_empty(x_MI.shape[0], w_EOI.shape[1])


@torch.library.custom_op("dsv3::grouped_dgrad", mutates_args=(), device_types="cpu")
def _grouped_dgrad(grad_MO: Tensor, w_EOI: Tensor, counts_E: Tensor) -> Tensor:
    out = grad_MO.new_empty(grad_MO.shape[0], w_EOI.shape[2])
    for expert, start, stop in _segments(counts_E):
        torch.mm(grad_MO[start:stop], w_EOI[expert], out=out[start:stop])
    return out


@_grouped_dgrad.register_fake
def _(grad_MO: Tensor, w_EOI: Tensor, counts_E: Tensor) -> Tensor:
    return grad_MO.new_empty(grad_MO.shape[0], w_EOI.shape[2])


@torch.library.custom_op("dsv3::grouped_wgrad", mutates_args=(), device_types="cpu")
def _grouped_wgrad(grad_MO: Tensor, x_MI: Tensor, counts_E: Tensor) -> Tensor:
    out = _zero_where_idle(x_MI.new_empty(len(counts_E), grad_MO.shape[1], x_MI.shape[1]), counts_E)
    for expert, start, stop in _segments(counts_E):
        torch.mm(grad_MO[start:stop].T, x_MI[start:stop], out=out[expert])
    return out


@_grouped_wgrad.register_fake
def _(grad_MO: Tensor, x_MI: Tensor, counts_E: Tensor) -> Tensor:
    return x_MI.new_empty(len(counts_E), grad_MO.shape[1], x_MI.shape[1])


def _save_inputs(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _grouped_linear_grad(ctx: Any, grad_MO: Tensor) -> tuple[Tensor, Tensor, None]:
    x_MI, w_EOI, counts_E = ctx.saved_tensors
    grad_MO = grad_MO.contiguous()
    return _grouped_dgrad(grad_MO, w_EOI, counts_E), _grouped_wgrad(grad_MO, x_MI, counts_E), None


_grouped_linear.register_autograd(_grouped_linear_grad, setup_context=_save_inputs)


def _swiglu(
    x_MD: Tensor, gate_EFD: Tensor, up_EFD: Tensor, down_EDF: Tensor, counts_E: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    out = torch.empty_like(x_MD)
    gate_MF = x_MD.new_empty(x_MD.shape[0], gate_EFD.shape[1])
    up_MF = torch.empty_like(gate_MF)
    for expert, start, stop in _segments(counts_E):
        x, gate, up = x_MD[start:stop], gate_MF[start:stop], up_MF[start:stop]
        torch.mm(x, gate_EFD[expert].T, out=gate)
        torch.mm(x, up_EFD[expert].T, out=up)
        torch.mm(F.silu(gate).mul_(up), down_EDF[expert].T, out=out[start:stop])
    return out, gate_MF, up_MF


_grouped_swiglu = torch.library.custom_op("dsv3::grouped_swiglu", mutates_args=(), device_types="cpu")(
    _swiglu
)


@_grouped_swiglu.register_fake
def _(
    x_MD: Tensor, gate_EFD: Tensor, up_EFD: Tensor, down_EDF: Tensor, counts_E: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    hidden = x_MD.new_empty(x_MD.shape[0], gate_EFD.shape[1])
    return torch.empty_like(x_MD), hidden, torch.empty_like(hidden)


@torch.library.custom_op("dsv3::grouped_swiglu_backward", mutates_args=(), device_types="cpu")
def _grouped_swiglu_backward(
    grad_MD: Tensor, x_MD: Tensor, gate_EFD: Tensor, up_EFD: Tensor, down_EDF: Tensor, counts_E: Tensor,
    gate_MF: Tensor, up_MF: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    grad_x = torch.empty_like(x_MD)
    grad_gate, grad_up, grad_down = (
        _zero_where_idle(torch.empty_like(w), counts_E) for w in (gate_EFD, up_EFD, down_EDF)
    )
    for expert, start, stop in _segments(counts_E):
        grad_out, x = grad_MD[start:stop], x_MD[start:stop]
        gate, up = gate_MF[start:stop], up_MF[start:stop]
        grad_hidden = grad_out @ down_EDF[expert]
        activated = F.silu(gate)
        torch.mm(grad_out.T, activated * up, out=grad_down[expert])
        up_grad = activated.mul_(grad_hidden)
        gate_grad = torch.ops.aten.silu_backward(grad_hidden.mul_(up), gate)
        torch.mm(gate_grad.T, x, out=grad_gate[expert])
        torch.mm(up_grad.T, x, out=grad_up[expert])
        torch.mm(gate_grad, gate_EFD[expert], out=grad_x[start:stop])
        grad_x[start:stop].addmm_(up_grad, up_EFD[expert])
    return grad_x, grad_gate, grad_up, grad_down


@_grouped_swiglu_backward.register_fake
def _(
    grad_MD: Tensor, x_MD: Tensor, gate_EFD: Tensor, up_EFD: Tensor, down_EDF: Tensor, counts_E: Tensor,
    gate_MF: Tensor, up_MF: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return tuple(torch.empty_like(t) for t in (x_MD, gate_EFD, up_EFD, down_EDF))  # type: ignore[return-value]


def _save_swiglu(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs, *output[1:])
    ctx.set_materialize_grads(False)


def _grouped_swiglu_grad(ctx: Any, grad_MD: Tensor, *unused: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_MD is None:
        return (None,) * 5
    return (*_grouped_swiglu_backward(grad_MD.contiguous(), *ctx.saved_tensors), None)


_grouped_swiglu.register_autograd(_grouped_swiglu_grad, setup_context=_save_swiglu)


def grouped_linear(x_MI: Tensor, w_EOI: Tensor, counts_E: Tensor) -> Tensor:
    """``out[m] = w[expert of m] x[m]``, ``[M, O]``.

    ``x_MI`` FP32 or BF16, sorted by expert; ``w_EOI`` the same dtype; ``counts_E`` integer rows an expert,
    summing to M. Experts without rows get a zero weight gradient.
    """
    if x_MI.device.type == "cpu":
        return _grouped_linear(x_MI, w_EOI, counts_E)
    ends_E = counts_E.cumsum(0).to(torch.int32)
    return F.grouped_mm(x_MI, w_EOI.transpose(1, 2), offs=ends_E)


def grouped_dgrad(grad_MO: Tensor, w_EOI: Tensor, counts_E: Tensor) -> Tensor:
    """The gradient of :func:`grouped_linear` with respect to its rows: ``grad[m] w[expert of m]``."""
    if grad_MO.device.type == "cpu":
        return _grouped_dgrad(grad_MO, w_EOI, counts_E)
    return F.grouped_mm(grad_MO, w_EOI, offs=counts_E.cumsum(0).to(torch.int32))


def grouped_wgrad(grad_MO: Tensor, x_MI: Tensor, counts_E: Tensor) -> Tensor:
    """The gradient of :func:`grouped_linear` with respect to its weights, ``[E, O, I]``."""
    if grad_MO.device.type == "cpu":
        return _grouped_wgrad(grad_MO, x_MI, counts_E)
    return F.grouped_mm(grad_MO.T, x_MI, offs=counts_E.cumsum(0).to(torch.int32))


def grouped_swiglu(
    x_MD: Tensor, gate_EFD: Tensor, up_EFD: Tensor, down_EDF: Tensor, counts_E: Tensor
) -> Tensor:
    """Every expert's SwiGLU, ``down(silu(gate x) * up x)``, on rows sorted by expert: ``[M, D]``.

    Kept for the backward: x and the outputs of gate and up; the product of the two is made again there.
    """
    if x_MD.device.type == "cpu":
        if not torch.is_grad_enabled() and not torch.compiler.is_compiling():
            # The same without an operator's ceremony, the first call of which imports the compiler (2 s).
            return _swiglu(x_MD, gate_EFD, up_EFD, down_EDF, counts_E)[0]
        return _grouped_swiglu(x_MD, gate_EFD, up_EFD, down_EDF, counts_E)[0]
    gate_MF = grouped_linear(x_MD, gate_EFD, counts_E)
    up_MF = grouped_linear(x_MD, up_EFD, counts_E)
    return grouped_linear(F.silu(gate_MF) * up_MF, down_EDF, counts_E)
