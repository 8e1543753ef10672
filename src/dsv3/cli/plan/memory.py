"""``dsv3 plan memory``."""

from __future__ import annotations

import json
from typing import Any

import typer

from dsv3.cli.plan.group import JSON, app
from dsv3.cli.tables import show


@app.command()
def memory(
    model: str = typer.Argument(
        "v3-671b", help="A preset (tiny, small, 16b, v3-671b) or a checkpoint folder."
    ),
    context: int = typer.Option(4096, "--context", help="Tokens of cache a sequence."),
    sequences: int = typer.Option(1, "--sequences", help="Sequences at once."),
    cache: str = typer.Option("bf16", "--cache", help="bf16, or fp8 (FlashMLA's rows)."),
    group: int = typer.Option(128, "--group", help="Inputs that share a scale in INT4: 32, 64 or 128."),
    reserve: float = typer.Option(
        0.1, "--reserve", help="Share of a GPU's memory left to activations and buffers."
    ),
    acceptance: float = typer.Option(
        0.85, "--acceptance", help="Share of drafted tokens accepted, with MTP."
    ),
    train: bool = typer.Option(
        False, "--train", help="Training memory of a GPU instead, in the report's layout."
    ),
    hardware: str = typer.Option("h800", "--hardware", help="With --train: h800, h100, h200, b200 or gb200."),
    gpus: int = typer.Option(2048, "--gpus", help="With --train: GPUs."),
    pipeline: int = typer.Option(16, "--pipeline", help="With --train: pipeline ranks."),
    schedule: str = typer.Option("dualpipe", "--schedule", help="With --train: the pipeline's schedule."),
    expert: int = typer.Option(64, "--expert", help="With --train: GPUs that share the routed experts."),
    batch: int = typer.Option(15360, "--batch", help="With --train: sequences a step."),
    seq_len: int = typer.Option(4096, "--seq-len", min=1, help="With --train: tokens a sequence."),
    precision: str = typer.Option("fp8", "--precision", help="With --train: fp8 or bf16."),
    as_json: bool = JSON,
) -> None:
    """Memory served or trained, by part; which machines hold which precision; how fast they can decode."""
    from dsv3.plan.params import resolve

    config = resolve(model)
    if train:
        from dsv3.plan import cost as costs
        from dsv3.plan.hardware import hardware as machine_of
        from dsv3.plan.memory import train_bytes

        machine = machine_of(hardware)
        layout = costs.Layout(gpus, pipeline, schedule if pipeline > 1 else "1f1b", 2, expert)
        mtp = config.num_nextn_predict_layers > 0
        parts = train_bytes(costs.Run(config, layout, machine, seq_len, batch, precision, mtp))
        total = sum(parts.values())
        found: dict[str, Any] = {
            "model": model, "hardware": hardware, "gpus": gpus, "bytes_per_gpu_by_part": parts,
            "bytes_per_gpu": total, "memory_bytes_per_gpu": machine.memory, "holds": total <= machine.memory,
        }  # fmt: skip
        if as_json:
            print(json.dumps(found, indent=2))
            return
        rows = [(part, f"{size / 1e9:.1f}") for part, size in parts.items()]
        rows.append(("all", f"{total / 1e9:.1f}"))
        show(
            f"{model}: training on {gpus:,} {hardware}, the fullest GPU",
            ("part", "GB"),
            rows,
            [len(parts) - 1],
        )
        verdict = "holds it" if found["holds"] else "does not hold it"
        print(f"a {hardware} has {machine.memory / 1e9:.0f} GB: {verdict}")
        return
    from dsv3.plan.memory import FORMATS, Serving, summary

    found = {"model": model, "context_tokens": context, "sequences": sequences, "formats": {}}
    for name in FORMATS:
        found["formats"][name] = summary(
            Serving(config, name, cache, group, context, sequences, False, reserve, acceptance)
        )
    if as_json:
        print(json.dumps(found, indent=2))
    else:
        _memory(found, cache)


def _memory(found: dict[str, Any], cache: str) -> None:
    formats = found["formats"]
    plain = formats["bf16"]
    parts = [part for part, size in plain["weight_bytes_by_part"].items() if size]
    rows = [
        (part, *(f"{formats[f]['weight_bytes_by_part'][part] / 1e9:.4g}" for f in formats)) for part in parts
    ]
    rows.append(("weights without MTP", *(f"{formats[f]['weight_bytes'] / 1e9:.1f}" for f in formats)))
    header = ("GB of", *(name.upper() for name in formats))
    show(f"{found['model']}: weights", header, rows, [len(parts) - 1])
    where = f"{found['sequences']} x {found['context_tokens']:,} tokens"
    token, every = plain["cache_bytes_per_token"], plain["cache_bytes"] / 1e9
    print(f"cache ({cache}): {token:,.0f} bytes a token, {every:.2f} GB for {where}\n")
    machines = list(plain["machines_needed"])
    needed = [(m, *(str(formats[f]["machines_needed"][m]) for f in formats)) for m in machines]
    show("Machines that hold weights and cache, shared evenly", ("machine", *header[1:]), needed)
    print()
    setups = [row["setup"] for row in plain["setups"]]
    rows = []
    for i, setup in enumerate(setups):
        cells = []
        for name in formats:
            row = formats[name]["setups"][i]
            slow, fast = (row[f"decode_bound{k}_tokens_per_s_per_sequence"] for k in ("", "_mtp"))
            cells.append(
                "-" if slow is None else f"{slow:,.0f}" if fast is None else f"{slow:,.0f} / {fast:,.0f}"
            )
        rows.append((setup, *cells))
    print(f"Decoding, {where}: tokens a second a sequence at most, from bandwidth alone;")
    show("without / with MTP; -: does not fit", ("setup", *header[1:]), rows)
