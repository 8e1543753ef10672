"""Absorbed attention: every head's query, folded into the latent space, attends to the latents themselves.

The rows it attends to are either gathered first, or stay where they lie in the cache's blocks: GPUs have
kernels for that, FlashMLA's or ours. Which one is decided once for the sizes of a model, and then logged: it
has to be installed, to suit the GPU, and to get a small example right. ``DSV3_MLA`` names one to try before
the others; ``reference`` means plain PyTorch.

Shapes: S sequences, T new tokens of each, M = S T, L keys, H heads, C latent, R rope, X = C + R, K nope,
Q = K + R, V value width, Y = K + V.
"""

from __future__ import annotations

import functools
import importlib
import logging
import os
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dsv3.common.errors import UserError, nearest
from dsv3.ops import flashmla, library
from dsv3.ops.backend import Choice
from dsv3.ops.paged import Table
from dsv3.serve.cache import LatentCache

VARIABLE = "DSV3_MLA"
AMPERE = 8  # the oldest whose major number our kernel suits
ORDER = ("flashmla", "triton", "reference")
LARGEST_ERROR = 1e-2  # of an example: BF16 weights and sums are off by less, a wrong row by about 1

log = logging.getLogger("dsv3")


def softmax(scores: Tensor, later: Tensor | None) -> Tensor:
    """Weights in the scores' dtype; sums in FP32. ``later``: added to scores, -inf where a key is hidden."""
    exact = scores.float()
    return (exact if later is None else exact.add_(later)).softmax(dim=-1).to(scores.dtype)


def fold(q_MHQ: Tensor, kv_b_HYC: Tensor, nope: int) -> Tensor:
    """The key part of ``kv_b_proj`` folded into the query: ``[M, H, X]``."""
    q_nope, q_rope = q_MHQ.split([nope, q_MHQ.shape[-1] - nope], dim=-1)
    q_latent = torch.bmm(q_nope.transpose(0, 1), kv_b_HYC[:, :nope]).transpose(0, 1)
    return torch.cat((q_latent, q_rope), dim=-1)


def unfold(out_MHC: Tensor, kv_b_HYC: Tensor, nope: int) -> Tensor:
    """The heads' values of their sums of latents: ``[M, H V]``."""
    return torch.bmm(out_MHC.transpose(0, 1), kv_b_HYC[:, nope:].transpose(1, 2)).transpose(0, 1).flatten(1)


def attend_rows(
    q_MHX: Tensor, rows_SLX: Tensor, latent: int, scale: float, later_STL: Tensor | None
) -> Tensor:
    """Attention to gathered rows: ``[M, H, C]``."""
    queries, heads, width = q_MHX.shape
    sequences, keys, _ = rows_SLX.shape
    q_SYX = q_MHX.view(sequences, -1, width)
    scores = torch.baddbmm(q_SYX.new_empty(1, 1, 1), q_SYX, rows_SLX.transpose(1, 2), beta=0, alpha=scale)
    later = None
    if later_STL is not None:
        scores, later = scores.view(sequences, -1, heads, keys), later_STL[:, :, None]
    weights = softmax(scores, later).view(sequences, -1, keys)
    return torch.bmm(weights, rows_SLX[..., :latent]).view(queries, heads, latent)


def attend_reference(q_MHX: Tensor, cache: LatentCache, layer: int, table: Table, scale: float) -> Tensor:
    """Attention over blocks, the specification: ``[M, H, C]`` of each sequence's last T places.

    Nothing in it depends on the lengths but through tensors: a CUDA graph could hold it.
    """
    sequences, width = table.blocks_SB.shape
    keys = torch.arange(width * table.block - table.first, device=q_MHX.device)
    place_L = keys + table.first
    slots_SL = table.blocks_SB[:, place_L // table.block] * table.block + place_L % table.block
    # A row of its own where there is none: masked, but what it holds must be a number.
    slots_SL = torch.where(keys < table.lengths_S[:, None], slots_SL, slots_SL[:, :1])
    rows_SLX = cache.read(layer, slots_SL.flatten()).unflatten(0, (sequences, -1))
    new = q_MHX.shape[0] // sequences
    last_ST = table.lengths_S[:, None] - new + torch.arange(new, device=q_MHX.device)
    hidden_STL = keys > last_ST[..., None]
    later_STL = torch.zeros(hidden_STL.shape, device=q_MHX.device).masked_fill_(hidden_STL, float("-inf"))
    return attend_rows(q_MHX, rows_SLX, cache.latent, scale, later_STL)


def by_blocks(cache: LatentCache) -> bool:
    """Whether absorbed attention leaves rows where they lie: on GPUs."""
    return cache.rows.is_cuda


def attend(q_MHX: Tensor, cache: LatentCache, layer: int, table: Table, scale: float) -> Tensor:
    """:func:`attend_reference`, by the first implementation that takes this."""
    for name in choose(sizes_of(q_MHX, cache)).order:
        if name != "reference":
            module, rows = implementation(name), cache.rows[layer]
            if module.takes(q_MHX, rows, table, cache.latent):
                return module.attend(q_MHX, rows, table, cache.latent, scale)
    return attend_reference(q_MHX, cache, layer, table, scale)


# What the choice depends on: device, dtype of queries, heads, latent, rope, kind of cache, slots a block.
Sizes = tuple[torch.device, torch.dtype, int, int, int, str, int]
V3 = (torch.bfloat16, 128, 512, 64, "bfloat16", 64)  # DeepSeek-V3's, on any device


def sizes_of(q_MHX: Tensor, cache: LatentCache) -> Sizes:
    """Of a call."""
    return (q_MHX.device, q_MHX.dtype, q_MHX.shape[1], cache.latent, cache.rope, cache.kind, cache.block)


@functools.cache
def choose(sizes: Sizes) -> Choice:
    """The implementations for a model on a device; decided once, and then logged."""
    device, wanted = sizes[0], os.environ.get(VARIABLE, "auto")
    if wanted not in ("auto", *ORDER):
        names = ("auto", *ORDER)
        raise UserError(
            f"{VARIABLE} ({wanted}) is unknown{nearest(wanted, names)}; use one of {', '.join(names)}"
        )
    order: tuple[str, ...] = ORDER if wanted == "auto" else tuple(dict.fromkeys((wanted, *ORDER)))
    if wanted == "reference":
        order = ("reference",)
    refused = {name: why for name in order if (why := _refusal(name, sizes)) is not None}
    if wanted in refused and device.type == "cuda":
        raise UserError(f"{VARIABLE} ({wanted}) cannot be used: {refused[wanted]}; use auto")
    choice = Choice("decode", tuple(name for name in order if name not in refused), refused, "MLA")
    if device.type == "cuda":
        log.info("%s", choice)
    return choice


def implementation(name: str) -> Any:
    """FlashMLA's or our kernel."""
    return importlib.import_module("dsv3.ops.triton_mla") if name == "triton" else flashmla


def _refusal(name: str, sizes: Sizes) -> str | None:
    """Why an implementation is not used, or None."""
    device = sizes[0]
    if name == "reference":
        return None
    if device.type != "cuda":
        return "no CUDA device"
    why = flashmla.missing(device) if name == "flashmla" else library.missing("triton", device, AMPERE)
    if why is not None:
        return why
    try:
        error = error_of(implementation(name), sizes)
    except Exception as problem:  # whatever it is, another implementation can do the work
        return f"an example failed: {type(problem).__name__} {problem}".splitlines()[0]
    if error is None:
        return "does not take this model's sizes, dtype or cache"
    return None if error <= LARGEST_ERROR else f"an example was off by {error:.1e} of its norm"


def error_of(module: Any, sizes: Sizes) -> float | None:
    """Relative error on two sequences of two new tokens; the reference does the same on the CPU in FP32."""
    device, dtype, heads, latent, rope, kind, block = sizes
    draw = torch.Generator().manual_seed(0)
    lengths = [3 * block + 1, 2]
    cache = LatentCache(1, 5 * block, latent, rope, kind, torch.float32, block=block)
    rows = torch.randn(5 * block, latent + rope, generator=draw).to(dtype).float()
    slots = torch.arange(5 * block)
    cache.write(0, slots, rows[:, :latent], rows[:, latent:])
    q_MHX = torch.randn(2 * len(lengths), heads, latent + rope, generator=draw).to(dtype)
    places = np.arange(5 * block).reshape(5, block)[::-1]
    pieces = [places[:4].ravel(), places[4]]
    tables = [Table.of(pieces, lengths, block, 0, on) for on in (torch.device("cpu"), device)]
    scale = (latent + rope) ** -0.5
    there = cache.rows[0].to(device)
    if not module.takes(q_MHX.to(device), there, tables[1], latent):
        return None
    got = module.attend(q_MHX.to(device), there, tables[1], latent, scale).cpu().double()
    wanted = attend_reference(q_MHX.float(), cache, 0, tables[0], scale).double()
    return float((got - wanted).norm() / wanted.norm())
