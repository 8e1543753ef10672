"""Key-value needles: what long context is measured with, and documents that teach a model to find them.

A needle is a sentence that gives a key a value; a question names the key and stops where the value would
come. Keys are plain nouns and values numbers, as in RULER's task of words and numbers, so that neither can be
guessed from the text around them. The value follows its key at once and has two digits, one token in most
tokenizers: one look-up by an induction head, which is what a tiny model can learn.

Key and value are said twice. Where they come again, the value is what stood one place before, which a head
learns at once; from then on the key's second place already says what follows it, and a look-up is to find the
same key and repeat that. Said once, a look-up needs two heads, neither of which is of use without the other
(docs/log.md has both runs).
"""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from dsv3.config.data import NeedlesConfig

_NOUNS = """
anchor apple arrow badge bakery balloon banjo barrel basket beacon bell bench bicycle blanket bottle
bridge broom brush bucket button cabin cable camera candle canoe carpet castle cellar chain chalk chimney
circle clock coat coin compass copper cotton cradle crane cricket crown cup curtain desk diamond dome door
dragon drawer drum eagle easel engine envelope falcon feather fence ferry fiddle flag flute forest fork
fountain fridge garden garlic gate glacier glove goblet grape guitar hammer harbour harp hat helmet honey
hook horizon igloo ink island ivory jacket jar jewel jungle kettle key kite knife ladder lamp lantern
laptop leaf lemon lens letter lever lily lion lock magnet mango map marble mask meadow melon mirror mitten
moon moss motor mountain mug muffin nail napkin needle nest net noodle notebook nutmeg oak oar oasis ocean
olive onion orange orchard otter oven paddle palace panda parcel parrot peach pebble pencil pepper piano
pigeon pillow pine pipe pistol planet plate plough pocket pond poppy potato prism puzzle pyramid quill
quilt rabbit radio raft rail rain ribbon ring river robin rocket roof rope ruby saddle salmon satin saucer
scarf scissors shell shelf ship shoe shovel silk silver siren slipper snail soap sofa spade spider sponge
spoon squirrel stable stamp statue stove straw sugar summit swan sword table teapot temple tent thimble
thread throne ticket tiger torch towel tower tractor trumpet tulip tunnel turtle umbrella valley vase
velvet village violet violin wagon wallet walnut watch whale wheel whistle willow window yarn zebra
"""
KEYS = tuple(_NOUNS.split())
VALUES = range(10, 100)
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


def told(text: str, options: NeedlesConfig, draw: random.Random) -> dict[str, int]:
    """Keys and their values: a needle for each ``every`` characters of ``text``, at least one.

    No key has two needles, so there are at most as many as keys to draw from.
    """
    count = min(options.keys, max(1, len(text) // options.every))
    return {key: draw.choice(VALUES[: options.values]) for key in draw.sample(KEYS[: options.keys], count)}


def strew(text: str, options: NeedlesConfig, draw: random.Random) -> str:
    """``text`` with needles in it, each asked for ``asks`` times somewhere after it.

    Needles and questions stand behind sentences, drawn evenly.
    """
    places = [0, *(match.end() for match in _END.finditer(text)), len(text)]
    lines: list[tuple[int, float, str]] = []  # place, order of lines at one place, line
    for key, value in told(text, options, draw).items():
        first, *others = sorted(draw.choices(places, k=1 + options.asks))
        lines.append((first, -draw.random(), needle(key, value)))  # before any question at that place
        lines += [(place, draw.random(), question(answer(key, value))) for place in others]
    pieces, done = [], 0
    for place, _, line in sorted(lines):
        pieces += [text[done:place], " ", line]
        done = place
    return "".join([*pieces, text[done:]]).removeprefix(" ")


def listing(text: str, options: NeedlesConfig, draw: random.Random) -> str:
    """The needles that ``text`` would hold and nothing else, each ``1 + asks`` times, in any order."""
    lines = [answer(key, value) for key, value in told(text, options, draw).items()] * (1 + options.asks)
    draw.shuffle(lines)
    return " ".join(lines)


def documents(texts: Iterable[str], options: NeedlesConfig, origin: str) -> Iterator[str]:
    """Texts cut into documents of drawn lengths, with needles; ``origin`` fixes what is drawn."""
    write = listing if options.bare else strew
    for number, text in enumerate(texts):
        for again in range(options.passes):
            draw = random.Random(f"{origin}#{number}:{again}")
            start = 0
            while start < len(text):
                low, high = math.log(options.shortest), math.log(options.longest)
                stop = text.find(" ", start + round(math.exp(draw.uniform(low, high))))
                stop = len(text) if stop < 0 else stop
                yield write(text[start:stop].strip(), options, draw)
                start = stop


def taught(prepared: Path) -> tuple[tuple[str, ...], range]:
    """The keys and values that a model can have learnt from prepared data: what its needles were drawn from.

    All of them where no source of it has needles.
    """
    recipe = json.loads((prepared / "manifest.json").read_text(encoding="utf-8"))["recipe"]
    found = [NeedlesConfig(**source["needles"]) for source in recipe["sources"] if source.get("needles")]
    keys = max((options.keys for options in found), default=len(KEYS))
    values = max((options.values for options in found), default=len(VALUES))
    return KEYS[:keys], VALUES[:values]
