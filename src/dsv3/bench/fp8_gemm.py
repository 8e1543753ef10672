"""``dsv3 bench fp8``: FP8 products, quantisers and a layer's step on a GPU, beside BF16 and other FP8.

Shapes: M rows (tokens), N outputs, K inputs, E experts. The products are the real model's; "ours" are the
Triton kernels, whatever ``dsv3.ops.backend`` would take. Operands of small products exist several times, so
that they come from memory and not from a cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F

from dsv3.bench.gpu_timer import Calls, Timer, calls_in_turns, graphs_in_turns
from dsv3.bench.machine import machine
from dsv3.common.errors import Failure, UserError
from dsv3.common.progress import Progress
from dsv3.ops import backend
from dsv3.ops.blocks import BLOCK, COLUMN, ROW, Quantised

# Inputs and outputs: gate and up of an expert, and of a dense layer; queries from their latent; keys and
# values from theirs; the Linear after attention.
SHAPES = ((7168, 2048), (7168, 18432), (1536, 24576), (512, 32768), (16384, 7168))
ROWS = (64, 256, 1024, 4096, 16384)
GROUPED = ((8, 4096), (256, 128))  # experts, rows of each
EXPERT = SHAPES[0]
PEAK = 8192  # the BF16 product whose speed counts as the device's peak
CACHE = 120_000_000  # bytes that do not stay in a cache
QUANTISED = (16384, 7168)
OURS = "triton"


def gpu() -> torch.device:
    """The current GPU, or one clear line."""
    if not torch.cuda.is_available():
        raise UserError("this needs a CUDA device, and there is none; --ablation and --memory need none")
    return torch.device("cuda", torch.cuda.current_device())


def copies(size: int) -> int:
    """How many sets of operands of this many bytes do not fit into a cache together."""
    return min(8, max(1, -(-CACHE // size)))


def contestants(
    operator: str, device: torch.device, operands: list[tuple[Any, ...]], takes: str, verb: str
) -> dict[str, Calls]:
    """Every FP8 implementation there is for these operands."""
    found: dict[str, Calls] = {}
    for name in backend.choose(operator, device).order:
        module = backend.implementation(name)
        if name != "reference" and getattr(module, takes)(*operands[0]):
            found[name] = [partial(getattr(module, verb), *each) for each in operands]
    return found


def linear_case(rows: int, inputs: int, outputs: int, device: torch.device) -> dict[str, Calls]:
    """``[M, K]`` by ``[N, K]``: BF16 and every FP8."""
    sets = range(copies(rows * inputs + inputs * outputs))
    x, w = (torch.randn(size, inputs, device=device, dtype=torch.bfloat16) for size in (rows, outputs))
    pairs = [(backend.quantise(x, ROW), backend.quantise(w, BLOCK), None, torch.bfloat16) for _ in sets]
    plain: Calls = [partial(F.linear, x.clone(), w.clone()) for _ in sets]
    return {"bf16": plain, **contestants("linear", device, pairs, "takes_linear", "linear")}


def wgrad_case(rows: int, inputs: int, outputs: int, device: torch.device) -> dict[str, Calls]:
    """``[M, N]`` and ``[M, K]`` to the weight's gradient."""
    x, g = (torch.randn(rows, size, device=device, dtype=torch.bfloat16) for size in (inputs, outputs))
    pair = (backend.quantise(g, COLUMN), backend.quantise(x, COLUMN), None)
    return {
        "bf16": [partial(torch.mm, g.T, x)],
        **contestants("wgrad", device, [pair], "takes_wgrad", "wgrad"),
    }


def grouped_case(experts: int, rows: int, device: torch.device) -> dict[str, Calls]:
    """Rows of every expert by its gate."""
    inputs, outputs = EXPERT
    x = torch.randn(experts * rows, inputs, device=device, dtype=torch.bfloat16)
    w = torch.randn(experts, outputs, inputs, device=device, dtype=torch.bfloat16)
    counts_E = torch.full((experts,), rows, device=device)
    ends_E = counts_E.cumsum(0).to(torch.int32)
    operands = (
        backend.quantise(x, ROW, counts_E=counts_E),
        backend.quantise(w, BLOCK),
        counts_E,
        torch.bfloat16,
    )
    plain: Calls = [partial(F.grouped_mm, x, w.transpose(1, 2), offs=ends_E)]
    return {"bf16": plain, **contestants("grouped linear", device, [operands], "takes_linear", "linear")}


def grouped_wgrad_case(experts: int, rows: int, device: torch.device) -> dict[str, Calls]:
    """The gate's gradient of every expert."""
    x, g = (torch.randn(experts * rows, size, device=device, dtype=torch.bfloat16) for size in EXPERT)
    counts_E = torch.full((experts,), rows, device=device)
    ends_E = counts_E.cumsum(0).to(torch.int32)
    operands = (*(backend.quantise(t, COLUMN, counts_E=counts_E) for t in (g, x)), counts_E)
    plain: Calls = [partial(F.grouped_mm, g.T, x, offs=ends_E)]
    return {"bf16": plain, **contestants("grouped wgrad", device, [operands], "takes_wgrad", "wgrad")}


Case = tuple[str, float, Callable[[torch.device], dict[str, Calls]]]  # name, operations, what to time


def cases(rows: Iterable[int] = ROWS, shapes: Iterable[tuple[int, int]] = SHAPES) -> list[Case]:
    """Every product with its number of operations."""
    found: list[Case] = []
    for inputs, outputs in shapes:
        for m in rows:
            work = 2.0 * m * inputs * outputs
            name = f"{inputs} x {outputs}, {m} rows"
            found.append((f"linear {name}", work, partial(linear_case, m, inputs, outputs)))
            if m >= 4096:
                found.append((f"wgrad {name}", work, partial(wgrad_case, m, inputs, outputs)))
    for experts, each in GROUPED:
        work = 2.0 * experts * each * EXPERT[0] * EXPERT[1]
        name = f"{EXPERT[0]} x {EXPERT[1]}, {experts} experts of {each} rows"
        found.append((f"linear {name}", work, partial(grouped_case, experts, each)))
        found.append((f"wgrad {name}", work, partial(grouped_wgrad_case, experts, each)))
    return found


def quantisers(device: torch.device) -> dict[str, tuple[int, Calls]]:
    """Bytes read and written, and calls, of each way to quantise; ``copy`` is what memory can do."""
    x = torch.randn(QUANTISED, device=device, dtype=torch.bfloat16)
    up, into = torch.randn_like(x), torch.empty_like(x)
    numbers = x.numel()
    found: dict[str, tuple[int, Calls]] = {"copy": (4 * numbers, [partial(into.copy_, x)])}
    for name, tile in (("1x128", ROW), ("128x1", COLUMN), ("128x128", BLOCK)):
        found[name] = (3 * numbers, [partial(backend.quantise, x, tile)])
    found["swiglu 1x128"] = (5 * numbers, [partial(backend.swiglu, x, up, ROW)])
    found["transpose"] = (2 * numbers, [partial(_transposed_afresh, backend.quantise(x, BLOCK))])
    return found


def _transposed_afresh(w: Quantised) -> Quantised:
    """The copy dgrad needs, which ``backend.transposed`` keeps: of a tensor it has not seen."""
    return backend.transposed(Quantised(w.values.view(w.values.shape), w.scales, w.shape, w.tile, w.kind))


def _timed(name: str, found: dict[str, Calls], rounds: int, timer: Timer) -> dict[str, float]:
    try:
        return {who: median(taken) for who, taken in timer(found, rounds).items()}
    except RuntimeError as error:
        raise Failure(f"{name} stopped: {str(error).splitlines()[0]}") from error


def bench(
    rounds: int = 9, found_cases: list[Case] | None = None, timer: Timer = graphs_in_turns, layer: bool = True
) -> dict[str, Any]:
    """TFLOP/s of every product, GB/s of the quantisers, and :func:`train_step`."""
    device = gpu()
    all_cases = cases() if found_cases is None else found_cases
    refused = {}
    for choice in backend.choices(device):
        refused[choice.operator] = choice.refused
        if OURS not in choice.order:
            why = choice.refused.get(OURS, f"{backend.VARIABLE} does not ask for them")
            raise Failure(f"our kernels cannot be measured, {choice.operator}: {why}")
    with Progress("bench fp8", len(all_cases) + 2, "cases") as progress:
        peak: dict[str, Calls] = {
            "bf16": [partial(torch.mm, *(torch.randn(2, PEAK, PEAK, device=device).bfloat16()))]
        }
        peak_flops = 2.0 * PEAK**3 / _timed("the BF16 peak", peak, rounds, timer)["bf16"]
        progress.advance(1)
        speeds: dict[str, dict[str, float]] = {}
        for name, work, make in all_cases:
            seconds = _timed(name, make(device), rounds, timer)
            speeds[name] = {who: work / taken / 1e12 for who, taken in seconds.items()}
            progress.note(", ".join(f"{who} {speed:.0f}" for who, speed in speeds[name].items()) + " TFLOP/s")
            progress.advance(1)
        moved = quantisers(device)
        seconds = _timed("a quantiser", {name: calls for name, (_, calls) in moved.items()}, rounds, timer)
        progress.advance(1)
    result = summary(speeds, peak_flops / 1e12)
    result["quantise_gb_per_second"] = {name: moved[name][0] / taken / 1e9 for name, taken in seconds.items()}
    result["refused"] = refused
    result["machine"] = machine("cuda")
    if layer:
        step = train_step()
        result["layer"] = step
        result["ratios"].update(step["ratios"])
    return result


def summary(speeds: dict[str, dict[str, float]], peak: float) -> dict[str, Any]:
    """Speeds by case and contestant, as the JSON has them."""
    ours = {case: each[OURS] for case, each in speeds.items()}
    peers: dict[str, dict[str, float]] = {}
    ratios = {}
    for case, each in speeds.items():
        for name, speed in each.items():
            if name != OURS:
                peers.setdefault(name, {})[case] = speed
                ratios[f"{name}:{case}"] = ours[case] / speed
    return {"ratios": ratios, "ours": ours, "peers": peers, "peak_bf16_tflops": peak, "unit": "TFLOP/s"}


def train_step(
    tokens: int = 4096,
    experts: int = 32,
    widths: dict[str, Any] | None = None,
    rounds: int = 5,
    device: torch.device | None = None,
    timer: Timer = calls_in_turns,
) -> dict[str, Any]:
    """A layer of the real widths, forward and backward: FP8 as the trainer applies it, beside BF16.

    ``widths`` are changes to the real model's configuration.
    """
    on = gpu() if device is None else device
    seconds = timer(
        {name: [_layer_step(name, tokens, experts, widths or {}, on)] for name in ("fp8", "bf16")}, rounds
    )
    speed = {name: tokens / median(taken) for name, taken in seconds.items()}
    return {
        "case": f"a layer, {experts} experts, {tokens} tokens, forward and backward",
        "ratios": {f"bf16:layer, {experts} experts, {tokens} tokens": speed["fp8"] / speed["bf16"]},
        "ours": {"tokens_per_second": speed["fp8"]},
        "peers": {"bf16": {"tokens_per_second": speed["bf16"]}},
        "machine": machine(on.type),
    }


def _layer_step(
    precision: str, tokens: int, experts: int, widths: dict[str, Any], device: torch.device
) -> Callable[[], None]:
    from dsv3.config.fp8 import FP8Section
    from dsv3.config.model import ModelConfig
    from dsv3.config.recipe import validate
    from dsv3.model import DeepSeekV3
    from dsv3.quant import fp8

    one_layer = dict(
        preset="v3-671b", vocab_size=128, num_hidden_layers=1, num_nextn_predict_layers=0,
        first_k_dense_replace=0, n_routed_experts=experts, aux_loss_alpha=0.0,
    )  # fmt: skip
    with device:
        model = DeepSeekV3(validate(ModelConfig, {**one_layer, **widths}))
    if precision == "fp8":
        fp8.apply(model, FP8Section())
    layer = model.main_layers[0]
    x = torch.randn(1, tokens, model.config.hidden_size, device=device).bfloat16().requires_grad_()
    grad = torch.randn_like(x)
    context = model.context(torch.arange(tokens, device=device))

    def step() -> None:
        out, _ = layer(x, context)
        torch.autograd.grad(out, [x, *layer.parameters()], grad, allow_unused=True)

    return step


def report(result: dict[str, Any]) -> str:
    """The result as a table."""
    names = ["bf16", *(name for name in result["peers"] if name != "bf16")]
    width = max(len(case) for case in result["ours"])
    lines = [f"{'TFLOP/s':<{width}}  {'ours':>6}  " + "  ".join(f"{name:>9}" for name in names)]
    for case, ours in result["ours"].items():
        cells = [result["peers"].get(name, {}).get(case) for name in names]
        text = "  ".join(f"{'-' if cell is None else f'{cell:.0f}':>9}" for cell in cells)
        lines.append(f"{case:<{width}}  {ours:>6.0f}  {text}")
    lines.append(f"BF16 at its best ({PEAK} cubed): {result['peak_bf16_tflops']:.0f}")
    moved = result.get("quantise_gb_per_second", {})
    lines += [f"quantise {name}: {speed:.0f} GB/s" for name, speed in moved.items()]
    if "layer" in result:
        step = result["layer"]
        speeds = step["ours"]["tokens_per_second"], step["peers"]["bf16"]["tokens_per_second"]
        lines.append(f"{step['case']}: {speeds[0]:.0f} tokens/s, BF16 {speeds[1]:.0f}")
    for operator, refusals in result.get("refused", {}).items():
        lines += [f"not measured, {operator} by {name}: {why}" for name, why in refusals.items()]
    return "\n".join(lines)
