"""Documents with needles: every question's answer stands before it, and the text is still there."""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv3.common.errors import UserError
from dsv3.config.data import DataRecipe, NeedlesConfig, SourceConfig
from dsv3.config.recipe import load, validate
from dsv3.data.needles import KEYS, VALUES, answer, documents, needle, question, strew
from dsv3.data.sources import Skipped, plan, read

NEEDLE = re.compile(r" ?Remember: ([a-z]+)(\d+) \1\2\.")
QUESTION = re.compile(r" ?Recall: ([a-z]+)(\d+) \1\2\.")
TEXT = "And it was so. The evening came; then the morning! Was it day? It was.\n\nThe second day came. " * 20


def test_the_patterns_of_this_test_are_those_of_the_sentences() -> None:
    assert NEEDLE.fullmatch(needle("lamp", 123))
    assert QUESTION.fullmatch(question(answer("lamp", 123)))
    assert answer("lamp", 123).startswith("lamp123")


def test_keys_differ_and_are_plain_words() -> None:
    assert len(set(KEYS)) == len(KEYS) > 200
    assert all(re.fullmatch("[a-z]+", key) for key in KEYS)


@given(st.integers(0, 2**32), st.integers(20, 2000), st.integers(0, len(TEXT)), st.integers(1, 4))
def test_each_question_follows_its_needle_and_the_text_remains(
    seed: int, every: int, length: int, asks: int
) -> None:
    text = TEXT[:length].strip()
    document = strew(text, every, random.Random(seed), asks)
    asked = list(QUESTION.finditer(document))
    without = QUESTION.sub("", document)
    hidden = {match[1]: int(match[2]) for match in NEEDLE.finditer(without)}
    assert len(asked) == asks * len(hidden)
    assert len(hidden) == min(len(KEYS), max(1, length and len(text) // every))
    for match in asked:
        assert int(match[2]) == hidden[match[1]]
        assert needle(match[1], hidden[match[1]]) in document[: match.start()]
    assert NEEDLE.sub("", without).strip() == text
    assert set(hidden.values()) <= set(VALUES)


def test_documents_are_as_long_as_asked_and_the_same_each_time() -> None:
    options = NeedlesConfig(shortest=200, longest=400, every=100, passes=2)
    made = list(documents([TEXT], options, "here"))
    assert made == list(documents([TEXT], options, "here"))
    assert made != list(documents([TEXT], options, "there"))
    plain = [NEEDLE.sub("", QUESTION.sub("", document)) for document in made]
    assert all(150 <= len(text) <= 420 for text in plain[:5])
    words = " ".join(plain).split()
    assert words == TEXT.split() * 2


def test_a_source_with_needles(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text(TEXT, encoding="utf-8")
    tree = {"name": "book", "paths": [str(tmp_path)], "needles": {"shortest": 300, "longest": 300}}
    source = validate(SourceConfig, tree)
    found = list(read(plan([source])[0], source, Skipped()))
    assert len(found) > 3
    assert all(QUESTION.search(document.text) for document in found)
    assert len({document.origin for document in found}) == len(found)


def test_lengths_the_wrong_way_round_are_refused() -> None:
    with pytest.raises(UserError, match=r"needles.shortest \(500\) exceeds needles.longest \(90\)"):
        validate(SourceConfig, {"name": "a", "stdlib": True, "needles": {"longest": 90}})


@pytest.fixture(scope="module")
def recipe_documents() -> dict[str, list[str]]:
    """What each source of the needle recipes makes of a text of ours."""
    found = {}
    text = TEXT * 40
    for file in ("needle-data.yaml", "needle-data-long.yaml"):
        for source in load(DataRecipe, Path("recipes") / file).sources:
            if source.needles is not None:
                found[source.name] = list(documents([text], source.needles, file))
    return found


def test_recipes_hold_what_is_to_be_learnt(recipe_documents: dict[str, list[str]]) -> None:
    """A look-up among several, from next to no text to longer than the last phase's windows."""
    assert set(recipe_documents) == {"short", "several", "long"}
    for made in recipe_documents.values():
        for document in made:
            told: dict[str, str] = {}
            lines = sorted(
                [*NEEDLE.finditer(document), *QUESTION.finditer(document)], key=lambda match: match.start()
            )
            for match in lines:
                if "Remember" in match[0]:
                    assert match[1] not in told
                    told[match[1]] = match[2]
                else:
                    assert told[match[1]] == match[2]
            assert told
    needles = [len(NEEDLE.findall(document)) for document in recipe_documents["short"]]
    assert sum(count > 1 for count in needles) > len(needles) / 2, "copying any value is not enough"
    assert max(map(len, recipe_documents["short"])) < 4 * 256, "so short that what is asked for is near"
    assert max(map(len, recipe_documents["long"])) > 3 * 8192
    asked = [len(QUESTION.findall(document)) for document in recipe_documents["short"]]
    assert sum(asked) >= 3 * sum(needles), "asked for often enough to be most of what can be predicted"
