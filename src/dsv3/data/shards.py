"""Token shards on disk: little-endian uint32 tokens, where each document starts, and checksums.

A shard is two files: ``shard-00007.bin`` (tokens) and ``shard-00007.starts`` (uint64 position in the shard of
each document's first token). A folder's ``manifest.json`` lists its shards in order, with SHA-256 of both.
Tokens of all shards form one long sequence.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from dsv3.common.errors import UserError
from dsv3.common.files import sha256, write_atomic, write_json

FORMAT = "dsv3-token-shards/1"
TOKEN = np.dtype("<u4")
START = np.dtype("<u8")


@dataclass(frozen=True)
class ShardInfo:
    """What the manifest says of a shard. ``text_bytes``: UTF-8 bytes of the documents' text."""

    name: str
    tokens: int
    documents: int
    text_bytes: int
    tokens_sha256: str
    starts_sha256: str


def write_shard(folder: Path, name: str, documents: list[np.ndarray], text_bytes: int) -> ShardInfo:
    """Write one shard's files atomically; ``documents`` are 1-D arrays of token ids."""
    folder.mkdir(parents=True, exist_ok=True)
    lengths = np.array([len(document) for document in documents], dtype=np.int64)
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]]).astype(START)
    write_atomic(folder / f"{name}.bin", np.concatenate(documents).astype(TOKEN).tobytes())
    write_atomic(folder / f"{name}.starts", starts.tobytes())
    return ShardInfo(
        name, int(lengths.sum()), len(documents), text_bytes,
        sha256(folder / f"{name}.bin"), sha256(folder / f"{name}.starts"),
    )  # fmt: skip


def write_manifest(folder: Path, shards: list[ShardInfo]) -> dict[str, int]:
    """Write a folder's ``manifest.json``; returns its totals (tokens, documents, text_bytes)."""
    totals = {
        key: sum(getattr(shard, key) for shard in shards) for key in ("tokens", "documents", "text_bytes")
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_json(
        folder / "manifest.json",
        {
            "format": FORMAT,
            "dtype": "uint32 little-endian",
            **totals,
            "shards": [asdict(shard) for shard in shards],
        },
    )
    return totals


class TokenShards:
    """All tokens of one source's split, memory-mapped.

    ``len(shards)`` is the number of tokens; ``document_starts`` the position of each document's first token.
    Raises :class:`UserError` naming the file when a shard is missing or has the wrong size; :meth:`verify`
    also compares checksums.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        manifest = self.folder / "manifest.json"
        try:
            content = json.loads(manifest.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise UserError(
                f"{self.folder} holds no token shards (no manifest.json): run dsv3 data prepare"
            ) from None
        except ValueError as error:
            raise UserError(f"{manifest} is damaged ({error}): run dsv3 data prepare again") from None
        if content.get("format") != FORMAT:
            raise UserError(f"{manifest}: format is {content.get('format')!r}, expected {FORMAT!r}")
        self.shards = [ShardInfo(**entry) for entry in content["shards"]]
        self.text_bytes = sum(shard.text_bytes for shard in self.shards)
        self.documents = sum(shard.documents for shard in self.shards)
        self._starts = np.cumsum([0, *(shard.tokens for shard in self.shards)])
        self.total_tokens = int(self._starts[-1])
        self._maps = [self._map(shard) for shard in self.shards]

    def _file(self, shard: ShardInfo, suffix: str, size: int) -> Path:
        path = self.folder / f"{shard.name}.{suffix}"
        found = path.stat().st_size if path.is_file() else None
        if found != size:
            state = "missing" if found is None else f"{found} bytes long, not {size}"
            raise UserError(f"token shard {path} is {state}: run dsv3 data prepare into a new folder")
        return path

    def _map(self, shard: ShardInfo) -> np.ndarray:
        path = self._file(shard, "bin", shard.tokens * TOKEN.itemsize)
        return np.memmap(path, dtype=TOKEN, mode="r")

    def __len__(self) -> int:
        return self.total_tokens

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """Tokens ``start`` to ``stop`` of the whole sequence, across shards: a new uint32 array."""
        if not 0 <= start <= stop <= self.total_tokens:
            raise IndexError(f"tokens {start}:{stop} of {self.total_tokens} in {self.folder}")
        out = np.empty(stop - start, dtype=np.uint32)
        shard = int(np.searchsorted(self._starts, start, side="right")) - 1
        done = 0
        while done < len(out):
            offset = start + done - int(self._starts[shard])
            piece = self._maps[shard][offset : offset + len(out) - done]
            out[done : done + len(piece)] = piece
            done += len(piece)
            shard += 1
        return out

    @cached_property
    def document_starts(self) -> np.ndarray:
        """int64 [documents]: position in the whole sequence of each document's first token, ascending."""
        pieces = []
        for shard, first in zip(self.shards, self._starts):
            path = self._file(shard, "starts", shard.documents * START.itemsize)
            pieces.append(np.fromfile(path, dtype=START).astype(np.int64) + first)
        return np.concatenate(pieces) if pieces else np.empty(0, dtype=np.int64)

    def verify(self) -> None:
        """Compare every file with its checksum; raises :class:`UserError` naming the first damaged one."""
        for shard in self.shards:
            for suffix, expected in (("bin", shard.tokens_sha256), ("starts", shard.starts_sha256)):
                path = self.folder / f"{shard.name}.{suffix}"
                if not path.is_file() or sha256(path) != expected:
                    raise UserError(
                        f"token shard {path} is damaged (SHA-256 differs):"
                        " run dsv3 data prepare into a new folder"
                    )


def open_split(out: str | Path, split: str) -> list[tuple[str, TokenShards, float]]:
    """The sources of a prepared folder: (name, shards, weight) each; ``split`` is ``train`` or ``valid``.

    Sources without a document in that split are left out. Raises :class:`UserError` if ``out`` is not
    prepared to the end, or nothing is in the split.
    """
    manifest = Path(out) / "manifest.json"
    if not manifest.is_file():
        raise UserError(f"{out} holds no prepared data (no manifest.json): run dsv3 data prepare RECIPE.yaml")
    sources = json.loads(manifest.read_text(encoding="utf-8"))["sources"]
    found = [
        (name, TokenShards(Path(out) / split / name), entry["weight"])
        for name, entry in sources.items()
        if entry[split]["documents"]
    ]
    if not found:
        raise UserError(
            f"{out} has no documents in {split}/: prepare it with a larger valid_fraction or more text"
        )
    return found


def check_content(out: str | Path, tokenizer_sha256: str | None, tokens_sha256: str | None) -> None:
    """Refuse a prepared folder that is not the one meant; None: any is.

    ``tokenizer_sha256``: of ``tokenizer.json``. ``tokens_sha256``: of all tokens, train then valid, as
    ``cat train/*/*.bin valid/*/*.bin`` gives them. Raises :class:`UserError` naming what differs.
    """
    out = Path(out)
    if tokenizer_sha256 is not None and (found := sha256(out / "tokenizer.json")) != tokenizer_sha256:
        raise UserError(_other("tokenizer", out / "tokenizer.json", found, tokenizer_sha256))
    if tokens_sha256 is not None:
        digest = hashlib.sha256()
        for split in ("train", "valid"):
            for path in sorted((out / split).glob("*/*.bin")):
                with open(path, "rb") as file:
                    while piece := file.read(1 << 20):
                        digest.update(piece)
        if (found := digest.hexdigest()) != tokens_sha256:
            raise UserError(_other("tokens", out, found, tokens_sha256))


def _other(what: str, where: Path, found: str, wanted: str) -> str:
    return (
        f"data.{what}_sha256: {where} has {found[:12]}..., the recipe asks for {wanted[:12]}...: prepare the"
        " data as the recipe says, with the versions of requirements.txt"
    )
