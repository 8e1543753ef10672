"""What the number formats share: putting a module in another's place, and buffers that no cast may touch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn


def swap(model: nn.Module, path: str, module: nn.Module) -> None:
    """Put ``module`` in the place ``path`` of a model."""
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)


class FixedDtypes(nn.Module):
    """A module whose buffers move between devices and keep their dtypes.

    ``model.bfloat16()`` must not cast numbers or scales: one without the other is not the weight.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        kept = {name: tensor for name, tensor in self._buffers.items() if tensor is not None}
        super()._apply(fn, recurse)
        for name, was in kept.items():
            now = self.get_buffer(name)
            if now.dtype != was.dtype:
                setattr(self, name, was.to(now.device))
        return self
