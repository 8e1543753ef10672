"""A small tokenizer and small token shards, made once."""

from __future__ import annotations

import inspect
import json
import textwrap
from pathlib import Path

import numpy as np
import pytest

from dsv3.data.shards import TokenShards, write_manifest, write_shard
from dsv3.data.tokenizer import Tokenizer, train

SAMPLE = [inspect.getsource(module) for module in (json, textwrap, inspect)] + [
    "Yes.\n\nNo!\n\nWhy?\nSo;\n" * 50
]


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return train(SAMPLE, 1024)


def make_shards(folder: Path, lengths: list[int], per_shard: int, seed: int = 0) -> TokenShards:
    """Documents of random tokens 0..999 of the given lengths, ``per_shard`` documents a shard."""
    rng = np.random.default_rng(seed)
    documents = [rng.integers(0, 1000, length, dtype=np.uint32) for length in lengths]
    infos = [
        write_shard(folder, f"shard-{place:05d}", documents[at : at + per_shard], 7)
        for place, at in enumerate(range(0, len(documents), per_shard))
    ]
    write_manifest(folder, infos)
    return TokenShards(folder)
