"""Whether a free answer is right: a short answer, a number, mathematics, a program that passes its tests."""

from __future__ import annotations

import itertools
import os
import re
import secrets
import string
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from dsv3.evaluate.benchmarks.base import Judge, Question, Scores
from dsv3.evaluate.sandbox import Sandbox
from dsv3.evaluate.verify import boxed, equal, outside_thought
from dsv3.evaluate.verify_symbolic import same_mathematics

SECONDS = 10.0  # of a program and its tests
ALIGNED = 6  # spans of an answer that are paired in every order
_ARTICLES = frozenset(("a", "an", "the"))
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def one_by_one(score: Callable[[str, Any], Scores]) -> Judge:
    """A judge from the score of one answer and its reference."""

    def judge(questions: Sequence[Question], answers: Sequence[str]) -> list[Scores]:
        return [score(answer, question.reference) for question, answer in zip(questions, answers)]

    return judge


def words(text: str) -> list[str]:
    """Lower case, without articles and punctuation, hyphens apart, numbers by value (as DROP's scorer)."""
    found = []
    for word in re.split(r"[\s-]+", text.lower()):
        try:
            bare = str(float(word.strip(string.punctuation + "‘’“”").replace(",", "")))
        except ValueError:
            bare = "".join(letter for letter in word if letter not in string.punctuation + "‘’´`“”")
        if bare and bare not in _ARTICLES:
            found.append(bare)
    return found


def short(answer: str, reference: Sequence[Sequence[str]]) -> Scores:
    """``exact_match`` and ``f1`` of the words, the best over the answers that are right.

    An answer of several spans is read as a list with commas, its spans paired as suits it best; F1 is 0 for a
    pair where the right span has numbers and the given one has none of them.
    """
    text = outside_thought(answer).strip()
    line = text.split("\n")[0].strip() if text else ""
    box = boxed(text)
    line = box if box is not None else line.removesuffix(".")
    best = {"exact_match": 0.0, "f1": 0.0}
    for spans in reference:
        given = [line] if len(spans) == 1 else [part for part in line.split(", ") if part]
        one, other = [words(span) for span in given], [words(span) for span in spans]
        best["exact_match"] = max(best["exact_match"], float(sorted(one) == sorted(other)))
        best["f1"] = max(best["f1"], _paired_f1(one, other))
    return best


def _paired_f1(given: list[list[str]], wanted: list[list[str]]) -> float:
    """Mean F1 of the best pairing; a span without a partner counts as 0."""
    size = max(len(given), len(wanted))
    if size > ALIGNED:
        return float(sorted(given) == sorted(wanted))
    one, other = (spans + [[]] * (size - len(spans)) for spans in (given, wanted))
    orders = itertools.permutations(other)
    return max(sum(map(_f1, one, order)) for order in orders) / max(1, size)


def _f1(given: list[str], wanted: list[str]) -> float:
    one, other = set(given), set(wanted)
    numbers = {word for word in other if _NUMBER.fullmatch(word)}
    if numbers and not numbers & one:
        return 0.0
    common = len(one & other)
    return 2 * common / (len(one) + len(other)) if common else 0.0


def number(answer: str, reference: Sequence[Sequence[str]]) -> Scores:
    """The boxed number, else the one after "answer is", else the last."""
    text = outside_thought(answer)
    given = boxed(text)
    if given is None:
        after = re.split(r"answer is:?", text, flags=re.IGNORECASE)[-1] if "nswer is" in text else None
        found = _NUMBER.findall(text if after is None else re.sub(r"-\s+(?=\d)", "-", after))
        given = "" if not found else found[-1] if after is None else found[0]
    return {"exact_match": float(any(equal(given, wanted) for (wanted,) in reference))}


def math(answer: str, solution: str) -> Scores:
    """The boxed answer, else what "the final answer is" states, against the solution's box."""
    text = outside_thought(answer)
    given = boxed(text)
    if given is None:
        match = re.search(
            r"final answer is:?\s*(.+?)(?:\. I hope|\.?\s*$)", text, re.IGNORECASE | re.MULTILINE
        )
        given = match[1] if match else None
    wanted = boxed(solution)
    if given is None or wanted is None:
        return {"exact_match": 0.0}
    return {"exact_match": float(equal(given, wanted) or bool(same_mathematics(given, wanted)))}


def program(answer: str, reference: dict[str, str]) -> str:
    """What is run: a fenced block as a whole program, other text as the continuation of the prompt."""
    text = outside_thought(answer)
    fenced = re.search(r"```(?:python|py)?\n(.*?)(?:```|\Z)", text, re.DOTALL)
    before = reference["before"]
    if fenced:
        body = (f"{before}\n    pass\n\n" if before else "") + fenced[1]
    else:
        body = before + text
    return f"{body}\n{reference['after']}"


def code(questions: Sequence[Question], answers: Sequence[str]) -> list[Scores]:
    """``pass@1``: the program ends its tests, in the sandbox. Leaving early is no way to pass."""
    word = secrets.token_hex(8)

    def passes(pair: tuple[Question, str]) -> Scores:
        question, answer = pair
        out = Sandbox(seconds=SECONDS).run(f"{program(answer, question.reference)}\nprint('\\n{word}')")
        return {"pass@1": float(out.status == "ok" and out.stdout.rstrip().endswith(word))}

    with ThreadPoolExecutor(max(1, (os.cpu_count() or 2) // 2)) as pool:
        return list(pool.map(passes, zip(questions, answers)))


JUDGES: dict[str, Judge] = {
    "short": one_by_one(short),
    "number": one_by_one(number),
    "math": one_by_one(math),
    "code": code,
}
