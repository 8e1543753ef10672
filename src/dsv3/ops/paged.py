"""Where the keys of sequences lie in a paged cache: what attention kernels that gather nothing are told.

Shapes: S sequences, B blocks of a sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Table:
    """``blocks_SB``: the block that holds the places ``[b block, (b + 1) block)`` of a sequence, int32.

    ``lengths_S``: keys of each sequence, int32, those of its new tokens among them. ``block``: slots a block.
    ``first``: the place of a sequence's first key. ``plans``: what a library works out from the lengths once,
    for all layers, by its name.
    """

    blocks_SB: Tensor
    lengths_S: Tensor
    block: int
    first: int = 0
    plans: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(
        cls, slots: Sequence[np.ndarray], lengths: Sequence[int], block: int, first: int, device: torch.device
    ) -> Table:
        """``slots``: the cache row of each place of each sequence, in whole blocks."""
        taken = [each[: first + length : block] // block for each, length in zip(slots, lengths)]
        blocks = np.zeros((len(taken), max(map(len, taken))), dtype=np.int32)
        for row, found in zip(blocks, taken):
            row[: len(found)] = found
        lengths_S = torch.tensor(lengths, dtype=torch.int32)
        return cls(torch.from_numpy(blocks).to(device), lengths_S.to(device), block, first)
