"""Folders out and in: round trips, names, MTP present or not, FP8, and every refusal."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dsv3.checkpoint import hf, names
from dsv3.checkpoint.errors import CheckpointError
from dsv3.checkpoint.hf import load, save
from dsv3.common.errors import UserError
from dsv3.config.model import ModelConfig, RopeScaling
from dsv3.model import DeepSeekV3
from tests.checkpoint.conftest import random_model, same


@pytest.fixture(autouse=True)
def _quiet() -> Any:
    """A warning that no test expects is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def _edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change the tensors of a one-file folder with the library's own tools."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _configure(folder: Path, **changes: Any) -> None:
    """Set keys of ``config.json``; ``...`` removes one."""
    tree = {**json.loads((folder / "config.json").read_text()), **changes}
    kept = {key: value for key, value in tree.items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(kept))


def _read(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()}


SHAPES: list[dict[str, Any]] = [
    {},
    {"num_nextn_predict_layers": 0},
    {"num_nextn_predict_layers": 2},
    {"q_lora_rank": None, "n_shared_experts": 0},
    {"n_shared_experts": 2, "rope_scaling": RopeScaling(factor=4, original_max_position_embeddings=32)},
    {"first_k_dense_replace": 3, "num_nextn_predict_layers": 0},  # no experts at all
]


@pytest.mark.parametrize("changes", SHAPES, ids=str)
@pytest.mark.parametrize("shard", [5 * 2**30, 20_000])
def test_round_trip(tmp_path: Path, changes: dict[str, Any], shard: int) -> None:
    model = random_model(**changes)
    save(model, tmp_path / "a", max_shard_bytes=shard)
    back = load(tmp_path / "a")
    assert same(model, back) and back.config == model.config
    assert all(parameter.requires_grad for parameter in back.parameters())
    ids = torch.randint(0, 96, (2, 16))
    assert torch.equal(model(ids).logits_BTV, back(ids).logits_BTV)
    # And out again: the same files.
    save(back, tmp_path / "b", max_shard_bytes=shard)
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == sorted(
        p.name for p in (tmp_path / "b").iterdir()
    )
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes(), file.name


def test_names_are_those_of_the_released_files(tmp_path: Path, model: DeepSeekV3) -> None:
    """Report, released weights (README_WEIGHTS), spelt out."""
    save(model, tmp_path / "a")
    attention = [
        "self_attn.q_a_proj.weight", "self_attn.q_a_layernorm.weight", "self_attn.q_b_proj.weight",
        "self_attn.kv_a_proj_with_mqa.weight", "self_attn.kv_a_layernorm.weight",
        "self_attn.kv_b_proj.weight", "self_attn.o_proj.weight",
    ]  # fmt: skip
    layer = ["input_layernorm.weight", "post_attention_layernorm.weight", *attention]
    swiglu = [f"{part}_proj.weight" for part in ("gate", "up", "down")]
    dense = [f"mlp.{part}" for part in swiglu]
    moe = ["mlp.gate.weight", "mlp.gate.e_score_correction_bias"]
    moe += [f"mlp.shared_experts.{part}" for part in swiglu]
    moe += [f"mlp.experts.{expert}.{part}" for expert in range(8) for part in swiglu]
    mtp = [
        "enorm.weight", "hnorm.weight", "eh_proj.weight", "embed_tokens.weight", "shared_head.norm.weight",
        "shared_head.head.weight",
    ]  # fmt: skip
    wanted = {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    for index, parts in enumerate([layer + dense, layer + moe, layer + moe, layer + moe + mtp]):
        wanted |= {f"model.layers.{index}.{part}" for part in parts}
    tensors = _read(tmp_path / "a")
    assert set(tensors) == wanted
    ours = model.state_dict()
    for name, tensor in tensors.items():
        if ".experts." in name:
            expert = int(name.split(".experts.")[1].split(".")[0])
            assert torch.equal(tensor, ours[names.our_name(name)][expert]), name
    assert torch.equal(tensors["model.layers.3.embed_tokens.weight"], ours["model.embed_tokens.weight"])
    assert torch.equal(tensors["model.layers.3.shared_head.head.weight"], ours["lm_head.weight"])


def test_views_write_through(model: DeepSeekV3) -> None:
    for _, tensor in names.hf_tensors(model):
        tensor.fill_(3)
    assert all(bool((tensor == 3).all()) for tensor in model.state_dict().values())


def test_shards(tmp_path: Path, model: DeepSeekV3) -> None:
    save(model, tmp_path / "a", max_shard_bytes=20_000)
    index = json.loads((tmp_path / "a" / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in (tmp_path / "a").glob("*.safetensors"))
    assert len(files) > 3
    assert files == [f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)]
    found = {name: file for file in files for name in load_file(tmp_path / "a" / file)}
    assert found == index["weight_map"]
    sizes = {file: sum(t.nbytes for t in load_file(tmp_path / "a" / file).values()) for file in files}
    assert max(sizes.values()) <= 20_000
    assert index["metadata"]["total_size"] == sum(sizes.values())


@pytest.mark.parametrize("text", [False, True])
def test_bf16_keeps_the_bias_exact(tmp_path: Path, model: DeepSeekV3, text: bool) -> None:
    save(model, tmp_path / "a", dtype="bfloat16" if text else torch.bfloat16)
    bias = "model.layers.1.mlp.gate.e_score_correction_bias"
    stored = _read(tmp_path / "a")
    for name, tensor in stored.items():
        assert tensor.dtype == (torch.float32 if name.endswith("bias") else torch.bfloat16), name
    assert torch.equal(stored[bias], model.state_dict()[bias])
    back = load(tmp_path / "a")
    for name, tensor in back.state_dict().items():
        assert tensor.dtype == (torch.float32 if name.endswith("bias") else torch.bfloat16), name
        assert torch.equal(tensor, model.state_dict()[name].to(tensor.dtype)), name
    assert json.loads((tmp_path / "a" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    save(model, tmp_path / "b")
    asked = load(tmp_path / "b", dtype="bfloat16" if text else torch.bfloat16)
    assert same(asked, back)
    wide = load(tmp_path / "a", dtype=torch.float32)
    assert {tensor.dtype for tensor in wide.state_dict().values()} == {torch.float32}


def test_bias_stored_in_bf16_is_widened(tmp_path: Path, model: DeepSeekV3) -> None:
    save(model, tmp_path / "a", dtype=torch.bfloat16)
    _edit(tmp_path / "a", lambda t: t.update({k: v.bfloat16() for k, v in t.items()}))
    back = load(tmp_path / "a").state_dict()["model.layers.1.mlp.gate.e_score_correction_bias"]
    assert back.dtype == torch.float32


def test_config_keys_survive(tmp_path: Path, model: DeepSeekV3) -> None:
    save(model, tmp_path / "a")
    _configure(
        tmp_path / "a", pretraining_tp=1, ep_size=1, my_note={"a": [1, 2]}, auto_map={"AutoModel": "evil.py"},
        dtype="float16",
    )  # fmt: skip
    save(load(tmp_path / "a"), tmp_path / "b")
    save(DeepSeekV3(ModelConfig.from_pretrained(tmp_path / "a")), tmp_path / "c")
    for folder in ("b", "c"):
        tree = json.loads((tmp_path / folder / "config.json").read_text())
        assert tree["my_note"] == {"a": [1, 2]} and tree["ep_size"] == 1 and tree["pretraining_tp"] == 1
        # What is not true of the new folder stays behind: code that is not there, another dtype.
        assert "auto_map" not in tree and "dtype" not in tree and tree["torch_dtype"] == "float32"


BAD_VALUES: list[tuple[str, Any]] = [
    ("rope_scaling", 3), ("rope_scaling", "yarn"), ("rope_parameters", [1]), ("eos_token_id", []),
    ("hidden_size", "wide"), ("n_group", None), ("num_nextn_predict_layers", 99), ("model_type", "llama"),
]  # fmt: skip


@pytest.mark.parametrize(("key", "value"), BAD_VALUES, ids=str)
def test_configuration_that_makes_no_sense(tmp_path: Path, model: DeepSeekV3, key: str, value: Any) -> None:
    save(model, tmp_path / "a")
    _configure(tmp_path / "a", **{key: value})
    with pytest.raises(UserError, match=key):
        load(tmp_path / "a")


def test_null_means_none_of_them(tmp_path: Path) -> None:
    model = random_model(n_shared_experts=0, num_nextn_predict_layers=0)
    save(model, tmp_path / "a")
    _configure(tmp_path / "a", n_shared_experts=None, num_nextn_predict_layers=None)
    assert same(load(tmp_path / "a"), model)


def test_config_says_what_other_readers_need(tmp_path: Path) -> None:
    yarn = RopeScaling(factor=4, original_max_position_embeddings=32)
    save(random_model(rope_scaling=yarn, pad_token_id=2), tmp_path / "a")
    tree = json.loads((tmp_path / "a" / "config.json").read_text())
    assert tree["architectures"] == ["DeepseekV3ForCausalLM"] and tree["model_type"] == "deepseek_v3"
    # llama.cpp takes softmax when scoring_func is absent.
    assert tree["scoring_func"] == "sigmoid" and tree["topk_method"] == "noaux_tc"
    assert tree["num_nextn_predict_layers"] == 1 and tree["num_key_value_heads"] == 2
    assert tree["rope_scaling"]["type"] == tree["rope_scaling"]["rope_type"] == "yarn"
    assert tree["rope_theta"] == 10000.0 and "extra" not in tree
    generation = json.loads((tmp_path / "a" / "generation_config.json").read_text())
    assert (generation["bos_token_id"], generation["eos_token_id"], generation["pad_token_id"]) == (0, 1, 2)


def test_tokenizer_goes_along(tmp_path: Path, model: DeepSeekV3) -> None:
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "tokenizer.json").write_text("{}")
    (tmp_path / "t" / "README.md").write_text("no")
    save(model, tmp_path / "a", tokenizer_files=hf.tokenizer_files(tmp_path / "t"))
    assert (tmp_path / "a" / "tokenizer.json").read_text() == "{}"
    assert not (tmp_path / "a" / "README.md").exists()
    with pytest.raises(UserError, match=r"gone\.json does not exist"):
        save(model, tmp_path / "b", tokenizer_files=[tmp_path / "gone.json"])
    assert not (tmp_path / "b").exists()


# MTP: in the files, half in them, or not.


def _without_mtp(tensors: dict[str, torch.Tensor]) -> None:
    for name in [name for name in tensors if name.startswith("model.layers.3.")]:
        del tensors[name]


def test_mtp_absent(tmp_path: Path, model: DeepSeekV3) -> None:
    save(model, tmp_path / "a")
    _edit(tmp_path / "a", _without_mtp)
    with pytest.warns(UserWarning, match="holds 0 MTP layers, its config.json says .* 1: the model has 0"):
        back = load(tmp_path / "a")
    assert back.config.num_nextn_predict_layers == 0 and not back.mtp_modules
    ids = torch.randint(0, 96, (1, 12))
    assert torch.equal(back(ids).logits_BTV, model(ids).logits_BTV)
    save(back, tmp_path / "b")
    assert set(_read(tmp_path / "b")) == set(_read(tmp_path / "a"))
    assert same(load(tmp_path / "b"), back)  # and no warning any more
    _configure(tmp_path / "a", num_nextn_predict_layers=...)
    assert same(load(tmp_path / "a"), back)  # config.json is silent, so are we


def test_mtp_that_the_configuration_does_not_mention(tmp_path: Path, model: DeepSeekV3) -> None:
    save(model, tmp_path / "a")
    _configure(tmp_path / "a", num_nextn_predict_layers=...)
    assert same(load(tmp_path / "a"), model)
    _configure(tmp_path / "a", num_nextn_predict_layers=0)
    with pytest.warns(UserWarning, match="holds 1 MTP layers, its config.json says .* 0: the model has 1"):
        assert same(load(tmp_path / "a"), model)


def test_mtp_without_repeats(tmp_path: Path, model: DeepSeekV3) -> None:
    save(model, tmp_path / "a")
    _edit(tmp_path / "a", lambda t: [t.pop(name) for name in names.mtp_repeats(model.config)])
    assert same(load(tmp_path / "a"), model)


def test_mtp_in_part_is_refused(tmp_path: Path, model: DeepSeekV3) -> None:
    save(model, tmp_path / "a")
    _edit(tmp_path / "a", lambda t: t.pop("model.layers.3.eh_proj.weight"))
    with pytest.raises(UserError, match=r"1 missing \(model\.layers\.3\.eh_proj\.weight\)"):
        load(tmp_path / "a")


def test_mtp_repeats_that_differ(tmp_path: Path, model: DeepSeekV3) -> None:
    save(model, tmp_path / "a")
    _edit(tmp_path / "a", lambda t: t["model.layers.3.embed_tokens.weight"][-1, -1].add_(1))
    with pytest.warns(UserWarning, match=r"model\.layers\.3\.embed_tokens\.weight differ") as caught:
        assert same(load(tmp_path / "a"), model)
    assert len(caught) == 1 and "shared_head" not in str(caught[0].message)


# FP8 (report 3.3).


def _to_fp8(tensors: dict[str, torch.Tensor]) -> None:
    """Quantise as the released files are: every Linear, but no norm, gate, embedding, head or eh_proj."""
    kept = ("norm", "mlp.gate.", "embed_tokens", "lm_head", "shared_head", "eh_proj")
    for name in [name for name in tensors if not any(part in name for part in kept)]:
        weight = tensors[name].float()
        rows, columns = (-(-size // 128) for size in weight.shape)
        scales = torch.empty(rows, columns)
        stored = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
        for row in range(rows):
            for column in range(columns):
                block = (slice(128 * row, 128 * row + 128), slice(128 * column, 128 * column + 128))
                scales[row, column] = weight[block].abs().max() / 448
                stored[block] = (weight[block] / scales[row, column]).to(torch.float8_e4m3fn)
                tensors[name][block] = stored[block].float() * scales[row, column]
        tensors[name], tensors[f"{name}_scale_inv"] = stored, scales


@pytest.fixture
def fp8(tmp_path: Path) -> tuple[Path, DeepSeekV3]:
    """A folder in FP8, with sizes above and not divisible by 128, and the model it stands for."""
    model = random_model(
        hidden_size=160, intermediate_size=272, num_hidden_layers=2, moe_intermediate_size=136
    )
    save(model, tmp_path / "fp8")
    tensors = load_file(tmp_path / "fp8" / "model.safetensors")
    exact = dict(tensors)
    _to_fp8(exact)
    _edit(tmp_path / "fp8", _to_fp8)
    quantised = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
    _configure(tmp_path / "fp8", quantization_config=quantised, torch_dtype="bfloat16")
    for name, view in names.hf_tensors(model):
        view.copy_(tensors[name])  # _to_fp8 left the rounded values here
    return tmp_path / "fp8", model


def test_fp8_is_dequantised(fp8: tuple[Path, DeepSeekV3], tmp_path: Path) -> None:
    folder, model = fp8
    assert same(load(folder, dtype=torch.float32), model)
    stored = load(folder)
    state = stored.state_dict()
    assert state["model.layers.1.mlp.experts.up_proj.weight"].dtype == torch.bfloat16
    assert state["model.norm.weight"].dtype == torch.float32  # as stored
    assert all(
        torch.equal(tensor, model.state_dict()[name].to(tensor.dtype)) for name, tensor in state.items()
    )
    save(stored, tmp_path / "b")
    assert "quantization_config" not in json.loads((tmp_path / "b" / "config.json").read_text())
    assert same(load(tmp_path / "b"), stored)


def test_fp8_needs_its_scales(fp8: tuple[Path, DeepSeekV3]) -> None:
    folder, _ = fp8
    scale = "model.layers.0.mlp.up_proj.weight_scale_inv"
    _edit(folder, lambda t: t.update({scale: t[scale][:-1].clone()}))
    with pytest.raises(UserError, match=r"up_proj\.weight_scale_inv is \[2, 2\], .* makes it \[3, 2\]"):
        load(folder)
    _edit(folder, lambda t: t.pop(scale))
    with pytest.raises(UserError, match=r"1 missing \(model\.layers\.0\.mlp\.up_proj\.weight_scale_inv\)"):
        load(folder)


def test_scales_without_fp8(tmp_path: Path, model: DeepSeekV3) -> None:
    save(model, tmp_path / "a")
    _edit(tmp_path / "a", lambda t: t.update({"lm_head.weight_scale_inv": torch.ones(1, 1)}))
    with pytest.raises(UserError, match=r"1 unexpected \(lm_head\.weight_scale_inv\)"):
        load(tmp_path / "a")


# Refusals.


def test_tensors_that_do_not_fit_are_named_before_memory_is_taken(
    tmp_path: Path, model: DeepSeekV3, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(model, tmp_path / "a")

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for expert in range(5):
            del tensors[f"model.layers.1.mlp.experts.{expert}.up_proj.weight"]
        tensors["model.layers.0.strange.weight"] = torch.ones(1)
        tensors["lm_head.weight"] = torch.ones(96, 31)

    _edit(tmp_path / "a", change)
    monkeypatch.setattr(hf, "_allocate", lambda *_: pytest.fail("memory was taken"))
    with pytest.raises(UserError) as caught:
        load(tmp_path / "a")
    text = str(caught.value)
    assert "5 missing (model.layers.1.mlp.experts.0.up_proj.weight" in text and "and 2 more" in text
    assert "1 unexpected (model.layers.0.strange.weight)" in text
    assert "lm_head.weight is [96, 31], config.json makes it [96, 32]" in text
    assert "\n" not in text


def test_tensors_of_another_expert_count(tmp_path: Path, model: DeepSeekV3) -> None:
    save(model, tmp_path / "a")
    _configure(tmp_path / "a", n_routed_experts=4, n_group=2)
    with pytest.raises(UserError, match=r"unexpected \(model\.layers\.1\.mlp\.experts\.4\."):
        load(tmp_path / "a")


def test_repeat_of_another_shape(tmp_path: Path, model: DeepSeekV3) -> None:
    save(model, tmp_path / "a")
    _edit(tmp_path / "a", lambda t: t.update({"model.layers.3.embed_tokens.weight": torch.ones(1)}))
    with pytest.raises(UserError, match=r"model\.layers\.3\.embed_tokens\.weight is \[1\]"):
        load(tmp_path / "a")


def test_integers_are_not_weights(tmp_path: Path, model: DeepSeekV3) -> None:
    save(model, tmp_path / "a")
    _edit(tmp_path / "a", lambda t: t.update({"model.norm.weight": torch.ones(32, dtype=torch.int8)}))
    with pytest.raises(UserError, match=r"model\.norm\.weight \(torch\.int8\)"):
        load(tmp_path / "a")


def test_old_computed_tensors_are_ignored(tmp_path: Path, model: DeepSeekV3) -> None:
    save(model, tmp_path / "a")
    _edit(tmp_path / "a", lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}))
    assert same(load(tmp_path / "a"), model)


@pytest.mark.parametrize("keep", [0, 7, 100, -1])
def test_truncated(tmp_path: Path, model: DeepSeekV3, keep: int) -> None:
    save(model, tmp_path / "a", max_shard_bytes=40_000)
    victim = sorted((tmp_path / "a").glob("*.safetensors"))[1]
    victim.write_bytes(victim.read_bytes()[:keep])
    with pytest.raises(UserError, match=f"{victim.name} is damaged"):
        load(tmp_path / "a")


def test_missing_shard(tmp_path: Path, model: DeepSeekV3) -> None:
    save(model, tmp_path / "a", max_shard_bytes=40_000)
    victim = sorted((tmp_path / "a").glob("*.safetensors"))[1]
    victim.unlink()
    with pytest.raises(UserError, match=f"shard {victim.name} is missing"):
        load(tmp_path / "a")


@pytest.mark.parametrize(
    "target", ["../x.safetensors", "/etc/passwd", "sub/x.safetensors", "..", "", 3, "x\0"]
)
def test_index_that_points_elsewhere(tmp_path: Path, model: DeepSeekV3, target: Any) -> None:
    save(model, tmp_path / "a", max_shard_bytes=40_000)
    shutil.copy(next((tmp_path / "a").glob("*.safetensors")), tmp_path / "x.safetensors")
    path = tmp_path / "a" / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"] = {name: target for name in index["weight_map"]}
    path.write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"plain file names|is missing"):
        load(tmp_path / "a")


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": {}}}'])
def test_damaged_index(tmp_path: Path, model: DeepSeekV3, content: str) -> None:
    save(model, tmp_path / "a", max_shard_bytes=40_000)
    (tmp_path / "a" / "model.safetensors.index.json").write_text(content)
    with pytest.raises(UserError, match=r"index\.json is damaged"):
        load(tmp_path / "a")


def test_index_that_lists_what_is_not_there(tmp_path: Path, model: DeepSeekV3) -> None:
    save(model, tmp_path / "a", max_shard_bytes=40_000)
    path = tmp_path / "a" / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.ghost.weight"] = next(iter(index["weight_map"].values()))
    path.write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"lists model\.ghost\.weight, but the shards do not hold"):
        load(tmp_path / "a")


def test_a_symlinked_folder_loads(tmp_path: Path, model: DeepSeekV3) -> None:
    """The hub's cache: snapshots are links to blobs elsewhere."""
    save(model, tmp_path / "blobs", max_shard_bytes=40_000)
    (tmp_path / "snapshot").mkdir()
    for file in (tmp_path / "blobs").iterdir():
        (tmp_path / "snapshot" / file.name).symlink_to(file)
    assert same(load(tmp_path / "snapshot"), model)


def test_what_cannot_be_loaded(tmp_path: Path, model: DeepSeekV3) -> None:
    save(model, tmp_path / "a")
    with pytest.raises(UserError, match="deepseek-ai/DeepSeek-V3 is not a folder"):
        load("deepseek-ai/DeepSeek-V3")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"config\.json does not exist"):
        load(tmp_path / "empty")
    shutil.copy(tmp_path / "a" / "config.json", tmp_path / "empty")
    with pytest.raises(UserError, match=r"holds neither model\.safetensors nor"):
        load(tmp_path / "empty")
    (tmp_path / "empty" / "pytorch_model.bin").touch()
    with pytest.raises(UserError, match=r"pickled weights .* are not read"):
        load(tmp_path / "empty")
    with pytest.raises(UserError, match=r"quantize \('int3'\) is unknown; use fp8, int8, int4, or None"):
        load(tmp_path / "a", quantize="int3")
    with pytest.raises(UserError, match=r"dtype \('bfloat'\) is unknown \(did you mean bfloat16\?\)"):
        load(tmp_path / "a", dtype="bfloat")
    with pytest.raises(UserError, match=r"dtype \(torch\.int8\)"):
        load(tmp_path / "a", dtype=torch.int8)
    for device in ("nonsense", "cuda:x", "meta"):
        with pytest.raises(UserError, match=f"device \\('{device}'\\)"):
            load(tmp_path / "a", device=device)
    _configure(tmp_path / "a", quantization_config={"quant_method": "awq"})
    with pytest.raises(UserError, match=r"quant_method': 'awq'"):
        load(tmp_path / "a")
    _configure(tmp_path / "a", quantization_config={"quant_method": "fp8", "weight_block_size": [64, 64]})
    with pytest.raises(UserError, match=r"weight_block_size': \[64, 64\]"):
        load(tmp_path / "a")
    _configure(tmp_path / "a", quantization_config="int3")
    with pytest.raises(UserError, match=r"quantization_config \(int3\)"):
        load(tmp_path / "a")


def test_what_cannot_be_saved(tmp_path: Path, model: DeepSeekV3, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "there").mkdir()
    with pytest.raises(UserError, match="there already exists"):
        save(model, tmp_path / "there")
    with pytest.raises(UserError, match=r"max_shard_bytes \(0\)"):
        save(model, tmp_path / "a", max_shard_bytes=0)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(hf, "_generation_config", full)  # the last step
    with pytest.raises(CheckpointError, match="No space left on device; free some space"):
        save(model, tmp_path / "a")
    assert [path.name for path in tmp_path.iterdir()] == ["there"]
    assert list((tmp_path / "there").iterdir()) == []


def test_a_preset_knows_its_files() -> None:
    """The released model: 163 shards' worth of names, without its 671B of memory."""
    with torch.device("meta"):
        model = DeepSeekV3(ModelConfig.preset("v3-671b"))
    tensors = dict(names.hf_tensors(model))
    assert "model.layers.61.mlp.experts.255.down_proj.weight" in tensors
    assert tensors["model.layers.3.mlp.experts.0.gate_proj.weight"].shape == (2048, 7168)
    assert sum(t.numel() for n, t in tensors.items() if ".layers.61." not in n) == 671_026_419_200
    # 61 layers of 9 names, 3 dense of 3, 59 with experts of 5 + 3 x 256, the MTP's 4 more, the 3 outside.
    assert len(tensors) == 62 * 9 + 3 * 3 + 59 * (5 + 768) + 4 + 3
