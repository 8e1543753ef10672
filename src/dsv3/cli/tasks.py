"""``dsv3 tasks``: what the verifiable tasks of post-training look like."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import typer

from dsv3.cli.group import Verbs

app = typer.Typer(cls=Verbs, help="The verifiable tasks of post-training.", no_args_is_help=True)


@app.callback()
def group() -> None:
    """The verifiable tasks of post-training: list them, look at examples, try an answer, write datasets."""


@app.command("list")
def show_names(as_json: bool = typer.Option(False, "--json", help="Print JSON.")) -> None:
    """Every task and what it asks for, one a line; those under gym/ come with the extra rl."""
    from dsv3.evaluate.tasks import describe, names

    found = {name: describe(name) for name in names()}
    width = max(map(len, found))
    lines = [f"{name:<{width}}  {text}" for name, text in found.items()]
    typer.echo(json.dumps(found) if as_json else "\n".join(lines))


@app.command()
def show(
    task: str = typer.Argument(help="A name of `dsv3 tasks list`."),
    difficulty: int = typer.Option(1, help="1 to 5."),
    seed: int = typer.Option(0, help="Another seed gives other examples, of the same splits."),
    split: str = typer.Option("train", help="train, validation or test; they share no example."),
    index: int = typer.Option(0, help="The first example shown."),
    count: int = typer.Option(3, min=1, help="Examples."),
    answer: str = typer.Option(None, help="A completion to be scored, instead of the solution."),
    as_json: bool = typer.Option(
        False, "--json", help="Print one JSON object a line, as a dataset has them."
    ),
) -> None:
    """Examples with their solution, and the score the verifier gives it."""
    from dsv3.evaluate.tasks import get

    source = get(task, difficulty, seed)
    for at in range(index, index + count):
        example = source.sample(at, split)  # type: ignore[arg-type]
        solution = source.solve(example)
        text = answer if answer is not None else solution.reasoned() if solution else None
        score = None if text is None else source.verify(text, example)
        if as_json:
            row: dict[str, Any] = {**example.row(), "completion": text, "score": score}
            typer.echo(json.dumps(row, ensure_ascii=False))
        else:
            typer.echo(f"== {task} {split} {at}  {example.id}\n{example.prompt}\n")
            typer.echo("-- no solution is known\n" if text is None else f"-- score {score:g}\n{text}\n")


@app.command()
def write(
    out: Path = typer.Argument(help="File to write, ending in .jsonl; one that is there gives way."),
    tasks: str = typer.Option(
        ..., "--tasks", help="Names of `dsv3 tasks list`, each with its difficulty or 1, as sums:2,gcd."
    ),
    seed: int = typer.Option(0, help="Another seed gives other examples, of the same splits."),
    split: str = typer.Option("train", help="train, validation or test; they share no example."),
    count: int = typer.Option(1000, min=1, help="Different examples of each task; fewer where it has fewer."),
    plain: bool = typer.Option(False, "--plain", help="Answers alone, without the steps that lead to them."),
) -> None:
    """A dataset of solved examples: `prompt`, `completion` and the task's columns, for `dsv3 sft`."""
    from dsv3.common.errors import UserError
    from dsv3.common.files import write_atomic
    from dsv3.evaluate.tasks.draw import named, solved

    if out.suffix != ".jsonl" or not out.parent.is_dir():
        raise UserError(f"out ({out}) must end in .jsonl and lie in a folder that exists")
    lines, counts = [], []
    for name in dict.fromkeys(tasks.split(",")):
        rows = list(solved(named(name, seed), count, split, reasoning=not plain))  # type: ignore[arg-type]
        lines += [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        counts.append(f"{name}: {len(rows)}")
    write_atomic(out, "".join(lines))
    typer.echo(f"{out}: different {split} examples of {', '.join(counts)}")
    typer.echo(f"next: name {out} in data.train of a recipe such as recipes/sft-tiny.yaml, and run dsv3 sft")
