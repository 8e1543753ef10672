"""Text out of package archives (wheel, npm tarball, deb), without trusting them or running their code.

Only regular files whose names match are read; links, devices and names that leave the folder are never
written, and what comes out is limited in size whatever the archive's headers say.
"""

from __future__ import annotations

import ast
import re
import stat
import subprocess
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import IO

from dsv3.common.errors import UserError

MAX_FILE = 256_000_000  # bytes of one file, decompressed
MAX_TOTAL = 4_000_000_000  # bytes of one package, decompressed
MAX_FILES = 100_000
LONG_STRING = 1000  # characters; shorter string constants of a .py file are code, not text


def glob_pattern(glob: str) -> re.Pattern[str]:
    """A file glob as a regular expression on ``/``-separated names: ``*`` and ``?`` stay in a folder."""
    found = ""
    for token in re.findall(r"\*\*/|\*\*|\*|\?|[^*?]+", glob):
        found += {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}.get(token) or re.escape(token)
    return re.compile(found, re.DOTALL)


def _name(raw: str, archive: Path) -> str:
    """A member's name without a leading ``./`` or ``package/``; refuses names that leave the folder."""
    path = PurePosixPath(raw)
    if path.is_absolute() or ".." in path.parts or "\\" in raw or "\0" in raw or re.match(r"[A-Za-z]:", raw):
        raise UserError(
            f"{archive.name} holds a file with the unsafe name {raw!r}: it is not a package to trust"
        )
    name = str(path)
    return name.removeprefix("package/") if archive.suffix == ".tgz" else name


def _read(stream: IO[bytes], name: str) -> bytes:
    content = stream.read(MAX_FILE + 1)
    if len(content) > MAX_FILE:
        raise UserError(f"{name} is larger than {MAX_FILE} bytes: narrow the manifest's glob")
    return content


def _zip(archive: Path, patterns: list[re.Pattern[str]]) -> Iterator[tuple[str, bytes]]:
    with zipfile.ZipFile(archive) as file:
        for info in file.infolist():
            link = stat.S_ISLNK(info.external_attr >> 16)
            if info.is_dir() or link:
                continue
            name = _name(info.filename, archive)
            if any(pattern.fullmatch(name) for pattern in patterns):
                with file.open(info) as stream:
                    yield name, _read(stream, name)


def _tar(
    file: tarfile.TarFile, archive: Path, patterns: list[re.Pattern[str]]
) -> Iterator[tuple[str, bytes]]:
    for member in file:
        if not member.isreg():
            continue
        name = _name(member.name, archive)
        if any(pattern.fullmatch(name) for pattern in patterns):
            stream = file.extractfile(member)
            assert stream is not None
            yield name, _read(stream, name)


def _tgz(archive: Path, patterns: list[re.Pattern[str]]) -> Iterator[tuple[str, bytes]]:
    with tarfile.open(archive, "r:gz") as file:
        yield from _tar(file, archive, patterns)


def _deb(archive: Path, patterns: list[re.Pattern[str]]) -> Iterator[tuple[str, bytes]]:
    command = ["dpkg-deb", "--fsys-tarfile", str(archive.resolve())]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        with tarfile.open(fileobj=process.stdout, mode="r|") as file:
            yield from _tar(file, archive, patterns)


def members(archive: Path, globs: list[str]) -> Iterator[tuple[str, bytes]]:
    """Name and content of every regular file of an archive that matches one of the globs.

    Kinds: ``.whl`` and ``.zip``, ``.tgz`` (npm) and ``.tar.gz``, ``.deb``. Raises :class:`UserError` for an
    archive that cannot be read, an unsafe name or too much content.
    """
    patterns = [glob_pattern(glob) for glob in globs]
    total = count = 0
    try:
        if archive.suffix in (".whl", ".zip"):
            found = _zip(archive, patterns)
        elif archive.suffix == ".deb":
            found = _deb(archive, patterns)
        else:
            found = _tgz(archive, patterns)
        for name, content in found:
            total, count = total + len(content), count + 1
            if total > MAX_TOTAL or count > MAX_FILES:
                raise UserError(
                    f"{archive.name} holds more than {MAX_FILES} matching files or {MAX_TOTAL} bytes:"
                    " narrow the manifest's glob"
                )
            yield name, content
    except (zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError, OSError) as error:
        raise UserError(f"{archive.name} cannot be unpacked: {error}") from None


def _gunzip(content: bytes, name: str) -> bytes:
    machine = zlib.decompressobj(wbits=31)
    text = machine.decompress(content, MAX_FILE)
    if machine.unconsumed_tail:
        raise UserError(f"{name} is larger than {MAX_FILE} bytes unpacked: narrow the manifest's glob")
    return text


def text_of(name: str, content: bytes, extract: str) -> tuple[str, str] | None:
    """File name and text to keep of one member; None if it is not UTF-8 or holds no text.

    ``extract``: ``plain`` (``.gz`` is unpacked), or ``python-strings``: the long string constants of a
    ``.py`` file, which is parsed and never run.
    """
    if name.endswith(".gz"):
        name, content = name.removesuffix(".gz"), _gunzip(content, name)
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return None
    if extract == "python-strings":
        try:
            tree = ast.parse(text)
        except SyntaxError:
            return None
        constants = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)]
        long = [value.strip() for value in constants if isinstance(value, str) and len(value) >= LONG_STRING]
        name, text = name.removesuffix(".py") + ".txt", "\n\n".join(long)
    return (name, text) if text.strip() else None
