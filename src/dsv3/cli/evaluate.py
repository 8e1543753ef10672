"""``dsv3 eval``: how well a model knows a text, what it answers, and how it compares with another."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from dsv3.common.errors import UserError

if TYPE_CHECKING:
    from dsv3.evaluate.held_out import HeldOut

app = typer.Typer()


@app.command("eval")
def evaluate(
    folder: Path = typer.Argument(None, help="Hugging Face folder of a model, with its tokenizer"),
    data: Path = typer.Option(
        None,
        "--data",
        help="without --tasks: a text file, or a folder of dsv3 data prepare, whose held-out part is read;"
        " with --tasks: a folder of benchmarks (docs/evaluation.md)",
    ),
    tasks: str = typer.Option(
        None,
        "--tasks",
        help="names with commas between: benchmarks of --data, or generated tasks as NAME or NAME:DIFFICULTY;"
        " `list` shows them",
    ),
    samples: int = typer.Option(
        None, "--samples", min=1, help="questions of each task at most; all, and 200 of generated ones"
    ),
    out: Path = typer.Option(
        None, "--out", help="where answers and results go; given again after a kill, goes on. FOLDER-eval"
    ),
    chat: bool = typer.Option(
        None,
        "--chat/--plain",
        help="ask in a conversation, or in plain text after examples; generated tasks: chat, others: plain",
    ),
    max_tokens: int = typer.Option(512, "--max-tokens", min=1, help="of an answer to a generated task"),
    quantize: list[str] = typer.Option(
        [], "--quantize", help="also with the weights in fp8, int8 or int4 (with --tasks: only so)"
    ),
    compare: tuple[Path, Path] = typer.Option(
        None, "--compare", help="instead: two folders of results, the difference of the second"
    ),
    contamination: Path = typer.Option(
        None,
        "--contamination",
        help="instead of asking: prepared data in which to look for the questions of --tasks",
    ),
    length: int = typer.Option(256, "--length", min=1, help="without --tasks: tokens read at once"),
    sequences: int = typer.Option(
        128, "--sequences", min=1, help="without --tasks: so many of that length, of each source"
    ),
    as_json: bool = typer.Option(False, "--json", help="print the result as JSON"),
) -> None:
    """Bits per byte of a text (less is better) and the share of MTP drafts that fit; or scores on tasks."""
    if tasks == "list":
        _list(as_json)
        return
    if compare is not None:
        _compare(*compare, as_json)
        return
    if contamination is not None:
        if tasks is None:
            raise UserError("--contamination looks for the questions of --tasks; give both")
        _contamination(contamination, data, tasks.split(","), samples, as_json)
        return
    if folder is None:
        raise UserError("give the folder of a model: dsv3 eval FOLDER --data ... or --tasks ...")
    if tasks is not None:
        _tasks(folder, data, tasks.split(","), samples, out, chat, max_tokens, quantize, as_json)
        return
    if data is None:
        raise UserError("give --data (a text file or prepared data), or --tasks")
    from dsv3.evaluate.quality import compare

    found = compare(folder, data, quantize, length, sequences)
    if as_json:
        plain = {name: {text: asdict(one) for text, one in row.items()} for name, row in found.items()}
        typer.echo(json.dumps(plain, indent=2))
    else:
        typer.echo(_table(found))


def _tasks(
    folder: Path,
    data: Path | None,
    names: list[str],
    samples: int | None,
    out: Path | None,
    chat: bool | None,
    max_tokens: int,
    quantize: list[str],
    as_json: bool,
) -> None:
    from dsv3.evaluate.benchmarks.build import build
    from dsv3.evaluate.benchmarks.run import describe, run

    if len(quantize) > 1:
        raise UserError(f"--quantize ({', '.join(quantize)}): one at a time with --tasks, each its own --out")
    model = describe(folder, quantize[0] if quantize else None)
    benchmarks = [build(name.strip(), data, samples, chat, max_tokens) for name in names]
    out = out or folder.resolve().with_name(f"{folder.resolve().name}-eval")
    from dsv3.serve.llm import LLM

    results = run(LLM(folder, quantize=model["quantize"]), benchmarks, out, model)
    if as_json:
        typer.echo(json.dumps(results, indent=2))
        return
    from dsv3.cli.tables import show

    rows = [_row(name, one) for name, one in results["tasks"].items()]
    show(str(folder), ("task", "shots", "n", "metric", "score", "+-", "notes"), rows)
    typer.echo(f"every prompt and answer: {out}/*.jsonl\nbeside another model's: dsv3 eval --compare A B")


def _list(as_json: bool) -> None:
    """What ``--tasks`` takes."""
    from dsv3.evaluate import tasks
    from dsv3.evaluate.benchmarks.table import TABLE

    if as_json:
        typer.echo(json.dumps({"benchmarks": list(TABLE), "generated": tasks.names()}))
        return
    from dsv3.cli.tables import show

    rows = [
        (
            name,
            one.judge or "ranked",
            str(one.shots),
            one.metric,
            "package" if one.sources else f"{name}.jsonl",
        )
        for name, one in TABLE.items()
    ]
    show("Benchmarks (--data)", ("task", "judged", "shots", "metric", "from"), rows)
    typer.echo(f"Generated, NAME or NAME:DIFFICULTY: {', '.join(n for n in tasks.names() if '/' not in n)}")
    typer.echo("and reasoning-gym's, where it is installed: dsv3 tasks list")


def _compare(first: Path, second: Path, as_json: bool) -> None:
    from dsv3.evaluate.benchmarks.compare import certain, compare, draw

    found = compare(first, second)
    picture = second / f"compared-with-{first.resolve().name}.png"
    draw(found, str(first), str(second), picture)
    if as_json:
        typer.echo(json.dumps(found, indent=2))
        return
    from dsv3.cli.tables import show

    rows = []
    for one in found:
        interval = "" if one["low"] is None else f"{one['low']:+.4f} to {one['high']:+.4f}"
        numbers = [f"{one[key]:.4f}" for key in ("first", "second")] + [f"{one['difference']:+.4f}", interval]
        moved = f"{one['up']} / {one['down']}"
        rows.append((one["task"], one["score"], str(one["n"]), *numbers, moved, "*" if certain(one) else ""))
    header = ("task", "score", "n", "first", "second", "difference", "95 % interval", "up / down", "")
    show(f"{second} beside {first}, question by question", header, rows)
    typer.echo(f"* the interval leaves zero out\nplot: {picture}")


def _contamination(
    prepared: Path, data: Path | None, names: list[str], samples: int | None, as_json: bool
) -> None:
    from dsv3.evaluate.benchmarks.build import build
    from dsv3.evaluate.benchmarks.contamination import WORDS, overlap

    found = overlap(prepared, [build(name.strip(), data, samples) for name in names])
    if as_json:
        typer.echo(json.dumps(found, indent=2))
        return
    from dsv3.cli.tables import show

    rows = [
        (
            name,
            str(one["questions"]),
            str(one["searched"]),
            str(one["found"]),
            f"{one['share']:.2%}",
            ", ".join(one["ids"][:5]),
        )
        for name, one in found.items()
    ]
    show(f"Questions that share {WORDS} words in a row with {prepared}",
         ("task", "questions", "long enough", "found", "share", "the first"), rows)  # fmt: skip


def _row(name: str, one: dict[str, Any]) -> tuple[str, ...]:
    metric, stderr = one["metric"], one[f"{one['metric']}_stderr"]
    notes = [f"{one[what]} {what}" for what in ("truncated", "unfinished") if one.get(what)]
    return (
        name, str(one["shots"]), str(one["n"]), metric, f"{one[metric]:.4f}",
        "" if stderr is None else f"{stderr:.4f}", ", ".join(notes),
    )  # fmt: skip


def _table(found: dict[str, dict[str, HeldOut]]) -> str:
    """A line a number format: bits per byte, how much more than as stored, MTP acceptance."""
    before = next(iter(found.values()))
    lines = ["bits per byte".ljust(16) + "".join(text.ljust(32) for text in before)]
    for name, row in found.items():
        cells = []
        for text, one in row.items():
            cell = f"{one.bits_per_byte:.4f}"
            if row is not before:
                cell += f" {one.bits_per_byte / before[text].bits_per_byte - 1:+.2%}"
            if one.acceptance:
                cell += f"  MTP {', '.join(f'{share:.1%}' for share in one.acceptance)}"
            cells.append(cell.ljust(32))
        lines.append(name.ljust(16) + "".join(cells))
    return "\n".join(line.rstrip() for line in lines)
