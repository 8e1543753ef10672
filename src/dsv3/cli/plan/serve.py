"""``dsv3 plan serve``."""

from __future__ import annotations

import json

import typer

from dsv3.cli.plan.group import JSON, app
from dsv3.cli.tables import show


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
