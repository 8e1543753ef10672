"""FP8 products by torch's own block-wise ``scaled_mm`` (cuBLAS, compute capability 9 only; floor 1).

Shapes: M rows (tokens), N outputs, K inputs. It knows all three products of report 3.3 but none over experts.
The layouts it wants are checked by its meta function too, so a machine without a GPU can test them:
scales of 1x128 tiles with rows contiguous and no gap between columns; of 128x128 blocks with the blocks of
the summed dimension contiguous, their number rounded up to four. cuBLAS takes rows in fours.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dsv3.ops import library
from dsv3.ops.blocks import BLOCK, COLUMN, ROW, Quantised
from dsv3.ops.formats import E4M3


def missing(device: torch.device) -> str | None:
    """Why it cannot be used on this GPU, or None."""
    if not hasattr(F, "scaled_mm"):
        return f"torch {torch.__version__} has no scaled_mm"
    return library.unsuited(device, library.HOPPER, library.HOPPER)


def takes_linear(x: Quantised, w: Quantised, counts_E: Tensor | None, dtype: torch.dtype) -> bool:
    """Whether :func:`linear` can do this: whole tiles of N and K."""
    tiles = x.tile == ROW and w.tile == BLOCK and x.kind == w.kind == E4M3
    return tiles and counts_E is None and w.shape[-2] % 128 == 0 and w.shape[-1] % 128 == 0


def takes_wgrad(g: Quantised, x: Quantised, counts_E: Tensor | None) -> bool:
    """Whether :func:`wgrad` can do this: whole tiles of rows, N and K."""
    tiles = g.tile == x.tile == COLUMN and g.kind == x.kind == E4M3
    return tiles and counts_E is None and all(size % 128 == 0 for size in (*g.shape, *x.shape))


def linear(x: Quantised, w: Quantised, counts_E: Tensor | None, dtype: torch.dtype) -> Tensor:
    """As :func:`dsv3.ops.fp8.linear`, without experts."""
    recipe = F.ScalingType
    rows = x.shape[0]
    x_values, x_scales, w_scales = x.values, x.scales.T, w.scales
    if rows % 4:
        extra = -rows % 4
        x_values = F.pad(x_values.view(torch.uint8), (0, 0, 0, extra)).view(x_values.dtype)
        x_scales = F.pad(x_scales, (0, extra))
    if w_scales.shape[-1] % 4:
        w_scales = F.pad(w_scales, (0, -w_scales.shape[-1] % 4))
    return F.scaled_mm(
        x_values.contiguous(), w.values.contiguous().T,
        x_scales.contiguous().T, recipe.BlockWise1x128, w_scales.contiguous().T, recipe.BlockWise128x128,
        output_dtype=dtype,
    )[:rows]  # fmt: skip


def wgrad(g: Quantised, x: Quantised, counts_E: Tensor | None) -> Tensor:
    """As :func:`dsv3.ops.fp8.wgrad`, without experts."""
    recipe = F.ScalingType
    return F.scaled_mm(
        g.values.T.contiguous(), x.values.T.contiguous().T,
        g.scales.contiguous().T, recipe.BlockWise1x128, x.scales.contiguous().T, recipe.BlockWise1x128,
        output_dtype=torch.float32,
    )  # fmt: skip
