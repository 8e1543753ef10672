"""``dsv3 plan``: what a model or a run will take."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import typer

from dsv3.cli.tables import show

app = typer.Typer(help="Count before you start: parameters, memory, cost, fleets.", no_args_is_help=True)


@app.callback()
def group() -> None:
    """Count before you start: parameters, memory, cost, fleets."""


@app.command()
def params(
    model: str = typer.Argument(help="A preset (tiny, small, 16b, v3-671b) or a checkpoint folder."),
    seq_len: int = typer.Option(4096, min=1, help="Tokens in a training sequence, for attention's FLOPs."),
    as_json: bool = typer.Option(False, "--json", help="Print JSON; the keys name their units."),
) -> None:
    """Parameters (total, activated, MTP, in the files), cache bytes and training FLOPs a token."""
    from dsv3.plan.params import resolve, summary

    found = summary(resolve(model), seq_len)
    if as_json:
        print(json.dumps({"model": model, **found}, indent=2))
    else:
        _print(model, found)


MODEL = typer.Option(None, "--preset", help="tiny, small, 16b, v3-671b or a checkpoint folder")
JSON = typer.Option(False, "--json", help="Print JSON; the keys name their units.")


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
    rows = [(part, _human(value), f"{100 * value / flops:.1f}%") for part, value in parts.items()]
    rows.append(("all", _human(flops), "100.0%"))
    show(
        f"{found['model']}: FLOPs a token, forward and backward",
        ("part", "FLOPs", "share"),
        rows,
        [len(parts) - 1],
    )
    print(f"in FP8: {100 * found['fp8_flops_share']:.1f}% of the FLOPs\n")
    whole = sum(gpu.values())
    terms = [(term, _figure(value), f"{100 * value / whole:.1f}%") for term, value in gpu.items()]
    terms.append(("all", _figure(whole), "100.0%"))
    show("Time of one GPU a token, by term", ("term", "microseconds", "share"), terms, [len(gpu) - 1])
    source = "fitted to the report's run" if fitted else "given"
    reached, mfu = found["efficiency"], found["mfu_of_bf16_peak"]
    print(f"products reach {100 * reached:.1f}% of peak ({source}); MFU {100 * mfu:.1f}% of the BF16 peak")
    hidden = found["all_to_all_hidden_us_per_token_gpu"]
    print(f"hidden behind products: {_figure(hidden)} microseconds of all-to-all\n")
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
        print(f"  {label}: {_figure(found[key])}")


def _cost_check(found: dict[str, Any]) -> None:
    print()
    rows: list[tuple[str, ...]] = [
        (row["figure"], _figure(row["model"]),
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


@app.command()
def serve(
    model: str = typer.Argument("v3-671b", help="A preset (16b, v3-671b) or a checkpoint folder."),
    hardware: str = typer.Option("h800", "--hardware", help="h800, h100, h200, b200 or gb200."),
    prefill_expert: int = typer.Option(
        32, "--prefill-expert", help="GPUs of a prefill unit that share the experts."
    ),
    prefill_redundant: int = typer.Option(
        32, "--prefill-redundant", help="Copies of busy experts in a prefill unit."
    ),
    decode_expert: int = typer.Option(
        144, "--decode-expert", help="GPUs of a decode unit that share the experts."
    ),
    decode_redundant: int = typer.Option(
        32, "--decode-redundant", help="Copies of busy experts in a decode unit."
    ),
    batch: int = typer.Option(None, "--batch", help="Sequences a decoding GPU. [default: what memory holds]"),
    mtp: bool = typer.Option(False, "--mtp", help="Draft one token a step."),
    acceptance: float = typer.Option(
        0.85, "--acceptance", min=0, max=1, help="Share of drafts accepted, with --mtp."
    ),
    input_rate: float = typer.Option(
        608e9 / 86400, "--input-rate", min=0, help="Input tokens a second, cached ones too."
    ),
    output_rate: float = typer.Option(168e9 / 86400, "--output-rate", min=0, help="Output tokens a second."),
    hit: float = typer.Option(0.563, "--hit", help="Share of input tokens found in the cache."),
    prompt: int = typer.Option(4383, "--prompt", min=1, help="Mean tokens of a prompt."),
    context: int = typer.Option(4989, "--context", min=1, help="Mean tokens of cache an output token reads."),
    as_json: bool = JSON,
) -> None:
    """Prefill and decode fleets: tokens/s a node and nodes; the defaults are DeepSeek's published day."""
    from dsv3.plan import fleet
    from dsv3.plan.cost import calibrate
    from dsv3.plan.hardware import hardware as machine_of
    from dsv3.plan.params import resolve

    demand = fleet.Demand(input_rate, output_rate, hit, prompt, context)
    found = fleet.summary(
        resolve(model), machine_of(hardware), demand, calibrate(),
        fleet.Fleet(prefill_expert, prefill_redundant), fleet.Fleet(decode_expert, decode_redundant),
        batch, mtp, acceptance,
    )  # fmt: skip
    found = {"model": model, "hardware": hardware, **found}
    if as_json:
        print(json.dumps(found, indent=2))
        return
    rows: list[tuple[str, ...]] = [
        (
            way, str(side["expert_gpus"]), str(side["experts_per_gpu"]),
            f"{side['bound_tokens_per_s_node']:,.0f}", f"{side['estimate_tokens_per_s_node']:,.0f}",
            side["limit"], f"{side['nodes']:,.1f}",
        )
        for way, side in (("prefill", found["prefill"]), ("decode", found["decode"]))
    ]  # fmt: skip
    header = ("fleet", "EP", "experts a GPU", "bound", "estimate", "limited by", "nodes")
    show(f"{model} on {hardware}: tokens a second a node of 8", header, rows)
    side = found["decode"]
    speed = f"{side['stream_tokens_per_s']:.1f} tokens a second each"
    print(f"decode: {side['sequences_per_gpu']} sequences a GPU, {speed}")
    print(f"demand: {input_rate:,.0f} tokens a second in, {hit:.1%} cached; {output_rate:,.0f} out\n")
    rows = [
        (
            row["who"], row["direction"], f"{row['bound_tokens_per_s_node']:,.0f}",
            f"{row['estimate_tokens_per_s_node']:,.0f}", f"{row['published_tokens_per_s_node']:,}",
            f"{row['published_over_estimate']:.2f}",
        )
        for row in found["published"]
    ]  # fmt: skip
    show(
        "Published, in their own settings: tokens a second a node",
        ("who", "", "bound", "estimate", "published", "published / estimate"), rows,
    )  # fmt: skip
    print("nodes DeepSeek's day takes at its published rates: "
          f"{found['published_rates_nodes']:.1f}; it published {found['published_nodes']}")  # fmt: skip


@app.command()
def pipeline(
    schedule: str = typer.Option(
        "1f1b,zb1p,dualpipe",
        "--schedule",
        help="One or more of 1f1b, interleaved, zb1p, zbv, dualpipe, dualpipev, with commas.",
    ),
    ranks: int = typer.Option(8, "--ranks", help="Pipeline ranks P."),
    micro_batches: int = typer.Option(20, "--micro-batches", help="Micro-batches a step M."),
    forward: float = typer.Option(
        1.0, "--forward", help="Forward F of one micro-batch on one rank, in --unit."
    ),
    backward: float = typer.Option(2.0, "--backward", help="Whole backward B, in --unit."),
    weight: float = typer.Option(1.0, "--weight", help="The part of B for the weights W, in --unit."),
    overlapped: float = typer.Option(
        None, "--overlapped", help="F&B, a forward and a backward overlapped. [default: F + B]"
    ),
    communication: float = typer.Option(0.0, "--communication", help="Delay from rank to rank, in --unit."),
    stages_per_rank: int = typer.Option(2, "--stages-per-rank", help="Stages a rank v, for interleaved."),
    unit: str = typer.Option("ms", "--unit", help="Unit of the times, for the picture."),
    out: Path = typer.Option(None, "--out", help="Draw the schedules into this PNG."),
    as_json: bool = JSON,
) -> None:
    """Play pipeline schedules: bubble beside its formula, time, activations held; drawn with --out."""
    from dsv3.common.errors import UserError
    from dsv3.plan import pipeline as play
    from dsv3.plan.schedules import schedule as made

    times = play.Times(forward, backward, weight, overlapped, communication)
    if out is not None and not out.absolute().parent.is_dir():
        raise UserError(f"--out ({out}): the folder {out.parent} does not exist")
    if out is not None and out.suffix != ".png":
        raise UserError(f"--out ({out}) must end in .png")
    names = [name.strip() for name in schedule.split(",")]
    orders = [made(name, ranks, micro_batches, stages_per_rank) for name in names]
    ran = [play.simulate(order, times) for order in orders]
    found = [play.summary(timeline) for timeline in ran]
    if out is not None:
        from dsv3.plan.draw import draw

        draw(ran, out, unit)
    if as_json:
        print(json.dumps({"unit": unit, "schedules": found, "picture": str(out) if out else None}, indent=2))
        return
    rows = [_pipeline_row(row) for row in found]
    header = ("schedule", "time", "bubble", "share", "formula", "gives", "held at most")
    show(f"{ranks} ranks, {micro_batches} micro-batches; times in {unit}", header, rows)
    print(
        "held: micro-batches through 1/P of the model; formulas: without communication, for B - W = F, W <= F"
    )
    if out is not None:
        print(f"picture: {out}")


def _pipeline_row(row: dict[str, Any]) -> tuple[str, ...]:
    known = row["bubble_formula"]
    return (
        row["schedule"], f"{row['time_total']:.4g}", f"{row['time_bubble']:.4g}",
        f"{100 * row['bubble_share']:.1f}%", known or "-",
        f"{row['time_bubble_formula']:.4g}" if known else "-",
        f"{max(row['peak_activations_by_rank_micro_batches']):g}",
    )  # fmt: skip


def _print(model: str, found: dict[str, Any]) -> None:
    by_part, active = found["parameters_by_part"], found["parameters_activated_by_part"]
    main = found["parameters_main"]
    rows = [
        (part, f"{size:,}", f"{active[part]:,}", f"{100 * size / main:.2f}%")
        for part, size in by_part.items()
    ]
    rows.append(("main model", f"{main:,}", f"{found['parameters_activated']:,}", "100.00%"))
    if found["parameters_mtp"]:
        rows.append(("MTP", f"{found['parameters_mtp']:,}", f"{found['parameters_mtp_activated']:,}", ""))
    header = ("part", "parameters", "activated a token", "of main")
    title = f"{model}: {_billions(main)} parameters, {_billions(found['parameters_activated'])} activated"
    notes = [
        ("activated, embedding counted", _billions(found["parameters_activated_with_embedding"])),
        ("in the files (MTP repeats embedding and head)", _billions(found["parameters_files"])),
        ("cache, BF16", f"{found['kv_bytes_per_token']:,} bytes a token"),
        (
            f"training, sequences of {found['seq_len_tokens']:,}",
            f"{_human(found['train_flops_per_token'])} FLOPs a token"
            f" ({_human(found['train_flops_per_token_without_mtp'])} without MTP)",
        ),
    ]
    show(title, header, rows, ends=[len(by_part) - 1])
    for name, value in notes:
        print(f"{name}: {value}")


def _billions(count: int) -> str:
    """``671.0B``, ``15.2M``."""
    return f"{count / 1e9:.1f}B" if count >= 1e9 else f"{count / 1e6:.1f}M"


def _figure(value: float) -> str:
    """``180,000``, ``54.2``, ``0.00102``."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}" if abs(value) >= 1 else f"{value:.3g}"


def _human(count: float) -> str:
    """``260G``, ``15.2M``: the counts of this module's tables."""
    from dsv3.common.progress import human

    return human(count)
