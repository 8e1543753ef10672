"""Text as it comes: whole characters, stop texts across token borders, nothing taken back."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from dsv3.serve.text import Detokeniser

WORDS = ["a", "b", "ab", "é", "日本", "🙂", "\ufffd", "\n", "aab"]


def cut(data: bytes, sizes: list[int]) -> list[bytes]:
    """The bytes as tokens of these sizes, over and over."""
    found, at = [], 0
    while at < len(data):
        size = sizes[len(found) % len(sizes)]
        found.append(data[at : at + size])
        at += size
    return found


@given(
    st.lists(st.sampled_from(WORDS)).map("".join),
    st.lists(st.integers(1, 5), min_size=1, max_size=6),
    st.lists(st.sampled_from(["ab", "aa", "b\n", "本", "🙂é", "abab"]), max_size=3),
)
def test_any_cut_of_any_text(text: str, sizes: list[int], stops: list[str]) -> None:
    tokens = cut(text.encode(), sizes)
    ends = [(place + len(stop), place) for stop in stops if (place := text.find(stop)) >= 0]
    wanted = text[: min(ends)[1]] if ends else text
    detokeniser = Detokeniser(tokens, stops=stops)
    shown, matched = "", False
    for number in range(len(tokens)):
        matched = detokeniser.push(number)
        assert detokeniser.text.startswith(shown), "text was taken back"
        shown = detokeniser.text
        assert "\ufffd" not in shown.replace("\ufffd", "", text.count("\ufffd"))
        if matched:
            break
    detokeniser.close(matched)
    assert matched == bool(ends) and detokeniser.text == wanted


def test_the_stop_text_complete_first_wins_however_the_text_is_cut() -> None:
    for tokens in ([b"xabab"], [b"xa", b"ba", b"b"], [b"x", b"a", b"b", b"a", b"b"]):
        detokeniser = Detokeniser(tokens, stops=["abab", "ba"])
        assert any(detokeniser.push(number) for number in range(len(tokens)))
        assert detokeniser.text == "xa"


def test_a_character_in_three_tokens_is_shown_when_whole() -> None:
    detokeniser = Detokeniser([b"x", b"\xe6\x97", b"\xa5"])
    seen = []
    for token in (0, 1, 2, 1):
        detokeniser.push(token)
        seen.append(detokeniser.text)
    assert seen == ["x", "x", "x日", "x日"]
    detokeniser.close()
    assert detokeniser.text == "x日\ufffd"  # the answer ended inside a character


def test_what_may_begin_a_stop_text_waits() -> None:
    tokens = [b"one\n", b"\n", b"two", b"\n"]
    detokeniser = Detokeniser(tokens, stops=["\n\nEND"])
    seen = []
    for token in range(4):
        assert not detokeniser.push(token)
        seen.append(detokeniser.text)
    assert seen == ["one", "one", "one\n\ntwo", "one\n\ntwo"]
    detokeniser.close()
    assert detokeniser.text == "one\n\ntwo\n"


def test_a_stop_text_completed_by_the_last_bytes() -> None:
    detokeniser = Detokeniser([b"a", b"\xff"], stops=["\ufffd"])
    assert not detokeniser.push(0) and detokeniser.push(1) and detokeniser.text == "a"


def test_hidden_tokens_and_no_tokenizer() -> None:
    detokeniser = Detokeniser([b"a", b"<eos>"], hidden={1})
    detokeniser.push(0)
    detokeniser.push(1)
    detokeniser.push(7)  # past the tokenizer's vocabulary
    detokeniser.close()
    assert detokeniser.text == "a"
    silent = Detokeniser(None)
    assert not silent.push(3) and silent.text == ""
