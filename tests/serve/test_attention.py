"""Absorbed equals expanded equals the model's own attention, over pages in any order, in any batch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import dsv3.serve.attention as attention_module
from dsv3.model import DeepSeekV3
from dsv3.model.linear import Linear
from dsv3.serve.attention import PagedAttention, Span, absorbs, arrange, install
from dsv3.serve.cache import LatentCache
from tests.model.build import ids, tiny_model
from tests.serve.conftest import close

SLOTS = 200
FORMS = {"absorbed": True, "expanded": False}


def new_cache(model: DeepSeekV3) -> LatentCache:
    config = model.config
    return LatentCache(
        config.num_hidden_layers,
        SLOTS,
        config.kv_lora_rank,
        config.qk_rope_head_dim,
        "float32",
        torch.float32,
    )


def run(model: DeepSeekV3, cache: LatentCache, spans: list[Span], tokens: list[Tensor]) -> list[Tensor]:
    """The states of each span's tokens."""
    order, pages = arrange(model, cache, spans)
    x = model.model.embed_tokens(torch.cat([tokens[n] for n in order])[None])
    for layer in model.main_layers:
        x, _ = layer(x, pages)
    pieces = model.model.norm(x)[0].split([len(tokens[n]) for n in order])
    found = dict(zip(order, pieces))
    return [found[n] for n in range(len(spans))]


@pytest.fixture(scope="module")
def paged(model: DeepSeekV3) -> DeepSeekV3:
    install(model)
    return model


@pytest.mark.parametrize("form", [*FORMS, "by count"])
@given(
    st.lists(st.lists(st.integers(1, 12), min_size=1, max_size=3), min_size=1, max_size=4),
    st.integers(0, 2**30),
    st.booleans(),
)
@torch.no_grad()
def test_paged_is_dense(
    paged: DeepSeekV3, form: str, cuts: list[list[int]], seed: int, scattered: bool
) -> None:
    """Sequences cut in chunks, one chunk of each a step, rows anywhere: the states of a whole forward."""
    generator = np.random.default_rng(seed)
    cache, free = new_cache(paged), np.arange(SLOTS)
    if scattered:
        generator.shuffle(free)
    cache.rows.fill_(float("nan"))  # what nobody wrote must not be looked at
    texts = [ids(1, sum(lengths), seed=number)[0] for number, lengths in enumerate(cuts)]
    slots, at = [], 0
    for text in texts:
        slots.append(free[at : at + len(text)])
        at += len(text)
    done = [0] * len(texts)
    states: list[list[Tensor]] = [[] for _ in texts]
    with pytest.MonkeyPatch.context() as patch:
        if form in FORMS:
            patch.setattr(attention_module, "absorbs", lambda *_: FORMS[form])
        for step in range(3):
            turn = [n for n, lengths in enumerate(cuts) if step < len(lengths)]
            if not turn:
                break
            spans = [Span(slots[n], done[n], done[n] + cuts[n][step]) for n in turn]
            found = run(paged, cache, spans, [texts[n][s.start : s.stop] for n, s in zip(turn, spans)])
            for n, span, state in zip(turn, spans, found):
                states[n].append(state)
                done[n] = span.stop
    for text, found in zip(texts, states):
        wanted, _ = paged.hidden_states(text[None], mtp=False)
        close(torch.cat(found), wanted[0][0])


def test_forms_by_count_of_multiplications() -> None:
    """A few tokens of a long text are absorbed, a whole prompt expanded: DeepSeek-V3's own widths."""
    with torch.device("meta"):
        attention = tiny_model_shape().main_layers[0].self_attn
    assert absorbs(attention, 1, 2) and absorbs(attention, 4, 4096) and absorbs(attention, 100, 4096)
    assert not absorbs(attention, 512, 512) and not absorbs(attention, 512, 4096)


def tiny_model_shape() -> DeepSeekV3:
    from tests.model.build import tiny_config

    return DeepSeekV3(
        tiny_config(
            num_hidden_layers=1, first_k_dense_replace=1, kv_lora_rank=512, qk_nope_head_dim=128,
            qk_rope_head_dim=64, v_head_dim=128,
        )
    )  # fmt: skip


def test_groups_share_their_products(paged: DeepSeekV3) -> None:
    """Sequences that wait for one token are one group whatever their lengths; equal prompts are one too."""
    slots = np.arange(SLOTS)
    spans = [
        Span(slots[:30], 29, 30),
        Span(slots[40:60], 0, 20),
        Span(slots[60:99], 38, 39),
        Span(slots[100:], 0, 20),
    ]
    order, pages = arrange(paged, new_cache(paged), spans)
    assert order == [0, 2, 1, 3]
    assert [(g.begin, g.end, g.sequences, g.absorbed) for g in pages.groups] == [
        (0, 2, 2, True),
        (2, 42, 2, False),
    ]
    _, single = arrange(paged, new_cache(paged), spans[:1])
    assert single.groups[0].keys == slice(0, 30) and single.groups[0].later_STL is None


@torch.no_grad()
def test_the_model_stays_itself_outside_the_engine() -> None:
    model = tiny_model()
    before = model(ids(2, 9)).logits_BTV
    install(model)
    install(model)  # a second engine on the same model
    assert torch.equal(model(ids(2, 9)).logits_BTV, before)
    core = model.main_layers[0].self_attn.core
    assert isinstance(core, PagedAttention) and not isinstance(core.plain, PagedAttention)


@pytest.mark.parametrize(
    "changes",
    [
        {"q_lora_rank": None},
        {"rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 8}},
        {"kv_lora_rank": 6, "v_head_dim": 22, "first_k_dense_replace": 3},
    ],
)
@torch.no_grad()
def test_other_shapes(changes: dict[str, Any]) -> None:
    """Plain queries, YaRN, a narrow latent, no experts: a prompt in two pieces and a token alone."""
    model = tiny_model(**changes)
    install(model)
    cache, text, slots = new_cache(model), ids(1, 30)[0], np.arange(SLOTS)
    cuts = [(0, 12), (12, 29), (29, 30)]
    found = [run(model, cache, [Span(slots, a, b)], [text[a:b]])[0] for a, b in cuts]
    close(torch.cat(found), model.hidden_states(text[None], mtp=False)[0][0][0])


class Doubled(Linear):
    """A Linear in another format: half of the weight is stored."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


@torch.no_grad()
def test_absorbs_a_swapped_projection() -> None:
    """``kv_b_proj`` in another format has no weight to fold: its matrix is what it makes of unit vectors."""
    model = tiny_model()
    for layer in model.main_layers:
        linear = layer.self_attn.kv_b_proj
        linear.weight.div_(2)
        linear.__class__ = Doubled
    install(model)
    cache, text, slots = new_cache(model), ids(1, 20)[0], np.arange(SLOTS)
    first = run(model, cache, [Span(slots, 0, 19)], [text[:19]])[0]
    last = run(model, cache, [Span(slots, 19, 20)], [text[19:]])[0]
    close(torch.cat((first, last)), model.hidden_states(text[None], mtp=False)[0][0][0])
