"""Generators over words: letter counts, reversing. Words are made up, so none is known."""

from __future__ import annotations

from random import Random

from dsv3.evaluate.tasks.base import Facts, Generator
from dsv3.evaluate.verify import squeezed

ONSETS = (*"bdfgklmnprstvz", "br", "dr", "gl", "pl", "st", "tr")
VOWELS = "aeiou"


def word(rng: Random, syllables: int) -> str:
    """A word that can be spoken, of two to three letters a syllable."""
    return "".join(rng.choice(ONSETS) + rng.choice(VOWELS) for _ in range(syllables))


class Letters(Generator):
    """How often a letter is in a word, by walking through it."""

    name = "letters"

    def facts(self, rng: Random) -> Facts:
        made = word(rng, self.difficulty + 1)
        return {"word": made, "letter": rng.choice(made) if rng.random() < 0.9 else rng.choice("aeioubdr")}

    def prompt(self, facts: Facts) -> str:
        return f'How many times is the letter "{facts["letter"]}" in "{facts["word"]}"?'

    def correct(self, facts: Facts) -> str:
        return str(facts["word"].count(facts["letter"]))

    def steps(self, facts: Facts) -> tuple[str, str]:
        count, parts = 0, []
        for letter in facts["word"]:
            count += letter == facts["letter"]
            parts.append(f"{letter} {count}")
        return "\n".join(parts), str(count)


class Reversing(Generator):
    """A word spelled backwards, letter by letter."""

    name = "reversing"

    def facts(self, rng: Random) -> Facts:
        return {"word": word(rng, self.difficulty + 1)}

    def prompt(self, facts: Facts) -> str:
        return f'Spell "{facts["word"]}" backwards.'

    def correct(self, facts: Facts) -> str:
        return str(facts["word"][::-1])

    def accepts(self, given: str, facts: Facts) -> bool:
        return squeezed(given).strip("\"'") == self.correct(facts)

    def steps(self, facts: Facts) -> tuple[str, str]:
        turned = ""
        lines = ["letters: " + " ".join(facts["word"])]
        for letter in facts["word"]:
            turned = letter + turned
            lines.append(turned)
        return "\n".join(lines), turned
