"""Instructions whose keeping a program can check, after IFEval: so many words, no commas, this ending.

Each constraint is a sentence of the prompt, a check, and a way to write what it asks for, so that a response
keeping all of them can be made. Difficulty is how many are asked at once; the score is the share kept.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

from dsv3.evaluate.tasks.base import Example, Facts, Generator, Solution
from dsv3.evaluate.verify import outside_thought

TOPICS = (
    "a river", "a train", "the sea", "an old house", "a garden", "the moon", "a market", "a bridge", "winter",
    "a library", "bread", "a clock", "a forest", "music", "rain", "a ship", "a map", "a school", "salt",
)  # fmt: skip
KEYWORDS = (
    "silver", "window", "quiet", "morning", "stone", "letter", "paper", "green", "distant", "harbour", "lamp",
    "seven", "gentle", "winding", "copper", "music", "shadow", "wooden", "village", "bright",
)  # fmt: skip
ENDINGS = ("that is all", "and so it goes", "the end", "thank you", "no more to say")
STARTS = ("Today", "Once", "Perhaps", "Here", "Listen")
FILLER = "it has been there for a long time and people like to look at it when they pass by on their way home"


@dataclass(frozen=True)
class Constraint:
    """``group``: only one of a group is asked at a time. ``order``: when ``apply`` acts on the text."""

    group: str
    order: int
    draw: Callable[[Random], Any]
    say: Callable[[Any], str]
    check: Callable[[str, Any], bool]
    apply: Callable[[str, Any], str]


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+(?:['’-][^\W_]+)*", text)


def _has(text: str, word: str) -> bool:
    return re.search(rf"\b{re.escape(word)}\b", text, re.IGNORECASE) is not None


def _lengthen(text: str, count: int) -> str:
    filler = FILLER.split()
    while len(_words(text)) < count:
        text += " " + filler[len(_words(text)) % len(filler)]
    return text


def _lines(text: str, count: int, before: str, between: str) -> str:
    """The words of a text dealt to ``count`` lines."""
    words = text.split()
    size = -(-len(words) // count)
    parts = [" ".join(words[at * size : (at + 1) * size]) or "yes" for at in range(count)]
    return between.join(before + part for part in parts)


def _bullets(text: str) -> int:
    return sum(bool(re.match(r"\s*[*-] \S", line)) for line in text.splitlines())


def _paragraphs(text: str) -> int:
    return len([part for part in re.split(r"\n\s*\n", text) if part.strip()])


def _ends(text: str) -> str:
    return text.rstrip().rstrip(".!\"'”").lower()


CONSTRAINTS: dict[str, Constraint] = {
    "at_least": Constraint(
        "length", 1, lambda r: r.choice((10, 20, 30, 50)), lambda n: f"Write at least {n} words.",
        lambda t, n: len(_words(t)) >= n, _lengthen,
    ),
    "at_most": Constraint(
        "length", 1, lambda r: r.choice((15, 20, 30, 40)), lambda n: f"Write at most {n} words.",
        lambda t, n: 0 < len(_words(t)) <= n, lambda t, n: t,
    ),
    "include": Constraint(
        "include", 2, lambda r: r.choice(KEYWORDS), lambda w: f'Use the word "{w}".',
        _has, lambda t, w: f"{w} {t}",
    ),
    "exclude": Constraint(
        "exclude", 3, lambda r: r.choice(("road", "long", "people", "time", "they")),
        lambda w: f'Do not use the word "{w}".', lambda t, w: bool(t.strip()) and not _has(t, w),
        lambda t, w: " ".join(part for part in t.split() if part.lower() != w),
    ),
    "letter": Constraint(
        "letter", 2, lambda r: [r.choice("kvwz"), r.randint(2, 4)],
        lambda v: f'The letter "{v[0]}" must appear at least {v[1]} times.',
        lambda t, v: t.lower().count(v[0]) >= v[1], lambda t, v: f"{v[0] * v[1]} {t}",
    ),
    "no_commas": Constraint(
        "commas", 4, lambda r: True, lambda _: "Use no commas.",
        lambda t, _: bool(t.strip()) and "," not in t, lambda t, _: t.replace(",", ""),
    ),
    "placeholders": Constraint(
        "placeholders", 2, lambda r: r.randint(1, 3),
        lambda n: f"Have at least {n} placeholder{'s' * (n > 1)} in square brackets, such as [name].",
        lambda t, n: len(re.findall(r"\[[^\[\]\n]+\]", t)) >= n, lambda t, n: t + " [name]" * n,
    ),
    "start": Constraint(
        "start", 5, lambda r: r.choice(STARTS), lambda w: f'Begin with the word "{w}".',
        lambda t, w: re.match(rf"\W*{w}\b", t, re.IGNORECASE) is not None, lambda t, w: f"{w} {t}",
    ),
    "end": Constraint(
        "end", 7, lambda r: r.choice(ENDINGS), lambda w: f'End with the words "{w}".',
        lambda t, w: _ends(t).endswith(w), lambda t, w: f"{t} {w}",
    ),
    "bullets": Constraint(
        "layout", 6, lambda r: r.randint(2, 4),
        lambda n: f'Write exactly {n} bullet points, each "* " on a line.',
        lambda t, n: _bullets(t) == n, lambda t, n: _lines(t, n, "* ", "\n"),
    ),
    "paragraphs": Constraint(
        "layout", 6, lambda r: r.randint(2, 3),
        lambda n: f"Write exactly {n} paragraphs, a blank line between.",
        lambda t, n: _paragraphs(t) == n, lambda t, n: _lines(t, n, "", "\n\n"),
    ),
    "lowercase": Constraint(
        "case", 8, lambda r: True, lambda _: "Write in lower case only.",
        lambda t, _: bool(t.strip()) and t == t.lower(), lambda t, _: t.lower(),
    ),
    "uppercase": Constraint(
        "case", 8, lambda r: True, lambda _: "Write in capital letters only.",
        lambda t, _: bool(t.strip()) and t == t.upper(), lambda t, _: t.upper(),
    ),
    "quoted": Constraint(
        "layout", 9, lambda r: True, lambda _: "Put double quotation marks around your whole answer.",
        lambda t, _: len(t.strip()) > 2 and t.strip()[0] == t.strip()[-1] == '"', lambda t, _: f'"{t}"',
    ),
}  # fmt: skip


class Instructions(Generator):
    """A topic and one to five constraints out of fourteen."""

    name = "instructions"

    def facts(self, rng: Random) -> Facts:
        groups = sorted({constraint.group for constraint in CONSTRAINTS.values()})
        chosen = rng.sample(groups, self.difficulty)
        kinds = sorted(rng.choice([k for k, c in CONSTRAINTS.items() if c.group == g]) for g in chosen)
        asked = {kind: CONSTRAINTS[kind].draw(rng) for kind in kinds}
        return {"topic": rng.choice(TOPICS), "asked": asked}

    def prompt(self, facts: Facts) -> str:
        sentences = [CONSTRAINTS[kind].say(value) for kind, value in facts["asked"].items()]
        return f"Write about {facts['topic']}. " + " ".join(sentences)

    def correct(self, facts: Facts) -> str:
        """A response that keeps every constraint."""
        text = facts["topic"] + " by the road"
        asked = sorted(facts["asked"].items(), key=lambda item: CONSTRAINTS[item[0]].order)
        for kind, value in asked:
            text = CONSTRAINTS[kind].apply(text, value)
            if kind == "exclude":  # words taken out may be missing from the count
                text = self._refill(text, facts["asked"], value)
        return text

    @staticmethod
    def _refill(text: str, asked: dict[str, Any], without: str) -> str:
        count = asked.get("at_least", 0)
        return text + " many" * max(0, count - len(_words(text)))

    def steps(self, facts: Facts) -> tuple[str, str]:
        lines = [CONSTRAINTS[kind].say(value) for kind, value in facts["asked"].items()]
        return "\n".join(lines), self.correct(facts)

    def solve(self, example: Example) -> Solution:
        reasoning, text = self.steps(example.metadata)
        return Solution(reasoning, text, text)

    def verify(self, completion: str, example: Example) -> float:
        """Share of the constraints kept by what follows the thoughts."""
        text = outside_thought(completion).strip()
        asked = example.metadata["asked"]
        return sum(CONSTRAINTS[kind].check(text, value) for kind, value in asked.items()) / len(asked)
