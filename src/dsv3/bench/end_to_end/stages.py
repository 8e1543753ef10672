"""The stages of `dsv3 bench end-to-end`, each the function behind its own verb, each skipped once it is done.

A stage's product (a model's folder, a file written last) tells that it is done; a stage that was killed goes
on by its own means. So the whole is resumed by running it again.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsv3.bench.end_to_end.served import ask_the_server
from dsv3.bench.machine import machine
from dsv3.checkpoint.convert import convert
from dsv3.common.errors import UserError
from dsv3.common.files import write_atomic, write_json
from dsv3.config import recipe as recipes
from dsv3.config.data import DataRecipe
from dsv3.config.distill import DistillRecipe
from dsv3.config.end_to_end import EndToEndRecipe, StageSection
from dsv3.config.grpo import GRPORecipe
from dsv3.config.sft import SFTRecipe
from dsv3.config.train import PretrainRecipe
from dsv3.evaluate.benchmarks.generated import generated
from dsv3.evaluate.benchmarks.run import describe, run
from dsv3.evaluate.tasks.draw import named, solved
from dsv3.serve.llm import LLM
from dsv3.train.distill import distill
from dsv3.train.grpo.run import grpo
from dsv3.train.pretrain import pretrain
from dsv3.train.quickstart import prepare_what_there_is
from dsv3.train.sft import sft

AFTER = {"sft": "SFT", "again": "distillation", "grpo": "GRPO"}  # a seed's models, in their order
CONTROL = {"control": "SFT for longer"}  # from SFT too, as many steps as distillation: what steps alone bring
ASKED = 1000  # added to a seed: distillation asks other questions than the examples answer,
ROLLED = 2000  # and GRPO other ones than both


@dataclass(frozen=True)
class Step:
    """``work`` makes ``product``; it returns False when a signal stopped it."""

    name: str
    product: Path
    work: Callable[[], bool]


def end_to_end(recipe: EndToEndRecipe) -> bool:
    """Do what is left to do; False when a signal stopped it.

    Raises :class:`UserError` before any work for a recipe that cannot run, or an ``out`` of another one.
    """
    plan = list(steps(recipe))
    out = Path(recipe.out)
    _claim(recipe, out)
    for number, step in enumerate(plan, start=1):
        if step.product.exists():
            continue
        print(f"[{number}/{len(plan)}] {step.name}", flush=True)
        wall, cpu = time.perf_counter(), time.process_time()
        if not step.work():
            return False
        spent = {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}
        with open(out / "spent.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps({"stage": step.name} | {k: round(v, 1) for k, v in spent.items()}) + "\n")
    return True


def _claim(recipe: EndToEndRecipe, out: Path) -> None:
    """Write the recipe; refuse a folder that holds the run of another.

    Seeds may be added afterwards, and notes written.
    """
    path = out / "recipe.yaml"
    if path.exists() and _work(recipes.load(EndToEndRecipe, path)) != _work(recipe):
        raise UserError(f"out ({out}) holds a run of another recipe; choose another --out, or delete it")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"out ({out}) cannot be made: {error.strerror}") from None
    write_atomic(path, recipes.dump(recipe.model_copy(update={"notes": []})))
    if not (out / "machine.json").exists():
        write_json(out / "machine.json", machine())


def _work(recipe: EndToEndRecipe) -> dict[str, Any]:
    """What is done for a seed, all keys of it."""
    return recipe.model_dump(exclude={"seeds", "notes"})


def steps(recipe: EndToEndRecipe) -> Iterator[Step]:
    """All of them, in order."""
    out = Path(recipe.out)
    data = recipe.data.load(DataRecipe)
    base = out / "pretrain"
    first = recipe.pretrain.load(PretrainRecipe, out=str(base), data__path=data.out)
    for name in recipe.tasks:
        named(name)

    def begin() -> bool:
        prepare_what_there_is(data)
        return pretrain(first, "auto") is not None

    yield Step("tokenizer and pre-training", base / "model", begin)
    yield _asked(recipe, "pre-training", base)
    each = [_of_seed(recipe, seed, out / f"seed-{seed}", base / "model") for seed in recipe.seeds]
    for together in zip(*each):  # a stage of all seeds before the next
        yield from together
    folder = out / f"seed-{recipe.seeds[0]}"
    for kind in recipe.quantize:
        yield _converted(folder / "grpo" / "model", folder / kind / "model", kind)
        yield _asked(recipe, kind, folder / kind)
    last, answer = folder / recipe.quantize[-1] / "model", folder / "answer.json"
    yield Step("serve", answer, lambda: _served(recipe, last, answer))


def _of_seed(recipe: EndToEndRecipe, seed: int, folder: Path, base: Path) -> Iterator[Step]:
    """From the pre-trained model to the reinforced one.

    Recipes that begin from a model read its shape from its folder: they are read when it is there.
    """
    examples, kept = folder / "examples.jsonl", folder / "distill" / "samples.jsonl"
    repeated = folder / "repeated.jsonl"
    given: dict[str, Any] = {"seed": seed}
    tasks = [{"name": n, "difficulty": d} for n, d in map(_split, recipe.tasks)]

    def tune(stage: StageSection, to: str, start: Path, *data: Path) -> bool:
        made = stage.load(
            SFTRecipe, out=str(folder / to), start=str(start), data__train=list(map(str, data)), **given
        )
        return sft(made, "auto") is not None

    def answer() -> bool:
        made = recipe.distill.load(
            DistillRecipe, out=str(folder / "distill"),
            prompts__tasks=[{**task, "count": recipe.prompts} for task in tasks], prompts__seed=seed + ASKED,
            expert__kind="engine", expert__model=str(folder / "sft" / "model"), **given,
        )  # fmt: skip
        return bool(distill(made, resume=True))

    def reinforce() -> bool:
        start = str(folder / "again" / "model")
        made = recipe.grpo.load(
            GRPORecipe, out=str(folder / "grpo"), start=start, tasks=tasks, seed=seed + ROLLED
        )
        return grpo(made, "auto") is not None

    name = f"seed {seed}: "
    yield Step(name + "examples", examples, lambda: _written(recipe, seed, examples))
    yield Step(name + "SFT", folder / "sft" / "model", lambda: tune(recipe.sft, "sft", base, examples))
    yield _asked(recipe, name + "SFT", folder / "sft")
    yield Step(name + "distillation", folder / "distill" / "report.json", answer)
    yield Step(
        name + "SFT on it", folder / "again" / "model",
        lambda: tune(recipe.again, "again", folder / "sft" / "model", examples, kept),
    )  # fmt: skip
    yield _asked(recipe, name + "distillation", folder / "again")
    yield Step(name + "examples again", repeated, lambda: _repeated(repeated, examples, kept))
    yield Step(
        name + "SFT for longer", folder / "control" / "model",
        lambda: tune(recipe.again, "control", folder / "sft" / "model", repeated),
    )  # fmt: skip
    yield _asked(recipe, name + "SFT for longer", folder / "control")
    yield Step(name + "GRPO", folder / "grpo" / "model", reinforce)
    yield _asked(recipe, name + "GRPO", folder / "grpo")


def _split(task: str) -> tuple[str, int]:
    name, _, difficulty = task.partition(":")
    return name, int(difficulty or 1)


def _written(recipe: EndToEndRecipe, seed: int, path: Path) -> bool:
    """Solved examples of every task, as ``dsv3 tasks write --plain`` makes them."""
    rows = [
        row for name in recipe.tasks for row in solved(named(name, seed), recipe.examples, reasoning=False)
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return True


def _repeated(path: Path, examples: Path, kept: Path) -> bool:
    """As many rows as the examples and the kept answers are together, of the examples alone, evenly."""
    rows = examples.read_bytes().splitlines(keepends=True)
    count = len(rows) + len(kept.read_bytes().splitlines())
    write_atomic(path, b"".join(rows[number * len(rows) // count] for number in range(count)))
    return True


def _asked(recipe: EndToEndRecipe, name: str, folder: Path) -> Step:
    """The same held-out questions of every model."""

    def work() -> bool:
        model = folder / "model"
        tasks = [generated(t, recipe.questions, max_tokens=recipe.max_tokens) for t in recipe.tasks]
        run(LLM(model, draft_tokens=0), tasks, folder / "eval", describe(model))
        return True

    return Step(f"{name}: held-out questions", folder / "eval" / "results.json", work)


def _converted(source: Path, target: Path, kind: str) -> Step:
    def work() -> bool:
        convert(source, target, kind)
        return True

    return Step(f"{kind}: convert", target, work)


def _served(recipe: EndToEndRecipe, model: Path, answer: Path) -> bool:
    """One held-out question through the API of a server that is started for it."""
    question = named(recipe.tasks[0]).sample(0, "test")
    write_json(answer, ask_the_server(model, question.prompt, recipe.max_tokens) | {"right": question.answer})
    return True
