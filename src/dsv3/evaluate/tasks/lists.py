"""Generators over lists of numbers: sorting, the largest, the smallest, from last to first, the even ones."""

from __future__ import annotations

from random import Random

from dsv3.evaluate.tasks.base import Facts, Generator


def listed(numbers: list[int]) -> str:
    """Numbers as prompts and answers write them."""
    return ", ".join(map(str, numbers))


class Listed(Generator):
    """A task whose question is a list of different numbers, and whose answer is a list or one of them."""

    def facts(self, rng: Random) -> Facts:
        count = (3, 4, 5, 6, 8)[self.difficulty - 1]
        largest = (20, 20, 99, 99, 999)[self.difficulty - 1]
        return {"numbers": rng.sample(range(largest + 1), count)}

    def accepts(self, given: str, facts: Facts) -> bool:
        parts = given.strip(" []()").split(",")
        return [part.strip() for part in parts] == self.correct(facts).split(", ")


class Sorting(Listed):
    """Numbers in rising order, by taking the smallest again and again."""

    name = "sorting"

    def facts(self, rng: Random) -> Facts:
        count = (3, 4, 5, 6, 8)[self.difficulty - 1]
        largest = (9, 20, 99, 99, 999)[self.difficulty - 1]
        return {"numbers": [rng.randint(0, largest) for _ in range(count)]}

    def prompt(self, facts: Facts) -> str:
        return f"Sort from smallest to largest: {listed(facts['numbers'])}"

    def correct(self, facts: Facts) -> str:
        return listed(sorted(facts["numbers"]))

    def steps(self, facts: Facts) -> tuple[str, str]:
        left, taken, lines = list(facts["numbers"]), [], []
        while left:
            least = min(left)
            lines.append(f"{listed(left)}: smallest {least}")
            left.remove(least)
            taken.append(str(least))
        return "\n".join(lines), ", ".join(taken)


class Largest(Listed):
    """The largest of some numbers, by keeping the best so far."""

    name = "largest"

    def best(self, numbers: list[int]) -> int:
        return max(numbers)

    def prompt(self, facts: Facts) -> str:
        return f"What is the {self.name} of {listed(facts['numbers'])}?"

    def correct(self, facts: Facts) -> str:
        return str(self.best(facts["numbers"]))

    def steps(self, facts: Facts) -> tuple[str, str]:
        found, *rest = facts["numbers"]
        lines = [f"so far {found}"]
        for number in rest:
            found = self.best([found, number])
            lines.append(f"{number}: so far {found}")
        return "\n".join(lines), str(found)


class Smallest(Largest):
    """The smallest of some numbers, in the same way."""

    name = "smallest"

    def best(self, numbers: list[int]) -> int:
        return min(numbers)


class Backwards(Listed):
    """Numbers from the last to the first."""

    name = "backwards"

    def prompt(self, facts: Facts) -> str:
        return f"Write from last to first: {listed(facts['numbers'])}"

    def correct(self, facts: Facts) -> str:
        return listed(facts["numbers"][::-1])

    def steps(self, facts: Facts) -> tuple[str, str]:
        left, turned = list(facts["numbers"]), []
        lines = []
        while left:
            lines.append(f"{listed(left)}: last {left[-1]}")
            turned.append(left.pop())
        return "\n".join(lines), listed(turned)


class Evens(Listed):
    """Those of some numbers that are even, in their order; at least one is."""

    name = "evens"

    def facts(self, rng: Random) -> Facts:
        facts = super().facts(rng)
        return facts if self.correct(facts) else self.facts(rng)

    def prompt(self, facts: Facts) -> str:
        return f"Which of {listed(facts['numbers'])} are even?"

    def correct(self, facts: Facts) -> str:
        return listed([number for number in facts["numbers"] if number % 2 == 0])

    def steps(self, facts: Facts) -> tuple[str, str]:
        kept, lines = [], []
        for number in facts["numbers"]:
            lines.append(f"{number} ends in {number % 10}: {'odd' if number % 2 else 'even'}")
            kept += [] if number % 2 else [number]
        return "\n".join(lines), listed(kept)
