"""Decoder layers over pieces of sequences: compiled for few tokens, the model's own modules for many.

A piece short enough for absorbed attention (:func:`dsv3.serve.attention.absorbs`) is bound by the bytes of
the weights it reads: ``native/decode.cpp`` takes it through all layers in one call, where there is a compiler
and it knows every matrix. Longer pieces, other number formats, GPUs and experts that are elsewhere go through
the modules. Which way a piece goes follows from the piece alone, never from what else is in the batch; but on
a GPU a batch of such short pieces alone may be replayed as a graph of the same launches (``graphs.py``).

Shapes: N tokens of the batch, D hidden, S places of a sequence.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dsv3.model import DeepSeekV3
from dsv3.model.layer import DecoderLayer
from dsv3.model.linear import GroupedLinear, Linear, RMSNorm
from dsv3.model.moe import LocalDispatcher, MoE
from dsv3.ops import native
from dsv3.ops.native import decode
from dsv3.ops.packed import AnyWeight
from dsv3.quant.frozen import FrozenGroupedLinear, FrozenLinear
from dsv3.quant.packed import PackedGroupedLinear, PackedLinear, pack
from dsv3.serve.attention import Pages, Span, absorbs, arrange
from dsv3.serve.cache import LatentCache
from dsv3.serve.graphs import Graphs

Run = Callable[[Sequence[Span], Tensor], Tensor]
CACHE_KINDS = {"float32": 0, "bfloat16": 1, "fp8": 2}  # as decode.cpp numbers them


def keep_bf16(model: DeepSeekV3) -> None:
    """On a CPU with compiled products: multiply BF16 weights as they are, with activations in FP32.

    PyTorch's own BF16 products there take twice the time of FP32's at a batch of 1. The model's matrices are
    swapped for good, and have no gradient afterwards: a model in training, whose weights are FP32, is left as
    it is.
    """
    embedding = model.model.embed_tokens
    kinds = {embedding.compute_dtype or torch.bfloat16, embedding.weight.dtype}
    if kinds == {torch.bfloat16} and native.usable(embedding.weight, "decode"):
        pack(model)


class Layers:
    """Consecutive layers of a model over the cache's layers from ``first`` on, and the norm after them."""

    def __init__(
        self,
        model: DeepSeekV3,
        layers: Sequence[DecoderLayer],
        first: int,
        cache: LatentCache,
        norm: RMSNorm,
    ):
        self.model, self.layers, self.first, self.cache, self.norm = model, layers, first, cache, norm
        self.refresh()

    def refresh(self) -> None:
        """To be called when weights or dispatchers have changed: the other ways hold pointers to them."""
        self.compiled = _Compiled.of(self)
        self.graphs = Graphs.of(self.model, self.layers, self._through, self.cache)

    def run(self, spans: Sequence[Span], x_ND: Tensor) -> Tensor:
        """States after the norm, ``[N, D]``; rows lie span after span. The cache holds theirs afterwards."""
        if self.graphs is not None:
            replayed = self.graphs.run(spans, x_ND)
            if replayed is not None:
                return replayed
        attention = self.layers[0].self_attn
        few = [
            self.compiled is not None and absorbs(attention, s.stop - s.start, s.stop - s.first)
            for s in spans
        ]
        if self.compiled is not None and all(few):
            return self.compiled.run(spans, x_ND)
        pieces = list(x_ND.split([span.stop - span.start for span in spans]))
        if self.compiled is not None and any(few):
            self._put(pieces, [number for number, short in enumerate(few) if short], spans, self.compiled.run)
        self._put(pieces, [number for number, short in enumerate(few) if not short], spans, self._by_modules)
        return torch.cat(pieces)

    @staticmethod
    def _put(pieces: list[Tensor], chosen: list[int], spans: Sequence[Span], run: Any) -> None:
        """Replace the chosen pieces by what ``run`` makes of them together."""
        rows = run([spans[number] for number in chosen], torch.cat([pieces[number] for number in chosen]))
        for number, piece in zip(chosen, rows.split([len(pieces[number]) for number in chosen])):
            pieces[number] = piece

    def _by_modules(self, spans: Sequence[Span], x_ND: Tensor) -> Tensor:
        order, pages = arrange(self.model, self.cache, spans)
        pieces = x_ND.split([span.stop - span.start for span in spans])
        sorted_ = order == sorted(order)
        x_ND = self._through(x_ND if sorted_ else torch.cat([pieces[number] for number in order]), pages)
        if sorted_:
            return x_ND
        found = dict(zip(order, x_ND.split([len(pieces[number]) for number in order])))
        return torch.cat([found[number] for number in range(len(spans))])

    def _through(self, x_ND: Tensor, pages: Pages) -> Tensor:
        x = x_ND[None]
        for layer in self.layers:
            x, _ = layer(x, pages)
        return self.norm(x)[0]


class _Compiled:
    """What ``decode.cpp`` needs of the layers; ``kept`` are the tensors it points into."""

    layers: ctypes.Array[decode.Layer]

    def __init__(self, model: DeepSeekV3, cache: LatentCache, norm: RMSNorm):
        config = model.config
        self.model, self.norm = model, _gain(norm)
        self.turns = torch.empty(0)  # rotations of the places seen so far, [S, R]
        self.kept: list[Any] = [cache.rows]
        self.shape = decode.Shape(
            hidden=config.hidden_size, heads=config.num_attention_heads, nope=config.qk_nope_head_dim,
            rope=config.qk_rope_head_dim, value=config.v_head_dim, latent=config.kv_lora_rank,
            chosen=config.num_experts_per_tok, groups=config.n_group, kept=config.topk_group,
            normalise=config.norm_topk_prob, cache_kind=CACHE_KINDS[cache.kind],
            eps=config.rms_norm_eps, scale=config.softmax_scale,
            routing_factor=config.routed_scaling_factor,
        )  # fmt: skip

    @classmethod
    def of(cls, layers: Layers) -> _Compiled | None:
        """The compiled layers; None where there is no compiler or one of them holds what it does not know."""
        embedding = layers.model.model.embed_tokens
        dtype = embedding.compute_dtype or embedding.weight.dtype
        if dtype != torch.float32 or not decode.usable(layers.cache.rows):
            return None
        made = cls(layers.model, layers.cache, layers.norm)
        found = [
            made._layer(layer, layers.cache.rows[number])
            for number, layer in enumerate(layers.layers, start=layers.first)
        ]
        known = [layer for layer in found if layer is not None]
        made.layers = decode.chain(known)
        return made if len(known) == len(found) else None

    def _layer(self, layer: DecoderLayer, rows: Tensor) -> decode.Layer | None:
        attention, mlp = layer.self_attn, layer.mlp
        weights: dict[str, AnyWeight | None] = {
            "kv_a": _weight(attention.kv_a_proj_with_mqa),
            "kv_b": _weight(attention.kv_b_proj),
            "o": _weight(attention.o_proj),
        }
        norms: dict[str, RMSNorm] = {
            "input_norm": layer.input_layernorm,
            "kv_norm": attention.kv_a_layernorm,
            "post_norm": layer.post_attention_layernorm,
        }
        if hasattr(attention, "q_a_proj"):
            weights |= {"q_a": _weight(attention.q_a_proj), "q": _weight(attention.q_b_proj)}
            norms["q_norm"] = attention.q_a_layernorm
        else:
            weights["q"] = _weight(attention.q_proj)
        numbers = {"cache": rows}
        experts = 0
        routed = mlp.experts if isinstance(mlp, MoE) else mlp
        for name in ("gate", "up", "down"):
            weights[name] = _weight(getattr(routed, f"{name}_proj"))
        if isinstance(mlp, MoE):
            if type(mlp.dispatcher) is not LocalDispatcher:
                return None
            experts = mlp.gate.weight.shape[0]
            weights["router"] = mlp.gate.weight.detach()
            numbers["bias"] = mlp.gate.e_score_correction_bias
            if hasattr(mlp, "shared_experts"):
                for name in ("gate", "up", "down"):
                    weights[f"shared_{name}"] = _weight(getattr(mlp.shared_experts, f"{name}_proj"))
        numbers |= {name: _gain(norm) for name, norm in norms.items()}
        if not all(map(decode.packs, weights.values())):
            return None
        self.kept += [*weights.values(), *numbers.values()]
        return decode.Layer(
            **{name: decode.matrix(w) for name, w in weights.items() if w is not None},
            **{name: tensor.data_ptr() for name, tensor in numbers.items()},
            experts=experts,
        )

    def run(self, spans: Sequence[Span], x_ND: Tensor) -> Tensor:
        """See :meth:`Layers.run`."""
        positions = np.concatenate([np.arange(s.start - s.first, s.stop - s.first) for s in spans])
        slots = np.concatenate([s.slots[s.start : s.stop] for s in spans])
        keys = np.concatenate([s.slots[s.first : s.stop] for s in spans])
        lengths = np.array([s.stop - s.first for s in spans])
        begins = np.repeat(np.cumsum(lengths) - lengths, [s.stop - s.start for s in spans])
        counts = positions + 1
        rotation = self._rotations(positions)
        x_ND = x_ND.clone(memory_format=torch.contiguous_format)
        batch = decode.Batch(
            len(positions), rotation.data_ptr(), slots.ctypes.data, keys.ctypes.data, begins.ctypes.data,
            counts.ctypes.data,
        )  # fmt: skip
        decode.layers(self.layers, self.shape, batch, self.norm, x_ND)
        return x_ND

    def _rotations(self, positions: np.ndarray) -> Tensor:
        last = int(positions.max())
        if last >= len(self.turns):
            places = torch.arange(1 << (last + 64).bit_length())
            self.turns = self.model.context(places).rotation.flatten(1).contiguous()
        return self.turns[torch.from_numpy(positions)]


def _gain(norm: RMSNorm) -> Tensor:
    return norm.weight.detach().float().contiguous()


def _weight(module: Linear | GroupedLinear) -> AnyWeight | None:
    """A matrix as it is kept; None for one in a format that has no compiled product."""
    if isinstance(module, PackedLinear | PackedGroupedLinear | FrozenLinear | FrozenGroupedLinear):
        return module.packed
    return module.weight.detach() if type(module) in (Linear, GroupedLinear) else None
