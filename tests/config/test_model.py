"""``ModelConfig``: ``config.json`` in every style, refusals that name the way out, presets."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from transformers import DeepseekV3Config

from dsv3.common.errors import UserError
from dsv3.config.model import PRESETS, ModelConfig, RopeScaling, yarn_mscale

# What the released model's config.json says, report 1.
RELEASED: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"}, "bos_token_id": 0,
    "eos_token_id": 1, "ep_size": 1, "first_k_dense_replace": 3, "hidden_act": "silu", "hidden_size": 7168,
    "initializer_range": 0.02, "intermediate_size": 18432, "kv_lora_rank": 512,
    "max_position_embeddings": 163840, "model_type": "deepseek_v3", "moe_intermediate_size": 2048,
    "moe_layer_freq": 1, "n_group": 8, "n_routed_experts": 256, "n_shared_experts": 1,
    "norm_topk_prob": True, "num_attention_heads": 128, "num_experts_per_tok": 8, "num_hidden_layers": 61,
    "num_key_value_heads": 128, "num_nextn_predict_layers": 1, "q_lora_rank": 1536, "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64, "quantization_config": {"quant_method": "fp8", "fmt": "e4m3"},
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096, "type": "yarn",
    },
    "rope_theta": 10000, "routed_scaling_factor": 2.5, "scoring_func": "sigmoid",
    "tie_word_embeddings": False, "topk_group": 4, "topk_method": "noaux_tc", "torch_dtype": "bfloat16",
    "transformers_version": "4.33.1", "use_cache": True, "v_head_dim": 128, "vocab_size": 129280,
}  # fmt: skip


def test_the_released_config_is_the_preset() -> None:
    config = ModelConfig.from_dict(RELEASED)
    preset = ModelConfig.preset("v3-671b", initializer_range=0.02)
    assert config.model_dump(exclude={"extra"}) == preset.model_dump(exclude={"extra"})
    assert config.extra["torch_dtype"] == "bfloat16" and config.extra["ep_size"] == 1
    assert config.qk_head_dim == 192


def test_every_key_of_the_released_config_is_written_back() -> None:
    written = ModelConfig.from_dict(RELEASED).to_dict()
    for key, value in RELEASED.items():
        if key == "rope_scaling":
            assert {**value, "rope_type": "yarn"} == written[key]
        else:
            assert written[key] == value, key


ropes = st.one_of(
    st.none(),
    st.fixed_dictionaries(
        dict(
            factor=st.floats(1, 64),
            original_max_position_embeddings=st.integers(64, 8192),
            beta_fast=st.floats(8, 64),
            beta_slow=st.floats(0.5, 4),
            mscale=st.sampled_from([0.0, 0.7, 1.0]),
            mscale_all_dim=st.sampled_from([0.0, 1.0]),
        )
    ),
)


@given(ropes, st.sampled_from([None, 24]), st.integers(0, 2), st.sampled_from([1e4, 5e4]))
def test_round_trip_through_our_file_and_through_transformers(
    rope: dict[str, Any] | None, q_lora_rank: int | None, depth: int, theta: float
) -> None:
    """to_dict -> from_dict is the identity; so it is with transformers' reading and writing in between."""
    config = ModelConfig.preset(
        "tiny", rope_scaling=rope, q_lora_rank=q_lora_rank, num_nextn_predict_layers=depth, rope_theta=theta
    )
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    theirs = DeepseekV3Config.from_dict(config.to_dict())
    assert theirs.rope_parameters["rope_theta"] == theta
    assert theirs.rope_parameters["rope_type"] == ("yarn" if rope else "default")
    assert (theirs.q_lora_rank, theirs.num_mtp_layers) == (q_lora_rank, depth)
    again = ModelConfig.from_dict(json.loads(theirs.to_json_string(use_diff=False)))
    assert again.model_dump(exclude={"extra"}) == config.model_dump(exclude={"extra"})


def test_transformers_reads_every_field() -> None:
    config = ModelConfig.preset("small")
    theirs = DeepseekV3Config.from_dict(config.to_dict())
    for field in set(ModelConfig.model_fields) - {"extra", "rope_scaling", "rope_theta"}:
        assert getattr(theirs, field) == getattr(config, field), field


def test_new_style_rope_parameters() -> None:
    tree = {key: value for key, value in RELEASED.items() if key not in ("rope_scaling", "rope_theta")}
    yarn = {**RELEASED["rope_scaling"], "rope_type": "yarn", "rope_theta": 50000.0}
    config = ModelConfig.from_dict({**tree, "rope_parameters": yarn})
    assert config.rope_theta == 50000.0 and config.rope_scaling == RopeScaling()
    plain = ModelConfig.from_dict({**tree, "rope_parameters": {"rope_type": "default", "rope_theta": 123.0}})
    assert plain.rope_theta == 123.0 and plain.rope_scaling is None


def test_absent_mscales_mean_zero_as_transformers_reads_them() -> None:
    rope = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048}
    config = ModelConfig.from_dict({**RELEASED, "rope_scaling": rope})
    assert config.rope_scaling is not None
    assert (config.rope_scaling.mscale, config.rope_scaling.mscale_all_dim) == (0.0, 0.0)
    assert config.softmax_scale == 192**-0.5


@pytest.mark.parametrize(
    "change, said",
    [
        (dict(model_type="llama"), "model_type ('llama') is not deepseek_v3"),
        (dict(hidden_act="gelu"), "hidden_act ('gelu') is not implemented; only 'silu' is"),
        (dict(attention_bias=True), "attention_bias (True)"),
        (dict(tie_word_embeddings=True), "tie_word_embeddings (True)"),
        (dict(rope_interleave=False), "rope_interleave (False)"),
        (dict(moe_layer_freq=2), "moe_layer_freq (2)"),
        (dict(num_key_value_heads=8), "num_key_value_heads (8) must equal num_attention_heads"),
        (dict(rope_scaling={"type": "linear", "factor": 2.0}), "rope_scaling type ('linear')"),
        (dict(rope_scaling={"type": "yarn"}), "rope_scaling.factor is required"),
        (
            dict(rope_scaling={"type": "yarn", "factor": 2.0, "attention_factor": 1.5}),
            "rope_scaling.attention_factor",
        ),
        (dict(rope_scaling={"type": "yarn", "factor": 2.0, "truncate": False}), "rope_scaling.truncate"),
        (dict(scoring_func="softmax"), "scoring_func ('softmax')"),
        (dict(topk_method="greedy"), "topk_method ('greedy')"),
        (dict(hidden_size="wide"), "hidden_size ('wide')"),
        (dict(hidden_size=-1), "hidden_size (-1)"),
        (dict(rope_scaling={"type": "yarn", "factor": "x"}), "rope_scaling.factor ('x')"),
        (dict(qk_rope_head_dim=63), "qk_rope_head_dim (63) must be even"),
        (dict(n_group=7), "n_group (7) must divide n_routed_experts (256); try"),
        (dict(n_group=256), "n_group (256) leaves 1 expert a group"),
        (dict(topk_group=9), "topk_group (9) must not exceed n_group (8)"),
        (dict(num_experts_per_tok=200), "num_experts_per_tok (200) exceeds the 128 experts"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_refusals_name_field_value_and_way_out(change: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as caught:
        ModelConfig.from_dict({**RELEASED, **change})
    assert str(caught.value).startswith(said)
    assert "\n" not in str(caught.value)


def test_suggested_group_counts_work() -> None:
    with pytest.raises(
        UserError, match=r"n_group \(8\) must divide n_routed_experts \(60\); try (.*)"
    ) as caught:
        ModelConfig.preset("tiny", n_routed_experts=60, n_group=8, topk_group=4)
    suggested = str(caught.value).split("try ")[1].replace(" or ", ", ").split(", ")
    assert len(suggested) == 3
    for count in suggested:
        ModelConfig.preset("tiny", n_routed_experts=60, n_group=int(count), topk_group=4)
    with pytest.raises(UserError, match=r"try 1$"):
        ModelConfig.preset("tiny", n_routed_experts=3, n_group=2, topk_group=1, num_experts_per_tok=1)


def test_harmless_differences_are_taken() -> None:
    """What training scripts leave behind: no cache, several ends of text, null for no experts."""
    config = ModelConfig.from_dict({**RELEASED, "use_cache": False, "eos_token_id": [1, 5]})
    assert config.eos_token_id == 1 and config.to_dict()["use_cache"] is True
    dense = {**RELEASED, "n_routed_experts": None, "first_k_dense_replace": 61, "num_nextn_predict_layers": 0}
    assert not ModelConfig.from_dict(dense).is_moe(60)
    assert ModelConfig.from_dict({**RELEASED, "model_type": "kimi_k2"}).hidden_size == 7168


def test_routing_fields_of_a_dense_model_are_not_checked() -> None:
    tiny = dict(first_k_dense_replace=6, num_nextn_predict_layers=0, n_group=5)
    assert ModelConfig.preset("tiny", **tiny).n_group == 5
    with pytest.raises(UserError, match="n_group"):
        ModelConfig.preset("tiny", **{**tiny, "num_nextn_predict_layers": 1})  # the MTP layer has experts


def test_from_pretrained(tmp_path: Path) -> None:
    config = ModelConfig.preset("tiny")
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    assert ModelConfig.from_pretrained(tmp_path) == config
    assert ModelConfig.from_pretrained(tmp_path / "config.json") == config
    with pytest.raises(UserError, match="does not exist"):
        ModelConfig.from_pretrained(tmp_path / "nothing")
    for content, said in (("{", "not valid JSON"), ("[1]", "must hold a JSON object, not a list")):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(UserError, match=said):
            ModelConfig.from_pretrained(tmp_path)


def test_presets() -> None:
    for name in PRESETS:
        config = ModelConfig.preset(name)
        assert config.n_routed_experts % config.n_group == 0
        assert ModelConfig.from_dict(config.to_dict()) == config
    assert ModelConfig.preset("tiny", hidden_size=64).hidden_size == 64
    with pytest.raises(UserError, match="did you mean small"):
        ModelConfig.preset("smal")
    with pytest.raises(UserError, match=r"unknown key hidden_siz .*did you mean hidden_size"):
        ModelConfig.preset("tiny", hidden_siz=64)


def test_frozen() -> None:
    with pytest.raises(ValidationError):
        ModelConfig.preset("tiny").hidden_size = 3  # type: ignore[misc]


def test_layers_with_experts() -> None:
    config = ModelConfig.preset("v3-671b")
    assert [config.is_moe(layer) for layer in (0, 2, 3, 60, 61)] == [False, False, True, True, True]


def test_yarn_mscale() -> None:
    assert yarn_mscale(1.0, 1.0) == yarn_mscale(0.5, 1.0) == 1.0
    assert yarn_mscale(40.0, 1.0) == pytest.approx(1.368888)
    assert yarn_mscale(math.e, 0.5) == pytest.approx(1.05)
