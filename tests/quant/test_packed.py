"""Packed matrices: the logits of the dequantised model, from the numbers as they are kept."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from dsv3.common.errors import UserError
from dsv3.evaluate.sample import generate
from dsv3.model import DeepSeekV3
from dsv3.model.linear import Experts, GroupedLinear, Linear
from dsv3.ops.integers import Int4, Int8, rounded
from dsv3.quant import frozen, packed
from dsv3.quant.packed import Integers, PackedLinear, matrices, pack
from tests.model.build import ids, tiny_model

FORMS = {"dense": None, "int8": Integers(8), "int4": Integers(4), "int4 g32": Integers(4, 32)}
SIZES: dict[str, Any] = dict(
    num_nextn_predict_layers=1, hidden_size=72, kv_lora_rank=48
)  # 72: 3 x 32 less 24


@pytest.fixture(scope="module")
def plain() -> DeepSeekV3:
    return tiny_model(**SIZES)


class RoundingLinear(Linear):
    """Its activations are rounded as integer products take them."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(rounded(x))


class RoundingGroupedLinear(GroupedLinear):
    """The same of one matrix an expert."""

    def forward(self, x_MI: Tensor, counts_E: Tensor) -> Tensor:
        return super().forward(rounded(x_MI), counts_E)


def dequantised(model: DeepSeekV3, integers: Integers | None) -> DeepSeekV3:
    """The model with every matrix rounded and dense again, by the definition of each format."""
    dense = copy.deepcopy(model)
    if integers is None:
        return dense
    with torch.no_grad():
        for path, module in matrices(dense):
            module.weight.copy_(integers.quantise(path, module.weight).dequantise())
            module.__class__ = RoundingLinear if type(module) is Linear else RoundingGroupedLinear
        embedding = dense.model.embed_tokens.weight
        embedding.copy_(embedding.bfloat16())
    return dense


@pytest.mark.parametrize("form", FORMS)
def test_logits_are_those_of_the_dequantised_model(plain: DeepSeekV3, form: str) -> None:
    model, dense = copy.deepcopy(plain), dequantised(plain, FORMS[form])
    pack(model, FORMS[form])
    ours, theirs, before = (m(ids(2, 20)) for m in (model, dense, plain))
    assert ours.logits_BTV.dtype == torch.float32 and not ours.logits_BTV.requires_grad
    for one, other in zip([ours.logits_BTV, *ours.mtp_logits], [theirs.logits_BTV, *theirs.mtp_logits]):
        # Sums in another order: now and then an activation between two codes is rounded to the other one.
        error = (one - other).abs()
        assert float(error.median()) <= 1e-4
        assert float(error.max()) <= (1e-4 if form == "dense" else 0.3)
    off = float((ours.logits_BTV - before.logits_BTV.detach()).abs().mean())
    low, high = {"dense": (0, 1e-5), "int8": (1e-3, 0.1), "int4": (0.1, 1), "int4 g32": (0.1, 1)}[form]
    assert low <= off < high
    assert generate(model, [3, 1, 4], 8) == generate(dense, [3, 1, 4], 8)


def test_bf16_weights_stay_so_and_activations_are_fp32(plain: DeepSeekV3) -> None:
    model = copy.deepcopy(plain).bfloat16()
    dense = copy.deepcopy(model).float()
    pack(model)
    assert {module.weight.dtype for _, module in matrices(model)} == {torch.bfloat16}
    ours = model(ids(2, 9)).logits_BTV
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, dense(ids(2, 9)).logits_BTV, atol=1e-4, rtol=1e-4)


def test_what_is_kept_in_which_format(plain: DeepSeekV3) -> None:
    for bits, group in ((8, 128), (4, 32)):
        model = copy.deepcopy(plain)
        pack(model, Integers(bits, group))
        kinds = {path: module.kind for path, module in matrices(model)}
        assert len(kinds) == 4 * 5 + 3 + 3 * 6 + 2  # attention; dense; routed and shared; eh_proj and head
        finer = {path for path in kinds if path.endswith(("lm_head", "kv_b_proj"))}
        assert len(finer) == 5
        for path, kind in kinds.items():
            assert kind is (Int8 if bits == 8 or path in finer else Int4), path
        state = model.state_dict()
        floats = {name: tensor.dtype for name, tensor in state.items() if tensor.is_floating_point()}
        assert floats.pop("model.embed_tokens.weight") == torch.bfloat16
        assert set(floats.values()) == {torch.float32}
        assert not any(parameter.requires_grad for parameter in model.parameters())
        gate, up, down = model.model.layers[1].mlp.experts.packed
        assert gate.scales.shape == ((16, 2, 16) if bits == 8 else (16, 2, 3, 16)) and type(up) is type(down)


@pytest.mark.parametrize("form", FORMS)
def test_one_matrix_an_expert_alone(plain: DeepSeekV3, form: str) -> None:
    model, dense = copy.deepcopy(plain), dequantised(plain, FORMS[form])
    pack(model, FORMS[form])
    x, counts = torch.randn(5, 72), torch.tensor([0, 2, 0, 3] + [0] * 12)
    ours, theirs = (m.model.layers[1].mlp.experts.up_proj(x, counts) for m in (model, dense))
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_casts_leave_numbers_and_scales_alone(plain: DeepSeekV3) -> None:
    model = copy.deepcopy(plain)
    pack(model, Integers(4, 32))
    before = {name: tensor.clone() for name, tensor in model.named_buffers()}
    for cast in (DeepSeekV3.bfloat16, DeepSeekV3.half, DeepSeekV3.float):
        cast(model)
        for name, tensor in model.named_buffers():
            assert tensor.dtype == before[name].dtype and torch.equal(tensor, before[name]), name


def test_on_the_meta_device_it_makes_the_shapes(plain: DeepSeekV3) -> None:
    with torch.device("meta"):
        bare = DeepSeekV3(plain.config)
    real = copy.deepcopy(plain)
    for model in (bare, real):
        pack(model, Integers(4, 64))
    found, wanted = bare.state_dict(), real.state_dict()
    assert all(tensor.is_meta for tensor in found.values()) and list(found) == list(wanted)
    assert all((found[k].dtype, found[k].shape) == (wanted[k].dtype, wanted[k].shape) for k in wanted)


def test_refusals(plain: DeepSeekV3) -> None:
    model = copy.deepcopy(plain)
    pack(model, Integers(8))
    with pytest.raises(UserError, match="is a PackedLinear: only a plain model"):
        pack(model, Integers(8))
    with torch.device("meta"):
        bare = DeepSeekV3(plain.config)
    frozen.freeze(bare)
    with pytest.raises(UserError, match="is a FrozenLinear"):
        pack(bare, Integers(8))
    with pytest.raises(UserError, match=r"group \(48\) must be one of 32, 64, 128"):
        Integers(4, 48)
    with pytest.raises(UserError, match=r"bits \(5\)"):
        Integers(5)


def test_products_go_through_ops(plain: DeepSeekV3, monkeypatch: pytest.MonkeyPatch) -> None:
    """Experts multiply as one, and nothing goes another way."""
    model = copy.deepcopy(plain)
    pack(model, Integers(8))
    seen: list[str] = []
    linear, experts = packed.packed.linear, packed.packed.experts
    monkeypatch.setattr(packed.packed, "linear", lambda *a: seen.append("linear") or linear(*a))
    monkeypatch.setattr(packed.packed, "experts", lambda *a: seen.append("experts") or experts(*a))
    model(ids(1, 4), mtp=False)
    count = sum(type(m) is packed.PackedLinear for m in model.modules())
    assert not any(type(m) in (Linear, Experts) for m in model.modules())
    mtp = 5 + 3 + 1  # attention, shared, eh_proj
    assert seen.count("experts") == 2 and seen.count("linear") == count - mtp


def test_what_was_swapped_stays_as_it_is(plain: DeepSeekV3) -> None:
    with torch.device("meta"):
        bare = DeepSeekV3(plain.config)
    frozen.freeze(bare)
    pack(bare)
    kinds = {type(module).__name__ for _, module in matrices(bare)}
    assert kinds == {"FrozenLinear", "FrozenGroupedLinear", "PackedLinear"}
    assert isinstance(bare.lm_head, PackedLinear) and bare.lm_head.packed is bare.lm_head.weight
