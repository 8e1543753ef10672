"""The model as a whole: seeds, dtypes, the meta device, causality, documents, names."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dsv3.config.model import ModelConfig
from dsv3.model import DeepSeekV3
from dsv3.model.attention import MLA
from dsv3.model.moe import Gate
from tests.model.build import ids, tiny_config, tiny_model


def test_same_seed_same_weights() -> None:
    one, two, other = (DeepSeekV3(tiny_config(), seed) for seed in (7, 7, 8))
    torch.manual_seed(123)  # the global generator plays no part
    three = DeepSeekV3(tiny_config(), 7)
    for name, value in one.state_dict().items():
        assert torch.equal(value, two.state_dict()[name])
        assert torch.equal(value, three.state_dict()[name])
    assert not torch.equal(one.lm_head.weight, other.lm_head.weight)


def test_initial_weights() -> None:
    """Matrices N(0, initializer_range), norms one, biases zero, no two matrices alike."""
    model = DeepSeekV3(tiny_config(initializer_range=0.03, hidden_size=128, num_nextn_predict_layers=1))
    sums = set()
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            assert torch.equal(parameter, torch.ones_like(parameter)), name
        else:
            assert abs(float(parameter.detach().mean())) < 5 * 0.03 / parameter.numel() ** 0.5, name
            assert float(parameter.detach().std()) == pytest.approx(0.03, rel=0.08), name
            sums.add(float(parameter.detach().double().sum()))
    assert len(sums) == sum(parameter.dim() > 1 for parameter in model.parameters())
    for moe in model.moe_layers().values():
        assert torch.equal(moe.gate.e_score_correction_bias, torch.zeros(16))


def test_meta_allocates_nothing_and_has_the_same_shapes() -> None:
    with torch.device("meta"):
        meta = DeepSeekV3(tiny_config())
    real = DeepSeekV3(tiny_config())
    shapes = {name: value.shape for name, value in real.state_dict().items()}
    assert {name: value.shape for name, value in meta.state_dict().items()} == shapes
    assert all(value.is_meta for value in meta.state_dict().values())


def test_meta_then_materialised_equals_built_here() -> None:
    with torch.device("meta"):
        model = DeepSeekV3(tiny_config())
    model.to_empty(device="cpu")
    model.initialise(3)
    built = DeepSeekV3(tiny_config(), 3)
    assert all(torch.equal(v, built.state_dict()[k]) for k, v in model.state_dict().items())
    assert torch.equal(model(ids(1, 5)).logits_BTV, built(ids(1, 5)).logits_BTV)


def test_bfloat16_keeps_the_expert_bias_exact() -> None:
    """``model.bfloat16()`` and the like leave e_score_correction_bias FP32, bit for bit."""
    exact = tiny_model()
    biases = {i: moe.gate.e_score_correction_bias.clone() for i, moe in exact.moe_layers().items()}
    for convert in ("bfloat16", "half"):
        model = getattr(tiny_model(), convert)()
        assert all(parameter.dtype != torch.float32 for parameter in model.parameters())
        for layer, moe in model.moe_layers().items():
            assert moe.gate.e_score_correction_bias.dtype == torch.float32
            assert torch.equal(moe.gate.e_score_correction_bias, biases[layer])
    model = tiny_model().to(torch.bfloat16)
    assert torch.equal(model.moe_layers()[1].gate.e_score_correction_bias, biases[1])
    assert "e_score_correction_bias" in str(list(model.state_dict()))


def test_bfloat16_model_stays_near_fp32() -> None:
    model = tiny_model(first_k_dense_replace=3)  # dense: no routing flips to forgive
    with torch.no_grad():
        wanted = model(ids(2, 12)).logits_BTV
        got = model.bfloat16()(ids(2, 12)).logits_BTV
    assert got.dtype == torch.bfloat16
    assert float((got - wanted).norm() / wanted.norm()) < 0.03


def test_compute_dtype_leaves_the_master_weights_alone() -> None:
    """FP32 weights, BF16 activations: what the embedding emits sets the precision of the whole pass."""
    model = tiny_model()
    model.model.embed_tokens.compute_dtype = torch.bfloat16
    output = model(ids(1, 9))
    assert output.logits_BTV.dtype == output.hidden_BTD.dtype == torch.bfloat16
    output.logits_BTV.float().square().sum().backward()
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in model.parameters())


@given(st.integers(1, 14), st.integers(0, 2**31))
def test_a_later_token_changes_no_earlier_logit(changed: int, seed: int) -> None:
    model = tiny_model()
    tokens = ids(2, 15, seed=seed)
    other = tokens.clone()
    other[:, changed:] = (other[:, changed:] + 1 + seed % 50) % 61
    with torch.no_grad():
        before, after = model(tokens).logits_BTV, model(other).logits_BTV
    assert torch.allclose(before[:, :changed], after[:, :changed], atol=1e-5)
    assert (before[:, changed] - after[:, changed]).abs().max() > 1e-3


def test_mtp_depth_k_sees_k_tokens_ahead_and_no_more() -> None:
    model = tiny_model(num_nextn_predict_layers=2)
    tokens = ids(1, 12)
    other = tokens.clone()
    other[:, 7] = (other[:, 7] + 5) % 61
    for k, (a, b) in enumerate(zip(model(tokens).mtp_logits, model(other).mtp_logits), start=1):
        assert torch.allclose(a[:, : 7 - k], b[:, : 7 - k], atol=1e-5)
        assert (a[:, 7 - k] - b[:, 7 - k]).abs().max() > 1e-3  # position i reads token i + k


@given(st.lists(st.integers(1, 6), min_size=1, max_size=4), st.booleans())
def test_packed_documents_equal_separate_runs(lengths: list[int], restart: bool) -> None:
    """RoPE is relative, so positions may restart with each document or run on."""
    model = tiny_model()
    total = sum(lengths)
    tokens = ids(1, total)
    documents = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[None]
    restarted = torch.cat([torch.arange(length) for length in lengths])[None]
    with torch.no_grad():
        packed = model(tokens, positions_BT=restarted if restart else None, documents_BT=documents).logits_BTV
        start = 0
        for length in lengths:
            alone = model(tokens[:, start : start + length]).logits_BTV
            assert torch.allclose(packed[:, start : start + length], alone, atol=2e-5)
            start += length


def test_without_documents_packed_texts_see_each_other() -> None:
    model = tiny_model()
    tokens = ids(1, 10)
    documents = torch.tensor([[0] * 5 + [1] * 5])
    plain, masked = model(tokens).logits_BTV, model(tokens, documents_BT=documents).logits_BTV
    assert torch.allclose(plain[:, :5], masked[:, :5], atol=1e-5)
    assert (plain[:, 5:] - masked[:, 5:]).abs().max() > 1e-2


def test_batch_rows_are_independent() -> None:
    model = tiny_model()
    tokens = ids(3, 8)
    whole = model(tokens).logits_BTV
    for row in range(3):
        assert torch.allclose(whole[row], model(tokens[row : row + 1]).logits_BTV[0], atol=1e-5)


def test_names_are_hugging_face_names() -> None:
    """The names of report 3, with the routed experts stacked."""
    names = set(DeepSeekV3(tiny_config(num_nextn_predict_layers=1)).state_dict())
    expected = {
        "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight",
        "model.layers.0.input_layernorm.weight", "model.layers.0.post_attention_layernorm.weight",
        "model.layers.0.self_attn.q_a_proj.weight", "model.layers.0.self_attn.q_a_layernorm.weight",
        "model.layers.0.self_attn.q_b_proj.weight", "model.layers.0.self_attn.kv_a_proj_with_mqa.weight",
        "model.layers.0.self_attn.kv_a_layernorm.weight", "model.layers.0.self_attn.kv_b_proj.weight",
        "model.layers.0.self_attn.o_proj.weight", "model.layers.0.mlp.gate_proj.weight",
        "model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.down_proj.weight",
        "model.layers.1.mlp.gate.weight", "model.layers.1.mlp.gate.e_score_correction_bias",
        "model.layers.1.mlp.experts.gate_proj.weight", "model.layers.1.mlp.experts.up_proj.weight",
        "model.layers.1.mlp.experts.down_proj.weight", "model.layers.1.mlp.shared_experts.up_proj.weight",
        "model.layers.3.enorm.weight", "model.layers.3.hnorm.weight", "model.layers.3.eh_proj.weight",
        "model.layers.3.shared_head.norm.weight", "model.layers.3.mlp.gate.weight",
    }  # fmt: skip
    assert expected <= names
    assert "self_attn.q_proj.weight" not in str(sorted(names))
    plain = set(DeepSeekV3(tiny_config(q_lora_rank=None)).state_dict())
    assert "model.layers.0.self_attn.q_proj.weight" in plain
    assert not any("q_a_" in name or "q_b_" in name for name in plain)


def test_attention_core_is_a_seam() -> None:
    """A core put in from outside gets positions-applied queries, the normed latent, the rotated key."""
    model = tiny_model()
    seen: dict[int, tuple[Tensor, ...]] = {}
    layers = [layer.self_attn for layer in model.main_layers]
    plain = model(ids(2, 5)).logits_BTV
    for index, attention in enumerate(layers):
        default = attention.core

        def recording(module, q, latent, key, context, index=index, default=default):  # type: ignore[no-untyped-def]
            assert isinstance(module, MLA)
            seen[index] = (q, latent, key)
            return default(module, q, latent, key, context)

        attention.core = recording
    assert torch.equal(model(ids(2, 5)).logits_BTV, plain)
    for q, latent, key in seen.values():
        assert q.shape == (2, 5, 3, 18) and latent.shape == (2, 5, 20) and key.shape == (2, 5, 8)


def test_main_layers_and_mtp_modules() -> None:
    model = DeepSeekV3(tiny_config(num_nextn_predict_layers=2))
    assert len(model.main_layers) == 3 and len(model.mtp_modules) == 2
    assert sorted(model.moe_layers()) == [1, 2, 3, 4]
    assert sum(isinstance(module, Gate) for module in model.modules()) == 4


@pytest.mark.parametrize("preset", ["tiny", "small", "16b", "v3-671b"])
def test_presets_build(preset: str) -> None:
    with torch.device("meta"):
        model = DeepSeekV3(ModelConfig.preset(preset))
    assert len(model.main_layers) == model.config.num_hidden_layers
