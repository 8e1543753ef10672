"""A pass through layers in pieces, cut where tokens travel, so that two micro-batches can take turns.

Shapes: B batch, T time, D hidden.

While one micro-batch's tokens are on their way to their experts or back, the other one computes (report
3.2.1). Forward passes are generators that stop whenever rows have been sent off; so are backward passes,
because autograd's graph is cut at the same places: each piece works on detached copies of what the piece
before made, and hands their gradients back. One thread runs both, in an order that is the same on every rank,
as collectives need it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor

from dsv3.model.attention import Context
from dsv3.model.layer import DecoderLayer, Step
from dsv3.model.moe import RouterStats

Result = TypeVar("Result")
Steps = Generator[None, None, Result]  # stops where there is something to wait for


class Cuts:
    """Where one forward pass was cut: for each cut the tensors before it and the leaves after it."""

    def __init__(self) -> None:
        self._pairs: list[list[tuple[Tensor, Tensor]]] = []

    def step(self, step: Step) -> Step:
        """The same step on leaves; what already is one (made before an earlier cut) stays."""
        pairs: list[tuple[Tensor, Tensor]] = []

        def leaf(x: Tensor | None) -> Tensor | None:
            if x is None or x.grad_fn is None:
                return x
            pairs.append((x, x.detach().requires_grad_()))
            return pairs[-1][1]

        cut = {name: leaf(getattr(step, name)) for name in ("residual_BTD", "u_BTD", "rows", "shared_BTD")}
        assert step.routing is not None and step.stats is not None
        gates = leaf(step.routing.gates_NK)
        stats = replace(step.stats, balance_loss=leaf(step.stats.balance_loss))
        self._pairs.append(pairs)
        return replace(step, routing=replace(step.routing, gates_NK=gates), stats=stats, **cut)  # type: ignore[arg-type]

    def tensor(self, x: Tensor) -> Tensor:
        """The same tensor on a leaf: for one that is used before and after later cuts."""
        leaf = x.detach().requires_grad_()
        self._pairs.append([(x, leaf)])
        return leaf

    def backward(self, roots: tuple[Tensor, ...], grads: tuple[Tensor | None, ...]) -> Steps[None]:
        """The backward pass from the outputs, a piece at a time."""
        torch.autograd.backward(roots, grads)
        while self._pairs:
            yield
            reached = [(made, leaf.grad) for made, leaf in self._pairs.pop() if leaf.grad is not None]
            torch.autograd.backward([made for made, _ in reached], [grad for _, grad in reached])


def layer_steps(
    layer: DecoderLayer, x_BTD: Tensor, context: Context, cuts: Cuts | None
) -> Steps[tuple[Tensor, RouterStats | None]]:
    """``layer(x, context)``, which with ``cuts`` stops while rows travel.

    A layer whose ``forward`` was replaced from outside (one that is made again in the backward) runs whole.
    """
    if cuts is None or "forward" in vars(layer):
        return layer(x_BTD, context)
    step = layer.dispatch(layer.attend_and_route(x_BTD, context))
    if step.rows is None:
        return layer.aggregate(step), step.stats
    step = cuts.step(step)
    yield
    step = cuts.step(layer.combine(layer.experts(step)))
    yield
    return layer.aggregate(step), step.stats


def finish(steps: Steps[Result]) -> Result:
    """Run to the end without stopping."""
    while True:
        try:
            next(steps)
        except StopIteration as stop:
            return stop.value


def take_turns(*passes: Steps[None]) -> None:
    """Run passes to their ends, each until it waits for something, then the next."""
    running = deque(passes)
    while running:
        steps = running.popleft()
        try:
            next(steps)
        except StopIteration:
            continue
        running.append(steps)
