"""Causal attention: values and gradients for any widths, the document mask."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dsv3.ops.attention import causal_attention, causal_attention_reference, document_mask
from tests.ops.compare import agree

small = st.integers(1, 4)


def qkv(b: int, h: int, t: int, q: int, v: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.randn(b, h, t, width, dtype=dtype) for width in (q, q, v)]


@given(small, small, st.integers(1, 12), st.integers(1, 9), st.integers(1, 9), st.booleans())
def test_values_and_gradients(b: int, h: int, t: int, q: int, v: int, masked: bool) -> None:
    documents = torch.randint(3, (b, t)) if masked else None
    agree(
        lambda *x: causal_attention(*x, 0.3, documents),
        lambda *x: causal_attention_reference(*x, 0.3, documents),
        *qkv(b, h, t, q, v),
        tolerance=2e-5,
    )


@pytest.mark.parametrize("value_width", [2, 4, 7])
@pytest.mark.parametrize("masked", [False, True])
def test_gradcheck(value_width: int, masked: bool) -> None:
    documents = torch.tensor([[0, 0, 1, 1, 1]]) if masked else None
    inputs = tuple(x.requires_grad_() for x in qkv(1, 2, 5, 4, value_width, torch.float64))
    assert torch.autograd.gradcheck(lambda *x: causal_attention(*x, 0.4, documents), inputs)


def test_by_hand() -> None:
    """One query at a time, in Python."""
    q, k, v = qkv(1, 2, 5, 3, 4)
    out = causal_attention(q, k, v, 0.7)
    for head in range(2):
        for t in range(5):
            scores = [0.7 * float(q[0, head, t].double() @ k[0, head, s].double()) for s in range(t + 1)]
            powers = [math.exp(score) for score in scores]
            wanted = sum(p / sum(powers) * v[0, head, s].double() for s, p in enumerate(powers))
            assert torch.allclose(out[0, head, t].double(), wanted, atol=1e-5)


def test_bfloat16() -> None:
    agree(
        lambda *x: causal_attention(*x, 0.3),
        lambda *x: causal_attention_reference(*x, 0.3),
        *qkv(2, 2, 16, 12, 8, torch.bfloat16),
        tolerance=0.03,
    )


@given(st.lists(st.integers(0, 3), min_size=1, max_size=8))
def test_document_mask(documents: list[int]) -> None:
    """True exactly for an equal document number at the same place or earlier."""
    mask = document_mask(torch.tensor([documents]), len(documents))
    assert mask.shape == (1, 1, len(documents), len(documents))
    for query, mine in enumerate(documents):
        for key, theirs in enumerate(documents):
            assert bool(mask[0, 0, query, key]) == (mine == theirs and key <= query)
    last = document_mask(torch.tensor([documents]), 1)
    assert torch.equal(last, mask[:, :, -1:])


@given(small, small, st.integers(1, 6), st.integers(1, 12), st.booleans())
def test_the_last_queries_of_longer_keys(b: int, h: int, queries: int, more: int, masked: bool) -> None:
    """Their rows of the whole sequence's result; no gradient for a key that nobody sees."""
    q, k, v = qkv(b, h, queries + more, 5, 4)
    documents = torch.randint(3, (b, queries + more)) if masked else None
    last = slice(more, None)
    agree(
        lambda q, k, v: causal_attention(q[:, :, last], k, v, 0.3, documents),
        lambda q, k, v: causal_attention_reference(q, k, v, 0.3, documents)[:, :, last],
        *(q, k, v),
        tolerance=2e-5,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("masked", [False, True])
def test_blocks_of_the_last_queries(dtype: torch.dtype, masked: bool) -> None:
    """Longer than a block of queries, in both ways of computing."""
    q, k, v = qkv(1, 2, 400, 8, 8, dtype)
    documents = (torch.arange(400) // 90)[None] if masked else None
    agree(
        lambda q, k, v: causal_attention(q[:, :, 230:], k, v, 0.3, documents),
        lambda q, k, v: causal_attention_reference(q, k, v, 0.3, documents)[:, :, 230:],
        *(q, k, v),
        tolerance=2e-5 if dtype is torch.float32 else 0.03,
    )
