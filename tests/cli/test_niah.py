"""What ``dsv3 niah`` makes of its words."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from dsv3.cli.main import app
from dsv3.cli.niah import _names, tokens
from dsv3.common.errors import UserError


def test_lengths_are_tokens_or_thousands_of_them() -> None:
    assert tokens("256,2K, 8k") == (256, 2048, 8192)
    for text in ("", "abc", "0", "1,,2", "-5", "2M"):
        with pytest.raises(UserError, match="--lengths"):
            tokens(text)


def test_models_are_named_by_what_tells_them_apart() -> None:
    phases = [
        Path("/runs/needle/model"),
        Path("/runs/extended/phase-1/model"),
        Path("/runs/extended/phase-2/model"),
    ]
    assert _names(phases) == ["needle-model", "phase-1-model", "phase-2-model"]
    assert _names([Path("/models/v3")]) == ["v3"]
    with pytest.raises(UserError, match="named twice"):
        _names([Path("/a"), Path("/a")])


def test_nothing_is_made_for_a_mistake(tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ["niah", str(tmp_path), "--haystack", str(tmp_path), "--out", str(out), "--lengths", "x"]
    done = CliRunner().invoke(app, words)
    assert isinstance(done.exception, UserError) and not out.exists()
    done = CliRunner().invoke(app, [*words[:-1], "256"])  # a folder without a model
    assert isinstance(done.exception, UserError) and not out.exists()
