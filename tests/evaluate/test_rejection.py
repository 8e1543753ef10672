"""Each filter of rejection sampling, and that the tasks' own solutions pass all of them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv3.config.distill import RejectionSection
from dsv3.evaluate import rejection, tasks
from dsv3.evaluate.rejection import foreign_share, judge, malformed, repeated_share, scripts, select

OPTIONS = RejectionSection()


@pytest.mark.parametrize("name", [*tasks.GENERATORS, "instructions"])
@given(difficulty=st.integers(1, 5), seed=st.integers(0, 10**6), index=st.integers(0, 10**6))
def test_solutions_are_kept(name: str, difficulty: int, seed: int, index: int) -> None:
    task = tasks.get(name, difficulty, seed)
    example = task.sample(index)
    solution = task.solve(example)
    assert solution is not None
    for text in (solution.reasoned(), solution.plain()):
        assert judge(text, example.prompt, "stop", task.verify(text, example), OPTIONS) is None, text


@pytest.mark.parametrize(
    ("text", "bad"),
    [
        ("plain", False), ("<think>a</think>b", False), ("  <think>\na\n</think>\n\nb", False), ("", True),
        (" \n", True), ("<think>a", True), ("a</think>b", True), ("<think></think>b", True),
        ("<think>a</think> ", True), ("so <think>a</think>b", True),
        ("<think>a<think>b</think>c", True), ("<think>a</think>b</think>c", True),
    ],
)  # fmt: skip
def test_malformed(text: str, bad: bool) -> None:
    assert malformed(text) is bad


def test_scripts_count_words_and_ideographs() -> None:
    assert scripts("two words, 3 и π = x") == {"LATIN": 2}  # lone letters are mathematics
    assert scripts("два слова and one") == {"CYRILLIC": 2, "LATIN": 2}
    assert scripts("答案是 7") == {"CJK": 3}
    assert scripts("カタカナ と 漢字") == {"CJK": 7}
    assert scripts("naïve café") == {"LATIN": 2}


@pytest.mark.parametrize(
    ("text", "prompt", "share"),
    [
        ("The sum of π and θ is 4", "What is it?", 0),
        ("The sum 等于四", "What is the sum?", 3 / 5),
        ("答案是 42, answer", "问题", 1 / 4),
        ("Ответ сорок два", "2 + 2 =", 0),  # no language asked for
        ("сначала think", "2 + 2 =", 1 / 2),
        ("Ответ and answer", "переведи this", 0),  # both were asked in
        ("1 + 1 = 2", "What?", 0),
    ],
)
def test_foreign_share(text: str, prompt: str, share: float) -> None:
    assert foreign_share(text, prompt) == pytest.approx(share)


def test_repeated_share() -> None:
    assert repeated_share("") == repeated_share("a few words") == 0
    assert repeated_share(" ".join(map(str, range(100)))) == 0
    assert repeated_share("so we try again and then we look once more " * 10) > 0.8
    assert repeated_share("one\ntwo\none\ntwo\none") == 0
    assert repeated_share("wait\nwait\n\nwait\n wait") == 1
    assert repeated_share("wait\nwait\nwait\nthen") == 0
    half = " ".join(map(str, range(50)))
    assert repeated_share(f"{half} {half}") == pytest.approx(43 / 93)


@pytest.mark.parametrize(
    ("text", "prompt", "finish", "score", "reason"),
    [
        ("\\boxed{1}", "What?", "stop", 1.0, None),
        ("", "What?", "error", None, "error"),
        ("\\boxed{1}", "What?", "length", 1.0, "unfinished"),
        ("\\boxed{1}", "What?", "content_filter", 1.0, "unfinished"),
        ("<think>\\boxed{1}", "What?", "stop", 1.0, "malformed"),
        ("\\boxed{1}", "What?", "stop", 0.99, "wrong"),
        ("\\boxed{1}", "What?", "stop", None, "wrong"),
        ("等于 one \\boxed{1}", "What?", "stop", 1.0, "mixed language"),
        ("so it is\n" * 9 + "\\boxed{1}", "What?", "stop", 1.0, "repetition"),
    ],
)
def test_judge_names_the_first_reason(
    text: str, prompt: str, finish: str, score: float | None, reason: str | None
) -> None:
    assert judge(text, prompt, finish, score, OPTIONS) == reason


def test_select_prefers_the_concise() -> None:
    texts = ["a long answer", "short", "short ", "middling", "wrong"]
    reasons = [None, None, None, None, "wrong"]
    assert select(texts, reasons, 1) == ["longer than kept", None, "duplicate", "longer than kept", "wrong"]
    assert select(texts, reasons, 2) == ["longer than kept", None, "duplicate", None, "wrong"]
    assert select(texts, reasons, 9) == [None, None, "duplicate", None, "wrong"]
    assert select(["bb", "aa"], [None, None], 1) == [None, "longer than kept"]  # the first of equals
    assert select([], [], 1) == []


@given(st.lists(st.tuples(st.text(max_size=6), st.sampled_from([None, "wrong"]))), st.integers(1, 4))
def test_select_keeps_different_right_ones_and_no_longer(
    answers: list[tuple[str, str | None]], keep: int
) -> None:
    texts, reasons = [text for text, _ in answers], [reason for _, reason in answers]
    chosen = select(texts, reasons, keep)
    kept = [text.strip() for text, reason in zip(texts, chosen) if reason is None]
    right = {text.strip() for text, reason in answers if reason is None}
    assert len(set(kept)) == len(kept) == min(keep, len(right))
    longer = [text for text, reason in zip(texts, chosen) if reason == rejection.LONGER]
    assert not longer or max(map(len, kept)) <= min(map(len, longer))
    assert [reason for reason in reasons if reason] == [r for b, r in zip(reasons, chosen) if b]
