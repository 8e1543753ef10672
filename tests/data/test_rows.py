from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from dsv3.common.errors import UserError
from dsv3.data import rows

WANTED = [{"text": "ä", "more": None}, {"text": "b", "more": {"deep": [1, None]}}]


def _lines(content: list[dict]) -> str:
    return "\n\n".join(json.dumps(row, ensure_ascii=False) for row in content) + "\n"


def _plain(path: Path) -> Path:
    path = path / "rows.jsonl"
    path.write_text("\ufeff" + _lines(WANTED), encoding="utf-8")  # some editors begin a file with this mark
    return path


def _gzip(path: Path) -> Path:
    path = path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(_lines(WANTED).encode()))
    return path


def _zst(path: Path) -> Path:
    zstandard = pytest.importorskip("zstandard")
    path = path / "rows.jsonl.zst"
    path.write_bytes(zstandard.compress(_lines(WANTED).encode()))
    return path


def _parquet(path: Path) -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = path / "rows.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(WANTED), path)
    return path


def _datasets(path: Path) -> Path:
    datasets = pytest.importorskip("datasets")
    path = path / "folder"
    datasets.Dataset.from_list(WANTED).save_to_disk(str(path))
    return path


@pytest.mark.parametrize("write", [_plain, _gzip, _zst, _parquet, _datasets])
def test_every_kind_gives_the_same_rows(write: Callable[[Path], Path], tmp_path: Path) -> None:
    path = write(tmp_path)
    found = list(rows.read([str(path)]))
    assert [row.fields for row in found] == WANTED
    assert [row.where.startswith(str(path)) for row in found] == [True, True]
    assert rows.count([str(path)]) == (
        3 if path.suffix in (".jsonl", ".gz", ".zst") else 2
    )  # with a blank line


def test_a_folder_stands_for_its_files_in_order(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl", "notes.txt"):
        (tmp_path / name).write_text(json.dumps({"text": name}) + "\n")
    assert [row.where for row in rows.read([str(tmp_path)])] == [
        f"{tmp_path}/a.jsonl:1",
        f"{tmp_path}/b.jsonl:1",
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "cut', "is not JSON"),
        (b'["text"]', "must be a JSON object, not a list"),
        (b'{"text": "\xff"}', "is not UTF-8 .* at byte 10"),
        (b"[" * 100_000, "is not JSON"),
    ],
)
def test_a_bad_line_is_named(line: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"text": "good"}\n\n' + line + b'\n{"text": "good"}\n')
    found = rows.read([str(path)])
    assert next(found).where == f"{path}:1"
    with pytest.raises(UserError, match=f"^{path}:3 {message}"):
        next(found)


def test_what_cannot_be_read_is_refused_before_any_row(tmp_path: Path) -> None:
    good, cut = _plain(tmp_path), tmp_path / "cut.jsonl.gz"
    cut.write_bytes(gzip.compress(_lines(WANTED * 500).encode())[:-20])
    (tmp_path / "data.csv").write_text("a,b\n")
    (tmp_path / "empty").mkdir()
    for entry, message in [
        ("none.jsonl", "none.jsonl does not exist"),
        ("data.csv", "data.csv must end in .jsonl, "),
        ("empty", "empty holds no file ending in .jsonl, "),
    ]:
        with pytest.raises(UserError, match=message):
            rows.find([str(good), str(tmp_path / entry)])
    for read in (rows.count, lambda paths: list(rows.read(paths))):
        with pytest.raises(UserError, match=r"cut.jsonl.gz cannot be read: Compressed file ended"):
            read([str(cut)])


def test_splits_must_be_named_and_missing_packages_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("datasets")
    one = datasets.Dataset.from_list(WANTED)
    datasets.DatasetDict({"train": one, "test": one}).save_to_disk(str(tmp_path / "both"))
    with pytest.raises(UserError, match=r"both holds the splits test, train; name one, as .*both/test"):
        rows.find([str(tmp_path / "both")])
    assert len(list(rows.read([str(tmp_path / "both" / "train")]))) == 2
    (tmp_path / "rows.parquet").write_bytes(b"not parquet")
    for read in (rows.count, lambda paths: list(rows.read(paths))):
        with pytest.raises(UserError, match=r"rows.parquet cannot be read: "):
            read([str(tmp_path / "rows.parquet")])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for entry, package in [("rows.parquet", "pyarrow"), ("both/train", "datasets")]:
        with pytest.raises(UserError, match=rf"needs the package {package}: pip install 'dsv3\[data\]'"):
            rows.find([str(tmp_path / entry)])
