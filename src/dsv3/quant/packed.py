"""Matrices kept for running on a CPU: dense, INT8 or INT4, multiplied as they are (ops/packed.py).

To run a model, not to train it: no gradient, activations FP32 (rounded to 8 bits where integers multiply
them). Quantised are the matrices of attention, dense MLPs, shared and routed experts, the MTP modules'
``eh_proj`` and the head; the embedding becomes BF16; gates, norms and selection biases stay as they are.

Shapes: O outputs, I inputs, E experts, M rows sorted by expert, D hidden.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor, nn

from dsv3.common.errors import UserError
from dsv3.model import DeepSeekV3
from dsv3.model.linear import Experts, GroupedLinear, Linear
from dsv3.ops import packed
from dsv3.ops.integers import GROUPS, LANES, QUAD, SPAN, Int4, Int8, quantise_int4, quantise_int8
from dsv3.quant.swap import FixedDtypes, swap

WEIGHT, SCALE, LEAST = "weight", "weight_scale", "weight_least"  # the buffers' and the files' names
# INT8 in an INT4 model. The head: in INT4 it alone loses more than everything else does (docs/log.md).
# kv_b_proj: absorbed, it is summed over its outputs too, and a scale an output suits both ways.
FINER = ("lm_head", "kv_b_proj")
Kept = Tensor | Int8 | Int4  # of what ops.packed multiplies; FP8 is quant.frozen's


@dataclass(frozen=True)
class Integers:
    """A model's number format: ``bits`` 8 (a scale an output) or 4 (a scale and a least a ``group``)."""

    bits: int
    group: int = 128

    def __post_init__(self) -> None:
        if self.bits not in (4, 8):
            raise UserError(f"bits ({self.bits}) must be 8 or 4")
        if self.group not in GROUPS:
            raise UserError(f"group ({self.group}) must be one of {', '.join(map(str, GROUPS))}")

    def quantise(self, path: str, w: Tensor) -> Int8 | Int4:
        """The weight ``[..., O, I]`` of the matrix at ``path``; on the meta device, its shapes."""
        in_int8 = self.bits == 8 or path.endswith(FINER)
        if w.is_meta:
            return self._shapes(in_int8, w)
        return quantise_int8(w) if in_int8 else quantise_int4(w, self.group)

    def _shapes(self, in_int8: bool, w: Tensor) -> Int8 | Int4:
        # Written out: torch's arithmetic without numbers would import another 150 MB first.
        *leading, outputs, inputs = w.shape
        spans, groups = -(-inputs // SPAN), -(-inputs // self.group)

        def bare(dtype: torch.dtype, *size: int) -> Tensor:
            return torch.empty(*leading, -(-outputs // LANES), *size, dtype=dtype, device="meta")

        if in_int8:
            values = bare(torch.uint8, spans * SPAN // QUAD, LANES, QUAD)
            return Int8(values, bare(torch.float32, LANES), outputs, inputs)
        values = bare(torch.uint8, spans, LANES, QUAD)
        scales, leasts = (bare(torch.float32, groups, LANES) for _ in range(2))
        return Int4(values, scales, leasts, self.group, outputs, inputs)


def parts(weight: Kept) -> dict[str, Tensor]:
    """The tensors of a weight, by the names of buffers and files."""
    if isinstance(weight, Int8):
        return {WEIGHT: weight.values, SCALE: weight.scales}
    if isinstance(weight, Int4):
        return {WEIGHT: weight.values, SCALE: weight.scales, LEAST: weight.leasts}
    return {WEIGHT: weight}


def one(weight: Kept, expert: int) -> Kept:
    """An expert's weight of a stack."""
    if isinstance(weight, Int8):
        return replace(weight, values=weight.values[expert], scales=weight.scales[expert])
    if isinstance(weight, Int4):
        values, scales, leasts = weight.values[expert], weight.scales[expert], weight.leasts[expert]
        return replace(weight, values=values, scales=scales, leasts=leasts)
    return weight[expert]


class _Packed(FixedDtypes):
    """A weight, held as buffers: :attr:`packed` puts them together."""

    weight_scale: Tensor
    weight_least: Tensor

    def __init__(self, weight: Kept):
        nn.Module.__init__(self)
        self.kind = type(weight)
        if isinstance(weight, Int8 | Int4):
            self.outputs, self.inputs = weight.outputs, weight.inputs
        if isinstance(weight, Int4):
            self.group = weight.group
        for name, tensor in parts(weight).items():
            self.register_buffer(name, tensor.detach())

    @property
    def packed(self) -> Kept:
        """The weight, ``[O, I]`` or ``[E, O, I]``; its tensors are the buffers themselves."""
        weight = cast(Tensor, self.weight)
        if self.kind is Int8:
            return Int8(weight, self.weight_scale, self.outputs, self.inputs)
        if self.kind is Int4:
            scales, leasts = self.weight_scale, self.weight_least
            return Int4(weight, scales, leasts, self.group, self.outputs, self.inputs)
        return weight


class PackedLinear(_Packed, Linear):
    """A Linear with its weight as it is kept."""

    def forward(self, x: Tensor) -> Tensor:
        """``[..., I] -> [..., O]`` in x's dtype."""
        return packed.linear(x, self.packed)


class PackedGroupedLinear(_Packed, GroupedLinear):
    """One matrix an expert as they are kept, stacked."""

    def forward(self, x_MI: Tensor, counts_E: Tensor) -> Tensor:
        """Rows sorted by expert, ``counts_E`` rows each: ``[M, I] -> [M, O]``."""
        pieces = x_MI.split(counts_E.tolist())
        return torch.cat([packed.linear(x, one(self.packed, e)) for e, x in enumerate(pieces)])


class PackedExperts(Experts):
    """A layer's routed experts as they are kept."""

    gate_proj: PackedGroupedLinear
    up_proj: PackedGroupedLinear
    down_proj: PackedGroupedLinear

    def __init__(self, gate: Kept, up: Kept, down: Kept):
        nn.Module.__init__(self)
        self.gate_proj, self.up_proj, self.down_proj = map(PackedGroupedLinear, (gate, up, down))

    @property
    def packed(self) -> tuple[Kept, Kept, Kept]:
        """gate and up ``[E, F, D]``, down ``[E, D, F]``."""
        return self.gate_proj.packed, self.up_proj.packed, self.down_proj.packed

    def forward(self, x_MD: Tensor, counts_E: Tensor) -> Tensor:
        """Rows sorted by expert: ``[M, D] -> [M, D]``."""
        return packed.experts(x_MD, counts_E, *self.packed)


def matrices(model: nn.Module) -> Iterator[tuple[str, Linear | GroupedLinear]]:
    """Path and module of every matrix that is packed: all but embedding and gates."""
    for path, module in model.named_modules():
        if isinstance(module, Linear | GroupedLinear):
            yield path, module


@torch.no_grad()
def pack(model: DeepSeekV3, integers: Integers | None = None) -> None:
    """Put packed modules in the place of a model's matrices, quantised or (None) as they are.

    Matrix by matrix, so that little is there twice; on the meta device it makes the shapes. Parameters get no
    gradient any more. Matrices that were swapped already stay, and to quantise them is refused.
    """
    for path, module in matrices(model):
        if integers is not None and type(module) not in (Linear, GroupedLinear):
            raise UserError(f"{path} is a {type(module).__name__}: only a plain model can be quantised")

    def made(path: str, w: Tensor) -> Kept:
        return w if integers is None else integers.quantise(path, w)

    for path, module in list(model.named_modules()):
        if type(module) is Experts:
            gate, up, down = module.gate_proj.weight, module.up_proj.weight, module.down_proj.weight
            swap(model, path, PackedExperts(*(made(path, w) for w in (gate, up, down))))
        elif type(module) is Linear:
            swap(model, path, PackedLinear(made(path, module.weight)))
    embedding = model.model.embed_tokens
    if integers is not None:
        embedding.weight = nn.Parameter(embedding.weight.bfloat16())
    embedding.compute_dtype = torch.float32
    model.requires_grad_(False)
