"""Replayed decoding steps: the same states, no row written that should not be, nothing the CPU must know.

CUDA is stood in for by a tape with a graph's memory: what was recorded is done again on the same tensors, and
what was a number of Python's then is so for ever. That no launch asks the GPU for anything is shown on
meta tensors, which take the ways of a GPU's and have no numbers to tell.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dsv3.model import DeepSeekV3
from dsv3.ops.blocks import dequantise_reference, quantise_reference
from dsv3.ops.grouped import grouped_linear_reference
from dsv3.serve import absorbed, graphs
from dsv3.serve import attention as attention_module
from dsv3.serve import cache as cache_module
from dsv3.serve.attention import Span, install
from dsv3.serve.cache import LatentCache
from dsv3.serve.engine import Engine
from dsv3.serve.graphs import Graphs
from dsv3.serve.layers import Layers
from dsv3.serve.options import Options
from tests.model.build import tiny_config, tiny_model
from tests.serve.conftest import close
from tests.serve.test_absorbed import answers

BLOCK = 16


class Tape(TorchDispatchMode):
    """Every operator with its tensors, while recording; again into the same memory, when replayed."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[tuple[Any, tuple[Any, ...], dict[str, Any], list[Tensor]]] = []
        self.plays = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        made = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        self.steps.append((func, args, kwargs or {}, made))
        return out

    def play(self) -> None:
        self.plays += 1
        for func, args, kwargs, made in self.steps:
            fresh = [leaf for leaf in tree_leaves(func(*args, **kwargs)) if isinstance(leaf, Tensor)]
            for old, new in zip(made, fresh, strict=True):
                if old.data_ptr() != new.data_ptr():  # else a view, or written in place
                    old.copy_(new)


def record(tapes: list[Tape], step: Callable[[], None]) -> Callable[[], None]:
    """As CUDA does: a run to warm up, and one that is recorded."""
    step()
    tapes.append(Tape())
    with tapes[-1]:
        step()
    return tapes[-1].play


def static_swiglu(x_MD: Tensor, gate: Tensor, up: Tensor, down: Tensor, counts_E: Tensor) -> Tensor:
    """Experts' products as on a GPU: rows an expert stay there."""
    expert_M = torch.searchsorted(counts_E.cumsum(0), torch.arange(len(x_MD)), right=True)
    hidden = torch.nn.functional.silu(torch.bmm(gate[expert_M], x_MD[..., None])[..., 0])
    hidden = hidden * torch.bmm(up[expert_M], x_MD[..., None])[..., 0]
    return torch.bmm(down[expert_M], hidden[..., None])[..., 0]


def tapes_of(patch: pytest.MonkeyPatch) -> list[Tape]:
    """As on a GPU, with tapes for graphs."""
    found: list[Tape] = []
    patch.setattr("dsv3.serve.layers._Compiled.of", lambda layers: None)
    patch.setattr("dsv3.model.linear.grouped_swiglu", static_swiglu)
    by_operators(patch)
    patch.setattr(attention_module, "by_blocks", lambda cache: True)
    patch.setattr(graphs, "refusal", lambda model, layers, cache: None)
    patch.setattr(graphs, "CudaRecorder", lambda device: partial(record, found))
    patch.setattr("dsv3.serve.engine.replays", lambda device: True)
    return found


@pytest.fixture
def tapes(monkeypatch: pytest.MonkeyPatch) -> list[Tape]:
    return tapes_of(monkeypatch)


def by_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    """FP8 rows by PyTorch's operators, which a tape and fake tensors see; compiled C++ they do not."""
    monkeypatch.setattr(cache_module, "quantise", quantise_reference)
    monkeypatch.setattr(cache_module, "dequantise", dequantise_reference)


def test_static_experts_are_the_experts() -> None:
    x, counts = torch.randn(9, 8), torch.tensor([4, 0, 5])
    weights = torch.randn(2, 3, 6, 8), torch.randn(3, 8, 6)
    (gate, up), down = weights
    hidden = torch.nn.functional.silu(grouped_linear_reference(x, gate, counts))
    hidden = hidden * grouped_linear_reference(x, up, counts)
    wanted = grouped_linear_reference(hidden, down, counts)
    torch.testing.assert_close(static_swiglu(x, gate, up, down, counts), wanted)


@pytest.fixture(scope="module")
def small() -> DeepSeekV3:
    model = tiny_model()
    install(model)
    return model


def both(model: DeepSeekV3, kind: str) -> tuple[Layers, Layers]:
    """The layers over two caches of the same contents: with graphs, and without. Most rows are NaN."""
    config, made = model.config, []
    for spare in (True, False):
        cache = LatentCache(
            config.num_hidden_layers, 20 * BLOCK, config.kv_lora_rank, config.qk_rope_head_dim, kind,
            torch.float32, block=BLOCK, spare=spare,
        )  # fmt: skip
        cache.rows[:, : 20 * BLOCK].view(torch.uint8).fill_(0xFF)
        made.append(Layers(model, model.main_layers, 0, cache, model.model.norm))
    with_graphs, plain = made
    assert with_graphs.graphs is not None and plain.graphs is None
    return with_graphs, plain


@settings(max_examples=12)
@given(st.data())
@torch.inference_mode()
def test_states_and_rows_are_those_without(small: DeepSeekV3, data: st.DataObject) -> None:
    with pytest.MonkeyPatch.context() as patch:
        tapes = tapes_of(patch)
        kind, first = data.draw(st.sampled_from(["float32", "fp8"])), data.draw(st.integers(0, 1))
        layers = both(small, kind)
        generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
        counts = data.draw(st.lists(st.integers(3, 40), min_size=1, max_size=5), "lengths")
        blocks = torch.randperm(20, generator=generator).numpy()
        slots = [(blocks[4 * n : 4 * n + 4, None] * BLOCK + np.arange(BLOCK)).ravel() for n in range(5)]
        begin = [Span(slots[n], first, first + count, first) for n, count in enumerate(counts)]
        x_ND = torch.randn(sum(counts), small.config.hidden_size, generator=generator)
        for each in layers:
            each.run(begin, x_ND)  # prompts: not replayed
        assert not tapes
        places = [span.stop for span in begin]
        for new in data.draw(st.lists(st.integers(1, 3), min_size=1, max_size=4), "steps"):
            going = sorted(data.draw(st.sets(st.integers(0, len(counts) - 1), min_size=1), "going"))
            spans = [Span(slots[n], places[n], places[n] + new, first) for n in going]
            x_ND = torch.randn(new * len(going), small.config.hidden_size, generator=generator)
            found, wanted = (each.run(spans, x_ND) for each in layers)
            close(found, wanted)
            for n in going:
                places[n] += new
        assert tapes and not layers[0].graphs.broken  # type: ignore[union-attr]
        ours = layers[0].cache.rows[:, : 20 * BLOCK]
        written = torch.from_numpy(np.concatenate([slots[n][first:place] for n, place in enumerate(places)]))
        idle = torch.ones(20 * BLOCK, dtype=torch.bool).index_fill_(0, written, False)
        assert (ours[:, idle].contiguous().view(torch.uint8) == 0xFF).all(), "nobody's rows are not touched"
        for layer in range(len(ours)):
            close(*(each.cache.read(layer, written) for each in layers))


@pytest.mark.parametrize("drafts", [0, 2])
def test_an_engines_answers(drafts: int, tapes: list[Tape], monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(num_nextn_predict_layers=1)
    options = Options(draft_tokens=drafts, cache_tokens=512, max_length=90, max_batch=3)
    engine = Engine(model, options=options)
    found = answers(engine)
    replayed = len(tapes)
    assert sum(tape.plays for tape in tapes) > 5 * replayed, "most steps are replayed"
    assert engine.cache.scratch == engine.cache.rows.shape[1] // BLOCK - 1 == len(engine.blocks.blocks)
    engine.forget()
    assert engine.runner.layers.graphs is not None and not engine.runner.layers.graphs.graphs
    monkeypatch.setattr("dsv3.serve.engine.replays", lambda device: False)
    assert answers(Engine(model, options=options)) == found
    assert len(tapes) == replayed


@pytest.fixture
def held(small: DeepSeekV3, tapes: list[Tape]) -> Graphs:
    """The graphs over an empty cache."""
    layers, _ = both(small, "float32")
    layers.cache.rows.zero_()
    assert layers.graphs is not None
    return layers.graphs


def decoding(lengths: list[int], new: int = 1) -> list[Span]:
    """Sequences one after the other, two blocks each."""
    return [
        Span(np.arange(2 * n * BLOCK, 2 * (n + 1) * BLOCK), length - new, length)
        for n, length in enumerate(lengths)
    ]


@torch.inference_mode()
def test_what_is_replayed(held: Graphs, tapes: list[Tape]) -> None:
    def run(spans: list[Span]) -> bool:
        rows = sum(span.stop - span.start for span in spans)
        return held.run(spans, torch.randn(rows, held.model.config.hidden_size)) is not None

    assert run(decoding([5, 9, 20])) and list(held.graphs) == [(4, 1, 0)]
    assert run(decoding([7, 30, 31, 8])) and len(tapes) == 1, "three and four share one"
    (four,), spare = held.graphs.values(), held.cache.scratch
    assert run(decoding([5, 9, 20])) and spare == 20
    assert four.table.lengths_S.tolist() == [5, 9, 20, 1] and four.table.blocks_SB[3, 0] == spare
    assert four.slots_N.tolist() == [4, 2 * BLOCK + 8, 5 * BLOCK + 3, spare * BLOCK]
    assert not four.x_ND[3].any() and four.out_ND.isfinite().all()
    assert run(decoding([7])) and run(decoding([7], new=2)) and len(tapes) == 3
    assert not run(decoding([5, 9])[:1] + decoding([5, 9], new=2)[1:]), "several shapes"
    assert not run(decoding([20], new=20)) and not run(decoding([30], new=9)), "prompts"
    assert len(tapes) == 3


@torch.inference_mode()
def test_an_answer_stays_what_it_is(small: DeepSeekV3, held: Graphs) -> None:
    """The memory a graph answers in is its own, and used again."""
    first = held.run(decoding([5]), torch.randn(1, small.config.hidden_size))
    assert first is not None
    kept = first.clone()
    held.run(decoding([9]), torch.randn(1, small.config.hidden_size))
    assert torch.equal(first, kept)


@torch.inference_mode()
def test_the_least_recently_used_graph_goes(
    small: DeepSeekV3, held: Graphs, tapes: list[Tape], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graphs, "KEPT", 2)
    for size in (1, 2, 1, 4, 1, 2):
        held.run(decoding([9] * size), torch.randn(size, small.config.hidden_size))
    assert list(held.graphs) == [(1, 1, 0), (2, 1, 0)] and len(tapes) == 4


@pytest.mark.parametrize("how", ["cannot be recorded", "replays nothing"])
@torch.inference_mode()
def test_graphs_that_fail_are_given_up(
    how: str, small: DeepSeekV3, tapes: list[Tape], caplog: pytest.LogCaptureFixture
) -> None:
    layers, plain = both(small, "float32")
    held = layers.graphs
    assert held is not None

    def broken(step: Callable[[], None]) -> Callable[[], None]:
        if how == "cannot be recorded":
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        step()  # the right answer stands where nothing will be written
        return lambda: None

    held.record = broken
    plain.cache.rows.normal_()
    layers.cache.rows[:, : 20 * BLOCK] = plain.cache.rows
    x_ND = torch.randn(2, small.config.hidden_size)
    for _ in range(2):
        close(layers.run(decoding([5, 9]), x_ND), plain.run(decoding([5, 9]), x_ND))
    assert held.broken and not held.graphs
    assert ("recording failed: operation not" in caplog.text) == (how == "cannot be recorded")
    assert ("given up, an answer was off" in caplog.text) == (how == "replays nothing")


class Launches(TorchDispatchMode):
    """Refuses a tensor of the CPU's; that a meta tensor tells no number is torch's own doing."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, Tensor):
                assert leaf.is_meta, f"{func} of a tensor on the CPU"
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            assert not isinstance(leaf, Tensor) or leaf.is_meta, f"{func} to the CPU"
        return out


@pytest.mark.parametrize("kind", ["bfloat16", "fp8"])
def test_nothing_is_asked_of_the_gpu(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All launches of a step with experts, in BF16; attention and FP8 rows by plain PyTorch."""
    by_operators(monkeypatch)
    monkeypatch.setattr(attention_module, "attend", absorbed.attend_reference)
    monkeypatch.setattr(graphs, "refusal", lambda model, layers, cache: None)
    monkeypatch.setattr(graphs, "CudaRecorder", lambda device: None)
    with torch.device("meta"):
        model = DeepSeekV3(tiny_config()).bfloat16()
    config = model.config
    install(model)
    cache = LatentCache(
        config.num_hidden_layers, 4 * BLOCK, config.kv_lora_rank, config.qk_rope_head_dim, kind,
        torch.bfloat16, "meta", BLOCK, spare=True,
    )  # fmt: skip
    layers = Layers(model, model.main_layers, 0, cache, model.model.norm)
    assert layers.graphs is not None
    like = torch.zeros(1, config.hidden_size, dtype=torch.bfloat16, device="meta")
    with torch.inference_mode():
        graph = layers.graphs._graph(4, 2, 0, like)
        with Launches():
            graph.step()
        with pytest.raises(RuntimeError, match="item"):
            graph.out_ND[0, 0].item()
        with pytest.raises(AssertionError, match="the CPU"), Launches():
            graph.out_ND.copy_(torch.zeros(1))


def test_there_are_none_on_a_cpu() -> None:
    engine = Engine(tiny_model(), options=Options(cache_tokens=64, max_length=40))
    assert engine.runner.layers.graphs is None and engine.cache.scratch is None


def test_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    from dsv3.model.moe import LocalDispatcher, MoE
    from dsv3.ops.backend import Choice
    from dsv3.quant.packed import Integers, pack

    order = ["triton", "reference"]
    monkeypatch.setattr(absorbed, "choose", lambda sizes: Choice("decode", tuple(order), {}, "MLA"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))

    def why(model: DeepSeekV3, dense: bool = False) -> str | None:
        cache = LatentCache(1, BLOCK, 16, 8, "float32", torch.float32, block=BLOCK, spare=True)
        layers = [layer for layer in model.main_layers if not (dense and isinstance(layer.mlp, MoE))]
        return graphs.refusal(model, layers, cache)

    model = tiny_model()
    assert why(model, dense=True) is None and "but in BF16" in str(why(model))
    model = model.bfloat16()
    assert why(model) is None
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert "capability 9" in str(why(model)) and why(model, dense=True) is None
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    order.pop(0)
    assert why(model) == "no kernel for attention over blocks"
    order.insert(0, "triton")
    mlp = model.main_layers[-1].mlp
    assert isinstance(mlp, MoE)
    mlp.dispatcher = type("Other", (LocalDispatcher,), {})()
    assert why(model) == "experts are placed or recorded from outside"
    mlp.dispatcher = LocalDispatcher()
    pack(model, Integers(8))
    assert why(model) == "matrices in other number formats"


@pytest.mark.gpu
@pytest.mark.parametrize("drafts", [0, 1])
def test_the_same_tokens_on_a_gpu(drafts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dense layers in FP32, replayed, beside the same launches one by one."""
    model = tiny_model(num_nextn_predict_layers=1, first_k_dense_replace=3).cuda()
    options = Options(draft_tokens=drafts, cache_tokens=1024, max_length=90, max_batch=3)
    engine = Engine(model, options=options)
    held = engine.runner.layers.graphs
    assert isinstance(held, Graphs)
    found = answers(engine)
    assert held.graphs and not held.broken
    monkeypatch.setattr("dsv3.serve.engine.replays", lambda device: False)
    assert answers(Engine(model, options=options)) == found


@pytest.mark.gpu
def test_experts_are_recorded_on_a_gpu() -> None:
    """In BF16; that what is replayed is what was launched is checked by the graphs themselves."""
    model = tiny_model().bfloat16().cuda()
    engine = Engine(model, options=Options(cache_tokens=1024, max_length=90))
    held = engine.runner.layers.graphs
    assert isinstance(held, Graphs)
    answers(engine)
    assert held.graphs and not held.broken and all(graph.proven for graph in held.graphs.values())
