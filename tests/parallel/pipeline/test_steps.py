"""Passes in pieces and weight gradients that wait: the same numbers as in one go, in one process."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from dsv3.config.fp8 import FP8Section
from dsv3.model.attention import Context
from dsv3.model.layer import DecoderLayer
from dsv3.ops.rope import rotations
from dsv3.ops.weight_gradients import WeightGradients
from dsv3.parallel.pipeline import split
from dsv3.parallel.pipeline.steps import Cuts, Steps, finish, layer_steps, take_turns
from dsv3.quant import fp8
from tests.model.build import tiny_model

X = torch.randn(2, 9, 40, generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def layer() -> DecoderLayer:
    """A layer with experts."""
    return tiny_model().main_layers[2]


@pytest.fixture(scope="module")
def context() -> Context:
    """Positions 0 to 8."""
    model = tiny_model()
    return Context(rotations(torch.arange(9), model._frequency_P, model._rope_factor))


def gradients(module: nn.Module) -> dict[str, Tensor]:
    """By name; what was there is dropped."""
    found = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    for p in module.parameters():
        p.grad = None
    return found  # type: ignore[return-value]


def in_one_go(layer: DecoderLayer, context: Context) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Output, gradient of the input and of the weights for a loss with a balance loss in it."""
    x = X.clone().requires_grad_()
    out, stats = layer(x, context)
    assert stats is not None and stats.balance_loss is not None
    (out.square().sum() + 0.5 * stats.balance_loss).backward()
    assert x.grad is not None
    return out.detach(), x.grad, gradients(layer)


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    """The same names and numbers."""
    assert found.keys() == wanted.keys()
    for name, grad in wanted.items():
        assert (found[name] - grad).norm() <= tolerance * grad.norm() + 1e-12, name


def test_a_pass_in_pieces_stops_twice_each_way(layer: DecoderLayer, context: Context) -> None:
    wanted, grad, weights = in_one_go(layer, context)
    x, cuts = X.clone().requires_grad_(), Cuts()
    steps = layer_steps(layer, x, context, cuts)
    next(steps)
    next(steps)
    with pytest.raises(StopIteration) as stop:
        next(steps)
    out, stats = stop.value.value
    assert torch.equal(out, wanted) and stats.balance_loss.is_leaf
    root = out.square().sum() + 0.5 * stats.balance_loss
    back = cuts.backward((root,), (None,))
    assert [None for _ in back] == [None, None]
    torch.testing.assert_close(x.grad, grad, rtol=1e-5, atol=1e-6)
    assert_same(gradients(layer), weights)


def test_a_replaced_forward_runs_whole(layer: DecoderLayer, context: Context) -> None:
    whole = copy.deepcopy(layer)
    ran = []
    whole.forward = lambda *given: (ran.append(1), layer(*given))[1]  # type: ignore[assignment,method-assign]
    out, _ = finish(layer_steps(whole, X, context, Cuts()))
    assert ran == [1] and torch.equal(out, layer(X, context)[0])


def test_passes_take_turns_until_they_end() -> None:
    order = []

    def run(name: str, count: int) -> Steps[None]:
        for number in range(count):
            order.append(f"{name}{number}")
            yield

    take_turns(run("f", 2), run("b", 4))
    assert order == ["f0", "b0", "f1", "b1", "b2", "b3"]


@pytest.mark.parametrize(("format", "tolerance"), [("fp32", 1e-5), ("bf16", 1e-2), ("fp8", 1e-5)])
def test_weight_gradients_wait_and_are_the_same(
    layer: DecoderLayer, context: Context, format: str, tolerance: float
) -> None:
    """Nothing of the big matrices before the call, exactly the usual after, added to what is there."""
    plain = copy.deepcopy(layer)
    holder = nn.ModuleList([plain])
    if format == "fp8":
        fp8.apply(holder, FP8Section())
    x = X.to(torch.bfloat16 if format == "bf16" else torch.float32)

    def run(module: DecoderLayer) -> Tensor:
        given = x.clone().requires_grad_()
        out, _ = module(given, context)
        out.float().square().sum().backward()
        assert given.grad is not None
        return given.grad

    grad = run(plain)
    wanted = gradients(plain)
    later = WeightGradients()
    split.apply(holder, later)
    assert (run(plain) - grad).norm() <= tolerance * grad.norm()
    assert_same(gradients(plain), wanted, tolerance)

    later.waiting = True
    assert (run(plain) - grad).norm() <= tolerance * grad.norm()
    early = {name for name, p in plain.named_parameters() if p.grad is not None}
    assert early == {name for name in wanted if "norm" in name or name == "mlp.gate.weight"}
    first = later.take()
    run(plain)
    first()
    later.take()()
    assert_same(gradients(plain), {name: 2 * grad for name, grad in wanted.items()}, tolerance)
    later.take()()
    assert not gradients(plain)
