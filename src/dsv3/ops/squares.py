"""The sum of many squares, as gradient clipping needs it: right to eight digits (floor 1)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

CHUNK = 256


def sums_of_squares(tensors: Sequence[Tensor]) -> Tensor:
    """The sum of each tensor's squares, FP64, one number a tensor.

    On a CPU torch's norm adds a whole tensor up in one FP32 number a vector lane: of 1.5M numbers it is 7e-5
    off, of 6M 3e-4, otherwise for otherwise cut tensors. So chunks of it are summed, and their sums in FP64.
    """
    if tensors[0].device.type != "cpu":
        return torch.stack(torch._foreach_norm(list(tensors))).double().square()
    return torch.stack([_sum(tensor) for tensor in tensors])


def _sum(tensor: Tensor) -> Tensor:
    flat = tensor.reshape(-1)
    whole = flat.numel() // CHUNK * CHUNK
    chunks = torch.linalg.vector_norm(flat[:whole].view(-1, CHUNK), dim=1)
    rest = torch.linalg.vector_norm(flat[whole:]).double()
    return chunks.double().square().sum() + rest.square()
