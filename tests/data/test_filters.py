from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv3.common.errors import UserError
from dsv3.data import filters

GOLD = "The quick brown fox jumps over the lazy dog while seven wizards quietly box their jugs."


@pytest.fixture
def evaluation(tmp_path: Path) -> str:
    path = tmp_path / "eval.jsonl"
    rows = [
        {"question": GOLD, "choices": ["short one", "b"]},
        {"deep": {"text": "我" + "们今天去公园看花然后回家吃饭"}},
    ]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def test_thirteen_words_in_a_row(evaluation: str) -> None:
    check = filters.Decontaminator((evaluation,))
    words = filters.words(GOLD)
    assert len(words) == 16
    assert len(check.grams) == 4 + 3
    for start in range(4):
        assert check.contaminated("x y " + " ".join(words[start : start + 13]) + " z")
        assert not check.contaminated("x y " + " ".join(words[start : start + 12]) + " z")
    assert check.contaminated(GOLD.upper().replace(" ", ",\n"))
    assert check.contaminated("前文。我们今天去公园看花然后回家！")
    assert not check.contaminated("short one")
    assert not check.contaminated("")
    broken = [*words[:6], "new", *words[6:12], "other", *words[12:]]
    assert not check.contaminated(" ".join(broken))


@given(data=st.data())
def test_same_verdict_as_a_plain_search(data: st.DataObject) -> None:
    word = st.sampled_from(["a", "b"])
    gold = data.draw(st.lists(word, min_size=13, max_size=20))
    text = data.draw(st.lists(word, max_size=60))
    check = filters.Decontaminator(())
    check.vocabulary = {"a": 1, "b": 2}
    import numpy as np

    check.grams = {tuple(check.vocabulary[w] for w in gold[i : i + 13]) for i in range(len(gold) - 12)}
    rows = np.array(sorted(check.grams), dtype=np.uint64)
    check._hashes = np.unique(check._hash(list(rows.T)))
    expected = any(
        text[i : i + 13] == gold[j : j + 13] for i in range(len(text) - 12) for j in range(len(gold) - 12)
    )
    assert check.contaminated(" ".join(text)) == expected


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("{")
    (tmp_path / "ok.jsonl.gz").write_bytes(gzip.compress(json.dumps({"t": GOLD}).encode()))
    (tmp_path / "plain.txt").write_text(GOLD)
    for name in ("ok.jsonl.gz", "plain.txt"):
        assert filters.Decontaminator((str(tmp_path / name),)).contaminated(GOLD)
    for name, message in (("a.jsonl", "cannot be read"), ("none.txt", "does not exist")):
        with pytest.raises(UserError, match=f"decontaminate: .*{name} {message}"):
            filters.Decontaminator((str(tmp_path / name),))


def test_identity_ignores_white_space_and_unicode_form_only() -> None:
    assert filters.identity("a  b\n") == filters.identity("a b")
    assert filters.identity("é") == filters.identity("e\u0301")
    assert filters.identity("A b") != filters.identity("a b")


def test_held_out_share_and_order() -> None:
    identities = [filters.identity(str(number)) for number in range(20_000)]
    chosen = [filters.held_out(i, 0.05) for i in identities]
    assert abs(sum(chosen) / len(chosen) - 0.05) < 0.005
    # A larger fraction holds out the same documents and more.
    assert all(filters.held_out(i, 0.1) for i, held in zip(identities, chosen) if held)
    assert not any(filters.held_out(i, 0.0) for i in identities)
    assert filters.order(identities[0], 0) != filters.order(identities[0], 1)
    assert 0.48 < sum(filters.order(i, 0) >> 63 for i in identities) / len(identities) < 0.52
