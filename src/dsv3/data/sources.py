"""Where documents come from: files, the standard library, installed packages, fetched packages, the hub.

:func:`plan` turns the recipe's sources into a fixed list of parts, each some files of one source, refusing
anything that is missing; :func:`read` yields the documents of one part, in an order that never changes.
"""

from __future__ import annotations

import glob
import importlib.metadata
import importlib.util
import json
import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from dsv3.common.errors import UserError, nearest
from dsv3.config.data import SourceConfig
from dsv3.data import needles
from dsv3.data.fetch import fetched_files
from dsv3.data.rows import open_unpacked
from dsv3.data.tokenizer import clean

PART_BYTES = 16_000_000  # files of a source are grouped into parts of about this size
ROWS = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")  # one document a row
# Compressed files hold several times their size in text: an estimate, to size shards and to check disk space.
EXPANSION = {".gz": 4.0, ".zst": 4.0, ".parquet": 2.5}
HUB_BYTES = 1_000_000_000  # text expected of a streamed data set, when nothing better is known
# Left out of the standard library and of installed packages: tests are a third of the text and say little.
LEFT_OUT = frozenset(("site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"))


class Document(NamedTuple):
    """One document and where it came from (a path, with the row's number for a file of rows)."""

    text: str
    origin: str


@dataclass(frozen=True)
class Part:
    """Some files of one source, read by one process. ``files``: (path, origin); ``size``: bytes on disk."""

    source: int
    files: tuple[tuple[str, str], ...]
    size: int
    text_bytes: int  # estimate


@dataclass
class Skipped:
    """Documents a part could not use."""

    empty: int = 0
    not_utf8: int = 0
    no_text_field: int = 0


@dataclass
class _Found:
    """Files of a source in a fixed order: (path, origin, bytes)."""

    files: list[tuple[str, str, int]] = field(default_factory=list)

    def add(self, path: Path, origin: str) -> None:
        if not os.access(path, os.R_OK):
            raise UserError(f"{path} cannot be read: change its permissions or take it out of the source")
        self.files.append((str(path), origin, path.stat().st_size))


def _needs(module: str, source: SourceConfig, what: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise UserError(
            f"source {source.name}: reading {what} needs the package {module}: pip install 'dsv3[data]'"
        )


def _walk(folder: Path, suffixes: list[str], skip: frozenset[str] = frozenset()) -> Iterator[Path]:
    """Files under a folder with these endings, sorted; no hidden ones, links or folders named in ``skip``."""
    endings = tuple("." + suffix.lstrip(".") for suffix in suffixes)
    for root, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name not in skip)
        for name in sorted(files):
            path = Path(root) / name
            if name.endswith(endings) and not name.startswith(".") and not path.is_symlink():
                yield path


def _paths(source: SourceConfig, found: _Found) -> None:
    for entry in source.paths or []:
        path = Path(entry).expanduser()
        if glob.has_magic(entry):
            matches = sorted(Path(match) for match in glob.glob(str(path), recursive=True))
            files = [match for match in matches if match.is_file()]
            if not files:
                raise UserError(f"source {source.name}: no file matches {entry}")
        elif path.is_dir():
            files = list(_walk(path, source.suffixes))
            if not files:
                raise UserError(
                    f"source {source.name}: {entry} holds no file ending in {', '.join(source.suffixes)};"
                    " set suffixes"
                )
        elif path.is_file():
            files = [path]
        else:
            raise UserError(f"source {source.name}: {entry} does not exist")
        base = path if path.is_dir() else Path(".")
        for file in files:
            found.add(file, str(file.relative_to(base)) if base != Path(".") else str(file))


def _stdlib(source: SourceConfig, found: _Found) -> None:
    folder = Path(sysconfig.get_path("stdlib"))
    for path in _walk(folder, ["py"], LEFT_OUT):
        found.add(path, str(path.relative_to(folder)))


def _packages(source: SourceConfig, found: _Found) -> None:
    for name in source.packages or []:
        try:
            files = importlib.metadata.files(name)
        except importlib.metadata.PackageNotFoundError:
            known = (dist.name for dist in importlib.metadata.distributions())
            hint = nearest(name, known) or f"; pip install {name}"
            raise UserError(f"source {source.name}: package {name} is not installed{hint}") from None
        before = len(found.files)
        for file in sorted(files or [], key=str):
            path = Path(str(file.locate()))
            inside = not any(p == ".." or p.endswith(".dist-info") or p in LEFT_OUT for p in file.parts)
            if inside and file.suffix in (".py", ".md", ".rst", ".txt") and path.is_file():
                found.add(path, str(file))
        if len(found.files) == before:
            raise UserError(
                f"source {source.name}: installed package {name} lists no .py, .md, .rst or .txt file"
            )


def _manifest(source: SourceConfig, found: _Found) -> None:
    assert source.manifest is not None and source.folder is not None
    for path, origin in fetched_files(source.manifest, source.folder):
        found.add(path, origin)


def _text_estimate(path: str, size: int) -> int:
    return int(size * EXPANSION.get(Path(path).suffix, 1.0))


def _group(number: int, files: list[tuple[str, str, int]]) -> Iterator[Part]:
    group: list[tuple[str, str]] = []
    size = text = 0
    for path, origin, length in files:
        group.append((path, origin))
        size += length
        text += _text_estimate(path, length)
        if text >= PART_BYTES:
            yield Part(number, tuple(group), size, text)
            group, size, text = [], 0, 0
    if group:
        yield Part(number, tuple(group), size, text)


def plan(sources: list[SourceConfig]) -> list[Part]:
    """The parts of all sources, in a fixed order. Reads no text.

    Raises :class:`UserError` naming the source for a missing path, package or optional dependency, and for a
    source without text.
    """
    finders = {"paths": _paths, "stdlib": _stdlib, "packages": _packages, "manifest": _manifest}
    parts: list[Part] = []
    for number, source in enumerate(sources):
        if source.huggingface is not None:
            _needs("datasets", source, "a Hugging Face data set")
            parts.append(Part(number, (), 0, HUB_BYTES))
            continue
        found = _Found()
        finders[source.kind](source, found)
        if not sum(size for _, _, size in found.files):
            raise UserError(f"source {source.name} is empty: its {len(found.files)} files hold no byte")
        for path, _, _ in found.files:
            if path.endswith(".parquet"):
                _needs("pyarrow", source, "parquet")
            if path.endswith(".zst"):
                _needs("zstandard", source, "zst")
        parts += _group(number, found.files)
    return parts


def cut(text: str, limit: int | None) -> Iterator[str]:
    """Cut a text longer than ``limit`` characters at blank lines, else at line breaks, else anywhere.

    The pieces, each at most ``limit`` long, put together are the text.
    """
    if limit is None:
        yield text
        return
    start = 0
    while len(text) - start > limit:
        stop = start + limit
        # Not before half of the limit, so that a rare blank line does not make tiny documents.
        for mark in ("\n\n", "\n", " "):
            place = text.rfind(mark, start + limit // 2, stop)
            if place >= 0:
                stop = place + len(mark)
                break
        yield text[start:stop]
        start = stop
    yield text[start:]


def _field(row: Any, name: str, origin: str, skipped: Skipped) -> Iterator[Document]:
    text = row.get(name) if isinstance(row, dict) else None
    if isinstance(text, str):
        yield Document(text, origin)
    else:
        skipped.no_text_field += 1


def _rows(path: str, origin: str, name: str, skipped: Skipped) -> Iterator[Document]:
    number = 0
    with open_unpacked(path) as lines:
        try:
            # Bytes, decoded a line at a time: a text file decodes ahead, and would name an earlier line.
            for number, line in enumerate(lines):
                if line.strip():
                    row = json.loads(line.decode("utf-8-sig"))
                    yield from _field(row, name, f"{origin}:{number}", skipped)
        except ValueError as error:
            raise UserError(f"{path}: line {number + 1} is not JSON in UTF-8 ({error})") from None
        except (EOFError, OSError) as error:
            raise UserError(f"{path} cannot be read to the end: {error}") from None


def _parquet(path: str, origin: str, name: str, skipped: Skipped) -> Iterator[Document]:
    import pyarrow.parquet

    table = pyarrow.parquet.ParquetFile(path)
    if name not in table.schema_arrow.names:
        raise UserError(f"{path} has no column {name}: set text_field to one of {table.schema_arrow.names}")
    number = 0
    for batch in table.iter_batches(batch_size=1024, columns=[name]):
        for text in batch.column(0).to_pylist():
            yield from _field({name: text}, name, f"{origin}:{number}", skipped)
            number += 1


def _hub(source: SourceConfig, skipped: Skipped) -> Iterator[Document]:
    import datasets

    hub = source.huggingface
    assert hub is not None
    try:
        rows = datasets.load_dataset(hub.path, hub.name, split=hub.split, streaming=True)
    except Exception as error:  # the library raises a dozen kinds for a wrong name or no network
        raise UserError(f"source {source.name}: {hub.path} cannot be loaded: {error}") from None
    for number, row in enumerate(rows):
        if hub.max_documents is not None and number >= hub.max_documents:
            return
        yield from _field(row, source.text_field, f"{hub.path}:{number}", skipped)


def _documents(part: Part, source: SourceConfig, skipped: Skipped) -> Iterator[Document]:
    if source.huggingface is not None:
        yield from _hub(source, skipped)
    for path, origin in part.files:
        if path.endswith(".parquet"):
            yield from _parquet(path, origin, source.text_field, skipped)
        elif path.endswith(ROWS):
            yield from _rows(path, origin, source.text_field, skipped)
        else:
            try:
                yield Document(Path(path).read_bytes().decode("utf-8-sig"), origin)
            except UnicodeDecodeError:
                skipped.not_utf8 += 1
            except OSError as error:
                raise UserError(f"{path} cannot be read: {error.strerror}; run again without it") from None


def read(part: Part, source: SourceConfig, skipped: Skipped) -> Iterator[Document]:
    """The documents of one part, long ones cut, with needles where the source asks for them.

    What cannot be used is counted in ``skipped``.
    """
    for document in _documents(part, source, skipped):
        text = clean(document.text)
        if not text.strip():
            skipped.empty += 1
            continue
        pieces = list(cut(text, source.max_document_chars))
        if source.needles is not None:
            pieces = list(needles.documents(pieces, source.needles, document.origin))
        for number, piece in enumerate(pieces):
            origin = f"{document.origin}#{number}" if len(pieces) > 1 else document.origin
            if piece.strip():
                yield Document(piece, origin)
