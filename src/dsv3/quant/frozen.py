"""Linears whose weights stay in memory as FP8 files hold them, dequantised where they are used (report 3.3).

To run a model, not to train it: half the memory of BF16, products in the activations' dtype, no gradient for
the weights.

Shapes: O outputs, I inputs, E experts, M rows sorted by expert, D hidden; o = ceil(O / 128),
i = ceil(I / 128).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsv3.model.layer import DecoderLayer
from dsv3.model.linear import Experts, GroupedLinear, Linear
from dsv3.ops import packed
from dsv3.ops.blocks import BLOCK, Quantised, dequantise
from dsv3.ops.formats import E4M3
from dsv3.ops.native import decode
from dsv3.quant.swap import FixedDtypes, swap

NUMBERS, SCALES = "weight", "weight_scale_inv"  # the files' names
BAND = 2**21  # numbers of a matrix that are dense at a time; whole large ones take two to three times as long


class _Frozen(FixedDtypes):
    """FP8 numbers ``[..., O, I]`` and the FP32 scales ``[..., o, i]`` of their blocks, as buffers."""

    weight_scale_inv: Tensor

    @property
    def packed(self) -> Quantised:
        """The weight, ``[..., O, I]``; its tensors are the buffers themselves."""
        numbers = cast(Tensor, self.weight)
        return Quantised(numbers, self.weight_scale_inv, numbers.shape, BLOCK, E4M3)

    def _hold(self, shape: torch.Size) -> None:
        nn.Module.__init__(self)
        blocks = (-(-shape[-2] // BLOCK.rows), -(-shape[-1] // BLOCK.columns))
        self.register_buffer(NUMBERS, torch.empty(shape, dtype=E4M3.dtype))
        self.register_buffer(SCALES, torch.empty((*shape[:-2], *blocks), dtype=torch.float32))


def _product(x: Tensor, numbers_OI: Tensor, scales_oi: Tensor) -> Tensor:
    """``x W^T`` in x's dtype; without a compiled product, some rows of W are dense at a time."""
    if x.dtype == torch.float32 and decode.usable(x):
        return packed.linear(x, Quantised(numbers_OI, scales_oi, numbers_OI.shape, BLOCK, E4M3))
    blocks = max(1, BAND // (BLOCK.rows * numbers_OI.shape[1]))
    pieces = []
    for first in range(0, len(scales_oi), blocks):
        numbers = numbers_OI[first * BLOCK.rows : (first + blocks) * BLOCK.rows]
        scales = scales_oi[first : first + blocks]
        weight = dequantise(Quantised(numbers, scales, numbers.shape, BLOCK, E4M3))
        pieces.append(F.linear(x, weight.to(x.dtype)))
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=-1)


class FrozenLinear(_Frozen, Linear):
    """A Linear with its weight in FP8."""

    def __init__(self, shape: torch.Size):
        self._hold(shape)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., I] -> [..., O]`` in x's dtype."""
        return _product(x, self.weight, self.weight_scale_inv)


class FrozenGroupedLinear(_Frozen, GroupedLinear):
    """One matrix an expert in FP8, stacked."""

    def __init__(self, shape: torch.Size):
        self._hold(shape)

    def one(self, expert: int, x_MI: Tensor) -> Tensor:
        """The rows of one expert times its matrix: ``[M, I] -> [M, O]``."""
        return _product(x_MI, self.weight[expert], self.weight_scale_inv[expert])

    def forward(self, x_MI: Tensor, counts_E: Tensor) -> Tensor:
        """Rows sorted by expert, ``counts_E`` rows each: ``[M, I] -> [M, O]``."""
        pieces = x_MI.split(counts_E.tolist())
        return torch.cat([self.one(expert, piece) for expert, piece in enumerate(pieces)])


class FrozenExperts(Experts):
    """A layer's routed experts in FP8: one matrix at a time is dense, none of an expert without rows."""

    gate_proj: FrozenGroupedLinear
    up_proj: FrozenGroupedLinear
    down_proj: FrozenGroupedLinear

    def __init__(self, experts: Experts):
        nn.Module.__init__(self)
        self.gate_proj = FrozenGroupedLinear(experts.gate_proj.weight.shape)
        self.up_proj = FrozenGroupedLinear(experts.up_proj.weight.shape)
        self.down_proj = FrozenGroupedLinear(experts.down_proj.weight.shape)

    def forward(self, x_MD: Tensor, counts_E: Tensor) -> Tensor:
        """Rows sorted by expert: ``[M, D] -> [M, D]``."""
        if x_MD.dtype == torch.float32 and decode.usable(x_MD):
            stacks = (self.gate_proj.packed, self.up_proj.packed, self.down_proj.packed)
            return packed.experts(x_MD, counts_E, *stacks)
        pieces = []
        for expert, x in enumerate(x_MD.split(counts_E.tolist())):
            if len(x):
                hidden = F.silu(self.gate_proj.one(expert, x)) * self.up_proj.one(expert, x)
                pieces.append(self.down_proj.one(expert, hidden))
        return torch.cat(pieces) if pieces else torch.zeros_like(x_MD)


def linears(model: nn.Module) -> Iterator[tuple[str, Linear | GroupedLinear]]:
    """Path and module of every matrix that the released files hold in FP8.

    Those of attention, dense MLPs, shared and routed experts. Not: embedding, head, gates, norms, and
    ``eh_proj`` of the MTP modules.
    """
    for path, layer in model.named_modules():
        if isinstance(layer, DecoderLayer):
            for part in ("self_attn", "mlp"):
                for name, module in layer.get_submodule(part).named_modules():
                    if isinstance(module, Linear | GroupedLinear):
                        yield f"{path}.{part}.{name}", module


def freeze(model: nn.Module) -> None:
    """Put frozen modules, on the meta device, in the place of a bare model's matrices."""
    with torch.device("meta"):
        for path, module in list(model.named_modules()):
            if isinstance(module, Experts):
                swap(model, path, FrozenExperts(module))
        for path, matrix in list(linears(model)):
            if isinstance(matrix, Linear):
                swap(model, path, FrozenLinear(matrix.weight.shape))
