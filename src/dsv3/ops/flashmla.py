"""Absorbed attention by DeepSeek's FlashMLA, where it is installed (compute capability 9 only; floor 1).

Shapes: S sequences, T new tokens of each, M = S T, H heads, C latent, R rope, X = C + R. Its dense decoding
kernel knows DeepSeek-V3's own widths in BF16 and blocks of 64 tokens. Its FP8 rows, which our cache has
too, it reads in sparse attention only.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from dsv3.ops import library
from dsv3.ops.paged import Table

LATENT, ROPE, BLOCK = 512, 64, 64


def missing(device: torch.device) -> str | None:
    """Why it cannot be used on this GPU, or None."""
    return library.missing("flash_mla", device, library.HOPPER, library.HOPPER)


def takes(q_MHX: Tensor, rows: Tensor, table: Table, latent: int) -> bool:
    """Whether :func:`attend` can do this; the MTP module's keys, which begin at place 1, it cannot."""
    widths = (latent, q_MHX.shape[-1] - latent, table.block) == (LATENT, ROPE, BLOCK)
    return widths and table.first == 0 and q_MHX.dtype == rows.dtype == torch.bfloat16


def attend(q_MHX: Tensor, rows: Tensor, table: Table, latent: int, scale: float) -> Tensor:
    """As :func:`dsv3.serve.absorbed.attend_reference`, of a layer's rows."""
    kernels, sequences = _library(), len(table.lengths_S)
    q_STHX = q_MHX.unflatten(0, (sequences, -1))
    if "flashmla" not in table.plans:  # old ones plan here, new ones in the first call; both for all layers
        queries = q_STHX.shape[1] * q_STHX.shape[2]
        table.plans["flashmla"] = kernels.get_mla_metadata(table.lengths_S, queries, 1)
    out_STHC, _ = kernels.flash_mla_with_kvcache(
        q_STHX, rows.view(-1, BLOCK, 1, LATENT + ROPE), table.blocks_SB, table.lengths_S, latent,
        *table.plans["flashmla"], softmax_scale=scale, causal=True,
    )  # fmt: skip
    return out_STHC.flatten(0, 1)


def _library() -> Any:
    return importlib.import_module("flash_mla")
