"""Weights kept in FP8: the same results as the dequantised model, from half of BF16's memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dsv3.checkpoint import names
from dsv3.checkpoint.hf import load, save
from dsv3.config.fp8 import FP8Section
from dsv3.evaluate.sample import generate
from dsv3.model import DeepSeekV3
from dsv3.model.linear import Experts
from dsv3.quant import fp8, frozen
from tests.model.build import randomise, tiny_config

# Blocks at the edges: 160, 272 and 136 are no multiples of 128.
SIZES = dict(hidden_size=160, intermediate_size=272, moe_intermediate_size=136, num_nextn_predict_layers=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in FP8."""
    path = tmp_path_factory.mktemp("frozen") / "fp8"
    save(randomise(DeepSeekV3(tiny_config(**SIZES))), path, fp8=True)
    return path


IDS = torch.randint(61, (2, 20), generator=torch.Generator().manual_seed(2))


def not_compiled(monkeypatch: pytest.MonkeyPatch, band: int = frozen.BAND) -> None:
    monkeypatch.setattr(frozen.decode, "usable", lambda x: False)
    monkeypatch.setattr(frozen, "BAND", band)


@pytest.mark.parametrize("band", [None, frozen.BAND, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_are_those_of_the_dequantised_model(
    folder: Path, dtype: torch.dtype, band: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if band is not None:
        not_compiled(monkeypatch, band)
    kept, dense = load(folder, dtype=dtype, quantize="fp8"), load(folder, dtype=dtype)
    with torch.no_grad():
        ours, theirs = kept(IDS), dense(IDS)
    assert ours.logits_BTV.dtype == dtype and ours.logits_BTV.std() > 0.5
    for one, other in zip([ours.logits_BTV, *ours.mtp_logits], [theirs.logits_BTV, *theirs.mtp_logits]):
        torch.testing.assert_close(one, other, atol=2e-5 if dtype is torch.float32 else 0.05, rtol=0)


def test_generates_the_same(folder: Path) -> None:
    kept, dense = load(folder, dtype="float32", quantize="fp8"), load(folder, dtype="float32")
    assert generate(kept, [3, 1, 4], 12) == generate(dense, [3, 1, 4], 12)


def test_what_is_in_memory(folder: Path) -> None:
    kept = load(folder, quantize="fp8")
    state = dict(names.hf_tensors(kept))
    chosen = names.quantised(kept)
    assert {name for name, tensor in state.items() if tensor.dtype is torch.float8_e4m3fn} == chosen
    assert {name for name in state if names.is_scale(name)} == {names.scale_name(name) for name in chosen}
    assert "model.layers.3.eh_proj.weight" in state and "model.layers.3.eh_proj.weight" not in chosen
    assert {name.split(".mlp.")[1] for name in chosen if ".mlp.experts.7." in name} == {
        f"experts.7.{part}_proj.weight" for part in ("gate", "up", "down")
    }
    dense = {name: tensor.numel() * 2 for name, tensor in names.hf_tensors(load(folder, dtype="bfloat16"))}
    size = sum(state[name].nbytes + state[names.scale_name(name)].nbytes for name in chosen)
    assert 0.5 < size / sum(dense[name] for name in chosen) < 0.501
    assert not any(parameter.requires_grad for name, parameter in state.items() if name in chosen)


def test_casts_leave_the_numbers_alone(folder: Path) -> None:
    kept = load(folder, quantize="fp8")
    before = {name: tensor.clone() for name, tensor in kept.state_dict().items()}
    for cast in (DeepSeekV3.bfloat16, DeepSeekV3.float, DeepSeekV3.half):
        cast(kept)
        for path, _ in frozen.linears(kept):
            for name in (f"{path}.weight", f"{path}.weight_scale_inv"):
                now = kept.state_dict()[name]
                assert now.dtype == before[name].dtype and torch.equal(now.float(), before[name].float())


def test_one_matrix_at_a_time(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    not_compiled(monkeypatch)
    experts = load(folder, dtype="float32", quantize="fp8").model.layers[1].mlp.experts
    seen: list[tuple[int, ...]] = []
    original = frozen.dequantise
    monkeypatch.setattr(frozen, "dequantise", lambda q: seen.append(tuple(q.shape)) or original(q))
    counts = torch.zeros(16, dtype=torch.int64)
    assert experts(torch.randn(0, 160), counts).shape == (0, 160) and not seen
    counts[3], counts[9] = 2, 1
    experts(torch.randn(3, 160), counts)
    assert seen == [(136, 160), (136, 160), (160, 136)] * 2
    seen.clear()
    monkeypatch.setattr(frozen, "BAND", 1)
    experts(torch.randn(3, 160), counts)
    assert seen == [(128, 160), (8, 160), (128, 160), (8, 160), (128, 136), (32, 136)] * 2


def test_a_grouped_linear_alone(folder: Path) -> None:
    kept = load(folder, dtype="float32", quantize="fp8").model.layers[1].mlp.experts.up_proj
    dense = load(folder, dtype="float32").model.layers[1].mlp.experts.up_proj
    x, counts = torch.randn(5, 160), torch.tensor([0, 2, 0, 3] + [0] * 12)
    torch.testing.assert_close(kept(x, counts), dense(x, counts), atol=1e-6, rtol=1e-6)


def test_gradients_pass_through(folder: Path) -> None:
    kept, dense = (load(folder, dtype="float32", quantize=how) for how in ("fp8", None))
    found = []
    for model in (kept, dense):
        model(IDS).logits_BTV.square().mean().backward()
        found.append(model.model.embed_tokens.weight.grad)
    torch.testing.assert_close(found[0], found[1], atol=1e-7, rtol=1e-4)


def test_training_in_fp8_chooses_the_same_matrices() -> None:
    """Two statements of what report 3.3 keeps in higher precision agree."""
    with torch.device("meta"):
        model = DeepSeekV3(tiny_config(**SIZES))
    ours = {id(module.weight) for _, module in frozen.linears(model)}
    fp8.apply(model, FP8Section())
    theirs: set[int] = set()
    for module in model.modules():
        if isinstance(module, (fp8.FP8Linear, fp8.FP8MLP, fp8.FP8Experts)):
            theirs |= {id(parameter) for parameter in module.parameters()}
    assert ours == theirs


def test_freeze_takes_no_memory() -> None:
    def count(model: nn.Module, kind: Any) -> int:
        return sum(isinstance(module, kind) for module in model.modules())

    with torch.device("meta"):
        model = DeepSeekV3(tiny_config(**SIZES))
    frozen.freeze(model)
    assert all(tensor.is_meta for tensor in model.state_dict().values())
    assert count(model, frozen.FrozenExperts) == count(model, Experts) == 3
    assert count(model, frozen.FrozenLinear) == 4 * 5 + 3 * 4  # attention; dense or shared
