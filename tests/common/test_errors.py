"""The nearest known word."""

from __future__ import annotations

from dsv3.common.errors import nearest


def test_nearest() -> None:
    assert nearest("hiden_size", ["hidden_size", "vocab_size"]) == " (did you mean hidden_size?)"
    assert nearest("xyz", ["hidden_size"]) == ""
    assert nearest("a", []) == ""
