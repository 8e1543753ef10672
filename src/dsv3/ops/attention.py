"""Causal attention over expanded heads, optionally within documents only (floor 1).

Shapes: B batch, H heads, T time, Q query/key width, V value width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def document_mask(documents_BT: Tensor) -> Tensor:
    """Boolean ``[B, 1, T, T]``: true where a query may see a key (same document, not later)."""
    length = documents_BT.shape[1]
    same = documents_BT[:, None, :, None] == documents_BT[:, None, None, :]
    earlier = torch.ones(length, length, dtype=torch.bool, device=documents_BT.device).tril()
    return same & earlier


def causal_attention_reference(
    q_BHTQ: Tensor, k_BHTQ: Tensor, v_BHTV: Tensor, scale: float, mask_B1TT: Tensor | None = None
) -> Tensor:
    """The specification: scores, softmax in FP32, weighted sum of values."""
    scores = (q_BHTQ @ k_BHTQ.transpose(-1, -2)).float() * scale
    if mask_B1TT is None:
        length = q_BHTQ.shape[2]
        mask_B1TT = torch.ones(length, length, dtype=torch.bool, device=q_BHTQ.device).tril()
    weights = scores.masked_fill(~mask_B1TT, float("-inf")).softmax(dim=-1)
    return weights.to(v_BHTV.dtype) @ v_BHTV


def causal_attention(
    q_BHTQ: Tensor, k_BHTQ: Tensor, v_BHTV: Tensor, scale: float, mask_B1TT: Tensor | None = None
) -> Tensor:
    """Causal attention ``[B, H, T, V]``; with a mask, attention where the mask is true.

    On a CPU the value is padded to the key's width: torch's flash kernel there wants them equal, and the
    unfused path costs 2.5 times the time and a T x T matrix a head.
    """
    width = v_BHTV.shape[-1]
    pad = q_BHTQ.shape[-1] - width if q_BHTQ.device.type == "cpu" else 0
    if pad < 0:  # values wider than keys: pad those instead, zeros add nothing to a score
        q_BHTQ, k_BHTQ = F.pad(q_BHTQ, (0, -pad)), F.pad(k_BHTQ, (0, -pad))
    elif pad > 0:
        v_BHTV = F.pad(v_BHTV, (0, pad))
    out = F.scaled_dot_product_attention(
        q_BHTQ, k_BHTQ, v_BHTV, attn_mask=mask_B1TT, is_causal=mask_B1TT is None, scale=scale
    )
    return out[..., :width]
