"""The compiled products and layers of ``decode.cpp`` (floor 1): its structures, and calls by pointer.

Shapes: R rows, N outputs, K inputs, E experts, M rows sorted by expert, D hidden.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dsv3.ops import native
from dsv3.ops.blocks import BLOCK, Quantised
from dsv3.ops.formats import E4M3
from dsv3.ops.integers import Int4, Int8

Weight = Tensor | Int8 | Int4 | Quantised
FP32, BF16, INT8, INT4, FP8 = range(5)  # the kinds of packed.h
DENSE = {torch.float32: FP32, torch.bfloat16: BF16}

_pointer, _long, _number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float


class Matrix(ctypes.Structure):
    """``packed.h``'s matrix or stack of them; it points into tensors that must be kept elsewhere."""

    _fields_ = (
        ("values", _pointer), ("scales", _pointer), ("leasts", _pointer),
        ("outputs", _long), ("inputs", _long), ("group", _long), ("kind", _long), ("skipped", _long),
    )  # fmt: skip


_MATRICES = (
    "q_a", "q", "kv_a", "kv_b", "o",
    "gate", "up", "down", "shared_gate", "shared_up", "shared_down", "router",
)  # fmt: skip
_NUMBERS = ("input_norm", "q_norm", "kv_norm", "post_norm", "bias", "cache")


class Layer(ctypes.Structure):
    """A decoder layer as ``decode.cpp`` has it."""

    _fields_ = (
        *((name, Matrix) for name in _MATRICES), *((name, _pointer) for name in _NUMBERS), ("experts", _long),
    )  # fmt: skip


_SIZES = (
    "hidden", "heads", "nope", "rope", "value", "latent",
    "chosen", "groups", "kept", "normalise", "cache_kind",
)  # fmt: skip


class Shape(ctypes.Structure):
    """What all layers of a model share."""

    _fields_ = (
        *((name, _long) for name in _SIZES),
        *((name, _number) for name in ("eps", "scale", "routing_factor")),
    )  # fmt: skip


class Batch(ctypes.Structure):
    """Tokens with their places in the cache."""

    _fields_ = (
        ("tokens", _long), ("rotation", _pointer), ("slots", _pointer), ("keys", _pointer),
        ("begins", _pointer), ("counts", _pointer),
    )  # fmt: skip


@functools.cache
def _library() -> ctypes.CDLL:
    found = native.library("decode")
    assert found is not None, "usable() comes first"
    whole = ctypes.c_int
    found.dsv3_linear.argtypes = [_pointer, _pointer, _long, _pointer, whole]
    found.dsv3_experts.argtypes = [_pointer, _pointer, _pointer, _long, _pointer, _pointer, _pointer, whole]
    found.dsv3_layers.argtypes = [_pointer, _long, _pointer, _pointer, _pointer, _pointer, whole]
    for function in (found.dsv3_linear, found.dsv3_experts, found.dsv3_layers):
        function.restype = None
    return found


def usable(x: Tensor) -> bool:
    """Whether the compiled functions take these activations: no gradient can pass through them."""
    return not (torch.is_grad_enabled() and x.requires_grad) and native.usable(x, "decode")


def packs(w: Any) -> bool:
    """Whether there is a compiled product with this weight: dense FP32 or BF16, FP8, INT8, INT4, on a CPU."""
    if isinstance(w, Quantised):
        return w.tile == BLOCK and w.kind == E4M3 and w.counts_E is None and w.values.device.type == "cpu"
    if isinstance(w, Tensor):
        return w.dtype in DENSE and w.device.type == "cpu" and w.is_contiguous()
    return isinstance(w, Int8 | Int4) and w.values.device.type == "cpu"


def matrix(w: Weight) -> Matrix:
    """A weight (or a stack, ``[E, N, K]``) as the compiled code sees it. The weight must outlive it."""
    if isinstance(w, Tensor):
        return Matrix(w.data_ptr(), None, None, w.shape[-2], w.shape[-1], 0, DENSE[w.dtype])
    parts = [w.values, w.scales, *((w.leasts,) if isinstance(w, Int4) else ())]
    assert all(part.is_contiguous() for part in parts)
    pointers = [part.data_ptr() for part in parts]
    if isinstance(w, Int4):
        return Matrix(*pointers, w.outputs, w.inputs, w.group, INT4)
    if isinstance(w, Int8):
        return Matrix(*pointers, None, w.outputs, w.inputs, 0, INT8)
    return Matrix(*pointers, None, *w.values.shape[-2:], 0, FP8)


def _rows(x: Tensor) -> Tensor:
    """FP32, ``[R, K]``."""
    return x.detach().reshape(-1, x.shape[-1]).float().contiguous()


def linear(x: Tensor, w: Weight) -> Tensor:
    """``x W^T``, FP32: ``[..., K] -> [..., N]``."""
    rows = _rows(x)
    m = matrix(w)
    out = torch.empty(len(rows), m.outputs)
    _library().dsv3_linear(
        ctypes.byref(m), rows.data_ptr(), len(rows), out.data_ptr(), torch.get_num_threads()
    )
    return out.view(*x.shape[:-1], m.outputs)


def experts(
    x_MD: Tensor,
    counts_E: Tensor,
    gate: Weight,
    up: Weight,
    down: Weight,
) -> Tensor:
    """Each expert's SwiGLU of its rows, FP32 ``[M, D]``."""
    rows, counts = _rows(x_MD), counts_E.to("cpu", torch.int64).contiguous()
    out = torch.empty(x_MD.shape)
    matrices = [ctypes.byref(matrix(w)) for w in (gate, up, down)]
    _library().dsv3_experts(
        *matrices, len(counts), counts.data_ptr(), rows.data_ptr(), out.data_ptr(), torch.get_num_threads()
    )
    return out


def chain(layers: Sequence[Layer]) -> ctypes.Array[Layer]:
    """Layers one after the other."""
    return (Layer * len(layers))(*layers)


def layers(array: ctypes.Array[Layer], shape: Shape, batch: Batch, norm_D: Tensor, x_ND: Tensor) -> None:
    """Run ``x_ND`` (FP32, contiguous) through the layers and the norm after them, in place."""
    _library().dsv3_layers(
        array, len(array), ctypes.byref(shape), ctypes.byref(batch), norm_D.data_ptr(), x_ND.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
