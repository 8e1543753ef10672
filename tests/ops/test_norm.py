"""RMSNorm: values and gradients, in each dtype."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dsv3.ops.norm import rms_norm, rms_norm_reference
from tests.ops.compare import agree

shapes = st.lists(st.integers(1, 5), min_size=1, max_size=3)


@given(shapes, st.integers(1, 9), st.sampled_from([1e-6, 1e-2, 1.0]))
def test_values_and_gradients(leading: list[int], width: int, eps: float) -> None:
    x, weight = torch.randn(*leading, width), torch.randn(width)
    agree(lambda x, w: rms_norm(x, w, eps), lambda x, w: rms_norm_reference(x, w, eps), x, weight)


def test_against_float64_by_hand() -> None:
    x, weight = torch.randn(6, 10), torch.randn(10)
    for row, got in zip(x.double(), rms_norm(x, weight, 1e-6)):
        rms = (sum(float(value) ** 2 for value in row) / 10 + 1e-6) ** 0.5
        assert torch.allclose(got.double(), row / rms * weight.double(), rtol=1e-5)


@pytest.mark.parametrize("shape", [(4,), (3, 5), (2, 3, 4), (1, 1, 1)])
def test_gradcheck(shape: tuple[int, ...]) -> None:
    x = torch.randn(*shape, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(shape[-1], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, 1e-2), (x, weight))


def test_bfloat16_keeps_its_dtype_and_fp32_statistics() -> None:
    x = (torch.randn(5, 512) + 3).bfloat16()
    weight = torch.rand(512) + 0.5
    got = rms_norm(x, weight, 1e-6)
    assert got.dtype == torch.bfloat16
    exact = rms_norm(x.float(), weight, 1e-6)
    assert (
        float(((got.float() - exact) / exact).abs().max()) < 3.1 * 2**-8
    )  # weight, norm and product: three roundings
    agree(
        lambda x, w: rms_norm(x, w, 1e-6), lambda x, w: rms_norm_reference(x, w, 1e-6), x, weight,
        tolerance=0.02,
    )  # fmt: skip


def test_zero_and_noncontiguous_rows() -> None:
    weight = torch.randn(4)
    zero = torch.zeros(2, 4, requires_grad=True)
    out = rms_norm(zero, weight, 1e-6)
    out.sum().backward()
    assert torch.equal(out, torch.zeros(2, 4)) and zero.grad.isfinite().all()
    x = torch.randn(4, 6)
    agree(lambda x, w: rms_norm(x.T, w, 1e-6), lambda x, w: rms_norm_reference(x.T, w, 1e-6), x, weight)


def test_split_of_a_wider_tensor() -> None:
    """As MLA uses it: the latent is a slice of [latent ; rope], and the gradient goes to the slice."""
    x, weight = torch.randn(2, 3, 7), torch.randn(4)
    agree(
        lambda x, w: rms_norm(x[..., :4], w, 1e-6),
        lambda x, w: rms_norm_reference(x[..., :4], w, 1e-6),
        x,
        weight,
    )


def test_compiles() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(lambda x, w: rms_norm(x, w, 1e-6), fullgraph=True, backend="aot_eager")
    agree(compiled, lambda x, w: rms_norm_reference(x, w, 1e-6), torch.randn(3, 8), torch.randn(8))
