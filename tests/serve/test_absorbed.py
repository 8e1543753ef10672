"""Absorbed attention over blocks equals the gathered kind; FlashMLA is called as it wants; who is chosen.

What our own kernel computes is tested by ``tests/ops/triton_mla_numbers.py``.
"""

from __future__ import annotations

import importlib.machinery
import sys
import types
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dsv3.common.errors import UserError
from dsv3.model import DeepSeekV3
from dsv3.ops import flashmla
from dsv3.ops.paged import Table
from dsv3.serve import absorbed
from dsv3.serve import attention as attention_module
from dsv3.serve.attention import Span, install
from dsv3.serve.cache import LatentCache
from dsv3.serve.engine import Engine
from dsv3.serve.layers import Layers
from dsv3.serve.options import BLOCK_SIZE, GPU_BLOCK_SIZE, Options
from dsv3.serve.params import SamplingParams
from tests.model.build import tiny_config, tiny_model
from tests.serve.conftest import close

CPU = torch.device("cpu")
GREEDY = SamplingParams(max_tokens=20, temperature=0, ignore_eos=True)
PROMPTS = [[5, 3, 8, 1], [7] * 40, [2], list(range(3, 36))]


def answers(engine: Engine) -> list[list[int]]:
    """Of all prompts, at once."""
    names = [engine.add_request(prompt, GREEDY) for prompt in PROMPTS]
    sequences = [engine.requests[name][0] for name in names]
    while engine.busy:
        engine.step()
    return [sequence.answer for sequence in sequences]


@pytest.fixture
def by_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: there are no layers compiled in C++."""
    monkeypatch.setattr("dsv3.serve.layers._Compiled.of", lambda layers: None)


@pytest.fixture
def by_blocks(by_modules: None, monkeypatch: pytest.MonkeyPatch) -> list[Table]:
    """As on a GPU: rows stay where they are. The tables that were attended by."""
    seen: list[Table] = []

    def attend(q: Tensor, cache: LatentCache, layer: int, table: Table, scale: float) -> Tensor:
        seen.append(table)
        return absorbed.attend(q, cache, layer, table, scale)

    monkeypatch.setattr(attention_module, "by_blocks", lambda cache: True)
    monkeypatch.setattr(attention_module, "attend", attend)
    return seen


@pytest.mark.parametrize("kind", ["float32", "fp8"])
@pytest.mark.parametrize("drafts", [0, 2])
def test_the_same_answers_by_blocks(
    kind: str, drafts: int, by_modules: None, request: pytest.FixtureRequest
) -> None:
    model = tiny_model(num_nextn_predict_layers=1)
    options = Options(draft_tokens=drafts, cache_tokens=512, max_length=90, cache_dtype=kind, max_batch=3)
    plain = answers(Engine(model, options=options))
    tables = request.getfixturevalue("by_blocks")
    assert answers(Engine(model, options=options)) == plain
    assert {table.first for table in tables} == ({0, 1} if drafts else {0})
    assert all(table.block == BLOCK_SIZE for table in tables)


@torch.inference_mode()
def test_slots_in_any_order(by_blocks: list[Table], monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache without blocks is one with blocks of one slot."""
    model = tiny_model()
    install(model)
    config = model.config
    slots = np.random.default_rng(0).permutation(100)
    pieces = [Span(slots[:30], 28, 30), Span(slots[40:90], 41, 43), Span(slots[90:], 3, 5)]
    x_ND = torch.randn(6, config.hidden_size)
    found = []
    for tables in (True, False):
        monkeypatch.setattr(attention_module, "by_blocks", lambda cache, by=tables: by)
        cache = LatentCache(3, 100, config.kv_lora_rank, config.qk_rope_head_dim, "float32", torch.float32)
        cache.rows.normal_(generator=torch.Generator().manual_seed(1))
        layers = Layers(model, model.main_layers, 0, cache, model.model.norm)
        found.append(layers.run(pieces, x_ND))
    assert by_blocks and by_blocks[0].block == 1
    close(*found)


class FlashMLA(types.ModuleType):
    """What its functions are documented to take, computed a query at a time in float64."""

    def __init__(self, old: bool):
        super().__init__("flash_mla")
        self.__spec__ = importlib.machinery.ModuleSpec("flash_mla", None)
        self.old, self.plans, self.calls = old, 0, 0

    def get_mla_metadata(self, cache_seqlens: Tensor, queries: int, heads_k: int) -> tuple[Any, Any]:
        """An old one's two tensors, or a new one's object, which the first call fills."""
        assert cache_seqlens.dtype == torch.int32 and heads_k == 1
        self.plans += 1
        plan = ("plan", tuple(cache_seqlens.tolist()), queries)
        return (plan, torch.zeros(len(cache_seqlens) + 1, dtype=torch.int32)) if self.old else (plan, None)

    def flash_mla_with_kvcache(
        self, q: Tensor, k_cache: Tensor, block_table: Tensor, cache_seqlens: Tensor, head_dim_v: int,
        tile_scheduler_metadata: Any, num_splits: Any = None, softmax_scale: float | None = None,
        causal: bool = False, is_fp8_kvcache: bool = False,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Dense decoding, with the checks of its C++ interface."""
        sequences, new, heads, width = q.shape
        assert tile_scheduler_metadata == ("plan", tuple(cache_seqlens.tolist()), new * heads)
        assert (num_splits is not None) == self.old
        assert q.dtype == k_cache.dtype == torch.bfloat16 and not is_fp8_kvcache
        assert q.stride(-1) == k_cache.stride(-1) == block_table.stride(-1) == 1
        assert k_cache.shape[1:] == (64, 1, 576) and width == 576 and head_dim_v == 512
        assert block_table.dtype == cache_seqlens.dtype == torch.int32 and len(block_table) == sequences
        assert cache_seqlens.is_contiguous() and softmax_scale is not None and causal
        self.calls += 1
        out = torch.zeros(sequences, new, heads, head_dim_v)
        for s, length in enumerate(cache_seqlens.tolist()):
            rows = k_cache[block_table[s, : -(-length // 64)].long()].reshape(-1, 576)[:length].double()
            for t in range(new):
                seen = rows[: length - new + t + 1]
                weights = (q[s, t].double() @ seen.T * softmax_scale).softmax(-1)
                out[s, t] = (weights @ seen[:, :512]).float()
        return out.to(q.dtype), torch.zeros(sequences, heads, new)


@pytest.fixture(params=[True, False], ids=["old", "new"])
def flash_mla(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[FlashMLA]:
    fake = FlashMLA(request.param)
    monkeypatch.setitem(sys.modules, "flash_mla", fake)
    absorbed.choose.cache_clear()
    yield fake
    absorbed.choose.cache_clear()


def test_flashmla_is_called_as_it_wants_to_be(flash_mla: FlashMLA) -> None:
    """The real widths, two layers: one plan for both."""
    lengths, new, heads = [63, 64, 130], 2, 3
    cache = LatentCache(2, 8 * 64, 512, 64, "bfloat16", torch.bfloat16, block=64)
    cache.rows.normal_()
    blocks = np.random.default_rng(0).permutation(8)
    slots = [(blocks[a:b, None] * 64 + np.arange(64)).ravel() for a, b in ((0, 1), (1, 2), (2, 5))]
    table = Table.of(slots, lengths, 64, 0, CPU)
    q_MHX = torch.randn(len(lengths) * new, heads, 576).bfloat16()
    for layer in range(2):
        assert flashmla.takes(q_MHX, cache.rows[layer], table, 512)
        found = flashmla.attend(q_MHX, cache.rows[layer], table, 512, 0.07)
        wanted = absorbed.attend_reference(q_MHX.float(), _exact(cache), layer, table, 0.07)
        assert found.dtype == torch.bfloat16
        torch.testing.assert_close(found.float(), wanted, rtol=2e-2, atol=2e-2)
    assert (flash_mla.plans, flash_mla.calls) == (1, 2)


def _exact(cache: LatentCache) -> LatentCache:
    layers, slots, _ = cache.rows.shape
    exact = LatentCache(layers, slots, cache.latent, cache.rope, "float32", torch.float32, block=cache.block)
    exact.rows.copy_(cache.rows)
    return exact


def test_flashmla_does_not_take_everything() -> None:
    q, rows = torch.zeros(1, 2, 576).bfloat16(), torch.zeros(64, 576).bfloat16()
    table = Table.of([np.arange(64)], [5], 64, 0, CPU)
    assert flashmla.takes(q, rows, table, 512)
    assert not flashmla.takes(q.float(), rows, table, 512)
    assert not flashmla.takes(q, rows.float(), table, 512)
    assert not flashmla.takes(q, rows, table, 448)
    assert not flashmla.takes(q, rows, Table.of([np.arange(64)], [5], 16, 0, CPU), 512)
    assert not flashmla.takes(q, rows, Table.of([np.arange(64)], [5], 64, 1, CPU), 512), (
        "an MTP module's keys"
    )


SIZES: absorbed.Sizes = (CPU, torch.bfloat16, 4, 512, 64, "bfloat16", 64)
GPU = torch.device("cuda", 0)


def test_why_flashmla_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert flashmla.missing(GPU) == "flash_mla is not installed"
    monkeypatch.setitem(sys.modules, "flash_mla", FlashMLA(False))
    assert flashmla.missing(GPU) is None
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (10, 0))
    assert flashmla.missing(GPU) == "needs compute capability 9, this GPU has 10.0"


def test_a_library_that_gets_the_example_wrong_is_not_used(
    flash_mla: FlashMLA, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = absorbed.error_of(flashmla, SIZES)
    assert error is not None and error < 5e-3 and flash_mla.calls == 1
    assert absorbed.error_of(flashmla, (*SIZES[:-2], "fp8", 64)) is None
    calls = flash_mla.flash_mla_with_kvcache
    monkeypatch.setattr(flash_mla, "flash_mla_with_kvcache", lambda *a, **k: (calls(*a, **k)[0] * 1.02, None))
    wrong = absorbed.error_of(flashmla, SIZES)
    assert wrong is not None and wrong > absorbed.LARGEST_ERROR


def test_the_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    absorbed.choose.cache_clear()
    choice = absorbed.choose(SIZES)
    assert choice.order == ("reference",) and choice.refused["triton"] == "no CUDA device"
    missing = {"flashmla": "flash_mla is not installed"}
    monkeypatch.setattr(absorbed, "_refusal", lambda name, sizes: missing.get(name))
    absorbed.choose.cache_clear()
    assert absorbed.choose(SIZES).order == ("triton", "reference")
    monkeypatch.setenv(absorbed.VARIABLE, "reference")
    absorbed.choose.cache_clear()
    assert absorbed.choose(SIZES).order == ("reference",)
    monkeypatch.setenv(absorbed.VARIABLE, "flashmla")
    absorbed.choose.cache_clear()
    with pytest.raises(UserError, match=r"DSV3_MLA \(flashmla\) cannot be used: flash_mla is not"):
        absorbed.choose((GPU, *SIZES[1:]))
    monkeypatch.setenv(absorbed.VARIABLE, "tritn")
    with pytest.raises(UserError, match=r"DSV3_MLA \(tritn\) is unknown \(did you mean triton"):
        absorbed.choose(SIZES)
    absorbed.choose.cache_clear()


def test_blocks_are_larger_on_a_gpu() -> None:
    options, config = Options(cache_tokens=100, draft_tokens=0), tiny_config(max_position_embeddings=64)
    on_cpu, on_gpu = (options.room(config, torch.bfloat16, device) for device in (CPU, GPU))
    assert (on_cpu.blocks, on_cpu.block) == (7, BLOCK_SIZE)
    assert (on_gpu.blocks, on_gpu.block) == (2, GPU_BLOCK_SIZE)


@pytest.mark.gpu
@pytest.mark.parametrize("drafts", [0, 1])
def test_the_same_tokens_on_a_gpu(drafts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the kernels and by plain PyTorch, in FP32, where no rounding can tip a token."""
    model: DeepSeekV3 = tiny_model(num_nextn_predict_layers=1).cuda()
    found = []
    for name in ("triton", "reference"):
        monkeypatch.setenv(absorbed.VARIABLE, name)
        absorbed.choose.cache_clear()
        engine = Engine(model, options=Options(draft_tokens=drafts, cache_tokens=1024, max_length=90))
        found.append(answers(engine))
    absorbed.choose.cache_clear()
    assert found[0] == found[1]
