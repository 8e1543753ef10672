"""What a batch says of its tokens: which are predicted where, and where documents begin.

Shapes: B batch, T time, X time with the extra tokens that follow (1 + MTP depth).
"""

from __future__ import annotations

import torch
from torch import Tensor

from dsv3.data.loader import Batch
from dsv3.ops.cross_entropy import IGNORE


def labels(batch: Batch, length: int, depth: int) -> Tensor:
    """Targets of depth k for each of the first ``length`` positions: the token k + 1 places on, ``[B, T]``.

    A target that bears no loss, or lies in another document than its position, is ``IGNORE``.
    """
    target = batch.tokens_BT[:, 1 + depth : 1 + depth + length]
    if batch.documents_BT is not None:
        documents = batch.documents_BT
        same = documents[:, 1 + depth : 1 + depth + length] == documents[:, :length]
        target = torch.where(same, target, IGNORE)
    if batch.bears_BT is not None:
        target = torch.where(batch.bears_BT[:, 1 + depth : 1 + depth + length], target, IGNORE)
    return target


def positions(batch: Batch, length: int) -> torch.Tensor | None:
    """Of the first ``length`` tokens, ``[B, T]``; None: 0 .. length - 1 in every row."""
    if batch.positions_BT is not None:
        return batch.positions_BT[:, :length]
    return None if batch.documents_BT is None else restarted_positions(batch.documents_BT[:, :length])


def restarted_positions(documents_BT: Tensor) -> Tensor:
    """Positions that begin at zero with each document, ``[B, T]``."""
    place = torch.arange(documents_BT.shape[1], device=documents_BT.device).expand_as(documents_BT)
    first = torch.ones_like(documents_BT, dtype=torch.bool)
    first[:, 1:] = documents_BT[:, 1:] != documents_BT[:, :-1]
    return place - torch.where(first, place, 0).cummax(dim=1)[0]
