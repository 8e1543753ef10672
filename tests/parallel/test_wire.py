"""What rows become on their way: nothing, BF16, or FP8 that an expert quantises again without loss."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dsv3.ops.blocks import ROW, dequantise, quantise
from dsv3.parallel.wire import FP8, Cast, Wire


def travelled(wire: Wire, rows: torch.Tensor) -> torch.Tensor:
    message = wire.encode(rows)
    assert len(message) == len(rows)
    assert message[:1].nbytes in (0, wire.row_bytes(rows.shape[1], rows.dtype))
    return wire.decode(message.clone(), rows.shape[1], rows.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [0, 1, 5])
def test_dtype_and_shape_come_back(rows: int, dtype: torch.dtype) -> None:
    x = torch.randn(rows, 200).to(dtype)
    for wire in (Cast(), Cast(torch.bfloat16), FP8()):
        out = travelled(wire, x)
        assert out.shape == x.shape and out.dtype == dtype
    assert torch.equal(travelled(Cast(), x), x)
    assert torch.equal(travelled(Cast(torch.bfloat16), x), x.bfloat16().to(dtype))


@given(seed=st.integers(0, 10_000), exponent=st.integers(-20, 10), width=st.sampled_from([32, 128, 300]))
def test_experts_round_what_came_in_fp8_no_further(seed: int, exponent: int, width: int) -> None:
    """Powers of two as scales: quantising again, as an expert's Linear does, gives the same numbers."""
    x = torch.randn(4, width, generator=torch.Generator().manual_seed(seed)) * 2.0**exponent
    for smallest in (1e-4, 0.0):
        once = travelled(FP8(smallest), x)
        again = dequantise(quantise(once, ROW, power_of_two_scales=True, smallest_amax=smallest))
        assert torch.equal(once, again)
        assert torch.equal(
            once, dequantise(quantise(x, ROW, power_of_two_scales=True, smallest_amax=smallest))
        )


def test_a_row_in_fp8_is_a_quarter_and_its_scales() -> None:
    assert FP8().row_bytes(7168, torch.bfloat16) == 7168 + 4 * 56
    assert Cast(torch.bfloat16).row_bytes(7168, torch.float32) == 2 * 7168
