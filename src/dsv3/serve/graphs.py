"""Decoding steps as CUDA graphs: the launches of all layers, recorded once, replayed as one.

A graph is recorded for a number of sequences, a power of two, with equally many new tokens each. It reads
the batch from memory of its own: states, rotations, slots, tables of blocks, lengths. Sequences that a batch
has too few of are filled up by ones of no tokens but zeros, whose rows lie in a block of the cache that no
sequence ever gets. All else that the launches need to know follows from the shapes. A graph's first answer is
compared with that of the same launches unrecorded; if they differ, or recording fails, no more is replayed.

Prompts, batches of several shapes, and layers whose launches depend on what the CPU must know (experts that
are elsewhere, other number formats) are computed as ever.

Shapes: S sequences, T new tokens of each, N = S T, D hidden, B blocks a sequence can have.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dsv3.model import DeepSeekV3
from dsv3.model.layer import DecoderLayer
from dsv3.model.linear import GroupedLinear, Linear
from dsv3.model.moe import LocalDispatcher, MoE
from dsv3.ops.paged import Table
from dsv3.serve import absorbed
from dsv3.serve.attention import Group, Pages, Span, absorbs, table_of
from dsv3.serve.cache import LatentCache

MOST_NEW = 8  # tokens of a sequence: the last one and its drafts; longer pieces are parts of prompts
KEPT = 16  # graphs; the least recently used goes
LARGEST_DIFFERENCE = 1e-2  # of a graph's first answer, of its norm

Through = Callable[[Tensor, Pages], Tensor]  # the layers and the norm after them: [N, D] to [N, D]
Record = Callable[[Callable[[], None]], Callable[[], object]]  # runs it, records it; gives what replays it

log = logging.getLogger("dsv3")


def replays(device: torch.device) -> bool:
    """Whether there are graphs on this device, and so a spare block in the cache."""
    return device.type == "cuda"


def refusal(model: DeepSeekV3, layers: Sequence[DecoderLayer], cache: LatentCache) -> str | None:
    """Why the launches of these layers cannot be recorded, or None."""
    embedding, device = model.model.embed_tokens, cache.rows.device
    dtype = embedding.compute_dtype or embedding.weight.dtype
    routed = [layer.mlp for layer in layers if isinstance(layer.mlp, MoE)]
    if any(type(mlp.dispatcher) is not LocalDispatcher for mlp in routed):
        return "experts are placed or recorded from outside"
    modules = [module for layer in layers for module in layer.modules()]
    if any(isinstance(m, Linear | GroupedLinear) and type(m) not in (Linear, GroupedLinear) for m in modules):
        return "matrices in other number formats"
    if routed and (dtype != torch.bfloat16 or torch.cuda.get_device_capability(device)[0] < 9):
        return "products of experts ask the GPU for sizes, but in BF16 on compute capability 9 or newer"
    heads = model.config.num_attention_heads
    sizes = (device, dtype, heads, cache.latent, cache.rope, cache.kind, cache.block)
    if absorbed.choose(sizes).order[0] == "reference":
        return "no kernel for attention over blocks"
    return None


@dataclass
class Graph:
    """A recorded step and the memory it works in."""

    x_ND: Tensor
    rotation: Tensor
    slots_N: Tensor
    table: Table
    out_ND: Tensor
    step: Callable[[], None]
    replay: Callable[[], object] | None = None
    proven: bool = False


class Graphs:
    """The graphs of some consecutive layers. ``record``: how; in tests without a GPU."""

    def __init__(self, model: DeepSeekV3, through: Through, cache: LatentCache, record: Record | None = None):
        self.model, self.through, self.cache = model, through, cache
        self.record = record or CudaRecorder(cache.rows.device)
        self.graphs: dict[tuple[int, int, int], Graph] = {}
        self.broken = False
        assert cache.scratch is not None and cache.block > MOST_NEW

    @classmethod
    def of(
        cls, model: DeepSeekV3, layers: Sequence[DecoderLayer], through: Through, cache: LatentCache
    ) -> Graphs | None:
        """None, and a line in the log, where there can be none."""
        if cache.scratch is None:
            return None
        why = refusal(model, layers, cache)
        log.info("CUDA graphs: %s", "used for decoding" if why is None else f"not used: {why}")
        return cls(model, through, cache) if why is None else None

    def run(self, spans: Sequence[Span], x_ND: Tensor) -> Tensor | None:
        """``[N, D]``, rows of the cache written; None for what is not replayed."""
        shapes = {(span.stop - span.start, span.first) for span in spans}
        if self.broken or len(shapes) > 1:
            return None
        ((new, first),) = shapes
        attention = self.model.main_layers[0].self_attn
        if new > MOST_NEW or not all(absorbs(attention, new, span.stop - first) for span in spans):
            return None
        key = (1 << (len(spans) - 1).bit_length(), new, first)
        graph = self.graphs.pop(key, None) or self._graph(*key, x_ND)
        self.graphs[key] = graph  # the most recently used is the last
        if len(self.graphs) > KEPT:
            del self.graphs[next(iter(self.graphs))]
        self._fill(graph, spans, x_ND)
        if not self._replayed(graph, len(x_ND)):
            self.broken = True
            self.graphs.clear()
        return graph.out_ND[: len(x_ND)].clone()

    def _graph(self, sequences: int, new: int, first: int, like: Tensor) -> Graph:
        """Not yet recorded; the batch in it is all filling."""
        cache, device = self.cache, self.cache.rows.device
        rows, blocks = sequences * new, cache.rows.shape[1] // cache.block
        x_ND = torch.zeros(rows, like.shape[1], dtype=like.dtype, device=device)
        out_ND = torch.empty_like(x_ND)
        slots_N = torch.zeros(rows, dtype=torch.int64, device=device)
        blocks_SB = torch.zeros(sequences, blocks, dtype=torch.int32, device=device)
        lengths_S = torch.zeros(sequences, dtype=torch.int32, device=device)
        rotation = self._rotation(np.zeros(rows, dtype=np.int64))

        def step() -> None:
            # A table of its own each time: what a library plans for it is recorded too.
            keys = Table(blocks_SB, lengths_S, cache.block, first)
            group = Group(0, rows, sequences, True, keys, None)
            pages = Pages(rotation, cache=cache, slots_N=slots_N, groups=(group,))
            out_ND.copy_(self.through(x_ND, pages))

        table = Table(blocks_SB, lengths_S, cache.block, first)
        return Graph(x_ND, rotation, slots_N, table, out_ND, step)

    def _fill(self, graph: Graph, spans: Sequence[Span], x_ND: Tensor) -> None:
        """Put a batch where the graph reads it; what is left of the graph's room works on the spare block."""
        assert self.cache.scratch is not None
        table, live = graph.table, len(spans)
        new, left = len(x_ND) // live, len(table.lengths_S) - live
        spare = self.cache.scratch * self.cache.block + table.first + np.arange(new)
        slots = [span.slots[span.start : span.stop] for span in spans] + [spare] * left
        positions = [np.arange(span.start, span.stop) - span.first for span in spans] + [
            np.arange(new)
        ] * left
        graph.slots_N.copy_(torch.from_numpy(np.concatenate(slots)))
        graph.rotation.copy_(self._rotation(np.concatenate(positions)))
        own = table_of(spans, self.cache)
        table.blocks_SB[:live, : own.blocks_SB.shape[1]] = own.blocks_SB
        table.blocks_SB[live:, 0] = self.cache.scratch
        table.lengths_S[:live] = own.lengths_S
        table.lengths_S[live:] = new
        graph.x_ND[: len(x_ND)] = x_ND
        graph.x_ND[len(x_ND) :] = 0

    def _replayed(self, graph: Graph, live: int) -> bool:
        """Compute the batch, by the graph if it can be trusted, which is what this says."""
        if graph.replay is None:
            try:
                graph.replay = self.record(graph.step)
            except RuntimeError as problem:  # a launch that cannot be recorded, or no memory for it
                log.warning("CUDA graphs: recording failed: %s", str(problem).splitlines()[0])
                graph.step()
                return False
        if not graph.proven:
            graph.out_ND.fill_(float("nan"))  # memory may hold the right answer from before
        graph.replay()
        if graph.proven:
            return True
        found = graph.out_ND[:live].double()
        graph.step()  # writes the same rows of the cache again
        wanted = graph.out_ND[:live].double()
        if not wanted.isfinite().all():
            return True  # nothing to compare with: such a sequence ends in an error
        difference = float((found - wanted).norm() / wanted.norm())
        graph.proven = difference <= LARGEST_DIFFERENCE
        if not graph.proven:
            log.warning("CUDA graphs: given up, an answer was off by %.1e of its norm", difference)
        return graph.proven

    def _rotation(self, positions: np.ndarray) -> Tensor:
        return self.model.context(torch.from_numpy(positions)[None].to(self.cache.rows.device)).rotation


class CudaRecorder:
    """Records with CUDA; the graphs share their memory, for only one is replayed at a time."""

    def __init__(self, device: torch.device):
        self.device = device
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, step: Callable[[], None]) -> Callable[[], object]:
        """Run it once, so that everything is compiled and chosen, and record it."""
        with torch.cuda.device(self.device):
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                step()
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            # What other threads do with the GPU meanwhile is no error of this one's.
            with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
                step()
        return graph.replay
