"""Gathering rows for experts and summing them back."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dsv3.ops.permute import (
    expert_order,
    gather_rows,
    gather_rows_reference,
    weighted_sum,
    weighted_sum_reference,
)
from tests.ops.compare import agree


@st.composite
def choices(draw: st.DrawFn) -> Tensor:
    """``[N, K]`` distinct experts a token, sometimes the same for all."""
    experts = draw(st.integers(1, 8))
    tokens, chosen = draw(st.integers(1, 9)), draw(st.integers(1, experts))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    rows = 1 if draw(st.booleans()) else tokens
    picked = torch.rand(rows, experts, generator=generator).topk(chosen)[1]
    return picked.expand(tokens, -1).contiguous()


@given(choices())
def test_order(indices: Tensor) -> None:
    """Rows by expert, ties by token, and the inverse leads back."""
    order, inverse = expert_order(indices)
    pairs = [(expert, flat) for flat, expert in enumerate(indices.flatten().tolist())]
    assert [(indices.flatten()[flat].item(), flat) for flat in order.tolist()] == sorted(pairs)
    assert torch.equal(order[inverse.flatten()], torch.arange(indices.numel()))
    assert inverse.shape == indices.shape


@given(choices(), st.integers(1, 7))
def test_gather_and_sum(indices: Tensor, hidden: int) -> None:
    order, inverse = expert_order(indices)
    x = torch.randn(len(indices), hidden)
    gates = torch.rand(indices.shape)
    y = torch.randn(indices.numel(), hidden)
    agree(lambda x: gather_rows(x, order, inverse), lambda x: gather_rows_reference(x, order, inverse), x)
    agree(
        lambda y, g: weighted_sum(y, g, order, inverse),
        lambda y, g: weighted_sum_reference(y, g, order, inverse),
        y,
        gates,
    )


@given(choices())
def test_gather_then_sum_is_multiplication_by_the_gates(indices: Tensor) -> None:
    order, inverse = expert_order(indices)
    x, gates = torch.randn(len(indices), 4), torch.rand(indices.shape)
    back = weighted_sum(gather_rows(x, order, inverse), gates, order, inverse)
    assert torch.allclose(back, x * gates.sum(1, keepdim=True), atol=1e-5)


@given(choices())
def test_rows_carry_the_token_their_expert_was_chosen_by(indices: Tensor) -> None:
    order, inverse = expert_order(indices)
    tokens = torch.arange(len(indices), dtype=torch.float32)[:, None]
    rows = gather_rows(tokens, order, inverse)[:, 0].long()
    experts = indices.flatten().sort()[0]
    for row, expert in zip(rows.tolist(), experts.tolist()):
        assert expert in indices[row].tolist()


def test_gradcheck() -> None:
    indices = torch.tensor([[0, 2], [2, 1], [0, 1]])
    order, inverse = expert_order(indices)
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    y = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    gates = torch.rand(3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: gather_rows(x, order, inverse), (x,))
    assert torch.autograd.gradcheck(lambda y, g: weighted_sum(y, g, order, inverse), (y, gates))


def test_bfloat16_rows_with_fp32_gates() -> None:
    indices = torch.rand(12, 8).topk(3)[1]
    order, inverse = expert_order(indices)
    x, y = torch.randn(12, 6).bfloat16(), torch.randn(36, 6).bfloat16()
    agree(
        lambda x: gather_rows(x, order, inverse),
        lambda x: gather_rows_reference(x, order, inverse),
        x,
        tolerance=0.02,
    )
    agree(
        lambda y, g: weighted_sum(y, g, order, inverse),
        lambda y, g: weighted_sum_reference(y, g, order, inverse),
        y,
        torch.rand(12, 3),
        tolerance=0.02,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_incoming_gradient_is_left_alone(dtype: torch.dtype) -> None:
    """The backward scales in place; what it scales must not be the caller's gradient."""
    indices = torch.tensor([[0], [1], [2]])
    order, inverse = expert_order(indices)
    y = torch.randn(3, 4).to(dtype).requires_grad_()
    grad = torch.ones(3, 4, dtype=dtype)
    weighted_sum(y, torch.full((3, 1), 0.5), order, inverse).backward(grad)
    assert torch.equal(grad, torch.ones(3, 4, dtype=dtype))
    assert torch.equal(y.grad, torch.full((3, 4), 0.5, dtype=dtype))
