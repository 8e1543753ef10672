"""A slice of the model's list as one module: what a pipeline stage runs (report 3.2.1).

Shapes: B batch, T time, X time with the extra tokens, D hidden.

Parameters keep the names they have in the model. The slice with the end makes the losses; another one adds
the balance losses of its own layers to the gradient that passes through it, so that nothing but the stream
``[B, T, D]`` travels between stages. Tokens, documents and positions do not travel: every rank has the
micro-batches from its own loader.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from dsv3.data.loader import Batch
from dsv3.data.targets import labels, positions
from dsv3.model import DeepSeekV3
from dsv3.model.attention import Context
from dsv3.model.layer import DecoderLayer
from dsv3.model.linear import Embedding
from dsv3.model.loss import Losses, Share, states_loss
from dsv3.model.moe import MoE, RouterStats
from dsv3.model.mtp import MTPModule
from dsv3.ops.rope import inverse_frequencies, rotations
from dsv3.ops.weight_gradients import WeightGradients
from dsv3.parallel.pipeline.steps import Cuts, Steps, finish, layer_steps


@dataclass
class Work:
    """A step's micro-batches on this rank, and what its slices find of them (detached)."""

    batches: list[Batch]
    length: int
    share: Share
    mtp_weight: float
    main: list[Tensor] = field(default_factory=list)
    mtp: list[list[Tensor]] = field(default_factory=list)
    balance: list[Tensor] = field(default_factory=list)
    loads: dict[int, Tensor] = field(default_factory=dict)

    def count(self, layer: int, stats: RouterStats) -> None:
        """Add a micro-batch's load of a layer."""
        seen = self.loads.get(layer)
        self.loads[layer] = stats.load_E.clone() if seen is None else seen.add_(stats.load_E)

    def losses(self, depths: int, device: torch.device) -> Losses:
        """Sums over the micro-batches; zeros for what this rank has no part in."""
        zero = torch.zeros((), device=device)
        mtp = [sum((found[k] for found in self.mtp), zero) for k in range(depths if self.mtp_weight else 0)]
        router = {layer: RouterStats(load_E, None) for layer, load_E in self.loads.items()}
        return Losses(sum(self.main, zero), mtp, sum(self.balance, zero), router)


class _WithLoss(torch.autograd.Function):
    """``x`` as it is; in the backward ``loss`` gets gradient one when ``x`` gets its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor) -> Tensor:
        ctx.dtype = loss.dtype
        return x.clone()  # a stage's output must not be a view

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, torch.ones((), dtype=ctx.dtype, device=grad.device)


class Part(nn.Module):
    """Some pieces of ``model`` (numbered as in ``cut``): the same modules under the same names.

    ``embedding``: what MTP modules look tokens up in, a parameter of this part even if it lacks piece 0.
    """

    def __init__(self, model: DeepSeekV3, pieces: Collection[int], embedding: Embedding | None = None):
        super().__init__()
        config = self.config = model.config
        main = config.num_hidden_layers
        self.begins, self.ends = 0 in pieces, main + 1 in pieces
        self.model = nn.Module()
        if self.begins:
            self.model.embed_tokens = model.model.embed_tokens
        elif embedding is not None:
            self.model.embed_tokens = embedding
        self.layer_ids = [piece - 1 for piece in pieces if 1 <= piece <= main]
        self.mtp_ids = [main + k for k in range(len(model.mtp_modules))] if self.ends else []
        kept = {str(layer): model.model.layers[layer] for layer in (*self.layer_ids, *self.mtp_ids)}
        self.model.layers = nn.ModuleDict(kept)
        if self.ends:
            self.model.norm, self.lm_head = model.model.norm, model.lm_head

    def layer(self, number: int) -> DecoderLayer:
        """The layer with this id (MTP modules follow the main layers)."""
        return cast(DecoderLayer, cast(nn.ModuleDict, self.model.layers)[str(number)])

    def moe_layers(self) -> dict[int, MoE]:
        """Layers with experts by id, MTP modules included."""
        layers = {number: self.layer(number).mlp for number in (*self.layer_ids, *self.mtp_ids)}
        return {number: mlp for number, mlp in layers.items() if isinstance(mlp, MoE)}


class Slice(Part):
    """Consecutive pieces that run. ``borrowed``: an embedding that MTP modules look tokens up in and that is
    a parameter of another slice on this rank.
    """

    work: Work

    def __init__(
        self,
        model: DeepSeekV3,
        pieces: range,
        embedding: Embedding | None = None,
        borrowed: Embedding | None = None,
    ):
        super().__init__(model, pieces, embedding)
        self.gradients = WeightGradients()
        self.frequency_P, self.rope_factor = inverse_frequencies(model.config)
        self._lookup = (borrowed,)  # in a tuple: not a module of this slice

    @property
    def embedding(self) -> Embedding:
        """What tokens are looked up in."""
        return cast(Embedding, self._lookup[0] or self.model.embed_tokens)

    def context(self, batch: Batch, length: int) -> Context:
        """Rotations, and with documents positions that restart."""
        where = positions(batch, length)
        if where is None:
            where = torch.arange(length, device=batch.tokens_BT.device)
        turned = rotations(where, self.frequency_P, self.rope_factor)
        return Context(turned, None if batch.documents_BT is None else batch.documents_BT[:, :length])

    def forward(self, x_BTD: Tensor | None = None, *, micro: Tensor | int) -> Tensor:
        """The stream after this slice, ``[B, T, D]``; from the end the micro-batch's loss, a scalar.

        ``x_BTD`` comes from the slice before, None at the beginning; ``micro``: index into ``work.batches``.
        """
        return finish(self.steps(x_BTD, int(micro)))

    def steps(self, x_BTD: Tensor | None, micro: int, cuts: Cuts | None = None) -> Steps[Tensor]:
        """The same, which with ``cuts`` stops while rows travel."""
        work = self.work
        batch = work.batches[micro]
        context = self.context(batch, work.length)
        found: list[tuple[int, RouterStats | None]] = []
        x = x_BTD
        if self.begins:
            x = self.embedding(batch.tokens_BT[:, : work.length])
        assert x is not None
        for number in self.layer_ids:
            x, stats = yield from layer_steps(self.layer(number), x, context, cuts)
            found.append((number, stats))
        if self.ends:
            states = [cast(nn.Module, self.model.norm)(x)]
            for k, number in enumerate(self.mtp_ids if work.mtp_weight > 0 else (), start=1):
                if cuts is not None:  # the head reads this state, and so does the module
                    states[-1] = cuts.tensor(states[-1])
                module = cast(MTPModule, self.layer(number))
                embedded = self.embedding(batch.tokens_BT[:, k : k + work.length])
                joined = module.join(embedded, states[-1])
                out, stats = yield from layer_steps(module, joined, context, cuts)
                states.append(module.shared_head.norm(out))
                found.append((number, stats))
            x = self._loss(states, batch)
        return self._with_balance(x, found, len(batch.tokens_BT))

    def _loss(self, states: list[Tensor], batch: Batch) -> Tensor:
        """The micro-batch's loss without its balance loss."""
        work = self.work
        targets = [labels(batch, work.length, depth) for depth in range(len(states))]
        total, main, mtp = states_loss(states, targets, self.lm_head.weight, work.share, work.mtp_weight)
        work.main.append(main)
        work.mtp.append(mtp)
        return total

    def _with_balance(self, x: Tensor, found: list[tuple[int, RouterStats | None]], sequences: int) -> Tensor:
        """``x``, the stream or the loss, with the balance losses of the layers; loads are counted."""
        work = self.work
        balances = []
        for layer, stats in found:
            if stats is not None:
                work.count(layer, stats)
                if stats.balance_loss is not None:
                    balances.append(stats.balance_loss)
        if not balances:
            return x
        balance = torch.stack(balances).sum() * (sequences / work.share.sequences)
        work.balance.append(balance.detach())
        weighted = self.config.aux_loss_alpha * balance
        return x + weighted if self.ends else _WithLoss.apply(x, weighted)
