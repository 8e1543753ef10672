"""Number formats over all BF16 inputs, against torch's own casts and a search through every code."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dsv3.ops.formats import E4M3, E5M2, E5M6, FORMATS, Format, pack, power_of_two, round_to, unpack

EVERY_BF16 = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float()


def grid(kind: Format) -> Tensor:
    """Every finite number of a format, from its definition, in float64, sorted."""
    found = {0.0}
    for exponent in range(1 << kind.exponent):
        for mantissa in range(1 << kind.mantissa):
            if exponent == 0:
                value = math.ldexp(mantissa, kind.smallest_exponent - kind.mantissa)
            else:
                lead = (1 << kind.mantissa) + mantissa
                value = math.ldexp(lead, kind.smallest_exponent + exponent - 1 - kind.mantissa)
            if value <= kind.largest:
                found |= {value, -value}
    return torch.tensor(sorted(found), dtype=torch.float64)


@pytest.mark.parametrize("kind", [E4M3, E5M2])
def test_rounding_equals_torchs_casts_for_every_bf16(kind: Format) -> None:
    assert kind.dtype is not None
    clamped = EVERY_BF16.clamp(-kind.largest, kind.largest)
    cast = clamped.to(kind.dtype)
    assert torch.equal(round_to(EVERY_BF16, kind).nan_to_num(), cast.float().nan_to_num())
    assert torch.equal(round_to(EVERY_BF16, kind).isnan(), EVERY_BF16.isnan())
    numbers = ~EVERY_BF16.isnan()
    assert torch.equal(pack(EVERY_BF16, kind).view(torch.uint8)[numbers], cast.view(torch.uint8)[numbers])


@pytest.mark.parametrize("kind", FORMATS.values(), ids=FORMATS)
def test_rounding_finds_the_nearest_number(kind: Format) -> None:
    """Against a search of the whole grid; infinities become the largest number."""
    x = EVERY_BF16[~EVERY_BF16.isnan()]
    points = grid(kind)
    wanted = x.double().clamp(-kind.largest, kind.largest)
    above = points[torch.searchsorted(points, wanted).clamp(max=len(points) - 1)]
    below = points[(torch.searchsorted(points, wanted, right=True) - 1).clamp(min=0)]
    nearest = torch.minimum((wanted - below).abs(), (above - wanted).abs())
    ours = round_to(x, kind).double()
    assert bool(torch.isin(ours, points).all())
    assert torch.equal((ours - wanted).abs(), nearest)


def test_ties_go_to_the_even_number() -> None:
    assert round_to(torch.tensor([17.0, 19.0, -17.0, 2**-10, 3 * 2**-10]), E4M3).tolist() == [
        16.0, 20.0, -16.0, 0.0, 2**-8,
    ]  # fmt: skip
    assert round_to(torch.tensor([1 + 2**-7, 1 + 3 * 2**-7]), E5M6).tolist() == [1.0, 1 + 2**-5]


@pytest.mark.parametrize("width", [1, 2, 7, 128])
def test_e5m6_takes_twelve_bits_and_comes_back(width: int) -> None:
    x = torch.randn(5, width) * 100
    packed = pack(x, E5M6)
    assert packed.dtype == torch.uint8 and packed.shape == (5, 3 * -(-width // 2))
    assert torch.equal(unpack(packed, E5M6, width), round_to(x, E5M6))
    assert E5M6.bits == 12 and E4M3.bits == 8


def test_e5m6_keeps_a_nan() -> None:
    assert unpack(pack(torch.tensor([float("nan"), 1.0]), E5M6), E5M6, 2).isnan().tolist() == [True, False]


@given(st.floats(min_value=2.0**-126, max_value=2.0**126, width=32))
def test_power_of_two_is_the_next_one_up(x: float) -> None:
    found = float(power_of_two(torch.tensor(x)))
    assert math.frexp(found)[0] == 0.5 and found / 2 < x <= found


def test_power_of_two_of_exact_and_of_special_numbers() -> None:
    exact = torch.tensor([2.0**-126, 0.25, 1.0, 1024.0])
    assert torch.equal(power_of_two(exact), exact)
    special = power_of_two(torch.tensor([float("inf"), float("nan")]))
    assert special[0].isinf() and special[1].isnan()
