"""Weight gradients that may wait: the half of a backward that no other pipeline stage waits for (floor 1).

A backward pass makes the gradients of inputs, which the stage before waits for, and those of weights, which
nobody needs before the optimizer. A pipeline schedule fills its bubbles with the second half (report 3.2.1:
"backward for weights", W).
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor


class WeightGradients:
    """Computes weight gradients at once, or keeps them for later while ``waiting`` is set."""

    def __init__(self) -> None:
        self.waiting = False
        self._kept: list[tuple[tuple[Tensor, ...], Callable[[], tuple[Tensor, ...]]]] = []

    def of(
        self, weights: tuple[Tensor, ...], compute: Callable[[], tuple[Tensor, ...]]
    ) -> tuple[Tensor | None, ...]:
        """What a backward returns for ``weights`` (leaves): their gradients, or None for those that wait."""
        if not self.waiting:
            return compute()
        self._kept.append((weights, compute))
        return (None,) * len(weights)

    def take(self) -> Callable[[], None]:
        """What was kept since the last call, as a function that adds it to ``.grad`` of the weights."""
        kept, self._kept = self._kept, []

        def run() -> None:
            for weights, compute in kept:
                for weight, grad in zip(weights, compute()):
                    weight.grad = grad if weight.grad is None else weight.grad.add_(grad)
            kept.clear()  # the activations they were made of

        return run
