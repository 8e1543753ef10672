"""Documents with needles: every question's answer stands before it, and the text is still there.

Bare lists say a pair as often as a document with text would; prepared data says what it teaches.
"""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv3.common.errors import UserError
from dsv3.config.data import DataRecipe, NeedlesConfig, SourceConfig
from dsv3.config.recipe import load, validate
from dsv3.data.needles import KEYS, VALUES, answer, documents, listing, needle, question, strew, taught
from dsv3.data.sources import Skipped, plan, read

PAIR = re.compile(r"([a-z]+)(\d+) \1\2\.")
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


def test_there_are_as_many_as_the_recipe_says() -> None:
    """The recipe is checked on a floor that cannot see the lists."""
    whole = NeedlesConfig()
    assert (whole.keys, whole.values) == (len(KEYS), len(VALUES))
    for key, value in {"keys": 247, "values": 91}.items():
        for wrong in (0, value):
            with pytest.raises(UserError, match=f"needles.{key}"):
                validate(SourceConfig, {"name": "a", "stdlib": True, "needles": {key: wrong}})


@given(st.integers(0, 2**32), st.integers(1, 246), st.integers(1, 90), st.booleans())
def test_needles_are_of_the_first_keys_and_values(seed: int, keys: int, values: int, bare: bool) -> None:
    options = NeedlesConfig(every=20, keys=keys, values=values, bare=bare, shortest=300, longest=900)
    made = list(documents([TEXT], options, str(seed)))
    assert all(("Remember:" in document) is not bare for document in made)
    pairs = [pair for document in made for pair in PAIR.findall(document)]
    assert {key for key, _ in pairs} <= set(KEYS[:keys])
    assert {int(value) for _, value in pairs} <= set(VALUES[:values])
    assert len(pairs) >= 4


def test_few_keys_are_all_used() -> None:
    options = NeedlesConfig(every=12, keys=4, values=3)
    pairs = PAIR.findall(" ".join(strew(TEXT, options, random.Random(seed)) for seed in range(20)))
    assert {key for key, _ in pairs} == set(KEYS[:4])
    assert {int(value) for _, value in pairs} == set(VALUES[:3])


@given(st.integers(0, 2**32), st.integers(5, 400), st.integers(1, 4))
def test_a_list_says_each_pair_as_often_and_nothing_else(seed: int, length: int, asks: int) -> None:
    options = NeedlesConfig(every=12, asks=asks, keys=16, bare=True)
    document = listing(TEXT[:length], options, random.Random(seed))
    assert re.fullmatch(r"(?: ?[a-z]+\d+ [a-z]+\d+\.)+", document)
    said = Counter(PAIR.findall(document))
    assert set(said.values()) == {1 + asks}
    assert len({key for key, _ in said}) == len(said) == min(16, max(1, length // 12))


@given(st.integers(0, 2**32), st.integers(20, 2000), st.integers(0, len(TEXT)), st.integers(1, 4))
def test_each_question_follows_its_needle_and_the_text_remains(
    seed: int, every: int, length: int, asks: int
) -> None:
    text = TEXT[:length].strip()
    document = strew(text, NeedlesConfig(every=every, asks=asks), random.Random(seed))
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


def test_prepared_data_says_what_it_teaches(tmp_path: Path) -> None:
    def write(*needles: dict[str, int] | None) -> None:
        sources = [{"name": "a", "needles": options} for options in needles]
        (tmp_path / "manifest.json").write_text(json.dumps({"recipe": {"sources": sources}}))

    write({"keys": 16, "values": 20}, None, {"keys": 12, "values": 30})
    assert taught(tmp_path) == (KEYS[:16], range(10, 40))
    for nothing_drawn in ([None], [{"every": 40}]):  # text as it is; data from before keys could be chosen
        write(*nothing_drawn)
        assert taught(tmp_path) == (KEYS, VALUES)


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


def gaps(document: str) -> int:
    """Characters from a question back to where its answer was said last, at most."""
    said: dict[str, int] = {}
    longest = 0
    for match in PAIR.finditer(document):
        longest = max(longest, match.start() - said.get(match[1], match.start()))
        said[match[1]] = match.start()
    return longest


def test_recipes_hold_what_is_to_be_learnt(recipe_documents: dict[str, list[str]]) -> None:
    """A look-up among several, from next to no text to longer than the last phase's windows."""
    assert set(recipe_documents) == {"lists", "short", "several", "often", "far"}
    lists = recipe_documents.pop("lists")
    assert sum(len(set(PAIR.findall(document))) > 1 for document in lists) > 0.9 * len(lists)
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
    assert max(map(len, recipe_documents["far"])) > 3 * 8192
    assert max(gaps(document) for document in recipe_documents["far"]) > 2 * 8192, "half of a window away"
    asked = [len(QUESTION.findall(document)) for document in recipe_documents["short"]]
    assert sum(asked) >= 3 * sum(needles), "asked for often enough to be most of what can be predicted"
