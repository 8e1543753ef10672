"""Documents of different benchmarks brought to the same parts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dsv3.evaluate.benchmarks.documents import Document

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True)
class Item:
    """``query``: the question, up to where an answer is to begin. ``choices``: continuations without the
    space before them; ``gold``: the right one. ``queries``: one a choice, where choices differ in what comes
    before. ``answer``: what follows the query in a worked example; ``reference``: what a judge compares with.
    ``asked``: the question of a conversation, where that is not the query. ``group``: a subject."""

    query: str = ""
    choices: tuple[str, ...] = ()
    gold: int = 0
    queries: tuple[str, ...] = ()
    answer: str = ""
    reference: Any = None
    asked: str = ""
    group: str = ""

    def contexts(self) -> tuple[str, ...]:
        """What comes before each choice."""
        return self.queries or (self.query,) * len(self.choices)

    def example(self) -> str:
        """The question with its answer."""
        if self.choices:
            return f"{self.contexts()[self.gold]} {self.choices[self.gold]}"
        return self.query + self.answer


def listed(doc: Document) -> Item:
    """``query`` (or ``question``), ``choices``, ``gold``; without ``gold`` the one choice is the answer."""
    query = doc.get("query", doc.get("question"))
    return Item(str(query), tuple(doc["choices"]), int(doc.get("gold", 0)))


def lettered(doc: Document) -> Item:
    """``question``, ``choices``, ``answer`` (a number from 0, or a letter), perhaps ``passage`` and
    ``subject``: the choices are listed by letters, and the letters are ranked."""
    answer = doc["answer"]
    gold = LETTERS.index(answer) if isinstance(answer, str) else int(answer)
    letters = LETTERS[: len(doc["choices"])]
    listing = "".join(f"\n{letter}. {choice}" for letter, choice in zip(letters, doc["choices"]))
    passage = f"{doc['passage']}\n" if "passage" in doc else ""
    return Item(
        f"{passage}{doc['question']}{listing}\nAnswer:",
        tuple(letters),
        gold,
        group=str(doc.get("subject", "")).replace("_", " "),
    )


def blank(doc: Document) -> Item:
    """WinoGrande: the sentence with each option in its blank; what follows the blank is ranked."""
    before, after = doc["sentence"].split("_")
    options = (doc["option1"], doc["option2"])
    return Item(
        choices=(after.strip(),) * 2,
        gold=int(doc["answer"]) - 1,
        queries=tuple(before + option for option in options),
    )


def _short(query: str, answers: list[str]) -> Item:
    return Item(query, answer=f" {answers[0]}", reference=[[answer] for answer in answers])


def asked(doc: Document) -> Item:
    """``question`` and ``answer``, a text or a list of those that are right."""
    answers = doc["answer"] if isinstance(doc["answer"], list) else [str(doc["answer"])]
    return _short(f"Question: {doc['question']}\nAnswer:", answers)


def trivia(doc: Document) -> Item:
    """TriviaQA: the answer and its other names."""
    answers = [doc["answer"]["value"], *doc["answer"]["aliases"]]
    return _short(f"Question: {doc['question']}\nAnswer:", answers)


def jeopardy(doc: Document) -> Item:
    """A category and a clue."""
    return _short(doc["query"], [doc["answer"]])


def squad(doc: Document) -> Item:
    """A passage, a question, spans of the passage."""
    return _short(doc["query"], doc["answers_text"])


def drop(doc: Document) -> Item:
    """A passage and a question; each answer that is right is a list of spans, given with commas between."""
    first = ", ".join(doc["answers"][0])
    return Item(doc["query"], answer=f" {first}", reference=doc["answers"])


def gsm8k(doc: Document) -> Item:
    """Steps that end in "So the answer is N."."""
    return Item(
        f"Question: {doc['question']}\nAnswer:",
        answer=f" {doc['choices'][0]}",
        reference=[[doc["short_answer"]]],
        asked=doc["question"],
    )


def math(doc: Document) -> Item:
    """A problem, and a solution with a box."""
    return Item(doc["query"], answer=f" {doc['solution']}", reference=doc["solution"], asked=doc["problem"])


def humaneval(doc: Document) -> Item:
    """A function to be completed, and a program that checks it."""
    check = f"{doc['test']}\ncheck({doc['entry_point']})\n"
    return Item(
        doc["prompt"],
        answer=doc["canonical_solution"],
        reference={"before": doc["prompt"], "after": check},
    )


def mbpp(doc: Document) -> Item:
    """A task in words, and asserts, which the prompt shows (they name the function)."""
    tests = "\n".join(doc["test_list"]).replace("\r", "")
    words = (
        f"You are an expert Python programmer, and here is your task: {doc['text'].strip()}"
        f" Your code should pass these tests:\n\n{tests}\n"
    )
    code = doc["code"].replace("\r", "")
    return Item(
        f"{words}[BEGIN]\n",
        answer=f"{code}\n[DONE]",
        reference={"before": "", "after": f"{doc['test_setup_code']}\n{tests}\n".replace("\r", "")},
        asked=words,
    )
