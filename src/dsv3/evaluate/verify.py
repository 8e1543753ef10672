"""Whether an answer is right: the box is found, and what stands in it compared exactly or as a number.

Nothing here evaluates what a model wrote: numbers are read by patterns of bounded length. What the patterns
do not know (algebra) can be left to :mod:`dsv3.evaluate.verify_symbolic`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

LONGEST = 300  # characters of an answer that are looked at; exponents up to 3 digits
TOLERANCE = Fraction(1, 10**6)  # relative, where one side is a decimal


def outside_thought(completion: str) -> str:
    """What follows the reasoning: all of it where there is none, nothing where it was not ended."""
    if "</think>" in completion:
        return completion.rsplit("</think>", 1)[1]
    return "" if "<think>" in completion else completion


def boxed(text: str) -> str | None:
    """Content of the last ``\\boxed{...}``, braces balanced; None where there is none."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    start += len("\\boxed{")
    depth = 1
    for place in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if depth == 0:
            return text[start:place]
    return None


def squeezed(text: str) -> str:
    """Without TeX's dressing, outer spaces, a final full stop; runs of spaces as one."""
    text = text[:LONGEST].strip()
    text = re.sub(r"\\(?:text|mathrm|mathbf|textbf|mbox|operatorname)\s*\{([^{}]*)\}", r" \1 ", text)
    text = re.sub(r"\\(?:left|right|displaystyle)(?![A-Za-z])|\\!|\\?\$", "", text)
    text = re.sub(r"\\[,;: ]|~", " ", text)
    text = re.sub(r"\\([%{}])", r"\1", text).replace("{,}", ",").replace("−", "-")
    text = re.sub(r"\\[dt]frac", r"\\frac", text)
    return re.sub(r"\s+", " ", text).strip().removesuffix(".").strip()


@dataclass(frozen=True)
class Quantity:
    """A number and its unit. ``decimal``: it was written with a point or an exponent, and may be rounded."""

    value: Fraction
    unit: str
    decimal: bool


_PLAIN = r"(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d*)?|\.\d+"
_NUMBER = re.compile(
    rf"""(?P<sign>[+-]?)\s*(?P<money>[€£]?)\s*
    (?: \\frac\s*(?:\{{\s*(?P<fa>[+-]?\d+)\s*\}}|(?P<fc>\d))\s*(?:\{{\s*(?P<fb>\d+)\s*\}}|(?P<fd>\d))
      | (?:(?P<whole>\d+)\s+(?:and\s+)?)? (?P<above>\d+)\s*/\s*(?P<below>\d+)
      | (?P<mixed>\d+)\s*\\frac\{{(?P<ma>\d+)\}}\{{(?P<mb>\d+)\}}
      | (?P<plain>{_PLAIN})
        (?:\s*(?:[eE]|(?:\*|\\times|×|\\cdot)\s*10\s*\^)\s*\{{?(?P<power>[+-]?\d{{1,3}})\}}?)?
    )
    \s*(?P<unit>(?:[%°€£]|\^\\circ|\^\{{\\circ\}}|[A-Za-zµμ][A-Za-zµμ /.^²³0-9]*)?)""",
    re.VERBOSE,
)


def quantity(text: str) -> Quantity | None:
    """Read ``1,234.5 kg``, ``-\\frac{1}{2}``, ``2 1/3``, ``50\\%``, ``1.5 \\times 10^3``; else None."""
    match = _NUMBER.fullmatch(squeezed(text))
    if match is None:
        return None
    part = match.groupdict()
    decimal = False
    try:
        if part["plain"]:
            value = Fraction(part["plain"].replace(",", "")) * Fraction(10) ** int(part["power"] or 0)
            decimal = "." in part["plain"] or bool(part["power"])
        elif part["below"]:
            value = int(part["whole"] or 0) + Fraction(int(part["above"]), int(part["below"]))
        elif part["mixed"]:
            value = int(part["mixed"]) + Fraction(int(part["ma"]), int(part["mb"]))
        else:
            value = Fraction(int(part["fa"] or part["fc"]), int(part["fb"] or part["fd"]))
    except ZeroDivisionError:
        return None
    unit = (part["money"] or part["unit"]).replace("^{\\circ}", "°").replace("^\\circ", "°")
    if len(unit) == 1 and unit.isalpha() and unit not in "mgshlKNJWV":
        return None  # 5x is no number of x
    return Quantity(-value if part["sign"] == "-" else value, _unit(unit), decimal)


def _unit(text: str) -> str:
    """A unit by one spelling: case, spaces, full stops and a plural's s dropped."""
    text = re.sub(r"[\s.]", "", text).lower().replace("²", "^2").replace("³", "^3").replace("μ", "µ")
    return text[:-1] if len(text) > 3 and text.endswith("s") else text


def same_quantity(given: Quantity, wanted: Quantity) -> bool:
    """Numbers equal and units not contradicting: one side may leave the unit out.

    A percentage may also be given, or wanted, as the fraction it stands for. Whole numbers and fractions are
    compared exactly; a decimal may be off by 1e-6 of the value, but not where a whole number is wanted.
    """
    if given.unit != wanted.unit and given.unit and wanted.unit:
        return False
    if _close(given, wanted.value, wanted):
        return True
    if given.unit == "%" and not wanted.unit:
        return _close(given, wanted.value * 100, wanted)
    return wanted.unit == "%" and not given.unit and _close(given, wanted.value / 100, wanted)


def _close(given: Quantity, value: Fraction, wanted: Quantity) -> bool:
    if given.value == value:
        return True
    rounded = given.decimal or wanted.decimal
    return rounded and value.denominator != 1 and abs(given.value - value) <= TOLERANCE * abs(value)


def equal(given: str, wanted: str) -> bool:
    """Whether ``given`` states what ``wanted`` states: as text, as a number, or part by part for lists.

    Lists and tuples are compared in order; ``{...}`` without order. ``x = 5`` is read as ``5``.
    """
    if len(given) > LONGEST:
        return False
    given, wanted = squeezed(given), squeezed(wanted)
    if _same_text(given, wanted):
        return bool(wanted)
    if "=" in given and "=" not in wanted:
        name, _, right = given.partition("=")
        return bool(re.fullmatch(r"\s*[A-Za-z]\w{0,9}\s*", name)) and equal(right, wanted)
    ours, theirs = quantity(wanted), quantity(given)
    if ours is not None and theirs is not None:
        return same_quantity(theirs, ours)
    if ours is not None:
        return False
    first, second = _parts(given), _parts(wanted)
    if len(second) < 2 or len(first) != len(second) or _fence(given, second) != _fence(wanted, second):
        return False
    if wanted.startswith("{"):
        left = list(second)
        for part in first:
            match = next((other for other in left if equal(part, other)), None)
            if match is None:
                return False
            left.remove(match)
        return True
    return all(equal(a, b) for a, b in zip(first, second))


def _same_text(given: str, wanted: str) -> bool:
    """Case and the spaces around signs do not count; those between words and digits do."""
    one, other = (re.sub(r"\s*([^\w\s])\s*", r"\1", text.casefold()) for text in (given, wanted))
    return one == other


def _fence(text: str, parts: list[str]) -> str:
    """The brackets of an interval or a set, which mean something; a list may come with or without its own."""
    if len(parts) == 2 and text[:1] in "[(" and text[-1:] in "])" and text[0] + text[-1] in ("[)", "(]"):
        return text[0] + text[-1]
    return ""


def _parts(text: str) -> list[str]:
    """Elements of a list, cut at commas outside brackets, its own brackets dropped."""
    if len(text) > 1 and text[0] in "([{" and text[-1] in ")]}":
        text = text[1:-1]
    parts, depth, piece = [], 0, ""
    for letter in text:
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and depth == 0:
            parts.append(piece)
            piece = ""
        else:
            piece += letter
    return [part.strip() for part in [*parts, piece]]
