"""FP8 Linears and experts against a composition in float64; what stays as it was; every switch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dsv3.config.fp8 import FP8Section
from dsv3.config.model import ModelConfig
from dsv3.data.loader import Batch
from dsv3.model import DeepSeekV3
from dsv3.model.linear import MLP, Embedding, Experts, Linear
from dsv3.model.moe import Gate
from dsv3.ops.blocks import BLOCK, COLUMN, ROW, WHOLE, dequantise_reference, quantise_reference
from dsv3.ops.formats import E4M3, E5M6
from dsv3.quant.fp8 import FP8MLP, FP8Experts, FP8Linear, Recipe, apply
from dsv3.train import recompute
from dsv3.train.objective import Share, language_loss

CONFIG: dict[str, Any] = dict(
    vocab_size=96, hidden_size=160, intermediate_size=200, moe_intermediate_size=144, num_hidden_layers=2,
    num_nextn_predict_layers=1, first_k_dense_replace=1, num_attention_heads=2, q_lora_rank=48,
    kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=24, n_routed_experts=6,
    n_shared_experts=1, num_experts_per_tok=2, n_group=2, topk_group=1, max_position_embeddings=64,
    aux_loss_alpha=0.0, initializer_range=0.05,
)  # fmt: skip


def rounded(x: Tensor, tile: Any, counts: list[int] | None = None, **options: Any) -> Tensor:
    """What the reference quantiser makes of a tensor, in float64."""
    counts_E = None if counts is None else torch.tensor(counts)
    q = quantise_reference(x.float(), tile, counts_E=counts_E, **options)
    return dequantise_reference(q).double()


def weight(w: Tensor, tile: Any = BLOCK) -> Tensor:
    return rounded(w, tile, smallest_amax=0.0)


def gradient(g: Tensor, tile: Any, counts: list[int] | None = None, power: bool = False) -> Tensor:
    return rounded(g, tile, counts, smallest_amax=0.0, power_of_two_scales=power)


def relative(ours: Tensor | None, wanted: Tensor) -> float:
    assert ours is not None
    return float((ours.double() - wanted).norm() / wanted.norm())


def drawn(*shape: int, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator) * scale


def make_linear(after_attention: bool = False, **switches: Any) -> FP8Linear:
    plain = Linear(200, 140)
    plain.weight.data = drawn(140, 200, scale=0.1)
    return FP8Linear(plain, Recipe(FP8Section(**switches)), after_attention)


def through(module: Any, x: Tensor, g: Tensor, *inputs: Any) -> tuple[Tensor, Tensor]:
    """Output, and the gradient of ``x`` for the gradient ``g`` of the output."""
    x = x.clone().requires_grad_()
    out = module(x, *inputs)
    out.backward(g)
    assert x.grad is not None
    return out.detach(), x.grad


def test_a_linear_is_three_products_of_rounded_numbers() -> None:
    linear, x, g = make_linear(), drawn(150, 200), drawn(150, 140, scale=1e-7)
    out, grad_x = through(linear, x, g)
    w = weight(linear.weight.detach())
    assert relative(out, rounded(x, ROW) @ w.T) < 1e-6
    assert relative(grad_x, gradient(g, ROW) @ w) < 1e-6
    kept = rounded(rounded(x, ROW), COLUMN)  # what was kept, quantised again the other way
    assert relative(linear.weight.grad, gradient(g, COLUMN).T @ kept) < 1e-6


def test_after_attention_the_input_is_kept_in_e5m6_with_powers_of_two() -> None:
    linear, x, g = make_linear(after_attention=True), drawn(150, 200), drawn(150, 140)
    out, _ = through(linear, x, g)
    w = weight(linear.weight.detach())
    power = dict(power_of_two_scales=True)
    assert relative(out, rounded(x, ROW, **power) @ w.T) < 1e-6
    kept = rounded(rounded(x, ROW, kind=E5M6, **power), COLUMN, kind=E4M3, **power)
    assert relative(linear.weight.grad, gradient(g, COLUMN).T @ kept) < 1e-6


@pytest.mark.parametrize(
    ("switches", "kept"),
    [
        (dict(cache="full"), lambda x: rounded(x, COLUMN)),
        (dict(activation_tile="tensor"), lambda x: rounded(x, WHOLE)),
        (dict(activation_tile="128x128"), lambda x: rounded(x, BLOCK)),
    ],
    ids=["cache full", "tensor", "128x128"],
)
def test_what_a_linear_keeps(switches: dict[str, Any], kept: Any) -> None:
    linear, x, g = make_linear(**switches), drawn(150, 200), drawn(150, 140)
    through(linear, x, g)
    assert relative(linear.weight.grad, gradient(g, COLUMN).T @ kept(x)) < 1e-6


@pytest.mark.parametrize(("name", "tile"), [("128x128", BLOCK), ("tensor", WHOLE)])
def test_tiles_of_gradients_and_weights(name: str, tile: Any) -> None:
    switches: dict[str, Any] = {"gradient_tile": name}
    if name == "tensor":
        switches["weight_tile"] = name
    linear, x, g = make_linear(**switches), drawn(150, 200), drawn(150, 140)
    _, grad_x = through(linear, x, g)
    w = weight(linear.weight.detach(), WHOLE if name == "tensor" else BLOCK)
    assert relative(grad_x, gradient(g, tile) @ w) < 1e-6
    assert relative(linear.weight.grad, gradient(g, tile).T @ rounded(rounded(x, ROW), COLUMN)) < 1e-6


@pytest.mark.parametrize(
    ("after_attention", "switches", "kept"),
    [
        (False, {}, (torch.float8_e4m3fn, torch.float32)),
        (True, {}, (torch.uint8, torch.float32)),
        (True, dict(attention_output="e4m3"), (torch.float8_e4m3fn, torch.float32)),
        (False, dict(cache="full"), (torch.float32,)),
        (True, dict(attention_output="full"), (torch.float32,)),
    ],
    ids=str,
)
def test_only_what_was_asked_is_kept(after_attention: bool, switches: Any, kept: Any) -> None:
    linear, found = make_linear(after_attention, **switches), []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: found.append(x) or x, lambda x: x):
        linear(drawn(150, 200).requires_grad_())
    assert tuple(x.dtype for x in found if x is not linear.weight) == kept


def expert_loop(
    x: Tensor, g: Tensor, weights: list[Tensor], counts: list[int] | None, section: FP8Section
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Output, gradient of x, gradients of gate, up and down: one expert at a time, in float64."""
    power = counts is not None and section.power_of_two_scales
    stacked = [w if w.dim() == 3 else w[None] for w in weights]
    outs, grads = [], []
    weight_grads: list[list[Tensor]] = [[], [], []]
    start = 0
    for expert, count in enumerate(counts or [x.shape[0]]):
        rows = slice(start, start + count)
        start += count
        gate_w, up_w, down_w = (weight(w[expert]) for w in stacked)
        x_rows = rounded(x[rows], ROW, power_of_two_scales=power)
        gate, up = x_rows @ gate_w.T, x_rows @ up_w.T
        hidden = rounded(F.silu(gate) * up, ROW)
        outs.append(hidden @ down_w.T)
        if section.swiglu == "fp8":
            gate, up = rounded(gate, ROW), rounded(up, ROW)
        made_again = F.silu(gate) * up
        weight_grads[2].append(gradient(g[rows], COLUMN, power=power).T @ rounded(made_again, COLUMN))
        hidden_grad = gradient(g[rows], ROW, power=power) @ down_w
        gate_leaf, up_leaf = gate.clone().requires_grad_(), up.clone().requires_grad_()
        (F.silu(gate_leaf) * up_leaf).backward(hidden_grad)
        assert gate_leaf.grad is not None and up_leaf.grad is not None
        gate_grad, up_grad = gate_leaf.grad, up_leaf.grad
        grads.append(gradient(gate_grad, ROW) @ gate_w + gradient(up_grad, ROW) @ up_w)
        x_columns = rounded(x_rows, COLUMN, power_of_two_scales=power)
        weight_grads[0].append(gradient(gate_grad, COLUMN).T @ x_columns)
        weight_grads[1].append(gradient(up_grad, COLUMN).T @ x_columns)
    return torch.cat(outs), torch.cat(grads), [torch.stack(found) for found in weight_grads]


@pytest.mark.parametrize("swiglu", ["fp8", "full"])
@pytest.mark.parametrize("counts", [None, [0, 140, 1, 9, 0, 50]], ids=["dense", "experts"])
def test_swiglu_against_one_expert_at_a_time(counts: list[int] | None, swiglu: Any) -> None:
    section = FP8Section(swiglu=swiglu)
    experts = len(counts or [1])
    plain: Any = MLP(160, 144) if counts is None else Experts(experts, 160, 144)
    for parameter in plain.parameters():
        parameter.data = drawn(*parameter.shape, scale=0.1)
    x, g = drawn(200, 160), drawn(200, 160, scale=1e-6)
    module: Any = FP8MLP(plain, Recipe(section)) if counts is None else FP8Experts(plain, Recipe(section))
    extra = () if counts is None else (torch.tensor(counts),)
    out, grad_x = through(module, x, g, *extra)
    weights = [module.gate_proj.weight, module.up_proj.weight, module.down_proj.weight]
    wanted, wanted_x, wanted_w = expert_loop(x, g, [w.detach() for w in weights], counts, section)
    # A number that falls on the other side of a rounding border in FP32 than in float64 moves by a step.
    assert relative(out, wanted) < 1e-3
    assert relative(grad_x, wanted_x) < 2e-3
    for ours, grad in zip(weights, wanted_w):
        assert relative(ours.grad if counts else ours.grad[None], grad) < 2e-3
        if counts:
            assert not ours.grad[0].any() and not ours.grad[4].any()


def train_once(model: DeepSeekV3) -> tuple[float, dict[str, Tensor]]:
    tokens = torch.randint(0, 96, (2, 34), generator=torch.Generator().manual_seed(3))
    loss, _ = language_loss(model, Batch(tokens), 32, Share([64, 64], 2), 0.3)
    loss.backward()
    return float(loss.detach()), {
        name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None
    }


def test_apply_swaps_what_the_report_swaps_and_nothing_else() -> None:
    model = DeepSeekV3(ModelConfig(**CONFIG))
    parameters, names = list(model.parameters()), list(model.state_dict())
    apply(model, FP8Section())
    assert [id(p) for p in model.parameters()] == [id(p) for p in parameters]
    assert list(model.state_dict()) == names
    plain = {
        name for name, module in model.named_modules()
        if type(module) in (Linear, Embedding, Gate) and "mlp.experts" not in name and "_experts." not in name
    }  # fmt: skip
    kept = {"model.embed_tokens", "lm_head", "model.layers.2.eh_proj", "model.layers.1.mlp.gate"}
    inside_mlp = {f"model.layers.0.mlp.{name}_proj" for name in ("gate", "up", "down")}  # FP8MLP's own
    assert plain == kept | inside_mlp | {"model.layers.2.mlp.gate"}
    for layer in model.model.layers:
        linears = {name for name, m in layer.self_attn.named_children() if isinstance(m, Linear)}
        swapped = {name for name, m in layer.self_attn.named_children() if isinstance(m, FP8Linear)}
        assert swapped == linears == {"q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"}
        assert [name for name in swapped if layer.self_attn.get_submodule(name).after_attention] == ["o_proj"]
    assert isinstance(model.model.layers[0].mlp, FP8MLP)
    assert isinstance(model.model.layers[1].mlp.experts, FP8Experts)
    assert isinstance(model.model.layers[1].mlp.shared_experts, FP8MLP)


@pytest.mark.parametrize("what", ["report", "layer"])
def test_recompute_changes_no_gradient(what: Any) -> None:
    results = []
    for again in ("none", what):
        model = DeepSeekV3(ModelConfig(**CONFIG))
        apply(model, FP8Section())
        recompute.apply(model, again)
        results.append(train_once(model))
    assert results[0][0] == results[1][0]
    for name, grad in results[0][1].items():
        assert torch.equal(grad, results[1][1][name]), name


def test_master_weights_and_their_gradients_stay_fp32_under_bf16() -> None:
    model = DeepSeekV3(ModelConfig(**CONFIG))
    model.model.embed_tokens.compute_dtype = torch.bfloat16
    apply(model, FP8Section())
    loss, grads = train_once(model)
    assert abs(loss / train_once(DeepSeekV3(ModelConfig(**CONFIG)))[0] - 1) < 2e-2
    assert {grad.dtype for grad in grads.values()} == {torch.float32}


def test_a_changed_weight_is_seen_at_once() -> None:
    linear, x = make_linear(), drawn(3, 200)
    before = linear(x).detach()
    with torch.no_grad():
        linear.weight.mul_(2)
    torch.testing.assert_close(linear(x).detach(), 2 * before)
