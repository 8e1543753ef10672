from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from dsv3.common.errors import UserError
from dsv3.data.shards import TokenShards, open_split

from .conftest import make_shards

LENGTHS = [5, 1, 17, 300, 2, 2, 40, 9]


def test_tokens_across_shards_and_document_starts(tmp_path: Path) -> None:
    shards = make_shards(tmp_path, LENGTHS, per_shard=3)
    rng = np.random.default_rng(0)
    whole = np.concatenate([rng.integers(0, 1000, n, dtype=np.uint32) for n in LENGTHS])
    assert len(shards) == shards.total_tokens == len(whole)
    assert np.array_equal(shards.tokens(0, len(shards)), whole)
    for start in range(0, len(whole), 7):
        for stop in (start, start + 1, min(start + 60, len(whole))):
            assert np.array_equal(shards.tokens(start, stop), whole[start:stop])
    assert shards.document_starts.tolist() == np.cumsum([0, *LENGTHS[:-1]]).tolist()
    assert (shards.documents, shards.text_bytes) == (8, 21)
    with pytest.raises(IndexError):
        shards.tokens(0, len(whole) + 1)


def test_bytes_on_disk_are_little_endian_uint32(tmp_path: Path) -> None:
    shards = make_shards(tmp_path, [3], per_shard=1)
    assert (tmp_path / "shard-00000.bin").read_bytes() == b"".join(
        int(token).to_bytes(4, "little") for token in shards.tokens(0, 3)
    )


def test_damage_is_named(tmp_path: Path) -> None:
    make_shards(tmp_path, LENGTHS, per_shard=3)
    file = tmp_path / "shard-00001.bin"
    whole = file.read_bytes()
    file.write_bytes(whole[:-4])
    with pytest.raises(UserError, match=r"shard-00001\.bin is 1212 bytes long, not 1216"):
        TokenShards(tmp_path)
    file.write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
    with pytest.raises(UserError, match=r"shard-00001\.bin is damaged"):
        TokenShards(tmp_path).verify()
    file.unlink()
    with pytest.raises(UserError, match=r"shard-00001\.bin is missing"):
        TokenShards(tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(UserError, match=r"manifest\.json is damaged"):
        TokenShards(tmp_path)
    with pytest.raises(UserError, match="holds no token shards"):
        TokenShards(tmp_path / "nothing")


def test_open_split(tmp_path: Path) -> None:
    make_shards(tmp_path / "train" / "a", [10, 10], per_shard=1)
    entry = {"weight": 0.25, "train": {"documents": 2}, "valid": {"documents": 0}}
    (tmp_path / "manifest.json").write_text(json.dumps({"sources": {"a": entry}}))
    ((name, shards, weight),) = open_split(tmp_path, "train")
    assert (name, len(shards), weight) == ("a", 20, 0.25)
    with pytest.raises(UserError, match="no documents in valid/"):
        open_split(tmp_path, "valid")
    with pytest.raises(UserError, match="no prepared data"):
        open_split(tmp_path / "train", "train")
