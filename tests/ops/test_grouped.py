"""Grouped products against their loop over experts: values, gradients, empty experts, compile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dsv3.ops.grouped import (
    grouped_linear,
    grouped_linear_reference,
    grouped_swiglu,
    grouped_swiglu_reference,
)
from tests.ops.compare import agree

COUNTS = {
    "even": [3, 3, 3],
    "empty_in_between": [0, 4, 0, 0, 2, 0],
    "all_to_one": [0, 0, 7],
    "one_row": [0, 1, 0],
    "one_expert": [5],
    "no_rows": [0, 0],
}
counts_of_experts = st.lists(st.integers(0, 5), min_size=1, max_size=6)
width = st.integers(1, 9)


def linear_inputs(
    counts: list[int], i: int = 5, o: int = 3, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    return [
        torch.randn(sum(counts), i, dtype=dtype),
        torch.randn(len(counts), o, i, dtype=dtype),
        torch.tensor(counts),
    ]


def swiglu_inputs(
    counts: list[int], d: int = 5, f: int = 3, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    experts = len(counts)
    return [
        torch.randn(sum(counts), d, dtype=dtype),
        torch.randn(experts, f, d, dtype=dtype),
        torch.randn(experts, f, d, dtype=dtype),
        torch.randn(experts, d, f, dtype=dtype),
        torch.tensor(counts),
    ]


@given(counts_of_experts, width, width)
def test_linear(counts: list[int], i: int, o: int) -> None:
    agree(grouped_linear, grouped_linear_reference, *linear_inputs(counts, i, o))


@given(counts_of_experts, width, width)
def test_swiglu(counts: list[int], d: int, f: int) -> None:
    agree(grouped_swiglu, grouped_swiglu_reference, *swiglu_inputs(counts, d, f))


@pytest.mark.parametrize("name", COUNTS)
def test_bfloat16(name: str) -> None:
    agree(
        grouped_linear, grouped_linear_reference, *linear_inputs(COUNTS[name], 16, 8, torch.bfloat16),
        tolerance=0.02,
    )  # fmt: skip
    agree(
        grouped_swiglu, grouped_swiglu_reference, *swiglu_inputs(COUNTS[name], 16, 8, torch.bfloat16),
        tolerance=0.03,
    )  # fmt: skip


@pytest.mark.parametrize("name", COUNTS)
def test_gradcheck(name: str) -> None:
    """Numerical derivatives in FP64."""
    for function, make in ((grouped_linear, linear_inputs), (grouped_swiglu, swiglu_inputs)):
        *floats, counts = make(COUNTS[name], dtype=torch.float64)
        for tensor in floats:
            tensor.requires_grad_()
        assert torch.autograd.gradcheck(lambda *x: function(*x, counts), tuple(floats))  # noqa: B023


def test_an_expert_without_rows_gets_a_zero_gradient() -> None:
    x, *weights, counts = swiglu_inputs([2, 0, 1])
    weights = [w.requires_grad_() for w in weights]
    grouped_swiglu(x, *weights, counts).sum().backward()
    for w in weights:
        assert torch.equal(w.grad[1], torch.zeros_like(w[1]))
        assert w.grad[0].abs().min() > 0


@pytest.mark.parametrize("trained", [[0], [1], [2], [3], [0, 3]])
def test_gradient_of_some_inputs_only(trained: list[int]) -> None:
    wanted = swiglu_inputs([3, 2])
    ours = [x.clone() for x in wanted]
    for index in trained:
        ours[index].requires_grad_()
        wanted[index].requires_grad_()
    grouped_swiglu(*ours).square().sum().backward()
    grouped_swiglu_reference(*wanted).square().sum().backward()
    for index in range(4):
        if index in trained:
            assert torch.allclose(ours[index].grad, wanted[index].grad, rtol=1e-4, atol=1e-4)
        else:
            assert ours[index].grad is None


def strided(x: Tensor) -> Tensor:
    """The same values in a tensor whose last dimension is not the innermost in memory."""
    return x.transpose(-1, -2).contiguous().transpose(-1, -2)


def test_inputs_need_not_be_contiguous() -> None:
    x, w, counts = linear_inputs([3, 0, 4], 6, 8)
    wanted = grouped_linear_reference(x, w, counts)
    assert torch.allclose(grouped_linear(strided(x), strided(w), counts), wanted, atol=1e-5)
    inputs = swiglu_inputs([3, 0, 4], 6, 8)
    agree(
        lambda x, g, u, d: grouped_swiglu(strided(x), strided(g), strided(u), strided(d), inputs[4]),
        lambda x, g, u, d: grouped_swiglu_reference(x, g, u, d, inputs[4]),
        *inputs[:4],
    )


def test_incoming_gradient_may_be_expanded() -> None:
    """``sum().backward()`` sends a gradient of stride zero."""
    inputs = [x.requires_grad_() if x.is_floating_point() else x for x in linear_inputs([2, 3])]
    grouped_linear(*inputs).sum().backward()
    assert torch.allclose(inputs[0].grad[0], inputs[1][0].sum(0), atol=1e-5)


@pytest.mark.parametrize("function, make", [(grouped_linear, linear_inputs), (grouped_swiglu, swiglu_inputs)])
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_as_one_graph(function: Callable[..., Any], make: Callable[..., Any], backend: str) -> None:
    """torch.compile(fullgraph) with forward and backward; another load does not break it."""
    torch._dynamo.reset()
    compiled = torch.compile(lambda *x: function(*x) * 2, fullgraph=True, backend=backend)
    for counts in ([2, 0, 3], [0, 4, 1]):
        agree(compiled, lambda *x: function(*x) * 2, *make(counts))


@pytest.mark.parametrize("name", ["grouped_linear", "grouped_swiglu"])
def test_operator_registration(name: str) -> None:
    """torch's own check of schema, fake tensors and autograd registration."""
    make = linear_inputs if name == "grouped_linear" else swiglu_inputs
    inputs = [x.requires_grad_() if x.is_floating_point() else x for x in make([2, 0, 3])]
    operator = getattr(torch.ops.dsv3, name).default
    torch.library.opcheck(operator, tuple(inputs))
