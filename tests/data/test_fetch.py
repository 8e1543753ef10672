from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import yaml

from dsv3.common.errors import UserError
from dsv3.common.files import sha256
from dsv3.data import fetch as module
from dsv3.data.fetch import RECORD, fetch, fetched_files

from .test_archive import make_tgz, make_zip

RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A wheel that the real pip finds without a network, and a manifest of it."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    info = "prose-1.0.dist-info"
    wheel = make_zip(
        folder / "prose-1.0-py3-none-any.whl",
        {
            "prose/data/a.txt": b"All human beings",
            "prose/data/b.txt": b"are born free",
            "prose/code.py": b"raise SystemExit('never run')",
            f"{info}/METADATA": b"Metadata-Version: 2.1\nName: prose\nVersion: 1.0\n",
            f"{info}/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
            f"{info}/RECORD": b"",
        },
    )
    for name in [name for name in __import__("os").environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    row = {"kind": "pypi", "name": "prose", "version": "1.0", "sha256": sha256(wheel)}
    write(tmp_path, [row | {"licence": "CC0", "glob": ["prose/data/*.txt"]}])
    return tmp_path


def write(folder: Path, rows: list[dict]) -> Path:
    path = folder / "manifest.yaml"
    path.write_text(yaml.safe_dump({"packages": rows}))
    return path


def rows_of(folder: Path) -> list[dict]:
    return yaml.safe_load((folder / "manifest.yaml").read_text())["packages"]


def test_fetch_records_and_resumes(registry: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest, to = registry / "manifest.yaml", registry / "to"
    with pytest.raises(UserError, match=r"prose 1\.0 .* run dsv3 data fetch .*manifest\.yaml --to .*to"):
        fetched_files(manifest, to)
    (folder,) = fetch(manifest, to)
    assert sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()) == [
        RECORD,
        "prose/data/a.txt",
        "prose/data/b.txt",
    ]
    record = json.loads((folder / RECORD).read_text())
    assert record["licence"] == "CC0"
    assert [origin for _, origin in fetched_files(manifest, to)] == [
        "pypi:prose@1.0/prose/data/a.txt",
        "pypi:prose@1.0/prose/data/b.txt",
    ]
    assert module.licences(manifest) == {"pypi:prose@1.0": "CC0"}

    # What is verified is not downloaded again; what is damaged is.
    real = module._download
    monkeypatch.setattr(module, "_download", lambda *_: pytest.fail("downloaded again"))
    assert fetch(manifest, to) == [folder]
    monkeypatch.setattr(module, "_download", real)
    (folder / "prose/data/a.txt").write_text("damaged")
    with pytest.raises(UserError, match=r"a\.txt is damaged"):
        fetched_files(manifest, to)
    fetch(manifest, to)
    assert (folder / "prose/data/a.txt").read_text() == "All human beings"


def test_wrong_checksum_leaves_nothing(registry: Path) -> None:
    rows = rows_of(registry)
    manifest = write(registry, [rows[0] | {"sha256": "0" * 64}])
    with pytest.raises(UserError, match=r"has SHA-256 .*, the manifest says 000"):
        fetch(manifest, registry / "to")
    assert list((registry / "to").iterdir()) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": "9"}, r"pypi package prose 9 could not be fetched \(only wheels are fetched\)"),
        ({"glob": ["*.nothing"]}, "no text file matches glob"),
        ({"name": "--index-url=x"}, "plain package name"),
        ({"name": "../x"}, "plain package name"),
        ({"version": "1.0 --pre"}, "plain package name"),
        ({"sha256": "abc"}, "sha256"),
        ({"kind": "git"}, "kind"),
    ],
)
def test_refusals(registry: Path, change: dict, message: str) -> None:
    manifest = write(registry, [rows_of(registry)[0] | change])
    with pytest.raises(UserError, match=message):
        fetch(manifest, registry / "to")
    assert not list((registry / "to").glob("*/*"))


def test_sdists_are_not_taken(registry: Path) -> None:
    """pip would run a source archive's setup.py to learn its name: we never let it have one."""
    ran = registry / "ran"
    project = b'[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
    make_tgz(
        registry / "wheels" / "src-1.0.tar.gz",
        {
            "src-1.0/pyproject.toml": project,
            "src-1.0/backend.py": f"open({str(ran)!r}, 'w')".encode(),
            "src-1.0/PKG-INFO": b"Metadata-Version: 2.1\nName: src\nVersion: 1.0\n",
        },
    )
    manifest = write(registry, [rows_of(registry)[0] | {"name": "src"}])
    with pytest.raises(UserError, match="only wheels"):
        fetch(manifest, registry / "to")
    assert not ran.exists()


def test_npm_and_a_missing_client(registry: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tarball = make_tgz(registry / "scope-p-2.0.tgz", {"package/data/x.txt": b"X", "package/install.js": b""})
    row = rows_of(registry)[0]
    npm = row | {"kind": "npm", "name": "@scope/p", "version": "2.0", "sha256": sha256(tarball)}
    manifest = write(registry, [row, npm | {"glob": ["data/*"]}])
    monkeypatch.setattr(shutil, "which", lambda name: None if name == "npm" else name)
    with pytest.raises(UserError, match=r"npm package @scope/p 2\.0: npm is not installed"):
        fetch(manifest, registry / "to")
    monkeypatch.undo()
    copy = [sys.executable, "-c", f"import shutil; shutil.copy({str(tarball)!r}, '.')"]
    monkeypatch.setattr(module, "_command", lambda row: copy)
    _, second = fetch(manifest, registry / "to")  # the first is there and verified
    assert (second / "data" / "x.txt").read_text() == "X"
    assert second.name == "npm-scope-p-2.0"


def test_commands_are_argument_lists() -> None:
    from dsv3.config.data import PackageRow

    for kind in ("pypi", "npm", "apt"):
        row = PackageRow(kind=kind, name="p", version="1:2~x", sha256="0" * 64, licence="", glob=[])
        assert any("p" in word and word.endswith("1:2~x") for word in module._command(row))
    assert module.folder_of(row, "to") == Path("to/apt-p-1_2~x")


@pytest.mark.parametrize(
    ("name", "client", "sizes", "begins"),
    [
        ("kjv", "pip", [4_200_000], "In the beginning God created"),
        ("prose", "npm", [4_200_000, 10_800_000, 1_200_000], "In the beginning God created"),
        ("docs", "apt-get", [10_900_000], ""),
    ],
)
@pytest.mark.network
def test_shipped_manifests(tmp_path: Path, name: str, client: str, sizes: list[int], begins: str) -> None:
    if client != "pip" and shutil.which(client) is None:
        pytest.skip(f"needs {client}")
    folders = fetch(RECIPES / f"manifest-{name}.yaml", tmp_path)
    found = [sum(p.stat().st_size for p in folder.rglob("*.txt")) for folder in folders]
    assert found == pytest.approx(sizes, rel=0.02)
    assert next(folders[0].rglob("*.txt")).read_text().startswith(begins)
