"""The pages of docs/examples say what Python prints."""

from __future__ import annotations

import doctest
from pathlib import Path

import pytest

PAGES = sorted((Path(__file__).parent.parent / "docs/examples").glob("*.md"))


@pytest.mark.parametrize("page", PAGES, ids=[page.stem for page in PAGES])
def test_every_line_is_as_printed(page: Path) -> None:
    found = doctest.testfile(str(page), module_relative=False)
    assert found.attempted > 3 and not found.failed
