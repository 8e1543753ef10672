"""Routing replay: the experts chosen while sampling are the experts trained.

Sampling and training round differently (kernels, batches, FP8), so near ties may fall to other experts, and a
token's log-probability jumps. Here the engine's choices are recorded, one more row of the cache a token: what
is shared, written again after a refused draft or computed anew after a preemption is so here too. Training
then computes gates from its own affinities, of the recorded experts.

Shapes: N rows of a batch, T tokens of an answer's row, L layers with experts (of the main model), K experts a
token, S answers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dsv3.model import DeepSeekV3
from dsv3.model.moe import Gate, LocalDispatcher, MoE, Routing
from dsv3.serve.attention import Pages
from dsv3.serve.engine import Engine
from dsv3.serve.sequence import Sequence


def routed_layers(model: DeepSeekV3) -> list[MoE]:
    """The main model's layers with experts; an MTP module's only drafts."""
    return [moe for layer, moe in model.moe_layers().items() if layer < model.config.num_hidden_layers]


class _ByModules(LocalDispatcher):
    """Keeps the engine's compiled layers away: they know the local dispatcher only, and tell no choices."""


class Recorder:
    """Keeps the experts of every token in an engine's cache; made after the engine, for its whole life."""

    def __init__(self, engine: Engine):
        layers = routed_layers(engine.model)
        rows, chosen = engine.cache.rows.shape[1], engine.model.config.num_experts_per_tok
        self.table = torch.zeros(
            len(layers), rows, chosen, dtype=torch.int16, device=engine.cache.rows.device
        )
        self.slots_N: Tensor | None = None  # of the batch the engine computes; None while training
        self.finished: dict[tuple[str, int], Tensor] = {}
        for layer in engine.model.main_layers:
            layer.register_forward_pre_hook(self._enter)
        for number, moe in enumerate(layers):
            moe.gate.register_forward_hook(partial(self._note, number))
            if type(moe.dispatcher) is LocalDispatcher:
                moe.dispatcher = _ByModules()
        engine.on_finish = self._finish
        engine.forget()

    def _enter(self, layer: torch.nn.Module, arguments: tuple[Any, ...]) -> None:
        context = arguments[1]
        self.slots_N = context.slots_N if isinstance(context, Pages) else None

    def _note(self, number: int, gate: Gate, arguments: tuple[Any, ...], routing: Routing) -> None:
        if self.slots_N is not None:
            self.table[number, self.slots_N] = routing.indices_NK.to(torch.int16)

    def _finish(self, sequence: Sequence) -> None:
        slots = torch.from_numpy(sequence.slots[: len(sequence.tokens) - 1]).to(self.table.device)
        self.finished[sequence.request_id, sequence.index] = self.table[:, slots].transpose(0, 1)

    def take(self, request_id: str, index: int) -> Tensor:
        """Of a finished answer, int16 ``[T, L, K]``: all tokens but the last, after which nothing follows."""
        return self.finished.pop((request_id, index))


@contextmanager
def replay(model: DeepSeekV3, routes_STLK: Tensor | None) -> Iterator[None]:
    """Within, the model's gates choose what was recorded, for a batch of exactly these rows; None: freely.

    The backward pass belongs inside: recomputed layers choose again.
    """
    if routes_STLK is None:
        yield
        return
    layers = routed_layers(model)
    try:
        for number, moe in enumerate(layers):
            chosen_NK = routes_STLK[:, :, number].flatten(0, 1).long()
            moe.gate.choose = partial(_recorded, chosen_NK)  # type: ignore[method-assign]
        yield
    finally:
        for moe in layers:
            moe.gate.__dict__.pop("choose", None)


def _recorded(chosen_NK: Tensor, scores_NE: Tensor) -> Tensor:
    return chosen_NK
