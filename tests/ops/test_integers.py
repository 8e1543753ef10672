"""INT8 and INT4 against a loop over rows and groups; edges, packing, and what is not finite."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dsv3.common.errors import UserError
from dsv3.ops.integers import quantise_int4, quantise_int8, rounded


def drawn(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator) * torch.exp(torch.randn(shape, generator=generator))


def test_int8_against_a_loop_over_rows() -> None:
    w = drawn(5, 77)
    q = quantise_int8(w)
    assert q.values.dtype == torch.uint8 and q.values.shape == (1, 20, 16, 4) and q.scales.shape == (1, 16)
    for row, values, scale, back in zip(w, q.numbers(), q.scales[0], q.dequantise()):
        step = float(row.abs().max()) / 127
        assert float(scale) == pytest.approx(step)
        assert values.tolist() == [round(float(x) / float(scale)) for x in row]
        assert float((back - row).abs().max()) <= step / 2 * (1 + 1e-5)
    assert int(q.numbers().abs().max()) == 127


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("inputs", [128, 200, 31, 1])
def test_int4_against_a_loop_over_groups(group: int, inputs: int) -> None:
    w = drawn(3, inputs)
    q = quantise_int4(w, group)
    assert q.values.shape == (1, -(-inputs // 8), 16, 4) and q.scales.shape == (1, -(-inputs // group), 16)
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


def test_outputs_lie_beside_each_other() -> None:
    w = torch.arange(-127.0, 129.0).clamp(max=127).view(32, 8)
    w[:, 0] = 127  # a scale of 1
    q = quantise_int8(w)
    for block, quad, output, place in itertools.product(range(2), range(2), range(16), range(4)):
        assert q.values[block, quad, output, place] == 128 + w[16 * block + output, 4 * quad + place]


def test_the_first_four_numbers_are_in_the_low_halves() -> None:
    up = torch.linspace(-8.0, 7.0, 16)  # numbers 0 .. 15 exactly
    w = torch.stack((torch.cat((up, up.flip(0))), torch.cat((up.flip(0), up))))
    q = quantise_int4(w, 32)
    assert q.values[0, 0, 0].tolist() == [16 * (4 + i) + i for i in range(4)]
    assert q.values[0, 3, 1].tolist() == [16 * (12 + i) + 8 + i for i in range(4)]
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


@pytest.mark.parametrize("inputs", [1, 127, 128, 300])
def test_activations_against_a_loop_over_tiles(inputs: int) -> None:
    x = drawn(3, inputs)
    for row, found in zip(x, rounded(x)):
        for first in range(0, inputs, 128):
            part = row[first : first + 128]
            step = float(part.abs().max()) / 127
            wanted = torch.tensor([step * round(float(number) / step) for number in part])
            torch.testing.assert_close(found[first : first + 128], wanted, rtol=1e-6, atol=1e-7)


def test_activations_at_the_edges() -> None:
    x = torch.zeros(4, 256)
    x[1, 5], x[2, 200], x[3, 0] = float("inf"), float("nan"), 1e-38
    found = rounded(x)
    assert not found[0].any() and not found[3].any()
    assert found[1].isnan().tolist() == [True] * 128 + [False] * 128
    assert found[2].isnan().tolist() == [False] * 128 + [True] * 128
