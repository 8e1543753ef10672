"""Rows of a dataset from files of JSON lines, parquet, and folders written by Hugging Face ``datasets``.

Every row comes with where it stands (``FILE:LINE``, lines counted from 1), so that a bad one can be found.
"""

from __future__ import annotations

import contextlib
import gzip
import importlib.util
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

from dsv3.common.errors import UserError

JSON_LINES = (".jsonl", ".jsonl.gz", ".jsonl.zst")
ENDINGS = (*JSON_LINES, ".parquet")


class Row(NamedTuple):
    """One row: its columns, and ``FILE:LINE``, or the file's or folder's name and the row's number."""

    fields: dict[str, Any]
    where: str


def open_unpacked(path: str | Path) -> IO[bytes]:
    """A file's bytes, unpacked if its name ends in ``.gz`` or ``.zst``."""
    name = str(path)
    if name.endswith(".gz"):
        return cast(IO[bytes], gzip.open(name, "rb"))
    if name.endswith(".zst"):
        import zstandard

        return io.BufferedReader(zstandard.open(name, "rb"))  # its own reader has no lines
    return open(name, "rb")


def find(paths: Sequence[str]) -> list[Path]:
    """The files (and ``datasets`` folders) that ``paths`` name, in a fixed order; reads no row.

    A folder stands for its files of rows, or is one that ``save_to_disk`` wrote. Raises :class:`UserError`
    for a path that is not there, an ending nobody reads and a package that is missing.
    """
    found: list[Path] = []
    for entry in paths:
        path = Path(entry).expanduser()
        if (path / "dataset_dict.json").is_file():
            parts = sorted(p.name for p in path.iterdir() if (p / "state.json").is_file())
            raise UserError(f"{entry} holds the splits {', '.join(parts)}; name one, as {entry}/{parts[0]}")
        if (path / "state.json").is_file():
            found.append(path)
        elif path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.name.endswith(ENDINGS) and p.is_file())
            if not inside:
                raise UserError(f"{entry} holds no file ending in {', '.join(ENDINGS)}")
            found += inside
        elif not path.is_file():
            raise UserError(
                f"{entry} does not exist; name a file ending in {', '.join(ENDINGS)}, or a folder of them"
            )
        elif not path.name.endswith(ENDINGS):
            raise UserError(f"{entry} must end in {', '.join(ENDINGS)}, or be a folder of datasets")
        else:
            found.append(path)
    for path in found:
        _needs(path)
    return found


def _needs(path: Path) -> None:
    kinds = {".parquet": ("pyarrow", "parquet"), ".zst": ("zstandard", "zst")}
    module, what = kinds.get(path.suffix, ("", ""))
    if path.is_dir():
        module, what = "datasets", "a folder of datasets"
    if module and importlib.util.find_spec(module) is None:
        raise UserError(f"{path}: reading {what} needs the package {module}: pip install 'dsv3[data]'")


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # gzip, zstandard, pyarrow and datasets have a dozen kinds of their own
        raise UserError(f"{path} cannot be read: {error}") from None


def count(paths: Sequence[str]) -> int:
    """How many rows ``paths`` name; blank lines of a file count too."""
    total = 0
    for path in find(paths):
        with _readable(path):
            if path.is_dir():
                import datasets

                total += len(datasets.load_from_disk(str(path)))
            elif path.suffix == ".parquet":
                import pyarrow.parquet

                total += pyarrow.parquet.read_metadata(path).num_rows
            else:
                with open_unpacked(path) as lines:
                    total += sum(1 for _ in lines)
    return total


def read(paths: Sequence[str]) -> Iterator[Row]:
    """Every row of what ``paths`` name (see :func:`find`), in a fixed order.

    Raises :class:`UserError` naming the line for anything that is not a JSON object in UTF-8, and the file
    for one that is damaged.
    """
    for path in find(paths):
        with _readable(path):
            if path.is_dir():
                yield from _datasets(path)
            elif path.suffix == ".parquet":
                yield from _parquet(path)
            else:
                yield from _json_lines(path)


def _json_lines(path: Path) -> Iterator[Row]:
    with open_unpacked(path) as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield Row(_parsed(line, f"{path}:{number}"), f"{path}:{number}")


def _parsed(line: bytes, where: str) -> dict[str, Any]:
    try:
        fields = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise UserError(f"{where} is not UTF-8 ({error.reason} at byte {error.start})") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not JSON ({error})") from None
    if not isinstance(fields, dict):
        raise UserError(f"{where} must be a JSON object, not a {type(fields).__name__}")
    return fields


def _parquet(path: Path) -> Iterator[Row]:
    import pyarrow.parquet

    number = 0
    with pyarrow.parquet.ParquetFile(path) as table:
        for batch in table.iter_batches(batch_size=1024):
            for fields in batch.to_pylist():
                number += 1
                yield Row(fields, f"{path}: row {number}")


def _datasets(path: Path) -> Iterator[Row]:
    import datasets

    for number, fields in enumerate(datasets.load_from_disk(str(path)), start=1):
        yield Row(fields, f"{path}: row {number}")
