"""The compiled layers against the model's own modules, and against themselves in other batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dsv3.checkpoint.hf import load, save
from dsv3.model import DeepSeekV3
from dsv3.model.linear import Linear
from dsv3.model.moe import LocalDispatcher, Routing
from dsv3.ops.native import decode
from dsv3.quant.packed import Integers, PackedLinear, pack
from dsv3.serve.attention import Span, install
from dsv3.serve.cache import LatentCache
from dsv3.serve.layers import Layers, keep_bf16
from tests.model.build import tiny_model


@pytest.fixture(autouse=True)
def _compiled(two_threads: None) -> None:
    if not decode.usable(torch.ones(1)):
        pytest.skip("no C++ compiler here")


def cache_of(model: DeepSeekV3, kind: str) -> LatentCache:
    config = model.config
    layers = config.num_hidden_layers + 1
    return LatentCache(layers, 512, config.kv_lora_rank, config.qk_rope_head_dim, kind, torch.float32)


def layers_of(model: DeepSeekV3, cache: LatentCache) -> Layers:
    return Layers(model, model.main_layers, 0, cache, model.model.norm)


def ran(model: DeepSeekV3, kind: str, compiled: bool, only: int | None = None) -> list[torch.Tensor]:
    """States of 1, 2 and 3 tokens that follow three sequences, in one pass; or of one of them alone."""
    cache = cache_of(model, kind)
    layers = layers_of(model, cache)
    assert layers.compiled is not None
    if not compiled:
        layers.compiled = None
    generator = torch.Generator().manual_seed(3)
    lengths, new = (40, 3, 17), (1, 2, 3)
    # The first lies in one piece, as blocks do.
    slots = np.concatenate((np.arange(50), 50 + np.random.default_rng(0).permutation(400)))
    pieces, at = [], 0
    for number, (length, more) in enumerate(zip(lengths, new)):
        own = slots[at : at + length + more]
        at += len(own)
        x = torch.randn(length + more, model.config.hidden_size, generator=generator)
        if only in (None, number):
            pieces.append((own, length, x))
    for own, n, x in pieces:
        layers.run([Span(own, 0, n)], x[:n])
    spans = [Span(own, n, len(own)) for own, n, _ in pieces]
    out = layers.run(spans, torch.cat([x[n:] for _, n, x in pieces]))
    return list(out.split([span.stop - span.start for span in spans]))


MODELS: dict[str, dict[str, Any]] = {
    "groups": {},
    "no query latent": {"q_lora_rank": None},
    "one group, two shared": {"n_group": 1, "topk_group": 1, "n_shared_experts": 2},
    "no shared": {"n_shared_experts": 0},
    "gates as they are": {"norm_topk_prob": False, "routed_scaling_factor": 1.5},
    "odd sizes": {"kv_lora_rank": 40, "qk_rope_head_dim": 6, "v_head_dim": 10, "moe_intermediate_size": 20},
}


@pytest.mark.parametrize("name", MODELS)
@torch.inference_mode()
def test_compiled_layers_are_the_modules(name: str) -> None:
    model = tiny_model(**MODELS[name])
    install(model)
    for ours, theirs in zip(ran(model, "float32", True), ran(model, "float32", False)):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "fp8"])
@pytest.mark.parametrize("integers", [None, Integers(8), Integers(4, 32)])
@torch.inference_mode()
def test_with_packed_weights_and_every_cache(kind: str, integers: Integers | None) -> None:
    model = tiny_model()
    pack(model, integers)
    install(model)
    tolerance = 1e-4 if kind == "float32" else 2e-2  # a row may be rounded to the next number
    for ours, theirs in zip(ran(model, kind, True), ran(model, kind, False)):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


@torch.inference_mode()
def test_with_fp8_weights_whose_heads_lie_across_blocks(tmp_path: Path) -> None:
    # A head's values are outputs 112 to 131 of kv_b_proj: two blocks with scales far apart.
    model = tiny_model(num_attention_heads=4, qk_nope_head_dim=24, v_head_dim=20)
    for layer in model.main_layers:
        layer.self_attn.kv_b_proj.weight[128:] *= 50
    save(model, tmp_path / "fp8", fp8=True)
    frozen = load(tmp_path / "fp8", dtype="float32", quantize="fp8")
    install(frozen)
    for ours, theirs in zip(ran(frozen, "float32", True), ran(frozen, "float32", False)):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


@torch.inference_mode()
def test_a_sequence_does_not_know_the_others() -> None:
    model = tiny_model()
    install(model)
    together = ran(model, "float32", True)
    for number, states in enumerate(together):
        (alone,) = ran(model, "float32", True, only=number)
        assert torch.equal(alone, states)


@torch.inference_mode()
def test_rows_of_the_cache_are_the_modules() -> None:
    model = tiny_model()
    install(model)
    caches = []
    for compiled in (True, False):
        cache = cache_of(model, "fp8")
        layers = Layers(model, model.main_layers[:1], 0, cache, model.model.norm)
        if not compiled:
            layers.compiled = None
        x = torch.randn(2, model.config.hidden_size, generator=torch.Generator().manual_seed(1))
        layers.run([Span(np.array([5, 9]), 0, 2)], x)
        caches.append(cache.read(0, torch.tensor([5, 9])))
    torch.testing.assert_close(caches[0], caches[1], rtol=0.07, atol=1e-6)  # a code apart at most


def test_what_it_does_not_know_goes_through_the_modules() -> None:
    model = tiny_model().bfloat16()
    assert layers_of(model, cache_of(model, "bfloat16")).compiled is None


class Counting(LocalDispatcher):
    """A dispatcher of another kind, which sees every row."""

    rows = 0

    def dispatch(self, x_ND: torch.Tensor, routing: Routing, load_E: torch.Tensor) -> Any:
        self.rows += len(x_ND)
        return super().dispatch(x_ND, routing, load_E)


@torch.inference_mode()
def test_another_dispatcher_is_not_passed_over() -> None:
    """The compiled layers know no experts that are elsewhere."""
    model = tiny_model()
    install(model)
    moe = list(model.moe_layers().values())[-1]
    moe.dispatcher = counting = Counting()
    layers = layers_of(model, cache_of(model, "float32"))
    assert layers.compiled is None
    layers.run([Span(np.arange(3), 0, 3)], torch.randn(3, model.config.hidden_size))
    assert counting.rows == 3


def test_bf16_weights_are_multiplied_as_they_are() -> None:
    rounded = tiny_model().bfloat16()
    exact = tiny_model().bfloat16().float()
    keep_bf16(rounded)
    keep_bf16(exact)
    assert isinstance(rounded.lm_head, PackedLinear) and type(exact.lm_head) is Linear
    assert rounded.lm_head.weight.dtype == torch.bfloat16
    ids = torch.arange(12)[None]
    torch.testing.assert_close(rounded(ids).logits_BTV, exact(ids).logits_BTV, rtol=1e-4, atol=1e-4)
