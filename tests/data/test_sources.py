from __future__ import annotations

import gzip
import json
import sys
import types
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv3.common.errors import UserError
from dsv3.config.data import SourceConfig
from dsv3.data.sources import Document, Skipped, cut, plan, read


def documents(source: SourceConfig, skipped: Skipped | None = None) -> list[Document]:
    return [d for part in plan([source]) for d in read(part, source, skipped or Skipped())]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.txt").write_text("bee", encoding="utf-8-sig")
    (tmp_path / "sub" / "a.md").write_text("ay")
    (tmp_path / "sub" / "c.rst").write_text("sea")
    (tmp_path / "sub" / "skip.bin").write_text("no")
    (tmp_path / ".hidden.txt").write_text("no")
    (tmp_path / "sub" / "link.txt").symlink_to(tmp_path / "b.txt")
    rows = [{"text": "one"}, {"other": 1}, {"text": " "}, {"text": "two\ud800"}]
    lines = "".join(json.dumps(row) + "\n\n" for row in rows)
    (tmp_path / "rows.jsonl").write_text(lines)
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    return tmp_path


def test_folders_globs_and_files(folder: Path) -> None:
    skipped = Skipped()
    found = documents(SourceConfig(name="s", paths=[str(folder)]), skipped)
    assert [d.text for d in found] == ["bee", "one", "two�", "one", "two�", "ay", "sea"]
    assert [d.origin for d in found][:3] == ["b.txt", "rows.jsonl:0", "rows.jsonl:6"]
    assert (skipped.empty, skipped.no_text_field, skipped.not_utf8) == (2, 2, 0)
    globbed = documents(SourceConfig(name="s", paths=[f"{folder}/**/*.md", f"{folder}/b.txt"]))
    assert [d.text for d in globbed] == ["ay", "bee"]
    only = documents(SourceConfig(name="s", paths=[str(folder)], suffixes=["bin"]))
    assert [d.text for d in only] == ["no"]
    named = documents(SourceConfig(name="s", paths=[f"{folder}/rows.jsonl"], text_field="other"))
    assert named == []


def test_not_utf8_is_counted(folder: Path) -> None:
    (folder / "b.txt").write_bytes(b"\xff\xfe\x00")
    skipped = Skipped()
    assert documents(SourceConfig(name="s", paths=[f"{folder}/b.txt"]), skipped) == []
    assert skipped.not_utf8 == 1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"paths": ["nowhere"]}, "source s: nowhere does not exist"),
        ({"paths": ["nowhere/*.txt"]}, "source s: no file matches nowhere/"),
        ({"paths": ["EMPTY"]}, "holds no file ending in txt"),
        ({"paths": ["EMPTY/void"]}, "source s is empty: its 1 files hold no byte"),
        ({"packages": ["nunpy"]}, r"package nunpy is not installed \(did you mean numpy\?\)"),
    ],
)
def test_refusals(tmp_path: Path, fields: dict, message: str) -> None:
    (tmp_path / "void").touch()
    if "paths" in fields:
        fields = {"paths": [path.replace("EMPTY", str(tmp_path)) for path in fields["paths"]]}
    with pytest.raises(UserError, match=message):
        plan([SourceConfig(name="s", **fields)])


@pytest.mark.parametrize(("suffix", "module"), [("parquet", "pyarrow"), ("jsonl.zst", "zstandard")])
def test_missing_extras_are_named_before_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, module: str
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    (tmp_path / f"x.{suffix}").write_bytes(b"x")
    with pytest.raises(
        UserError, match=rf"source s: .* needs the package {module}: pip install 'dsv3\[data\]'"
    ):
        plan([SourceConfig(name="s", paths=[str(tmp_path)])])
    with pytest.raises(UserError, match="needs the package datasets"):
        plan([SourceConfig(name="s", huggingface={"path": "some/data"})])


def test_damaged_rows_name_their_line(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"text": "a"}\n{"text": \n')
    with pytest.raises(UserError, match=r"x\.jsonl: line 2 is not JSON"):
        documents(SourceConfig(name="s", paths=[str(tmp_path)]))
    # Far enough up in the file that a reader which decodes ahead of the line would name another.
    rows = b'\xef\xbb\xbf{"text": "a"}\n' + b'{"text": "b"}\n' * 49 + b'{"text": "\xff"}\n'
    (tmp_path / "x.jsonl").write_bytes(rows)
    with pytest.raises(UserError, match=r"x\.jsonl: line 51 is not JSON in UTF-8"):
        documents(SourceConfig(name="s", paths=[str(tmp_path)]))
    (tmp_path / "x.jsonl").unlink()
    whole = gzip.compress(b'{"text": "a"}\n' * 1000)
    (tmp_path / "x.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"x\.jsonl\.gz cannot be read to the end"):
        documents(SourceConfig(name="s", paths=[str(tmp_path)]))


def test_standard_library_without_tests() -> None:
    (source,) = [SourceConfig(name="code", stdlib=True)]
    origins = [origin for part in plan([source]) for _, origin in part.files]
    assert "json/decoder.py" in origins
    assert origins == sorted(set(origins), key=origins.index)
    assert not [o for o in origins if {"test", "tests", "site-packages"} & set(Path(o).parts)]


def test_installed_package() -> None:
    source = SourceConfig(name="p", packages=["PyYAML"])
    origins = [origin for part in plan([source]) for _, origin in part.files]
    assert "yaml/loader.py" in origins
    assert all(origin.endswith((".py", ".md", ".rst", ".txt")) for origin in origins)
    assert not any("dist-info" in origin for origin in origins)


def test_parquet_and_zst(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    zstandard = pytest.importorskip("zstandard")
    table = pyarrow.table({"text": ["one", None, "two"], "n": [1, 2, 3]})
    parquet.write_table(table, tmp_path / "a.parquet")
    raw = b'{"text": "three"}\n'
    (tmp_path / "b.jsonl.zst").write_bytes(zstandard.compress(raw))
    found = documents(SourceConfig(name="s", paths=[str(tmp_path)]))
    assert [(d.text, d.origin) for d in found] == [
        ("one", "a.parquet:0"),
        ("two", "a.parquet:2"),
        ("three", "b.jsonl.zst:0"),
    ]
    with pytest.raises(UserError, match="has no column body: set text_field to one of"):
        documents(SourceConfig(name="s", paths=[str(tmp_path)], text_field="body"))


def test_hub_data_is_streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(*args: object, **options: object) -> list[dict]:
        asked.append((args, options))
        return [{"text": f"row {n}"} for n in range(5)]

    fake = types.ModuleType("datasets")
    fake.load_dataset = load_dataset  # type: ignore[attr-defined]
    fake.__spec__ = types.SimpleNamespace()  # type: ignore[assignment]
    monkeypatch.setitem(sys.modules, "datasets", fake)
    hub = {"path": "some/data", "name": "en", "max_documents": 3}
    found = documents(SourceConfig(name="web", huggingface=hub))
    assert [d.text for d in found] == ["row 0", "row 1", "row 2"]
    assert asked == [(("some/data", "en"), {"split": "train", "streaming": True})]


@given(
    text=st.text(st.sampled_from("ab \n"), max_size=3000) | st.text(max_size=700),
    limit=st.integers(256, 600),
)
def test_cut_pieces_are_the_text(text: str, limit: int) -> None:
    pieces = list(cut(text, limit))
    assert "".join(pieces) == text
    assert all(len(piece) <= limit for piece in pieces)
    assert list(cut(text, None)) == [text]


def test_cut_prefers_blank_lines() -> None:
    text = ("word " * 20 + "\n") * 2 + "\n" + "word " * 200
    first = next(iter(cut(text, 300)))
    assert first.endswith("\n\n")
