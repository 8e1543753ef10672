"""FP8 products by DeepSeek's DeepGEMM, where somebody installed it (compute capability 9 only; floor 1).

Shapes: M rows (tokens), N outputs, K inputs, E experts, P rows with every expert's padded. It wants the rows
of an expert to begin at a multiple of its own tile, so rows are copied apart and their products back. It has
products for weights' gradients too, but over experts only with sizes known to the CPU: not used here.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from dsv3.ops import library
from dsv3.ops.blocks import BLOCK, ROW, Quantised
from dsv3.ops.formats import E4M3


def missing(device: torch.device) -> str | None:
    """Why it cannot be used on this GPU, or None."""
    return library.missing("deep_gemm", device, library.HOPPER, library.HOPPER)


def takes_linear(x: Quantised, w: Quantised, counts_E: Tensor | None, dtype: torch.dtype) -> bool:
    """Whether :func:`linear` can do this: whole tiles of N and K, and BF16 out of experts."""
    tiles = x.tile == ROW and w.tile == BLOCK and x.kind == w.kind == E4M3
    whole = w.shape[-2] % 128 == 0 and w.shape[-1] % 128 == 0
    return tiles and whole and (dtype == torch.bfloat16 or (counts_E is None and dtype == torch.float32))


def linear(x: Quantised, w: Quantised, counts_E: Tensor | None, dtype: torch.dtype) -> Tensor:
    """As :func:`dsv3.ops.fp8.linear`."""
    kernels = _library()
    weights = (w.values.contiguous(), w.scales.contiguous())
    rows, outputs = x.shape[0], w.shape[-2]
    if counts_E is None:
        out = torch.empty((rows, outputs), dtype=dtype, device=x.values.device)
        kernels.fp8_gemm_nt((x.values.contiguous(), x.scales), weights, out)
        return out
    place_M, expert_P = apart(counts_E, rows, kernels.get_mk_alignment_for_contiguous_layout())
    x_PK = torch.zeros((len(expert_P), x.shape[1]), dtype=torch.uint8, device=x.values.device)
    x_PK[place_M] = x.values.view(torch.uint8)
    scales_P = x.scales.new_zeros((len(expert_P), x.scales.shape[1]))
    scales_P[place_M] = x.scales
    out_PN = torch.empty((len(expert_P), outputs), dtype=dtype, device=x.values.device)
    kernels.m_grouped_fp8_gemm_nt_contiguous((x_PK.view(x.values.dtype), scales_P), weights, out_PN, expert_P)
    return out_PN[place_M]


def apart(counts_E: Tensor, rows: int, alignment: int) -> tuple[Tensor, Tensor]:
    """Where rows go for every expert to begin at a multiple of ``alignment``: ``(place_M, expert_P)``.

    ``expert_P`` is -1 where no row is. Its length depends on sizes known to the CPU alone: nothing waits.
    """
    experts = len(counts_E)
    length = -(-(rows + min(experts, rows) * (alignment - 1)) // alignment) * alignment
    padded_E = -(-counts_E // alignment) * alignment
    shift_E = (padded_E.cumsum(0) - padded_E) - (counts_E.cumsum(0) - counts_E)
    expert_E = torch.arange(experts, device=counts_E.device)
    expert_M = torch.repeat_interleave(expert_E, counts_E, output_size=rows)
    place_M = torch.arange(rows, device=counts_E.device) + shift_E[expert_M]
    expert_P = torch.full((length,), -1, dtype=torch.int32, device=counts_E.device)
    expert_P[place_M] = expert_M.to(torch.int32)
    return place_M, expert_P


def _library() -> Any:
    return importlib.import_module("deep_gemm")
