from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv3.data import fim
from dsv3.data.tokenizer import Tokenizer


@given(text=st.text(), seed=st.integers(0, 2**32))
def test_pieces_rejoin(tokenizer: Tokenizer, text: str, seed: int) -> None:
    prefix, middle, suffix = fim.split(text, np.random.default_rng(seed))
    assert prefix + middle + suffix == text
    ids = fim.join(tokenizer, *(tokenizer.encode(piece) for piece in (prefix, middle, suffix)))
    assert tokenizer.decode(ids) == f"<｜fim▁begin｜>{prefix}<｜fim▁hole｜>{suffix}<｜fim▁end｜>{middle}"
    apart = [tokenizer.decode(piece) for piece in fim.take_apart(tokenizer, ids)]
    assert "".join(apart) == text


def test_cuts_are_uniform() -> None:
    rng = np.random.default_rng(0)
    lengths = np.array([[len(p) for p in fim.split("x" * 99, rng)] for _ in range(3000)])
    assert np.allclose(lengths.mean(axis=0), 33, atol=1.5)


def test_take_apart_refuses_plain_text(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="not a fill-in-the-middle document"):
        fim.take_apart(tokenizer, tokenizer.encode("plain"))
