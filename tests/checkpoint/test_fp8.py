"""FP8 blocks beside a slow loop, there and back again without loss, and folders written from a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from dsv3.checkpoint import fp8, names
from dsv3.checkpoint.errors import CheckpointError
from dsv3.checkpoint.fp8 import FP8, quantised, translate
from dsv3.checkpoint.hf import load, save
from dsv3.ops import native
from tests.checkpoint.conftest import random_model, same

SIZES = dict(hidden_size=160, intermediate_size=272, num_hidden_layers=2, moe_intermediate_size=136)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp8": FP8}


def _bytes(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.uint8)


def _blocks(x: Tensor) -> list[tuple[int, int, Tensor]]:
    """Row, column and content of every block."""
    return [
        (i // 128, j // 128, x[i : i + 128, j : j + 128])
        for i in range(0, x.shape[0], 128)
        for j in range(0, x.shape[1], 128)
    ]


def _slow(x: Tensor, powers: bool) -> tuple[Tensor, Tensor]:
    """FP8 numbers and scales by a loop over blocks; a power of two: the least that needs no clamping."""
    numbers, scales = torch.empty(x.shape, dtype=FP8), torch.empty(fp8.scale_shape(tuple(x.shape)))
    for i, j, block in _blocks(x.float()):
        amax = block.abs().max()
        scale = amax / 448 if amax > 0 else torch.tensor(1.0)
        if powers:
            scale = torch.tensor(2.0**-120)
            while amax > 0 and (amax / scale > 464 or (amax / scale).to(FP8).float() > 448):
                scale *= 2
            scale = scale if amax > 0 else torch.tensor(1.0)
        scales[i, j] = scale
        numbers[128 * i : 128 * i + 128, 128 * j : 128 * j + 128] = (block / scale).clamp(-448, 448).to(FP8)
    return numbers, scales


def _dense(numbers: Tensor, scales: Tensor) -> Tensor:
    """FP32 values by a loop over blocks."""
    x = numbers.float()
    for i, j, block in _blocks(x):
        block *= scales[i, j]
    return x


@st.composite
def weights(draw: st.DrawFn) -> Tensor:
    """Matrices as models have them: outliers, tiny and zero blocks, minus zeros, sizes that do not divide."""
    rows, columns = draw(st.integers(1, 300)), draw(st.integers(1, 300))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    x = torch.randn(rows, columns, generator=generator) * 10.0 ** draw(st.floats(-6, 2))
    for _, _, block in _blocks(x):
        kind = draw(st.sampled_from(["plain", "plain", "outlier", "small", "zero"]))
        if kind == "outlier":
            block[0, 0] *= 1000
        elif kind == "small":
            block *= 1e-5
        elif kind == "zero":
            block *= 0.0  # minus zeros too
    return x


@given(x=weights(), dtype=st.sampled_from([torch.float32, torch.bfloat16]), powers=st.booleans())
def test_numbers_and_scales_are_those_of_a_loop(x: Tensor, dtype: torch.dtype, powers: bool) -> None:
    x = x.to(dtype)
    q, (numbers, scales) = quantised(x, powers), _slow(x, powers)
    assert torch.equal(q.scales, scales)
    assert torch.equal(_bytes(q.values), _bytes(numbers))


@given(x=weights(), seed=st.integers(0, 2**31))
def test_through_fp32_and_back(x: Tensor, seed: int) -> None:
    """Whatever made the scales: here each is multiplied by something, so that no division by 448 did."""
    q = quantised(x)
    scales = q.scales * (1 + torch.rand(q.scales.shape, generator=torch.Generator().manual_seed(seed)))
    y = _dense(q.values, scales)
    again = quantised(y)
    assert torch.equal(_bytes(again.values), _bytes(q.values))
    assert torch.equal(_dense(again.values, again.scales), y)
    for i, j, block in _blocks(q.values.float()):
        mantissas = block.frexp()[0].abs()
        if bool((mantissas == 0.5).any()):  # a power of two times the scale is the scale: no other will do
            assert again.scales[i, j] == scales[i, j]


def test_the_scale_beside_is_needed() -> None:
    """For about one scale in nine, where it was not made by a division by 448."""
    scales = 0.001 * (1 + torch.rand(40, 40))
    numbers = (448 * torch.rand(40 * 8, 40 * 8)).to(FP8)
    numbers[::8, ::8], numbers[1::8, ::8] = torch.tensor(448.0).to(FP8), torch.tensor(1.0).to(FP8)
    lost = found = 0
    for i in range(40):
        for j in range(40):
            y = numbers[8 * i : 8 * i + 8, 8 * j : 8 * j + 8].float() * scales[i, j]
            lost += int(y.max() / 448 != scales[i, j])
            found += int(quantised(y).scales[0, 0] == scales[i, j])
    assert found == 1600 and 0.07 < lost / 1600 < 0.14


@given(x=weights())
def test_through_bf16_and_back(x: Tensor) -> None:
    q = quantised(x)
    again = quantised(_dense(q.values, q.scales).bfloat16())
    assert torch.equal(_bytes(again.values), _bytes(q.values))
    assert bool(((again.scales - q.scales).abs() <= 2.0**-8 * q.scales).all())


@given(x=weights())
def test_powers_of_two_through_bf16_and_back(x: Tensor) -> None:
    q = quantised(x.bfloat16(), ue8m0=True)
    assert bool((q.scales.frexp()[0] == 0.5).all())
    y = _dense(q.values, q.scales)
    assert torch.equal(y.bfloat16().float(), y)
    for dtype in (torch.bfloat16, torch.float32):
        again = quantised(y.to(dtype), ue8m0=True)
        assert torch.equal(again.scales, q.scales) and torch.equal(_bytes(again.values), _bytes(q.values))


@pytest.mark.parametrize("ue8m0", [False, True])
def test_the_plain_pytorch_path_is_the_same(monkeypatch: pytest.MonkeyPatch, ue8m0: bool) -> None:
    x = torch.randn(200, 300)
    fast = quantised(x, ue8m0)
    again = quantised(_dense(fast.values, fast.scales), ue8m0)
    monkeypatch.setattr(native, "usable", lambda x, name: False)
    slow = quantised(x, ue8m0)
    assert torch.equal(slow.scales, fast.scales) and torch.equal(_bytes(slow.values), _bytes(fast.values))
    assert torch.equal(quantised(_dense(slow.values, slow.scales), ue8m0).scales, again.scales)


def _translate(tensors: dict[str, Tensor], name: str, dtype: torch.dtype, **how: bool) -> dict[str, Tensor]:
    """What becomes of a tensor in memory; the largest piece asked for is under ``largest``."""
    tensor = tensors[name]
    made = {
        key: torch.empty(*kind[1], dtype=kind[0])
        for key, kind in fp8.outputs(name, tuple(tensor.shape), dtype).items()
    }
    asked = [0]

    def rows(key: str, first: int, last: int) -> Tensor:
        asked.append((last - first) * tensors[key][0].numel())
        return tensors[key].reshape(tensors[key].shape[0], -1)[first:last]

    def put(key: str, first: int, piece: Tensor) -> None:
        made[key].view(-1)[first : first + piece.numel()] = piece.reshape(-1).to(made[key].dtype)

    translate(name, (tensor.dtype, tuple(tensor.shape)), dtype, rows, put, **how)
    return {**made, "largest": torch.tensor(max(asked))}


@pytest.mark.parametrize("stored", DTYPES)
@pytest.mark.parametrize("wanted", DTYPES)
def test_every_dtype_to_every_other_band_by_band(
    stored: str, wanted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    numbers, scales = _slow(torch.randn(400, 130), False)
    dense = _dense(numbers, scales)
    source = {"x": numbers, "x_scale_inv": scales} if stored == "fp8" else {"x": dense.to(DTYPES[stored])}
    whole = _translate(source, "x", DTYPES[wanted])
    monkeypatch.setattr(fp8, "BAND", 1)
    bands = _translate(source, "x", DTYPES[wanted])
    assert int(whole.pop("largest")) == 400 * 130 and int(bands.pop("largest")) == 128 * 130
    assert all(torch.equal(_bytes(bands[key]), _bytes(whole[key])) for key in whole)
    if wanted == "fp8":
        assert torch.equal(_bytes(bands["x"]), _bytes(numbers))
        if stored in ("fp8", "fp32"):
            assert torch.equal(bands["x_scale_inv"], scales)
    else:
        expected = dense if stored == "fp8" else source["x"]
        assert torch.equal(bands["x"], expected.to(DTYPES[wanted]))


def test_fp8_anew() -> None:
    numbers, scales = _slow(torch.randn(100, 200), False)
    tensors = {"x": numbers, "x_scale_inv": scales}
    kept = _translate(tensors, "x", FP8, ue8m0=True)
    assert torch.equal(kept["x_scale_inv"], scales)
    made = _translate(tensors, "x", FP8, ue8m0=True, anew=True)
    expected = quantised(_dense(numbers, scales), True)
    assert torch.equal(made["x_scale_inv"], expected.scales)
    assert torch.equal(_bytes(made["x"]), _bytes(expected.values))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_fp8_cannot_hold(bad: float, tmp_path: Path) -> None:
    model = random_model(**SIZES)
    model.model.layers[1].mlp.experts.up_proj.weight.data[5, 130, 140] = bad
    with pytest.raises(
        CheckpointError, match=r"layers\.1\.mlp\.experts\.5\.up_proj\.weight .* infinity or a NaN"
    ):
        save(model, tmp_path / "a", fp8=True)
    assert not list(tmp_path.iterdir())


# Folders.


def _read(folder: Path) -> dict[str, Tensor]:
    return {k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()}


@pytest.mark.parametrize("shard", [5 * 2**30, 100_000])
def test_a_folder_in_the_released_layout(tmp_path: Path, shard: int) -> None:
    model = random_model(**SIZES)
    save(model, tmp_path / "a", fp8=True, dtype="bfloat16", max_shard_bytes=shard)
    stored, exact = _read(tmp_path / "a"), dict(names.hf_tensors(model))
    kept = ("norm", "mlp.gate.", "embed_tokens", "lm_head", "shared_head", "eh_proj")
    for name, tensor in stored.items():
        if name.endswith("_scale_inv"):
            continue
        if any(part in name for part in kept):
            bias = name.endswith("e_score_correction_bias")
            assert tensor.dtype == (torch.float32 if bias else torch.bfloat16), name
            assert f"{name}_scale_inv" not in stored
            continue
        numbers, scales = _slow(exact[name], False)
        assert torch.equal(_bytes(tensor), _bytes(numbers)), name
        assert torch.equal(stored[f"{name}_scale_inv"], scales), name
    attention, dense, experts = 5 * 3, 3, 2 * 3 * (1 + 8)
    assert sum(tensor.dtype is FP8 for tensor in stored.values()) == attention + dense + experts
    assert set(stored) - set(exact) == {f"{n}_scale_inv" for n in exact if stored[n].dtype is FP8} | set(
        names.mtp_repeats(model.config)
    )
    tree = json.loads((tmp_path / "a" / "config.json").read_text())
    assert tree["torch_dtype"] == "bfloat16" and tree["quantization_config"] == {
        "quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128], "activation_scheme": "dynamic",
    }  # fmt: skip
    if shard < 2**30:
        index = json.loads((tmp_path / "a" / "model.safetensors.index.json").read_text())
        files = sorted(path.name for path in (tmp_path / "a").glob("*.safetensors"))
        assert len(files) > 3
        assert index["weight_map"] == {k: f for f in files for k in load_file(tmp_path / "a" / f)}
        assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in stored.values())


@pytest.mark.parametrize("shard", [5 * 2**30, 100_000])
@pytest.mark.parametrize("powers", [False, True])
def test_loaded_in_fp8_and_saved_again(tmp_path: Path, shard: int, powers: bool) -> None:
    model = random_model(**SIZES)
    if powers:  # such weights that every scale is one
        for path, tensor in names.hf_tensors(model):
            if path in names.quantised(model):
                tensor.copy_(tensor.sign() * 448)
    save(model, tmp_path / "a", fp8=True, dtype="bfloat16", max_shard_bytes=shard)
    save(load(tmp_path / "a", quantize="fp8"), tmp_path / "b", fp8=True, max_shard_bytes=shard)
    for file in (tmp_path / "a").glob("*.safetensors*"):
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes(), file.name
    tree = json.loads((tmp_path / "b" / "config.json").read_text())
    assert tree["quantization_config"].get("scale_fmt") == ("ue8m0" if powers else None)
    # And as BF16 it is what plain loading makes of it.
    save(load(tmp_path / "a", quantize="fp8"), tmp_path / "c")
    assert same(load(tmp_path / "c"), load(tmp_path / "a"))
    assert "quantization_config" not in json.loads((tmp_path / "c" / "config.json").read_text())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_quantised_while_loading(tmp_path: Path, dtype: str) -> None:
    model = random_model(**SIZES)
    save(model, tmp_path / "a", dtype=dtype)
    save(load(tmp_path / "a"), tmp_path / "b", fp8=True)
    one, other = load(tmp_path / "a", quantize="fp8"), load(tmp_path / "b", quantize="fp8")
    a, b = one.state_dict(), other.state_dict()
    assert list(a) == list(b)
    assert all(a[key].dtype == b[key].dtype and torch.equal(_bytes(a[key]), _bytes(b[key])) for key in a)
    assert a["model.norm.weight"].dtype == getattr(torch, dtype)


def test_dtype_is_for_the_rest(tmp_path: Path) -> None:
    save(random_model(**SIZES), tmp_path / "a", fp8=True)
    state: dict[str, Any] = load(tmp_path / "a", dtype="bfloat16", quantize="fp8").state_dict()
    assert state["model.embed_tokens.weight"].dtype == torch.bfloat16
    assert state["model.layers.1.mlp.gate.e_score_correction_bias"].dtype == torch.float32
    assert state["model.layers.1.mlp.experts.up_proj.weight"].dtype == FP8
