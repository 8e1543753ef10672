"""The first pass of ``data prepare``: documents, filtered and identified, thrown into buckets on disk.

A document's bucket follows from its place in the shuffled order, so a sorted bucket is a stretch of that
order, and all copies of a document meet in one bucket whatever source they came from. Each part of a source
becomes one spill file (records grouped by bucket) and, written last, a JSON index.
"""

from __future__ import annotations

import json
import os
import struct
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, NamedTuple

from dsv3.common.errors import UserError
from dsv3.common.files import TEMPORARY, fsync_folder, write_json
from dsv3.config.data import SourceConfig
from dsv3.data import filters
from dsv3.data.sources import Part, Skipped, read

BUFFER = 64_000_000  # bytes of text one process holds before it writes them out
# place in the shuffled order, identity, source, part, number in the part, bytes of origin, bytes of text
HEADER = struct.Struct("<Q16sIIQIQ")


class Record(NamedTuple):
    """One document on its way; sorted by shuffled order, copies of a text by source, part, number."""

    order: int
    identity: bytes
    source: int
    part: int
    number: int
    origin: str
    text: str


@dataclass(frozen=True)
class SpillJob:
    """What one process needs to spill one part. ``number``: of the part in the plan."""

    part: Part
    number: int
    source: SourceConfig
    seed: int
    buckets: int
    decontaminate: tuple[str, ...]
    folder: str


def names(folder: str | Path, number: int) -> tuple[Path, Path]:
    """Spill file and index of a part."""
    return Path(folder) / f"part-{number:06d}.bin", Path(folder) / f"part-{number:06d}.json"


def done(folder: Path, number: int) -> dict | None:
    """The index of a part that has been spilled completely, else None."""
    data, index = names(folder, number)
    try:
        content = json.loads(index.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if data.is_file() and data.stat().st_size == content["size"] else None


def spill(job: SpillJob) -> dict:
    """Read one part and write its spill file; returns its index.

    The index: ``blocks`` (bucket, offset, bytes), ``documents`` and ``text_bytes`` kept, what was dropped.
    """
    skipped, contaminated = Skipped(), 0
    check = filters.decontaminator(job.decontaminate)
    data, index = names(job.folder, job.number)
    temporary = data.with_name(f"{TEMPORARY}{os.getpid()}-{data.name}")
    blocks: list[tuple[int, int, int]] = []
    held: dict[int, list[bytes]] = defaultdict(list)
    buffered = documents = text_bytes = 0
    with open(temporary, "wb") as file:
        for number, document in enumerate(read(job.part, job.source, skipped)):
            raw, origin = document.text.encode(), document.origin.encode(errors="replace")
            if check is not None and check.contaminated(document.text):
                contaminated += 1
                continue
            identity = filters.identity(document.text)
            order = filters.order(identity, job.seed)
            header = HEADER.pack(order, identity, job.part.source, job.number, number, len(origin), len(raw))
            held[order * job.buckets >> 64].append(header + origin + raw)
            documents, text_bytes, buffered = documents + 1, text_bytes + len(raw), buffered + len(raw)
            if buffered >= BUFFER:
                _flush(file, held, blocks)
                buffered = 0
        _flush(file, held, blocks)
        file.flush()
        os.fsync(file.fileno())
        size = file.tell()
    os.replace(temporary, data)
    fsync_folder(data.parent)
    content = {
        "source": job.part.source,
        "size": size,
        "documents": documents,
        "text_bytes": text_bytes,
        "dropped": {**asdict(skipped), "contaminated": contaminated},
        "blocks": blocks,
    }
    write_json(index, content)
    return content


def _flush(file: IO[bytes], held: dict[int, list[bytes]], blocks: list[tuple[int, int, int]]) -> None:
    for bucket in sorted(held):
        start = file.tell()
        file.writelines(held[bucket])
        blocks.append((bucket, start, file.tell() - start))
    held.clear()


def _parse(raw: bytes) -> Iterator[Record]:
    at = 0
    while at < len(raw):
        order, identity, source, part, number, origin, text = HEADER.unpack_from(raw, at)
        at += HEADER.size
        yield Record(
            order, identity, source, part, number,
            raw[at : at + origin].decode(), raw[at + origin : at + origin + text].decode(),
        )  # fmt: skip
        at += origin + text


def bucket(folder: Path, blocks: Iterable[tuple[int, int, int]]) -> tuple[list[Record], list[Record]]:
    """The records of one bucket, in shuffled order: (first copies, duplicates of an earlier one).

    ``blocks``: where they are, (part, offset, bytes) each.
    """
    found: list[Record] = []
    for part, offset, size in blocks:
        path = names(folder, part)[0]
        try:
            with open(path, "rb") as file:
                file.seek(offset)
                found += _parse(file.read(size))
        except FileNotFoundError:
            raise UserError(f"{path} has gone: delete the folder and run dsv3 data prepare again") from None
    found.sort(key=lambda record: record[:5])
    first: list[Record] = []
    copies: list[Record] = []
    seen: set[bytes] = set()
    for record in found:
        (copies if record.identity in seen else first).append(record)
        seen.add(record.identity)
    return first, copies
