"""INT8 and INT4 against a loop over rows and groups; edges, packing, and what is not finite."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dsv3.common.errors import UserError
from dsv3.ops.integers import quantise_int4, quantise_int8


def drawn(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator) * torch.exp(torch.randn(shape, generator=generator))


def test_int8_against_a_loop_over_rows() -> None:
    w = drawn(5, 77)
    q = quantise_int8(w)
    for row, values, scale, back in zip(w, q.values, q.scales, q.dequantise()):
        step = float(row.abs().max()) / 127
        assert float(scale) == pytest.approx(step)
        assert values.tolist() == [round(float(x) / float(scale)) for x in row]
        assert float((back - row).abs().max()) <= step / 2 * (1 + 1e-5)
    assert q.values.dtype == torch.int8 and int(q.values.abs().max()) == 127


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("inputs", [128, 200, 31, 1])
def test_int4_against_a_loop_over_groups(group: int, inputs: int) -> None:
    w = drawn(3, inputs)
    q = quantise_int4(w, group)
    assert q.values.shape == (3, 16 * -(-inputs // 32)) and q.scales.shape == (3, -(-inputs // group))
    back, numbers = q.dequantise(), q.numbers()
    for row in range(3):
        for first in range(0, inputs, group):
            part = w[row, first : first + group]
            step = float(part.max() - part.min()) / 15
            error = (back[row, first : first + group] - part).abs().max()
            assert float(error) <= step / 2 * (1 + 1e-4) + 1e-7
            if len(part) > 1:
                codes = numbers[row, first : first + group]
                assert int(codes[part.argmin()]) == 0 and int(codes[part.argmax()]) == 15


def test_the_first_sixteen_numbers_are_in_the_low_halves() -> None:
    up = torch.linspace(-8.0, 7.0, 16)  # numbers 0 .. 15 exactly
    w = torch.cat((up, up.flip(0)))[None]
    q = quantise_int4(w, 32)
    assert q.values[0].tolist() == [16 * (15 - i) + i for i in range(16)]
    assert torch.equal(q.dequantise(), w)


@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 140))
def test_stacks_are_quantised_one_by_one(experts: int, outputs: int, inputs: int) -> None:
    w = drawn(experts, outputs, inputs)
    int8, int4 = quantise_int8(w).dequantise(), quantise_int4(w, 64).dequantise()
    for expert in range(experts):
        assert torch.equal(int8[expert], quantise_int8(w[expert]).dequantise())
        assert torch.equal(int4[expert], quantise_int4(w[expert], 64).dequantise())


@pytest.mark.parametrize("value", [0.0, 1.5, -3.0, 1e-42])
def test_a_constant_is_kept(value: float) -> None:
    w = torch.full((2, 64), value)
    torch.testing.assert_close(quantise_int4(w, 32).dequantise(), w, rtol=1e-6, atol=1e-37)
    torch.testing.assert_close(quantise_int8(w).dequantise(), w, rtol=1e-6, atol=1e-37)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_shows_in_its_group(bad: float) -> None:
    w = drawn(3, 128)
    w[1, 40] = bad
    rows, groups = quantise_int8(w).dequantise().isnan(), quantise_int4(w, 32).dequantise().isnan()
    assert rows.all(dim=1).tolist() == [False, True, False] and not rows[0].any() and not rows[2].any()
    assert groups[1].nonzero().flatten().tolist() == list(range(32, 64))
    assert not groups[0].any() and not groups[2].any()


def test_large_numbers_do_not_overflow() -> None:
    w = torch.tensor([[-1.7e38, 1.7e38] * 16])  # what lies between must be a number itself
    assert bool(quantise_int4(w, 32).dequantise().isfinite().all())
    assert bool(quantise_int8(w).dequantise().isfinite().all())


def test_an_odd_group_is_refused() -> None:
    with pytest.raises(UserError, match=r"group \(48\).*32, 64, 128"):
        quantise_int4(drawn(2, 96), 48)
