from __future__ import annotations

import re

from hypothesis import given
from hypothesis import strategies as st

from dsv3.serve.api.markers import Markers, Thinking

MARKERS = ("<think>", "</think>", "<thin", "ab")
texts = st.lists(
    st.sampled_from(["<think>", "</think>", "<", "/", "thin", "k>", "a", "b", "\n", " ", "é"])
).map("".join)


def cuts(data: st.DataObject, text: str) -> list[str]:
    """A text cut anywhere."""
    places = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    return [text[a:b] for a, b in zip([0, *places], [*places, len(text)])]


@given(st.data(), texts)
def test_markers_are_found_however_the_text_is_cut(data: st.DataObject, text: str) -> None:
    markers = ("<think>", "</think>", "ab")
    reader, found = Markers(markers), []
    for piece in cuts(data, text):
        found += reader.feed(piece)
    found += reader.close()
    assert "".join(found) == text
    wanted = [part for part in re.split("(<think>|</think>|ab)", text) if part in markers]
    assert [piece for piece in found if piece in markers] == wanted


def divided(pieces: list[str], begun: bool) -> tuple[str, str]:
    reader, thought, said = Thinking(begun), "", ""
    for piece in pieces:
        more, rest = reader.feed(piece)
        thought, said = thought + more, said + rest
    more, rest = reader.close()
    return thought + more, said + rest


@given(st.data(), texts, st.booleans())
def test_thinking_is_divided_however_the_text_is_cut(data: st.DataObject, text: str, begun: bool) -> None:
    # Written apart from the reader: by one regular expression over the whole text.
    match = re.fullmatch(
        r"(?s)(.*?)(</think>(.*))?" if begun else r"(?s)\s*<think>(.*?)(</think>(.*))?", text
    )
    wanted = ("", text) if match is None else (match[1].strip("\n"), (match[3] or "").lstrip("\n"))
    assert divided(cuts(data, text), begun) == wanted


def test_reasoning_as_r1_writes_it() -> None:
    assert divided(["<think>\nLet me", " see.\n</th", "ink>\n\n", "42"], False) == ("Let me see.", "42")
    assert divided(["A <think> in", " text"], False) == ("", "A <think> in text")
