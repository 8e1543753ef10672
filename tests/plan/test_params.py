"""Counts against the published numbers, against the built model, and FLOPs against torch's counter."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dsv3.common.errors import UserError
from dsv3.config.model import ModelConfig
from dsv3.model import DeepSeekV3
from dsv3.model.attention import MLA, Context
from dsv3.ops.grouped import grouped_linear_reference
from dsv3.plan import params
from dsv3.plan.params import counts, kv_bytes_per_token, resolve, summary, train_flops_per_token
from tests.model.build import ids, tiny_config


def test_published_counts_of_the_released_model() -> None:
    """Report 1: 671B, 37B activated, an MTP module of 11.5B, 685B in the files, 70,272 bytes a token."""
    config = ModelConfig.preset("v3-671b")
    found = counts(config)
    assert round(found.main / 1e9) == 671
    assert round(found.activated / 1e9) == 37
    assert found.activated == pytest.approx(36.7e9, rel=0.003)
    assert found.mtp == pytest.approx(11.5e9, rel=0.01)
    assert round(found.parts["embedding"] / 1e9, 1) == round(found.parts["head"] / 1e9, 1) == 0.9
    # the hub shows 685B: these, and the FP8 scales (one for 128 x 128 values)
    assert round(found.files * (1 + 1 / 128**2) / 1e9) == 685
    assert kv_bytes_per_token(config) == 70_272


def test_a_model_in_a_line() -> None:
    assert params.describe(ModelConfig.preset("v3-671b")) == (
        "671.0B parameters and 11.6B for MTP (depth 1), 36.6B activated a token; 61 layers, 58 with 8 of 256"
        " experts a token; vocabulary 129,280"
    )
    dense = params.describe(tiny_config(first_k_dense_replace=9, num_nextn_predict_layers=0))
    assert "3 layers, none with experts; vocabulary 61" in dense and "MTP" not in dense


def test_by_hand() -> None:
    """Every part of a small model, multiplied out."""
    config = tiny_config(num_nextn_predict_layers=2)
    found = counts(config)
    attention = 40 * 28 + 28 * 3 * 18 + 40 * (20 + 8) + 20 * 3 * (10 + 14) + 3 * 14 * 40
    expert, layer_norms = 3 * 40 * 24, 40 + 40 + 28 + 20
    assert found.parts == {
        "embedding": 61 * 40,
        "attention": 3 * attention,
        "dense MLP": 3 * 40 * 56,
        "routed experts": 2 * 16 * expert,
        "shared experts": 2 * expert,
        "gate": 2 * 16 * 40,
        "norms": 3 * layer_norms + 40,
        "head": 61 * 40,
    }
    module = attention + 17 * expert + 16 * 40 + layer_norms + 3 * 40 + 2 * 40 * 40
    assert found.mtp == 2 * module
    assert found.mtp_activated == 2 * (module - 13 * expert + 61 * 40)
    assert found.activated == found.main - 61 * 40 - 2 * 13 * expert  # 3 of 16 experts
    assert found.activated_with_embedding == found.activated + 61 * 40
    assert found.expert_biases == 4 * 16
    assert found.files == found.main + found.mtp + 4 * 61 * 40 + 4 * 16


@pytest.mark.parametrize("preset", ["tiny", "small", "16b", "v3-671b"])
def test_totals_are_those_of_the_built_model(preset: str) -> None:
    config = ModelConfig.preset(preset)
    with torch.device("meta"):
        model = DeepSeekV3(config)
    found = counts(config)
    assert found.trained == sum(p.numel() for p in model.parameters())
    main = f"model.layers.{config.num_hidden_layers}."
    assert found.main == sum(p.numel() for n, p in model.named_parameters() if not n.startswith(main))


@pytest.mark.parametrize(
    "changes",
    [
        dict(q_lora_rank=None),
        dict(n_shared_experts=0),
        dict(first_k_dense_replace=3),
        dict(first_k_dense_replace=0),
    ],
    ids=str,
)
def test_other_shapes_are_counted_whole(changes: dict[str, Any]) -> None:
    config = tiny_config(**changes)
    found = counts(config)
    assert found.main == sum(p.numel() for p in DeepSeekV3(config).parameters())
    assert found.mtp == found.mtp_activated == found.repeated == 0
    if changes.get("first_k_dense_replace") == 3:
        assert found.parts["routed experts"] == found.expert_biases == 0
        assert found.activated == found.main - found.parts["embedding"]


def test_an_unknown_parameter_is_an_error() -> None:
    with pytest.raises(ValueError, match="belongs to no known part"):
        params.part_of("model.layers.0.novelty.weight")


@pytest.fixture
def countable(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Operators as plain matrix products, which is what torch's FLOP counter knows."""

    def attend(
        module: MLA, q: torch.Tensor, latent: torch.Tensor, k_rope: torch.Tensor, context: Context
    ) -> torch.Tensor:
        batch, length, heads, _ = q.shape
        k_nope, v = (
            module.kv_b_proj(latent).view(batch, length, heads, -1).split([module.nope, module.value], dim=-1)
        )
        k = torch.cat((k_nope, k_rope[:, :, None].expand(-1, -1, heads, -1)), dim=-1)
        mask = torch.ones(length, length, dtype=torch.bool).tril()
        scores = torch.einsum("bthq,bshq->bhts", q, k).masked_fill(~mask, float("-inf"))
        return torch.einsum("bhts,bshv->bthv", scores.softmax(-1), v).flatten(2)

    def swiglu(x, gate, up, down, sizes):  # type: ignore[no-untyped-def]
        hidden = torch.nn.functional.silu(grouped_linear_reference(x, gate, sizes))
        return grouped_linear_reference(hidden * grouped_linear_reference(x, up, sizes), down, sizes)

    monkeypatch.setattr("dsv3.model.attention.expanded_attention", attend)
    monkeypatch.setattr("dsv3.model.linear.grouped_swiglu", swiglu)
    yield


@pytest.mark.parametrize("mtp", [False, True])
def test_flops_against_the_counter_of_torch(countable: None, mtp: bool) -> None:
    """A training step counted by torch, operator by operator: equal to the last FLOP.

    torch counts the whole T x T of attention, so the half that the mask hides is taken off first.
    """
    config = tiny_config(num_nextn_predict_layers=1)
    length = 32
    model = DeepSeekV3(config)
    tokens = ids(2, length + 1)
    with FlopCounterMode(display=False) as counter:
        states, _ = model.hidden_states(tokens[:, :length], future_ids_BF=tokens[:, length:], mtp=mtp)
        sum(model.lm_head(state).square().mean() for state in states).backward()
    layers = 4 if mtp else 3
    hidden_by_the_mask = layers * 6 * 3 * (18 + 14) * (length - (length + 1) / 2)
    measured = counter.get_total_flops() / (2 * length) - hidden_by_the_mask
    assert train_flops_per_token(config, length, mtp=mtp) == measured


def test_flops_of_the_released_model() -> None:
    """6 x 36.6B and attention; the report's 180K hours a trillion tokens then mean a sensible H800."""
    config = ModelConfig.preset("v3-671b")
    flops = train_flops_per_token(config, 4096, mtp=False)
    attention = 61 * 6 * 128 * (192 + 128) * 4097 // 2
    assert flops == 6 * (counts(config).activated - counts(config).parts["norms"]) + attention
    per_gpu = train_flops_per_token(config, 4096) * 1e12 / (180_000 * 3600)
    assert 0.3e15 < per_gpu < 0.6e15  # of 1.98e15 dense FP8
    assert isinstance(flops, int)


def test_flops_grow_with_length_by_attention_alone() -> None:
    config = tiny_config()
    per_key = train_flops_per_token(config, 101) - train_flops_per_token(config, 100)
    assert per_key == 3 * 3 * 3 * (18 + 14)
    with pytest.raises(UserError, match=r"seq_len \(0\)"):
        train_flops_per_token(config, 0)


def test_summary_is_plain_and_complete() -> None:
    found = summary(ModelConfig.preset("tiny"), 512)
    assert sum(found["parameters_by_part"].values()) == found["parameters_main"]
    assert sum(found["parameters_activated_by_part"].values()) == found["parameters_activated"]
    assert found["parameters_trained"] == found["parameters_main"] + found["parameters_mtp"]
    assert found["train_flops_per_token"] > found["train_flops_per_token_without_mtp"]
    assert found["seq_len_tokens"] == 512


def test_resolve(tmp_path: Any) -> None:
    import json

    assert resolve("small") == ModelConfig.preset("small")
    config = tiny_config()
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    assert resolve(str(tmp_path)) == config
    with pytest.raises(UserError, match="did you mean v3-671b"):
        resolve("v3-671")
