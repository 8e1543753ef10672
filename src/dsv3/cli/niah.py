"""``dsv3 niah``: needle in a haystack over lengths and depths."""

from __future__ import annotations

import json
from pathlib import Path

import typer

app = typer.Typer()


@app.command()
def niah(
    folders: list[Path] = typer.Argument(
        help="Hugging Face folder of a model, with its tokenizer; with several, their maps stand side by side"
    ),
    haystack: Path = typer.Option(
        ..., "--haystack", help="text round the needles: held out of a dsv3 data prepare folder, or a file"
    ),
    source: str = typer.Option(None, "--source", help="of prepared data: which source; default its first"),
    lengths: str = typer.Option("256,512,1024,2048", "--lengths", help="tokens of a prompt, K for 1024"),
    depths: int = typer.Option(11, "--depths", min=1, help="places of the needle, evenly from front to end"),
    samples: int = typer.Option(4, "--samples", min=1, help="prompts a length and depth"),
    distractors: int = typer.Option(3, "--distractors", min=0, help="needles with other keys in a prompt"),
    seed: int = typer.Option(0, "--seed", min=0, help="of text, keys, values and places"),
    out: Path = typer.Option(
        Path("runs/niah"),
        "--out",
        help="folder for a JSON a model and heat_map.png; what is there is not done again",
    ),
    as_json: bool = typer.Option(False, "--json", help="print the share found, a length and depth, as JSON"),
) -> None:
    """Hide a sentence in a long text and ask for it: found, at which depth, up to which length?"""
    from dsv3.evaluate.needle import Grid, check, measure, scores
    from dsv3.evaluate.needle_plot import draw

    places = tuple(round(i / max(1, depths - 1), 4) for i in range(depths))
    grid = Grid(tokens(lengths), places, samples, distractors, seed)
    names = _names(folders)
    for folder in folders:  # all of them before the first is asked
        check(folder)
    results = [
        (name, measure(folder, haystack, grid, out / f"{name}.json", source=source))
        for name, folder in zip(names, folders)
    ]
    draw(results, out / "heat_map.png")
    tables = {name: scores(result) for name, result in results}
    if as_json:
        plain = {
            name: {"lengths": lengths, "depths": depths, "found": share.round(4).tolist()}
            for name, (lengths, depths, share) in tables.items()
        }
        typer.echo(json.dumps(plain, indent=2))
        return
    for name, (counts, _, share) in tables.items():
        found = ", ".join(f"{count}: {mean:.0%}" for count, mean in zip(counts, share.mean(axis=0)))
        typer.echo(f"{name}: {found}")
    typer.echo(f"answers: {out}/*.json   heat map: {out}/heat_map.png")


def tokens(text: str) -> tuple[int, ...]:
    """``"256,2K"`` as numbers of tokens."""
    from dsv3.common.errors import UserError

    found = []
    for word in text.split(","):
        digits, unit = (word[:-1], 1024) if word[-1:] in "kK" else (word, 1)
        if not digits.strip().isdigit() or int(digits) < 1:
            raise UserError(f"--lengths ({text}) must be numbers of tokens, like 256,2K,8K")
        found.append(int(digits) * unit)
    return tuple(found)


def _names(folders: list[Path]) -> list[str]:
    """A short name for each model: the last parts of its path that tell it from the others."""
    from dsv3.common.errors import UserError

    parts = [folder.resolve().parts[1:] for folder in folders]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["-".join(path[-count:]) for path in parts]
        if len(set(names)) == len(names) and "model" not in names:
            return names
    raise UserError(f"a model is named twice: {', '.join(map(str, folders))}")
