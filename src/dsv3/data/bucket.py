"""The second pass of ``data prepare``: one bucket of documents into token shards, one a source and split."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from dsv3.common.files import sha256, write_atomic, write_json
from dsv3.data import filters, fim
from dsv3.data.shards import ShardInfo, write_shard
from dsv3.data.spill import Record, bucket
from dsv3.data.tokenizer import Tokenizer

BATCH = 500_000  # characters handed to the tokenizer at once: encodings take many times their text in memory


@dataclass(frozen=True)
class BucketJob:
    """What one process needs to write one bucket's shards."""

    number: int
    out: str
    blocks: tuple[tuple[int, int, int], ...]  # (part, offset, bytes) of its records
    sources: tuple[str, ...]
    seed: int
    valid_fraction: float
    fim_rate: float
    boundary_split_prob: float

    @property
    def work(self) -> Path:
        """Where spill files and finished buckets are kept until the end."""
        return Path(self.out) / "work"

    @property
    def record(self) -> Path:
        """Written when every shard of the bucket is."""
        return self.work / f"bucket-{self.number:05d}.json"


@lru_cache(maxsize=1)
def _tokenizer(path: str) -> Tokenizer:
    return Tokenizer.load(path)


def finished(job: BucketJob) -> dict | None:
    """The record of a bucket whose shards are all there and match their checksums, else None."""
    try:
        record = json.loads(job.record.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    for file, digest in record["files"].items():
        path = Path(job.out) / file
        if not path.is_file() or sha256(path) != digest:
            return None
    return record


def _encode(tokenizer: Tokenizer, records: list[Record], job: BucketJob, training: bool) -> list[np.ndarray]:
    """Each document's tokens, the end of sentence last; FIM and boundary splits in training only.

    A document's random choices depend on the seed and its own text, so that neither workers nor the other
    documents change them.
    """
    chances = [
        np.random.Generator(np.random.PCG64([job.seed, int.from_bytes(record.identity)]))
        for record in records
    ]
    pieces: list[str] = []
    made_fim = []
    for record, chance in zip(records, chances):
        made_fim.append(training and bool(chance.random() < job.fim_rate))
        pieces += fim.split(record.text, chance) if made_fim[-1] else [record.text]
    encoded = iter(tokenizer.encode_batch(pieces))
    found = []
    for is_fim, chance in zip(made_fim, chances):
        ids = fim.join(tokenizer, next(encoded), next(encoded), next(encoded)) if is_fim else next(encoded)
        tokens = np.array([*ids, tokenizer.eos_id], dtype=np.uint32)
        if training:
            tokens = tokenizer.split_boundaries(tokens, job.boundary_split_prob, chance)
        found.append(tokens)
    return found


def _batches(records: list[Record]) -> list[list[Record]]:
    batches: list[list[Record]] = []
    size = BATCH
    for record in records:
        if size >= BATCH:
            batches.append([])
            size = 0
        batches[-1].append(record)
        size += len(record.text)
    return batches


def write_bucket(job: BucketJob) -> dict:
    """Tokenise one bucket and write its shards, then its record; returns the record.

    The record: ``shards`` ({split: {source: shard info}}), ``files`` ({path: SHA-256}), ``duplicates``
    ({source: count}) and ``read_bytes``, the text handled.
    """
    tokenizer = _tokenizer(str(Path(job.out) / "tokenizer.json"))
    records, copies = bucket(job.work, job.blocks)
    shards: dict[str, dict[str, dict]] = {"train": {}, "valid": {}}
    files: dict[str, str] = {}
    name = f"shard-{job.number:05d}"
    for number, source in enumerate(job.sources):
        mine = [record for record in records if record.source == number]
        for split in ("train", "valid"):
            chosen = [
                record for record in mine
                if filters.held_out(record.identity, job.valid_fraction) == (split == "valid")
            ]  # fmt: skip
            if not chosen:
                continue
            folder = Path(job.out) / split / source
            tokens = [
                document
                for batch in _batches(chosen)
                for document in _encode(tokenizer, batch, job, split == "train")
            ]
            info = write_shard(folder, name, tokens, sum(len(record.text.encode()) for record in chosen))
            shards[split][source] = asdict(info)
            files[f"{split}/{source}/{name}.bin"] = info.tokens_sha256
            files[f"{split}/{source}/{name}.starts"] = info.starts_sha256
            if split == "valid":  # the text itself, so that any model or compressor can be judged on it
                lines = (json.dumps({"text": r.text, "origin": r.origin}, ensure_ascii=False) for r in chosen)
                write_atomic(folder / f"{name}.jsonl", "".join(line + "\n" for line in lines))
                files[f"{split}/{source}/{name}.jsonl"] = sha256(folder / f"{name}.jsonl")
    duplicates = {source: sum(r.source == n for r in copies) for n, source in enumerate(job.sources)}
    read_bytes = sum(len(record.text.encode()) for record in records)
    record = {"shards": shards, "files": files, "duplicates": duplicates, "read_bytes": read_bytes}
    write_json(job.record, record)
    return record


def shard_infos(records: list[dict], split: str, source: str) -> list[ShardInfo]:
    """The shards of one source and split, in order, out of all buckets' records."""
    return [
        ShardInfo(**record["shards"][split][source])
        for record in records
        if source in record["shards"][split]
    ]
