"""A benchmark by its name: documents read, examples chosen, prompts written."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from random import Random

from dsv3.common.errors import UserError, nearest
from dsv3.evaluate import tasks
from dsv3.evaluate.benchmarks import documents
from dsv3.evaluate.benchmarks.base import Benchmark, Question
from dsv3.evaluate.benchmarks.documents import Document
from dsv3.evaluate.benchmarks.fields import Item
from dsv3.evaluate.benchmarks.generated import SAMPLES, generated
from dsv3.evaluate.benchmarks.judges import JUDGES
from dsv3.evaluate.benchmarks.table import TABLE, Definition
from dsv3.evaluate.sandbox.run import strongest


def build(
    name: str,
    data: Path | None = None,
    samples: int | None = None,
    chat: bool | None = None,
    max_tokens: int = 512,
) -> Benchmark:
    """A benchmark of :data:`TABLE`, read from ``data``, or a generated task, ``NAME`` or ``NAME:DIFFICULTY``.

    ``samples``: questions at most; of a table's benchmark always the same, drawn from all of it. ``chat``
    None: a conversation for generated tasks, plain text for others. ``max_tokens``: of an answer to a
    generated task. Raises :class:`UserError` for what is unknown, missing or malformed.
    """
    if name in TABLE:
        if data is None:
            raise UserError(f"task {name} needs --data, a folder of benchmarks (docs/evaluation.md)")
        return benchmark(name, TABLE[name], data, samples, chat is True)
    bare = name.partition(":")[0]
    if bare not in (*tasks.GENERATORS, "instructions", "doctests") and not bare.startswith("gym/"):
        known = [*TABLE, *tasks.names()]
        raise UserError(f"task ({name}) is unknown{nearest(bare, known)}; --tasks list shows them all")
    return generated(name, samples or SAMPLES, chat=chat is not False, max_tokens=max_tokens)


def benchmark(name: str, definition: Definition, data: Path, samples: int | None, chat: bool) -> Benchmark:
    """One definition over the documents of ``data``."""
    if chat and not definition.judge:
        raise UserError(f"task {name} ranks choices after plain text; leave --chat out")
    if definition.judge == "code":
        strongest()  # says what is missing where programs cannot be run
    items, pool, given = _read(name, definition, data)
    numbered = list(enumerate(items))
    if samples is not None and samples < len(numbered):
        numbered = sorted(Random(name).sample(numbered, samples), key=lambda pair: pair[0])
    heads: dict[str, str] = {}
    questions = []
    for number, item in numbered:
        if item.group not in heads:
            heads[item.group] = given if given is not None else _head(definition, pool, item.group)
        questions.append(_question(definition, str(number), item, heads[item.group], chat))
    return Benchmark(
        name, definition.metric, questions, JUDGES.get(definition.judge),
        shots=0 if chat else definition.shots,
        max_tokens=definition.max_tokens,
        stop=() if chat else definition.stop,
        note="a conversation" if chat else "",
    )  # fmt: skip


def _question(definition: Definition, number: str, item: Item, head: str, chat: bool) -> Question:
    own = " ".join((item.query or item.queries[0], *item.choices, item.answer))
    if not definition.judge:
        pairs = ((head + context, f" {choice}") for context, choice in zip(item.contexts(), item.choices))
        return Question(number, choices=tuple(pairs), gold=item.gold, own=own)
    if not chat:
        return Question(number, head + item.query, reference=item.reference, own=own)
    words = (item.asked or item.query) + definition.told
    return Question(number, [{"role": "user", "content": words}], reference=item.reference, own=own)


def _read(name: str, definition: Definition, data: Path) -> tuple[list[Item], list[Item], str | None]:
    """The documents to ask, those to take examples from, and the package's own prompt where it is used."""
    own, root = data / f"{name}.jsonl", documents.package_root(data)
    pool: list[Item] = []
    if own.is_file():
        items = _items(definition, documents.read_jsonl(own), own)
        shots = data / f"{name}.shots.jsonl"
        if shots.is_file():
            pool = _items(definition, documents.read_jsonl(shots), shots)
    elif root is not None and definition.sources:
        items = _items(definition, documents.from_package(root, definition.sources), root)
        if definition.pool == ("given",):
            prompt = documents.given_prompt(root, definition.sources[0])
            if not prompt.endswith(items[0].query):
                raise UserError(f"--data ({root}) has another prompt for {name} than version 0.9.0")
            return items, [], prompt.removesuffix(items[0].query)
        if definition.pool:
            pool = _items(definition, documents.from_package(root, definition.pool), root)
    else:
        raise UserError(f"--data ({data}) has no {own.name} and is no unpacked package that holds {name}")
    if not pool and definition.shots:
        if len(items) <= definition.shots:
            raise UserError(f"{own} has {len(items)} lines, {definition.shots} of them examples; add more")
        items, pool = items[: -definition.shots], items[-definition.shots :]
    return items, pool, None


def _items(definition: Definition, found: Sequence[Document], where: Path) -> list[Item]:
    items = []
    for number, document in enumerate(found, start=1):
        try:
            items.append(definition.item(document))
        except (KeyError, ValueError, TypeError, IndexError, AttributeError) as error:
            raise UserError(
                f"{where}: document {number} is malformed: {type(error).__name__} {error}"
            ) from None
    return items


def _head(definition: Definition, pool: Sequence[Item], group: str) -> str:
    examples = [item.example() for item in pool if item.group == group][: definition.shots]
    return definition.head.format(group=group) + "".join(f"{example}\n\n" for example in examples)
