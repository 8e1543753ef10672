"""Folders between us and transformers, both ways: same keys, same configuration, same logits."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from dsv3.checkpoint import names
from dsv3.checkpoint.convert import convert
from dsv3.checkpoint.hf import load, save
from dsv3.config.model import RopeScaling
from tests.checkpoint.conftest import random_model, same

os.environ["HF_HUB_OFFLINE"] = "1"
transformers = pytest.importorskip("transformers")

YARN = RopeScaling(factor=4, original_max_position_embeddings=32)
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "yarn": {"rope_scaling": YARN},
    "yarn with unequal mscale": {"rope_scaling": RopeScaling(factor=8, mscale=0.7, mscale_all_dim=0.3)},
    "no query latent": {"q_lora_rank": None, "n_shared_experts": 2, "rope_theta": 50000.0},
}


def _theirs(folder: Path) -> Any:
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    mtp = {key for key in report["unexpected_keys"] if ".layers.3." not in key}
    assert not report["missing_keys"] and not report["mismatched_keys"] and not mtp
    return model.eval()


@pytest.mark.parametrize("case", CASES)
def test_transformers_reads_ours_and_we_read_theirs(tmp_path: Path, case: str) -> None:
    ours = random_model(**CASES[case])
    save(ours, tmp_path / "ours", max_shard_bytes=60_000)
    theirs = _theirs(tmp_path / "ours")
    ids = torch.randint(0, 96, (2, 100))
    with torch.no_grad():
        logits = ours(ids).logits_BTV
        assert logits.std() > 0.3  # something to compare
        torch.testing.assert_close(theirs(ids).logits, logits, atol=1e-4, rtol=0)

    theirs.save_pretrained(tmp_path / "theirs")
    with pytest.warns(UserWarning, match="holds 0 MTP layers"):  # it drops them, and says 1
        back = load(tmp_path / "theirs")
    main = {name: t for name, t in ours.state_dict().items() if not name.startswith("model.layers.3.")}
    assert set(back.state_dict()) == set(main)
    assert all(torch.equal(tensor, main[name]) for name, tensor in back.state_dict().items())
    with torch.no_grad():
        torch.testing.assert_close(back(ids).logits_BTV, logits, atol=1e-6, rtol=0)
    # What their save leaves out is there again after ours.
    save(back, tmp_path / "again")
    tree = json.loads((tmp_path / "again" / "config.json").read_text())
    assert tree["scoring_func"] == "sigmoid" and tree["topk_method"] == "noaux_tc"
    with torch.no_grad():
        torch.testing.assert_close(_theirs(tmp_path / "again")(ids).logits, logits, atol=1e-4, rtol=0)


def test_keys_are_exactly_those_transformers_writes(tmp_path: Path) -> None:
    from safetensors import safe_open

    config = transformers.DeepseekV3Config(**{**random_model().config.to_dict(), "architectures": None})
    transformers.DeepseekV3ForCausalLM(config).save_pretrained(tmp_path / "theirs")
    with safe_open(tmp_path / "theirs" / "model.safetensors", "pt") as file:
        theirs = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    ours = names.hf_tensors(random_model(num_nextn_predict_layers=0))
    assert {name: tuple(tensor.shape) for name, tensor in ours} == theirs


def test_transformers_reads_the_configuration(tmp_path: Path) -> None:
    model = random_model(rope_scaling=YARN, rope_theta=12345.0, pad_token_id=2)
    save(model, tmp_path / "a", dtype=torch.bfloat16)
    config = transformers.AutoConfig.from_pretrained(tmp_path / "a")
    assert type(config).__name__ == "DeepseekV3Config" and config.dtype == torch.bfloat16
    for field in ("hidden_size", "n_routed_experts", "n_group", "topk_group", "num_nextn_predict_layers",
                  "routed_scaling_factor", "q_lora_rank", "rms_norm_eps", "pad_token_id"):  # fmt: skip
        assert getattr(config, field) == getattr(model.config, field), field
    rope = config.rope_parameters
    assert (rope["rope_type"], rope["rope_theta"], rope["factor"]) == ("yarn", 12345.0, 4)
    generation = transformers.GenerationConfig.from_pretrained(tmp_path / "a")
    assert generation.eos_token_id == 1 and generation.pad_token_id == 2
    # In BF16 their model keeps our bias exact too.
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    bias = theirs.model.layers[1].mlp.gate.e_score_correction_bias
    assert bias.dtype == torch.float32
    assert torch.equal(bias, model.state_dict()["model.layers.1.mlp.gate.e_score_correction_bias"])


@pytest.mark.parametrize("style", ["type", "rope_type", "rope_parameters"])
def test_every_way_to_write_yarn(tmp_path: Path, style: str) -> None:
    model = random_model(rope_scaling=YARN)
    save(model, tmp_path / "a")
    path = tmp_path / "a" / "config.json"
    tree = json.loads(path.read_text())
    rope = tree.pop("rope_scaling")
    del rope["rope_type" if style == "type" else "type"]
    if style == "rope_parameters":
        tree["rope_parameters"] = {**rope, "rope_theta": tree.pop("rope_theta")}
    else:
        tree["rope_scaling"] = rope
    path.write_text(json.dumps(tree))
    back = load(tmp_path / "a")
    assert back.config == model.config and same(back, model)


@pytest.mark.parametrize("scale_format", ["float", "ue8m0"])
def test_transformers_reads_our_fp8(tmp_path: Path, scale_format: str) -> None:
    """Without a GPU it dequantises while loading.

    Sizes above 128 are multiples of it: where they are not, it takes ceil(n / 128) equal blocks, or refuses.
    """
    sizes = dict(
        hidden_size=256, intermediate_size=384, q_lora_rank=128, kv_lora_rank=96, qk_nope_head_dim=32,
        qk_rope_head_dim=32, v_head_dim=32, num_attention_heads=4, initializer_range=0.05,
    )  # fmt: skip
    save(random_model(**sizes), tmp_path / "bf16", dtype="bfloat16", max_shard_bytes=2**20)
    convert(tmp_path / "bf16", tmp_path / "fp8", "fp8", scale_format)
    theirs = _theirs(
        tmp_path / "fp8"
    ).float()  # what is not in FP8 it leaves in BF16, whatever dtype is asked
    ours = load(tmp_path / "fp8", dtype=torch.float32, quantize="fp8")
    ids = torch.randint(0, 96, (2, 100))
    with torch.no_grad():
        logits = ours(ids).logits_BTV
        assert logits.std() > 0.3
        torch.testing.assert_close(theirs(ids).logits, logits, atol=1e-5, rtol=0)
        unquantised = load(tmp_path / "bf16", dtype=torch.float32)(ids).logits_BTV
        assert (unquantised - logits).abs().max() > 0.01  # FP8 it was
