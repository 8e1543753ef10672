"""Key-value needles: what long context is measured with, and documents that teach a model to find them.

A needle is a sentence that gives a key a value; a question names the key and stops where the value would
come. Keys are plain nouns and values numbers, as in RULER's task of words and numbers, so that neither can be
guessed from the text around them. The value follows its key at once and has two digits, one token in most
tokenizers: one look-up by an induction head, which is what a tiny model can learn.

Key and value are said twice. Where they come again, the value is what stood one place before, which a head
learns at once; from then on the key's second place already says what follows it, and a look-up is to find the
same key and repeat that. Said once, a look-up needs two heads, neither of which is of use without the other
(docs/long-context.md has both runs).
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Iterable, Iterator

from dsv3.config.data import NeedlesConfig

# Few of both: with 246 keys and 90 values a tiny model mostly went on copying any value of its context for as
# long as it was trained, and did not look at the key (docs/long-context.md).
KEYS = (
    "anchor", "bridge", "candle", "dragon", "engine", "falcon", "garden", "hammer",
    "island", "jacket", "kettle", "lantern", "mirror", "needle", "orchard", "pepper",
)  # fmt: skip
VALUES = range(11, 100, 6)  # two digits, one token each
_END = re.compile(r"[.!?:;]['\"”’)\]]?(?=\s)")  # a line is put behind such a place


def needle(key: str, value: int) -> str:
    """The sentence that hides a value."""
    return f"Remember: {answer(key, value)}"


def question(key: str) -> str:
    """What asks for it: the answer begins with the number."""
    return f"Recall: {key}"


def answer(key: str, value: int) -> str:
    """What a sentence says of a key, and what follows a question that names it, from the key on."""
    return f"{key}{value} {key}{value}."


def strew(text: str, every: int, draw: random.Random, asks: int = 1) -> str:
    """``text`` with a needle for each ``every`` characters, each asked for ``asks`` times somewhere after it.

    Needles and questions stand behind sentences, drawn evenly; no key has two needles, so a document has at
    most as many as there are keys.
    """
    places = [0, *(match.end() for match in _END.finditer(text)), len(text)]
    count = min(len(KEYS), max(1, len(text) // every))
    lines: list[tuple[int, float, str]] = []  # place, order of lines at one place, line
    for key in draw.sample(KEYS, count):
        value = draw.choice(VALUES)
        first, *others = sorted(draw.choices(places, k=1 + asks))
        lines.append((first, -draw.random(), needle(key, value)))  # before any question at that place
        lines += [(place, draw.random(), question(answer(key, value))) for place in others]
    pieces, done = [], 0
    for place, _, line in sorted(lines):
        pieces += [text[done:place], " ", line]
        done = place
    return "".join([*pieces, text[done:]]).removeprefix(" ")


def documents(texts: Iterable[str], options: NeedlesConfig, origin: str) -> Iterator[str]:
    """Texts cut into documents of drawn lengths, with needles; ``origin`` fixes what is drawn."""
    for number, text in enumerate(texts):
        for again in range(options.passes):
            draw = random.Random(f"{origin}#{number}:{again}")
            start = 0
            while start < len(text):
                low, high = math.log(options.shortest), math.log(options.longest)
                stop = text.find(" ", start + round(math.exp(draw.uniform(low, high))))
                stop = len(text) if stop < 0 else stop
                yield strew(text[start:stop].strip(), options.every, draw, options.asks)
                start = stop
