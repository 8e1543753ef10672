"""Files are whole or absent, whatever breaks in between."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest

from dsv3.common.files import TEMPORARY, new_folder, sha256, write_atomic, write_json


def test_write_atomic_replaces(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_atomic(path, "one")
    write_atomic(path, b"two\x00")
    assert path.read_bytes() == b"two\x00"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


@pytest.mark.parametrize("broken", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_file_and_no_litter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    path = tmp_path / "a.txt"
    write_atomic(path, "old")

    def fail(*arguments: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, broken, fail)
    with pytest.raises(OSError, match="disk full"):
        write_atomic(path, "new")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_write_json_keeps_order_and_letters(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"z": "｜", "a": 1})
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    assert "｜" in text and list(json.loads(text)) == ["z", "a"] and text.endswith("\n")


def test_new_folder_appears_whole(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "run"
    with new_folder(target) as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "a").write_text("x")
        (folder / "b").write_text("y")
        assert not target.exists() and folder.name.startswith(TEMPORARY)
    assert (target / "sub" / "a").read_text() == "x" and (target / "b").read_text() == "y"
    assert [p.name for p in target.parent.iterdir()] == ["run"]


def test_new_folder_on_failure_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), new_folder(tmp_path / "run") as folder:
        (folder / "a").write_text("x")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_new_folder_refuses_to_overwrite(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "kept").write_text("x")
    with pytest.raises(FileExistsError), new_folder(tmp_path / "run"):
        pass
    assert (tmp_path / "run" / "kept").exists()


def test_new_folder_clears_what_a_killed_process_of_the_same_number_left(tmp_path: Path) -> None:
    stale = tmp_path / f"{TEMPORARY}{os.getpid()}-run"
    stale.mkdir()
    (stale / "half").write_text("x")
    with new_folder(tmp_path / "run") as folder:
        (folder / "a").write_text("y")
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["a"]


def test_sha256(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc" * 100_000)
    assert sha256(tmp_path / "a") == hashlib.sha256(b"abc" * 100_000).hexdigest()
