"""``dsv3 plan cost``."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import typer

from dsv3.cli.plan.group import JSON, MODEL, app, figure, human
from dsv3.cli.tables import show


@app.command()
def cost(
    recipe: Path = typer.Argument(
        None, help="YAML recipe of a pre-training run. [default: the report's run]"
    ),
    preset: str = MODEL,
    hardware: str = typer.Option("h800", "--hardware", help="h800, h100, h200, b200 or gb200."),
    gpus: int = typer.Option(2048, "--gpus", help="GPUs of the run."),
    tokens: float = typer.Option(
        None, "--tokens", min=1, help="Tokens to train on. [default: the recipe's; 14.8e12]"
    ),
    seq_len: int = typer.Option(
        None, "--seq-len", min=1, help="Tokens a sequence. [default: the recipe's; 4096]"
    ),
    batch: int = typer.Option(None, "--batch", help="Sequences a step. [default: the recipe's; 15360]"),
    precision: str = typer.Option(
        None, "--precision", help="fp8 or bf16. [default: the recipe's (fp32 as bf16); fp8]"
    ),
    pipeline: int = typer.Option(16, "--pipeline", help="Pipeline ranks."),
    schedule: str = typer.Option(
        "dualpipe", "--schedule", help="1f1b, interleaved, zb1p, zbv, dualpipe or dualpipev."
    ),
    virtual: int = typer.Option(2, "--virtual", help="Stages a rank, for interleaved."),
    expert: int = typer.Option(64, "--expert", help="GPUs that share the routed experts."),
    tensor: int = typer.Option(1, "--tensor", help="Tensor-parallel GPUs."),
    usd_hour: float = typer.Option(
        None, "--usd-hour", min=0, help="Price of a GPU hour. [default: the hardware's]"
    ),
    efficiency: float = typer.Option(
        None,
        "--efficiency",
        help="Share of peak that products reach: your own measured one. [default: fitted to the report]",
    ),
    check: bool = typer.Option(
        False,
        "--check",
        help="Show what is fitted, the report's and other people's runs beside the model, sensitivities.",
    ),
    as_json: bool = JSON,
) -> None:
    """What a training run takes: FLOPs by part, tokens/s, GPU hours, days, money, energy."""
    from dsv3.common.errors import UserError
    from dsv3.plan import cost as model
    from dsv3.plan.hardware import hardware as machine_of
    from dsv3.plan.params import resolve

    machine = machine_of(hardware)
    layout = model.Layout(gpus, pipeline, schedule if pipeline > 1 else "1f1b", virtual, expert, tensor)
    values: dict[str, Any] = {"seq_len": 4096, "batch": 15360, "precision": "fp8", "tokens": 14.8e12}
    if recipe is not None and preset is not None:
        raise UserError("RECIPE and --preset both name a model; give one of them")
    if recipe is not None:
        from dsv3.config.recipe import load
        from dsv3.config.train import PretrainRecipe

        read = load(PretrainRecipe, recipe, [])
        config, name = read.model, str(recipe)
        values = {
            "seq_len": read.sequence_length, "batch": read.batch.sequences, "tokens": read.total_tokens,
            "precision": "bf16" if read.precision == "fp32" else read.precision,
        }  # fmt: skip
    else:
        name = preset or "v3-671b"
        config = resolve(name)
    for key, given in (("seq_len", seq_len), ("batch", batch), ("precision", precision), ("tokens", tokens)):
        if given is not None:
            values[key] = given
    total = values.pop("tokens")
    for key, wish in (("--tokens", total), ("--usd-hour", usd_hour or 0.0)):
        if not math.isfinite(wish):
            raise UserError(f"{key} ({wish}) must be finite")
    run = model.Run(config, layout, machine, mtp=config.num_nextn_predict_layers > 0, **values)
    model.check(run)
    if efficiency is not None and not 0 < efficiency <= 1:
        raise UserError(f"--efficiency ({efficiency}) must be a share of peak, above 0 and at most 1")
    fitted = model.calibrate()
    found = model.summary(
        run, total, efficiency or fitted, machine.usd_hour if usd_hour is None else usd_hour
    )
    found = {"model": name, **found}
    if check:
        found["efficiency_fitted"] = fitted
        found["report"] = model.report_table(fitted)
        found["held_out"] = model.held_out_table(fitted)
        found["sensitivity"] = model.sensitivity(fitted)
    if as_json:
        print(json.dumps(found, indent=2))
        return
    _cost(found, fitted=efficiency is None)
    if check:
        _cost_check(found)


def _cost(found: dict[str, Any], fitted: bool) -> None:
    parts = found["train_flops_per_token_by_part"]
    flops, gpu = sum(parts.values()), found["time_us_per_token_gpu"]
    rows = [(part, human(value), f"{100 * value / flops:.1f}%") for part, value in parts.items()]
    rows.append(("all", human(flops), "100.0%"))
    show(
        f"{found['model']}: FLOPs a token, forward and backward",
        ("part", "FLOPs", "share"),
        rows,
        [len(parts) - 1],
    )
    print(f"in FP8: {100 * found['fp8_flops_share']:.1f}% of the FLOPs\n")
    whole = sum(gpu.values())
    terms = [(term, figure(value), f"{100 * value / whole:.1f}%") for term, value in gpu.items()]
    terms.append(("all", figure(whole), "100.0%"))
    show("Time of one GPU a token, by term", ("term", "microseconds", "share"), terms, [len(gpu) - 1])
    source = "fitted to the report's run" if fitted else "given"
    reached, mfu = found["efficiency"], found["mfu_of_bf16_peak"]
    print(f"products reach {100 * reached:.1f}% of peak ({source}); MFU {100 * mfu:.1f}% of the BF16 peak")
    hidden = found["all_to_all_hidden_us_per_token_gpu"]
    print(f"hidden behind products: {figure(hidden)} microseconds of all-to-all\n")
    print(f"{found['gpus']:,} {found['hardware']}, {found['tokens']:.4g} tokens:")
    for label, key in (
        ("tokens a second and GPU", "tokens_per_s_gpu"),
        ("tokens a second", "tokens_per_s"),
        ("GPU hours a trillion tokens", "gpu_hours_per_trillion_tokens"),
        ("GPU hours", "gpu_hours"),
        ("days", "days"),
        ("USD", "cost_usd"),
        ("MWh at most, without cooling", "energy_mwh"),
    ):
        print(f"  {label}: {figure(found[key])}")


def _cost_check(found: dict[str, Any]) -> None:
    print()
    rows: list[tuple[str, ...]] = [
        (row["figure"], figure(row["model"]),
         f"{row['published']:,}", f"{100 * row['error']:+.1f}%", row["kind"])
        for row in found["report"]
    ]  # fmt: skip
    show("The report's run", ("figure", "model", "report", "error", ""), rows)
    print()
    rows = [
        (row["run"], f"{row['model_tokens_per_s_gpu']:,.0f}", f"{row['published_tokens_per_s_gpu']:,.0f}",
         f"{100 * row['error']:+.0f}%")
        for row in found["held_out"]
    ]  # fmt: skip
    show("Held out: Megatron-Bridge, tokens a second and GPU", ("run", "model", "published", "error"), rows)
    print("(never fitted; assumed: dispatch in BF16, all-to-all not overlapped, the fitted share of peak)")
    print()
    rows = [
        (row["assumption"], f"{row['gpu_hours_per_trillion_tokens']:,.0f}", f"{100 * row['change']:+.1f}%",
         f"{100 * row['extension_error_refitted']:+.1f}%", f"{100 * row['h100_error_refitted']:+.1f}%")
        for row in found["sensitivity"]
    ]  # fmt: skip
    header = (
        "one assumption changed",
        "hours/T tokens",
        "change",
        "extension, refitted",
        "H100 row, refitted",
    )
    show("Sensitivity of the report's run; the last two columns are errors after fitting anew", header, rows)
