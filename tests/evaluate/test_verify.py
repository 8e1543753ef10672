"""Answers judged: what is the same is accepted, what is not is refused, and nothing is evaluated."""

from __future__ import annotations

import time
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3.evaluate.verify import boxed, equal, outside_thought, quantity

SAME = [
    ("42", "42"), ("42.0", "42"), ("$42$", "42"), ("42.", "42"), ("-7", "−7"), ("+7", "7"),
    ("1,234,567", "1234567"), ("1{,}234", "1234"), ("0.5", "1/2"), ("\\frac{1}{2}", "0.5"),
    ("\\dfrac12", "1/2"),
    ("2/4", "1/2"), ("1 1/2", "3/2"), ("1\\frac{1}{2}", "1.5"), ("-\\frac{3}{4}", "-0.75"), ("5 kg", "5"),
    ("5", "5 kg"), ("5\\text{ kg}", "5 kg"), ("3 apples", "3 apple"), ("\\$12", "12"), ("50\\%", "50"),
    ("50%", "0.5"), ("0.5", "50\\%"), ("90^\\circ", "90"), ("1.5 \\times 10^3", "1500"), ("1.5e3", "1500"),
    ("0.33333333", "1/3"), ("x = 5", "5"), ("(1, 2)", "1, 2"),
    ("\\{2, 1\\}", "\\{1, 2\\}"),
    ("(0.5, 3)", "(1/2, 3)"),
    ("Paris", " paris "), ("\\text{Paris}", "Paris"), ("1,234.50", "1234.5"), (".5", "0.5"),
]  # fmt: skip
DIFFERENT = [
    ("42", "43"), ("42.0000001", "42"), ("0.33", "1/3"), ("1,23", "123"), ("12,34", "1234"), ("5 kg", "5 m"),
    ("1/0", "1"), ("", "1"), ("1 2", "12"), ("2, 1", "1, 2"), ("1, 2", "1, 2, 3"), ("(1, 2]", "(1, 2)"),
    ("5x", "5"), ("London", "Paris"), ("2*21", "42"), ("0x2a", "42"), ("5%", "0.5"), ("1e999", "1"),
    ("[0, 1)", "[0, 1]"), ("\\{1, 1\\}", "\\{1, 2\\}"), ("y = 5, z", "5"), ("", ""),
]  # fmt: skip


@pytest.mark.parametrize(("said", "wanted"), SAME)
def test_same(said: str, wanted: str) -> None:
    assert equal(said, wanted)


@pytest.mark.parametrize(("said", "wanted"), DIFFERENT)
def test_different(said: str, wanted: str) -> None:
    assert not equal(said, wanted)


@given(st.integers(-(10**9), 10**9), st.integers(1, 10**4), st.sampled_from(["kg", "", "%", "apples"]))
@settings(max_examples=60, deadline=None)
def test_a_number_is_read_from_every_spelling(above: int, below: int, unit: str) -> None:
    value = Fraction(above, below)
    sign = "-" if above < 0 else ""
    for text in (f"{above}/{below}", f"{sign}\\frac{{{abs(above)}}}{{{below}}}"):
        found = quantity(text)
        assert found is not None and found.value == value
        assert equal(text, str(value)) and not equal(text, str(value + 1))
    found = quantity(f"{above:,} {unit}")
    assert found is not None and found.value == above
    assert not equal(f"{above:,}", str(above + 1)) and equal(f"{above:,}", str(above))


@given(st.text(max_size=400))
@settings(max_examples=80, deadline=None)
def test_any_text_is_read_without_error(text: str) -> None:
    equal(text, "42")
    equal("42", text)
    assert quantity(text) is None or abs(quantity(text).value) < Fraction(10) ** 1400  # type: ignore[union-attr]
    assert boxed(f"so \\boxed{{{text}}}") == text or text.count("{") != text.count("}") or "}" in text


@pytest.mark.parametrize(
    "text", ["9**9**9**9", "1e999999999", "10^{10^{10}}", "(" * 300, "9" * 100_000, "{" * 9999, "1/" * 4000]
)
def test_hostile_answers_are_quick(text: str) -> None:
    begun = time.process_time()
    assert not equal(text, "42") and not equal(text, "1, 2")
    assert time.process_time() - begun < 0.5


def test_the_last_box_outside_the_thoughts_counts() -> None:
    assert boxed("\\boxed{1} then \\boxed{\\frac{1}{2}}.") == "\\frac{1}{2}"
    assert boxed("\\boxed{1") is None and boxed("no box") is None
    assert outside_thought("<think>\\boxed{1}</think> \\boxed{2}") == " \\boxed{2}"
    assert outside_thought("<think>\\boxed{1} and no end") == ""
    assert outside_thought("plain") == "plain"
