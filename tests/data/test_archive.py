from __future__ import annotations

import gzip
import io
import shutil
import stat
import subprocess
import tarfile
import zipfile
from pathlib import Path

import pytest

from dsv3.common.errors import UserError
from dsv3.data import archive


def make_zip(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in files.items():
            file.writestr(name, content)
    return path


def make_tgz(path: Path, files: dict[str, bytes], links: tuple[tarfile.TarInfo, ...] = ()) -> Path:
    with tarfile.open(path, "w:gz") as file:
        for link in links:
            file.addfile(link)
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
    return path


@pytest.mark.parametrize(
    ("glob", "yes", "no"),
    [
        ("data/*.txt", ["data/a.txt"], ["data/x/a.txt", "a.txt", "data/a.txt.gz"]),
        ("**/*.rst", ["a.rst", "x/y/a.rst"], ["a.rst.txt"]),
        ("x/**", ["x/a", "x/y/b"], ["y/a"]),
        ("a?.t[x]t", ["ab.t[x]t"], ["ab.txt", "a/.t[x]t"]),
    ],
)
def test_globs(glob: str, yes: list[str], no: list[str]) -> None:
    pattern = archive.glob_pattern(glob)
    assert all(pattern.fullmatch(name) for name in yes)
    assert not any(pattern.fullmatch(name) for name in no)


def test_wheel_and_npm_tarball(tmp_path: Path) -> None:
    files = {"d/a.txt": b"A", "d/b.py": b"B"}
    wheel = make_zip(tmp_path / "p.whl", files)
    tarball = make_tgz(tmp_path / "p.tgz", {f"package/{name}": content for name, content in files.items()})
    for path in (wheel, tarball):
        assert dict(archive.members(path, ["d/*.txt"])) == {"d/a.txt": b"A"}


@pytest.mark.parametrize("name", ["../up.txt", "/abs.txt", "a/../../up.txt", "c:\\x.txt", "a\\..\\b.txt"])
def test_names_that_leave_the_folder_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="unsafe name"):
        list(archive.members(make_tgz(tmp_path / "p.tgz", {name: b"x"}), ["**"]))
    if "\\" not in name:
        with pytest.raises(UserError, match="unsafe name"):
            list(archive.members(make_zip(tmp_path / "p.whl", {name: b"x"}), ["**"]))


def test_links_and_devices_are_left_out(tmp_path: Path) -> None:
    found = []
    for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE):
        info = tarfile.TarInfo(f"package/{kind!r}.txt")
        info.type, info.linkname = kind, "/etc/passwd"
        found.append(info)
    path = make_tgz(tmp_path / "p.tgz", {"package/a.txt": b"A"}, tuple(found))
    assert dict(archive.members(path, ["**"])) == {"a.txt": b"A"}
    link = zipfile.ZipInfo("link.txt")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(tmp_path / "p.whl", "w") as file:
        file.writestr(link, "/etc/passwd")
    assert list(archive.members(tmp_path / "p.whl", ["**"])) == []


def test_size_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make_zip(tmp_path / "p.whl", {"a.txt": b"x" * 1000, "b.txt": b"y" * 1000})
    monkeypatch.setattr(archive, "MAX_FILE", 999)
    with pytest.raises(UserError, match=r"a\.txt is larger than 999 bytes"):
        list(archive.members(path, ["**"]))
    monkeypatch.setattr(archive, "MAX_FILE", 1000)
    monkeypatch.setattr(archive, "MAX_TOTAL", 1999)
    with pytest.raises(UserError, match="more than"):
        list(archive.members(path, ["**"]))
    monkeypatch.setattr(archive, "MAX_FILE", 10_000)
    with pytest.raises(UserError, match="larger than 10000 bytes unpacked"):
        archive.text_of("bomb.txt.gz", gzip.compress(b"0" * 1_000_000), "plain")


def test_damaged_archives(tmp_path: Path) -> None:
    for name in ("p.whl", "p.tgz"):
        (tmp_path / name).write_bytes(b"not an archive")
        with pytest.raises(UserError, match=f"{name} cannot be unpacked"):
            list(archive.members(tmp_path / name, ["**"]))


@pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="dpkg-deb makes and reads .deb files")
def test_deb(tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "DEBIAN").mkdir(parents=True)
    (root / "DEBIAN" / "control").write_text(
        "Package: p\nVersion: 1\nArchitecture: all\nMaintainer: n <n@n>\nDescription: d\n"
    )
    (root / "usr/share").mkdir(parents=True)
    (root / "usr/share/a.rst.gz").write_bytes(gzip.compress(b"text"))
    (root / "usr/share/l.rst.gz").symlink_to("a.rst.gz")
    subprocess.run(["dpkg-deb", "-b", str(root), str(tmp_path / "p.deb")], check=True, capture_output=True)
    ((name, content),) = archive.members(tmp_path / "p.deb", ["usr/share/*.rst.gz"])
    assert archive.text_of(name, content, "plain") == ("usr/share/a.rst", "text")


def test_text_of() -> None:
    assert archive.text_of("a.txt", b"\xef\xbb\xbfhi", "plain") == ("a.txt", "hi")
    assert archive.text_of("a.txt", b"\xff", "plain") is None
    assert archive.text_of("a.txt", b" \n", "plain") is None
    source = f"import os\nos.abort()\nx = f('''\n{'In the beginning. ' * 100}''', 'short')\n".encode()
    assert archive.text_of("d/a.py", source, "python-strings") == (
        "d/a.txt",
        ("In the beginning. " * 100).strip(),
    )
    assert archive.text_of("a.py", b"x = (", "python-strings") is None
