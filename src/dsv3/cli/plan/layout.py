"""``dsv3 plan layout``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import typer

from dsv3.cli.plan.group import JSON, app
from dsv3.cli.tables import show


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def layout(
    context: typer.Context,
    recipe: Path = typer.Argument(help="YAML recipe of a pre-training run with a parallel section."),
    gpus: int = typer.Option(2048, "--gpus", min=1, help="GPUs of the run."),
    hardware: str = typer.Option("h800", "--hardware", help="h800, h100, h200, b200 or gb200."),
    as_json: bool = JSON,
) -> None:
    """Cut and spread the real model without a cluster: what each pipeline rank's GPU holds and sends.

    Keys of the recipe may follow as --any.key value, e.g. --parallel.pipeline 8.
    """
    from dsv3.config.recipe import load
    from dsv3.config.train import PretrainRecipe
    from dsv3.plan.hardware import hardware as machine_of
    from dsv3.plan.layout import summary

    found = summary(load(PretrainRecipe, recipe, context.args), gpus, machine_of(hardware))
    if as_json:
        print(json.dumps(found, indent=2))
    else:
        _print(str(recipe), found)


def _print(name: str, found: dict[str, Any]) -> None:
    parts = ["weights", "gradients", "optimizer", "activations", "head"]
    rows = [
        (
            str(rank["pipeline_rank"]),
            " ".join(map(str, rank["stages"])),
            str(rank["layers"]),
            f"{rank['parameters'] / 1e9:.3f}",
            *(f"{rank['bytes_by_part'].get(part, 0) / 1e9:.1f}" for part in parts),
            f"{rank['bytes'] / 1e9:.1f}",
            *(f"{size / 1e9:.0f}" for size in rank["sent_bytes_per_step"].values()),
        )
        for rank in found["ranks"]
    ]
    sizes = ", ".join(f"{key} {value}" for key, value in found["layout"].items())
    print(f"{name} on {found['gpus']:,} {found['hardware']}: {sizes}; {found['micro_batches']} micro-batches")
    header = (
        "pipeline rank", "stages", "layers", "G parameters", *parts, "all",
        *(f"sends: {way}" for way in found["ranks"][0]["sent_bytes_per_step"]),
    )  # fmt: skip
    show("GB of one GPU of each pipeline rank, and GB it sends in a step", header, rows)
    full, room = found["fullest_bytes"] / 1e9, found["memory_bytes_per_gpu"] / 1e9
    verdict = "holds it" if found["holds"] else "does not hold it"
    print(f"the fullest, rank {found['fullest_rank']}, takes {full:.1f} GB; {room:.0f} GB: {verdict}")
    print("head: gradients made with the loss, kept until its backward; left out: copies in FP8, buffers")
