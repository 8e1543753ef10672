"""What the Triton kernels of absorbed attention compute: run by ``test_triton_numbers.py``, as its others.

The reference gathers each sequence's keys and weighs them in float64, a query and a head at a time.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
import triton
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dsv3.ops import triton_mla
from dsv3.ops.paged import Table
from dsv3.serve import absorbed
from dsv3.serve.cache import FORMATS, LatentCache

INTERPRETED = triton.knobs.runtime.interpret
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
# Of the norm: BF16 weights and results; a GPU's exponential is off by two units of the last place.
CLOSE = {torch.float32: 2e-6 if INTERPRETED else 1e-5, torch.bfloat16: 4e-3}
SMALL = triton_mla.Tiling(16, 16, 4, 1)


class Case:
    """Sequences of these lengths, their last ``new`` places asked; blocks anywhere, NaN where no key is."""

    def __init__(
        self, lengths: list[int], new: int, heads: int, latent: int, rope: int, kind: str = "float32",
        dtype: torch.dtype = torch.float32, block: int = 16, first: int = 0, seed: int = 0,
    ):  # fmt: skip
        draw = torch.Generator().manual_seed(seed)
        counts = [-(-(first + length) // block) for length in lengths]
        total = sum(counts) + 2
        cache = LatentCache(2, total * block, latent, rope, kind, torch.float32, block=block)
        cache.rows.view(torch.uint8).fill_(0xFF)  # NaN in every format
        free = torch.randperm(total, generator=draw).numpy()
        self.slots, at = [], 0
        for length, count in zip(lengths, counts):
            own = (free[at : at + count, None] * block + np.arange(block)).ravel()
            at += count
            self.slots.append(own)
            rows = torch.randn(length, latent + rope, generator=draw)
            there = torch.from_numpy(own[first : first + length])
            cache.write(1, there, rows[:, :latent], rows[:, latent:])
        self.lengths, self.new, self.first, self.latent = lengths, new, first, latent
        self.q_MHX = torch.randn(len(lengths) * new, heads, latent + rope, generator=draw).to(dtype)
        self.scale = 2.5 * (latent + rope) ** -0.5  # weights far from even
        self.cache = cache
        self.rows = cache.rows[1].to(DEVICE)
        self.table = Table.of(self.slots, lengths, block, first, DEVICE)

    def found(self, splits: int | None = None, tiling: triton_mla.Tiling | None = None) -> Tensor:
        q_MHX = self.q_MHX.to(DEVICE)
        assert triton_mla.takes(q_MHX, self.rows, self.table, self.latent)
        out = triton_mla.attend(q_MHX, self.rows, self.table, self.latent, self.scale, splits, tiling)
        assert out.dtype == self.q_MHX.dtype
        return out.cpu().double()

    def wanted(self) -> Tensor:
        q_STHX = self.q_MHX.double().unflatten(0, (len(self.lengths), self.new))
        out = torch.zeros(*q_STHX.shape[:-1], self.latent, dtype=torch.float64)
        for sequence, length in enumerate(self.lengths):
            keys = self.slots[sequence][self.first : self.first + length]
            rows_LX = self.cache.read(1, torch.from_numpy(keys)).to(self.q_MHX.dtype).double()
            for t in range(self.new):
                seen_LX = rows_LX[: length - self.new + t + 1]
                for head, q_X in enumerate(q_STHX[sequence, t]):
                    weights_L = (seen_LX @ q_X * self.scale).softmax(0)
                    out[sequence, t, head] = weights_L @ seen_LX[:, : self.latent]
        return out.flatten(0, 1)

    def check(self, splits: int | None = None, tiling: triton_mla.Tiling | None = None) -> None:
        found, wanted = self.found(splits, tiling), self.wanted()
        error = (found - wanted).flatten(1).norm(dim=1) / wanted.flatten(1).norm(dim=1)
        assert error.max() < CLOSE[self.q_MHX.dtype], error


@settings(max_examples=20)
@given(st.data())
def test_any_shape(data: st.DataObject) -> None:
    new = data.draw(st.integers(1, 4), "new")
    block = data.draw(st.sampled_from([1, 8, 16, 64]), "block")
    near = st.integers(1, 3).flatmap(lambda k: st.integers(-1, 1).map(lambda d: k * block + d))
    lengths = st.lists((st.integers(new, 90) | near).map(lambda n: max(n, new)), min_size=1, max_size=3)
    kind, dtype = data.draw(
        st.sampled_from(
            [
                ("float32", torch.float32), ("bfloat16", torch.bfloat16), ("fp8", torch.bfloat16),
                ("fp8", torch.float32), ("bfloat16", torch.float32),
            ]
        )
    )  # fmt: skip
    case = Case(
        data.draw(lengths, "lengths"), new, data.draw(st.integers(1, 7), "heads"),
        data.draw(st.sampled_from([16, 20, 32, 132]), "latent"),
        data.draw(st.sampled_from([2, 8, 16]), "rope"), kind, dtype, block,
        data.draw(st.integers(0, 1), "first"), data.draw(st.integers(0, 9), "seed"),
    )  # fmt: skip
    case.check(data.draw(st.integers(1, 6), "splits"), SMALL)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("splits", [1, 3])
def test_the_real_widths(kind: str, splits: int) -> None:
    dtype = torch.float32 if kind == "float32" else torch.bfloat16
    Case([65, 300], 2, 5, 512, 64, kind, dtype, block=64).check(splits)


def test_one_key_is_its_own_latent() -> None:
    case = Case([1], 1, 3, 32, 8, block=64)
    own = case.cache.read(1, torch.from_numpy(case.slots[0][:1]))[:, :32].double()
    for splits in (1, 4):
        torch.testing.assert_close(case.found(splits, SMALL), own.expand(3, -1)[None], rtol=0, atol=1e-6)


def test_more_rows_than_a_program_takes() -> None:
    """Heads of one token lie in two programs, and a program holds heads of two tokens."""
    Case([40, 70], 3, 11, 16, 8).check(2, SMALL)


def test_as_chosen_by_itself() -> None:
    Case([700], 1, 2, 16, 8).check()
    Case([30, 40], 4, 20, 16, 8, "bfloat16", torch.bfloat16).check()


def test_scores_far_from_zero_do_not_overflow() -> None:
    case = Case([50], 1, 2, 16, 8)
    case.scale = 300.0
    case.check(3, SMALL)


def test_splits_fill_the_gpu_and_no_more() -> None:
    assert triton_mla.choose_splits(1, 100_000, 132) == triton_mla.MOST_SPLITS
    assert triton_mla.choose_splits(1, 1000, 132) == 4
    assert triton_mla.choose_splits(16, 100_000, 132) == 8
    assert triton_mla.choose_splits(200, 100_000, 132) == 1
    assert triton_mla.choose_splits(1, 1, 132) == 1


@pytest.mark.parametrize("kind, dtype", [("bfloat16", torch.bfloat16), ("fp8", torch.bfloat16)])
def test_the_example_that_decides_whether_it_is_used(kind: str, dtype: torch.dtype) -> None:
    error = absorbed.error_of(triton_mla, (DEVICE, dtype, 4, 32, 8, kind, 16))
    assert error is not None and error < CLOSE[dtype]
    assert absorbed.error_of(triton_mla, (DEVICE, dtype, 4, 33, 8, "fp8", 16)) is None, "scales lie anywhere"
