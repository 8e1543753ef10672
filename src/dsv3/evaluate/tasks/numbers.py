"""Generators of arithmetic: sums, products, gcd, bases, fractions, sequences, countdown."""

from __future__ import annotations

import ast
import itertools
import math
import operator
from collections.abc import Callable
from fractions import Fraction
from random import Random

from dsv3.evaluate.tasks.base import Facts, Generator

DIGITS = "0123456789abcdef"


class Sums(Generator):
    """Chains of additions and subtractions: two one-digit terms at first, five of up to three digits."""

    name = "sums"

    def facts(self, rng: Random) -> Facts:
        largest = (9, 20, 99, 99, 999)[self.difficulty - 1]
        count = (2, 2, 3, 4, 5)[self.difficulty - 1]
        terms = [rng.randint(0, largest)]
        terms += [rng.choice((1, -1)) * rng.randint(1, largest) for _ in range(count - 1)]
        return {"terms": terms}

    def prompt(self, facts: Facts) -> str:
        first, *rest = facts["terms"]
        return "What is " + str(first) + "".join(f" {'+-'[n < 0]} {abs(n)}" for n in rest) + "?"

    def correct(self, facts: Facts) -> str:
        return str(sum(facts["terms"]))

    def steps(self, facts: Facts) -> tuple[str, str]:
        total, *rest = facts["terms"]
        lines = []
        for term in rest:
            lines.append(f"{total} {'+-'[term < 0]} {abs(term)} = {total + term}")
            total += term
        return "\n".join(lines), str(total)


class Products(Generator):
    """A number times another, by partial products of its digits."""

    name = "products"

    def facts(self, rng: Random) -> Facts:
        left, right = ((9, 9), (20, 9), (99, 9), (99, 99), (999, 99))[self.difficulty - 1]
        return {"left": rng.randint(2, left), "right": rng.randint(2, right)}

    def prompt(self, facts: Facts) -> str:
        return f"What is {facts['left']} * {facts['right']}?"

    def correct(self, facts: Facts) -> str:
        return str(facts["left"] * facts["right"])

    def steps(self, facts: Facts) -> tuple[str, str]:
        left, right = facts["left"], facts["right"]
        lines, total = [], 0
        for place, digit in enumerate(reversed(str(left))):
            part = int(digit) * 10**place
            if part:
                lines.append(f"{part} * {right} = {part * right}")
                if total:
                    lines.append(f"{total} + {part * right} = {total + part * right}")
                total += part * right
        return "\n".join(lines), str(total)


class GreatestDivisor(Generator):
    """Greatest common divisors by Euclid's steps."""

    name = "gcd"

    def facts(self, rng: Random) -> Facts:
        shared, largest = ((4, 6), (9, 12), (15, 30), (40, 60), (99, 99))[self.difficulty - 1]
        common = rng.randint(1, shared)
        return {"a": common * rng.randint(1, largest), "b": common * rng.randint(1, largest)}

    def prompt(self, facts: Facts) -> str:
        return f"What is the greatest common divisor of {facts['a']} and {facts['b']}?"

    def correct(self, facts: Facts) -> str:
        return str(math.gcd(facts["a"], facts["b"]))

    def steps(self, facts: Facts) -> tuple[str, str]:
        large, small = max(facts["a"], facts["b"]), min(facts["a"], facts["b"])
        lines = []
        while small:
            lines.append(f"{large} = {large // small} * {small} + {large % small}")
            large, small = small, large % small
        return "\n".join(lines), str(large)


class Bases(Generator):
    """A decimal number written in base 2, 3, 8 or 16, digit by digit from the right."""

    name = "bases"

    def facts(self, rng: Random) -> Facts:
        largest = (15, 31, 99, 255, 4095)[self.difficulty - 1]
        bases = ((2,), (2, 3), (2, 3, 8), (2, 3, 8, 16), (2, 3, 8, 16))[self.difficulty - 1]
        return {"number": rng.randint(1, largest), "base": rng.choice(bases)}

    def prompt(self, facts: Facts) -> str:
        return f"Write {facts['number']} in base {facts['base']}."

    def correct(self, facts: Facts) -> str:
        number, base = facts["number"], facts["base"]
        places = range(next(n for n in itertools.count() if base**n > number) - 1, -1, -1)
        return "".join(DIGITS[number // base**place % base] for place in places)

    def accepts(self, given: str, facts: Facts) -> bool:
        return given.replace(" ", "").lower() == self.correct(facts)

    def steps(self, facts: Facts) -> tuple[str, str]:
        number, base = facts["number"], facts["base"]
        lines, digits = [], ""
        while number:
            lines.append(f"{number} = {number // base} * {base} + {DIGITS[number % base]}")
            digits = DIGITS[number % base] + digits
            number //= base
        return "\n".join(lines) + f"\nread upwards: {digits}", digits


class Fractions(Generator):
    """Sums and differences of two fractions; any equal fraction or decimal is right."""

    name = "fractions"

    def facts(self, rng: Random) -> Facts:
        largest = (4, 6, 9, 12, 20)[self.difficulty - 1]
        below = [rng.randint(2, largest) for _ in range(2)]
        if self.difficulty == 1:
            below[1] = below[0]
        above = [rng.randint(1, largest) for _ in range(2)]
        return {"above": above, "below": below, "sign": rng.choice("+-")}

    def prompt(self, facts: Facts) -> str:
        (a, c), (b, d) = facts["above"], facts["below"]
        return f"What is {a}/{b} {facts['sign']} {c}/{d}?"

    def correct(self, facts: Facts) -> str:
        (a, c), (b, d) = facts["above"], facts["below"]
        return str(Fraction(a, b) + (1 if facts["sign"] == "+" else -1) * Fraction(c, d))

    def steps(self, facts: Facts) -> tuple[str, str]:
        (a, c), (b, d), sign = facts["above"], facts["below"], facts["sign"]
        below = math.lcm(b, d)
        left, right = a * below // b, c * below // d
        above = left + right if sign == "+" else left - right
        lines = [] if b == d else [f"{a}/{b} = {left}/{below}, {c}/{d} = {right}/{below}"]
        lines.append(f"{left}/{below} {sign} {right}/{below} = {above}/{below}")
        shared = math.gcd(above, below)
        answer = f"{above // shared}/{below // shared}" if below != shared else str(above // shared)
        if shared > 1:
            lines.append(f"{above}/{below} = {answer}")
        return "\n".join(lines), answer


class Sequences(Generator):
    """The next number of an arithmetic, geometric or twice-arithmetic sequence."""

    name = "sequences"

    def facts(self, rng: Random) -> Facts:
        kind = rng.choice(("add", "add", "times", "grow")[: self.difficulty + 1])
        largest = (9, 20, 50, 99, 200)[self.difficulty - 1]
        start, step = rng.randint(1, largest), rng.randint(1, min(largest, 30))
        if kind == "times":
            start, step = rng.randint(1, 9), rng.randint(2, 4)
        terms = [start]
        for place in range(3 if kind == "add" else 4):
            last = terms[-1]
            terms.append(last * step if kind == "times" else last + step + (place if kind == "grow" else 0))
        return {"terms": terms}

    def prompt(self, facts: Facts) -> str:
        return f"What comes next: {', '.join(map(str, facts['terms']))}?"

    def correct(self, facts: Facts) -> str:
        terms = facts["terms"]
        a, b, c = terms[-3:]
        if c - b == b - a:
            return str(c + c - b)
        if all(y * terms[0] == x * terms[1] for x, y in itertools.pairwise(terms)):
            return str(c * terms[1] // terms[0])
        return str(c + (c - b) + (c - b) - (b - a))

    def steps(self, facts: Facts) -> tuple[str, str]:
        terms = facts["terms"]
        gaps = [y - x for x, y in itertools.pairwise(terms)]
        lines = [f"differences: {', '.join(map(str, gaps))}"]
        last = terms[-1]
        if len(set(gaps)) == 1:
            lines.append(f"{last} + {gaps[-1]} = {last + gaps[-1]}")
            return "\n".join(lines), str(last + gaps[-1])
        ratio = terms[1] // terms[0]
        if [terms[0] * ratio**n for n in range(len(terms))] == terms:
            lines += [f"each is {ratio} times the one before", f"{last} * {ratio} = {last * ratio}"]
            return "\n".join(lines), str(last * ratio)
        growth = gaps[-1] - gaps[-2]
        gap = gaps[-1] + growth
        lines += [
            f"the differences grow by {growth}: the next is {gap}",
            f"{last} + {gap} = {last + gap}",
        ]
        return "\n".join(lines), str(last + gap)


OPERATORS: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
}  # fmt: skip


class Countdown(Generator):
    """Reach a target with each given number used once and + - * (and / when offered); many answers are right.

    Two numbers at first, four with larger targets at the end.
    """

    name = "countdown"

    def facts(self, rng: Random) -> Facts:
        count = (2, 3, 3, 4, 4)[self.difficulty - 1]
        largest = (9, 9, 20, 20, 50)[self.difficulty - 1]
        numbers = [rng.randint(1, largest) for _ in range(count)]
        order = rng.sample(numbers, count)
        total = order[0]
        for number in order[1:]:
            sign = rng.choice("+-*" if abs(total * number) < 1000 and self.difficulty > 1 else "+-")
            total = total + number if sign == "+" else total - number if sign == "-" else total * number
        return {"numbers": numbers, "target": abs(total)} if total else self.facts(rng)

    def prompt(self, facts: Facts) -> str:
        numbers = ", ".join(map(str, facts["numbers"]))
        return f"Use each of {numbers} once with + - * to make {facts['target']}."

    def correct(self, facts: Facts) -> str:
        return self._search(facts)[1]

    def accepts(self, given: str, facts: Facts) -> bool:
        return self._value(given, list(facts["numbers"])) == facts["target"]

    def steps(self, facts: Facts) -> tuple[str, str]:
        lines, answer = self._search(facts)
        return "\n".join(lines), answer

    @staticmethod
    def _value(text: str, numbers: list[int]) -> Fraction | None:
        """The value of an expression that uses exactly ``numbers``; None where it does not, or is none.

        The text is parsed and walked, never evaluated.
        """
        text = text.replace("\\times", "*").replace("\\cdot", "*").replace("×", "*").split("=")[0].strip()
        if len(text) > 200:
            return None
        used: list[int] = []

        def walk(node: ast.expr) -> Fraction:
            if isinstance(node, ast.Constant) and type(node.value) is int:
                used.append(node.value)
                return Fraction(node.value)
            if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
                return OPERATORS[type(node.op)](walk(node.left), walk(node.right))
            raise ValueError

        try:
            value = walk(ast.parse(text, mode="eval").body)
        except (ValueError, SyntaxError, ZeroDivisionError, RecursionError, MemoryError):
            return None
        return value if sorted(used) == sorted(numbers) else None

    @staticmethod
    def _search(facts: Facts) -> tuple[list[str], str]:
        """The first way found, two numbers joined at a time."""

        def join(items: list[tuple[int, str]], lines: list[str]) -> tuple[list[str], str] | None:
            if len(items) == 1:
                return (lines, items[0][1]) if items[0][0] == facts["target"] else None
            for (i, (x, left)), (j, (y, right)) in itertools.permutations(enumerate(items), 2):
                rest = [item for k, item in enumerate(items) if k not in (i, j)]
                for sign, value in (("+", x + y), ("-", x - y), ("*", x * y)):
                    if sign != "-" and i > j:
                        continue
                    made = (value, f"({left} {sign} {right})")
                    found = join([*rest, made], [*lines, f"{x} {sign} {y} = {value}"])
                    if found:
                        return found
            return None

        found = join([(n, str(n)) for n in facts["numbers"]], [])
        assert found is not None  # the target was made from the numbers
        lines, text = found
        return lines, text[1:-1]
