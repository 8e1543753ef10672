"""What a training run takes: time a token by terms, then hours, money and energy (report 1, 3, 4.2 and 4.3).

One number is fitted: ``efficiency``, the share of a GPU's peak that its products reach, the same for FP8 and
BF16, forward and backward, with everything that has no term of its own in it (memory-bound steps, quantising,
the optimizer, imbalance, restarts). It is solved for so that the report's pre-training takes 180K H800 hours
a trillion tokens, and used everywhere else as it is. The other terms are assumptions with a source
(:class:`Assumptions`), never adjusted to a measured run.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cache
from math import gcd
from typing import Any

from dsv3.common.errors import UserError
from dsv3.config.model import ModelConfig
from dsv3.plan import alltoall
from dsv3.plan.hardware import Hardware, hardware
from dsv3.plan.params import train_flops_by_part
from dsv3.plan.pipeline import Times, simulate
from dsv3.plan.schedules import schedule

FP8_PARTS = ("attention", "dense MLP", "routed experts", "shared experts")  # report 3.3.1: every Linear
BF16 = 2  # bytes a value


@dataclass(frozen=True)
class Assumptions:
    """What the model takes for granted, beside the fitted efficiency.

    ``sm_share``: of the GPU's multiprocessors, those that move tokens while others compute (20 of 132, report
    3.2.2), where all-to-all is overlapped. ``times``: F : B : W of a micro-batch. ``scores_again``: the
    backward of attention computes the scores a second time (FlashAttention). ``up_projections_again``: MLA's
    up-projections are recomputed (report 3.2.3). ``fp8``: with precision fp8, Linears run at the FP8 peak.
    ``link_share``: of a link's rate that all-to-all reaches.
    """

    sm_share: float = 20 / 132
    times: Times = field(default_factory=Times)
    scores_again: bool = True
    up_projections_again: bool = True
    link_share: float = alltoall.LINK_SHARE
    fp8: bool = True
    bubble: bool = True
    all_to_all: bool = True


@dataclass(frozen=True)
class Layout:
    """How a model lies on GPUs. ``virtual``: stages a rank, for interleaved.

    With ``overlap`` all-to-all runs beside the products of another micro-batch, as in DualPipe; else it adds
    to them.
    """

    gpus: int
    pipeline: int = 1
    schedule: str = "1f1b"
    virtual: int = 2
    expert: int = 1
    tensor: int = 1
    fp8_dispatch: bool = True

    @property
    def overlap(self) -> bool:
        """Whether the schedule overlaps forward and backward."""
        return self.schedule.startswith("dualpipe")


@dataclass(frozen=True)
class Run:
    """A training run: ``batch`` sequences a step, one sequence a micro-batch."""

    config: ModelConfig
    layout: Layout
    machine: Hardware
    seq_len: int = 4096
    batch: int = 15360
    precision: str = "fp8"
    mtp: bool = True


@dataclass(frozen=True)
class Estimate:
    """Seconds a token takes of one GPU, by term; ``exposed``: all-to-all that nothing hides."""

    fp8: float
    bf16: float
    again: float
    multiprocessors: float
    exposed: float
    tensor: float
    bubble: float
    hidden: float
    flops: int

    @property
    def seconds(self) -> float:
        """GPU-seconds a token."""
        parts = (self.fp8, self.bf16, self.again, self.multiprocessors, self.exposed, self.tensor)
        return sum(parts) + self.bubble

    @property
    def tokens_s(self) -> float:
        """Tokens a second and GPU."""
        return 1 / self.seconds

    def hours(self, tokens: float) -> float:
        """GPU hours for ``tokens``."""
        return self.seconds * tokens / 3600


def check(run: Run) -> int:
    """Micro-batches a pipeline rank sees in a step. Raises :class:`UserError` for a layout that cannot be."""
    layout = run.layout
    for name in ("gpus", "pipeline", "virtual", "expert", "tensor"):
        if getattr(layout, name) < 1:
            raise UserError(f"{name} ({getattr(layout, name)}) must be at least 1")
    if run.precision not in ("bf16", "fp8"):
        raise UserError(f"precision ({run.precision}) must be bf16 or fp8")
    if run.batch < 1:
        raise UserError(f"batch ({run.batch}) must be at least 1 sequence")
    cell = layout.pipeline * layout.tensor
    if layout.gpus % cell:
        raise UserError(
            f"gpus ({layout.gpus}) must be a multiple of pipeline x tensor ({cell}); "
            f"try --gpus {-(-layout.gpus // cell) * cell}, or --pipeline 1"
        )
    stage, experts = layout.gpus // layout.pipeline, run.config.n_routed_experts
    if stage % layout.expert or experts % layout.expert:
        raise UserError(
            f"expert ({layout.expert}) must divide gpus / pipeline ({stage}) and n_routed_experts "
            f"({experts}); try --expert {gcd(stage, experts)}"
        )
    ranks = layout.gpus // cell
    if run.batch % ranks:
        raise UserError(
            f"batch ({run.batch} sequences) must be a multiple of the data-parallel ranks ({ranks}); "
            f"try --batch {-(-run.batch // ranks) * ranks}"
        )
    return run.batch // ranks


@cache
def _pipeline(name: str, ranks: int, micro_batches: int, virtual: int, times: Times) -> tuple[float, float]:
    """Bubble as a share of the work, and the share of the work that runs in overlapped pairs."""
    if ranks == 1:
        return 0.0, 0.0
    ran = simulate(schedule(name, ranks, micro_batches, virtual), times)
    pairs = sum(len(action) == 2 for order in ran.schedule.orders for action in order)
    every = ranks * micro_batches * ran.schedule.stages_per_rank
    return sum(ran.bubbles) / sum(ran.busy), pairs / every


@cache
def _flops(config: str, seq_len: int, mtp: bool) -> dict[str, int]:
    return train_flops_by_part(ModelConfig.model_validate_json(config), seq_len, mtp)


def flops_by_part(run: Run) -> dict[str, int]:
    """FLOPs a token, as :func:`train_flops_by_part` counts them."""
    return dict(_flops(run.config.model_dump_json(), run.seq_len, run.mtp))


def is_fp8(part: str) -> bool:
    """Whether a part's products run in FP8 with precision fp8 (report 3.3.1)."""
    return part.removeprefix("MTP ") in FP8_PARTS


def again_by_part(run: Run, assumed: Assumptions) -> dict[str, float]:
    """FLOPs a token computed twice to save memory: the scores, and MLA's up-projections."""
    config, found = run.config, flops_by_part(run)
    widths = config.qk_head_dim + config.v_head_dim
    scores = found["attention scores"] + found.get("MTP attention scores", 0)
    heads, latent = config.num_attention_heads, config.kv_lora_rank
    up = latent * heads * (config.qk_nope_head_dim + config.v_head_dim)
    up += (config.q_lora_rank or 0) * heads * config.qk_head_dim
    layers = config.num_hidden_layers + (config.num_nextn_predict_layers if run.mtp else 0)
    return {
        "attention scores": assumed.scores_again * scores * config.qk_head_dim / (3 * widths),
        "attention": assumed.up_projections_again * 2.0 * up * layers,
    }


def estimate(run: Run, efficiency: float, assumed: Assumptions | None = None) -> Estimate:
    """Time a token and GPU, term by term."""
    assumed = assumed or Assumptions()
    micro_batches = check(run)
    config, layout, machine = run.config, run.layout, run.machine
    assert machine.bf16 and machine.fp8  # hardware() refuses machines without
    low = run.precision == "fp8" and assumed.fp8
    speed = {True: (machine.fp8 if low else machine.bf16) * efficiency, False: machine.bf16 * efficiency}
    found = flops_by_part(run)
    taken = {low_part: 0.0 for low_part in (True, False)}
    for part, flops in found.items():
        taken[is_fp8(part)] += flops / speed[is_fp8(part)]
    again = sum(flops / speed[is_fp8(part)] for part, flops in again_by_part(run, assumed).items())
    products = taken[True] + taken[False] + again

    bubble, paired = _pipeline(layout.schedule, layout.pipeline, micro_batches, layout.virtual, assumed.times)
    way = alltoall.route(config, layout.expert, machine, link_share=assumed.link_share)
    layers = alltoall.moe_layers(config, run.mtp)
    moved = 2 * alltoall.seconds(config, layers, way, layout.fp8_dispatch)  # forward and backward
    overlapped = layout.overlap and layout.expert > 1
    # What runs in pairs hides the all-to-all, as far as its products last.
    hidden = min(moved, products) * paired if overlapped else 0.0
    occupied = assumed.sm_share if overlapped else 0.0
    # Tensor parallel with sequence parallel: gather and scatter around attention, thrice more backward.
    exchanged = 5 * config.num_hidden_layers * config.hidden_size * BF16 * (layout.tensor - 1)
    tensor = exchanged / (machine.nvlink * assumed.link_share) if layout.tensor > 1 else 0.0
    exposed = (moved - hidden) * assumed.all_to_all
    multiprocessors = products * occupied / (1 - occupied)
    working = products + multiprocessors + exposed + tensor
    return Estimate(
        fp8=taken[True] if low else 0.0,
        bf16=taken[False] if low else taken[True] + taken[False],
        again=again,
        multiprocessors=multiprocessors,
        exposed=exposed,
        tensor=tensor,
        bubble=working * bubble * assumed.bubble,
        hidden=hidden,
        flops=sum(found.values()),
    )


# The report's run.
REPORT_LAYOUT = Layout(gpus=2048, pipeline=16, schedule="dualpipe", expert=64)
REPORT_HOURS_A_TRILLION = 180_000.0
EXTENSION = ((1000 * 1920, 32768), (1000 * 480, 131072))  # (sequences, their length), report 4.3
# The report gives no count of tokens. 1.5M instances, 2 epochs (5.1), and 7,750 tokens each, chosen so that
# the 5K hours come out: the one figure here that predicts nothing.
POST_TRAINING = (2 * 1_500_000, 7750)


def report_run(seq_len: int = 4096) -> Run:
    """Pre-training of DeepSeek-V3 on its 2,048 H800, at another length of sequence if given."""
    return Run(ModelConfig.preset("v3-671b"), REPORT_LAYOUT, hardware("h800"), seq_len=seq_len)


def calibrate(assumed: Assumptions | None = None) -> float:
    """The efficiency with which the report's pre-training takes 180K H800 hours a trillion tokens.

    Raises :class:`UserError` if the assumptions leave no time for products.
    """
    wanted = REPORT_HOURS_A_TRILLION * 3600 / 1e12
    # All-to-all is hidden only as far as products last, so the time is not quite linear in 1 / efficiency.
    low, high = 1e-3, 1.0
    if estimate(report_run(), high, assumed).seconds > wanted:
        raise UserError("these assumptions leave the report's run no time for its products")
    for _ in range(60):
        middle = (low + high) / 2
        if estimate(report_run(), middle, assumed).seconds > wanted:
            low = middle
        else:
            high = middle
    return high


def report_table(efficiency: float, assumed: Assumptions | None = None) -> list[dict[str, Any]]:
    """The report's own figures beside the model's; ``kind`` says what each proves."""

    def hours(sequences: int, length: int) -> float:
        return estimate(report_run(length), efficiency, assumed).hours(float(sequences) * length)

    a_trillion = estimate(report_run(), efficiency, assumed).hours(1e12)
    pretraining = 14.8 * a_trillion
    extension = sum(hours(*phase) for phase in EXTENSION)
    post = hours(*POST_TRAINING)
    total = pretraining + extension + post
    rows = (
        ("H800 hours a trillion tokens", a_trillion, 180_000, "fitted"),
        ("days a trillion tokens, 2,048 H800", a_trillion / 2048 / 24, 3.7, "follows"),
        ("pre-training, H800 hours", pretraining, 2_664_000, "follows"),
        ("context extension, H800 hours", extension, 119_000, "predicted"),
        ("post-training, H800 hours", post, 5_000, "tokens assumed"),
        ("all, H800 hours", total, 2_788_000, "follows"),
        ("all, USD at $2 an hour", 2 * total, 5_576_000, "follows"),
    )
    return [
        {"figure": name, "model": ours, "published": theirs, "error": ours / theirs - 1, "kind": kind}
        for name, ours, theirs, kind in rows
    ]


@dataclass(frozen=True)
class Published:
    """A measured run of others: a row of Megatron-Bridge's performance summary."""

    name: str
    run: Run
    tokens_s: float


def held_out() -> list[Published]:
    """DeepSeek-V3 in NVIDIA's Megatron-Bridge (docs/performance-summary.md), never used to fit anything.

    Assumed of all of them: dispatch in BF16, all-to-all not overlapped, MTP as the page says.
    """
    config = ModelConfig.preset("v3-671b")

    def row(
        name: str, gpus: int, tokens_s: float, precision: str, batch: int, mtp: bool, *shape: int
    ) -> Published:
        tensor, pipeline, virtual, expert = shape
        name_of = "interleaved" if virtual > 1 else "1f1b"
        layout = Layout(gpus, pipeline, name_of, virtual, expert, tensor, fp8_dispatch=False)
        run = Run(config, layout, hardware(name.split(",")[0]), 4096, batch, precision, mtp)
        return Published(f"{gpus} {name}", run, tokens_s)

    return [
        row("h100, FP8 (25.09)", 1024, 1297, "fp8", 8192, True, 2, 8, 4, 64),
        row("b200, FP8 (25.11)", 256, 2139, "fp8", 2048, True, 1, 16, 1, 8),
        row("b200, FP8 (26.02)", 256, 2689, "fp8", 4096, True, 1, 16, 1, 8),
        row("gb200, BF16 (25.11)", 256, 3139, "bf16", 4096, False, 1, 4, 4, 64),
        row("gb200, FP8 (25.11)", 256, 4018, "fp8", 4096, False, 1, 8, 4, 32),
        row("gb200, FP8 (26.02)", 256, 3955, "fp8", 4096, True, 1, 4, 4, 64),
    ]


def sensitivity(efficiency: float) -> list[dict[str, Any]]:
    """Each assumption changed alone: hours a trillion tokens, and the H100 row's error after fitting anew."""
    plain, first = Assumptions(), held_out()[0]
    base = estimate(report_run(), efficiency, plain).hours(1e12)
    rows: list[dict[str, Any]] = []

    def add(name: str, factor: float, assumed: Assumptions, run: Run | None = None) -> None:
        hours = estimate(run or report_run(), efficiency * factor, assumed).hours(1e12)
        anew = calibrate(assumed)
        extension = report_table(anew, assumed)[3]["error"]
        error = estimate(first.run, anew, assumed).tokens_s / first.tokens_s - 1
        rows.append(
            {
                "assumption": name, "gpu_hours_per_trillion_tokens": hours, "change": hours / base - 1,
                "extension_error_refitted": extension, "h100_error_refitted": error,
            }
        )  # fmt: skip

    add("as assumed", 1.0, plain)
    add("efficiency 10% lower", 0.9, plain)
    add("no FP8: products in BF16", 1.0, replace(plain, fp8=False))
    add("no multiprocessors for communication", 1.0, replace(plain, sm_share=0.0))
    add("all-to-all costs nothing", 1.0, replace(plain, all_to_all=False))
    add("links at 70% of their rate, not 90%", 1.0, replace(plain, link_share=0.7))
    add("no bubble", 1.0, replace(plain, bubble=False))
    add("F : B : W = 1 : 2.2 : 1", 1.0, replace(plain, times=Times(1.0, 2.2, 1.0)))
    add("scores not computed again", 1.0, replace(plain, scores_again=False))
    add("up-projections not computed again", 1.0, replace(plain, up_projections_again=False))
    wide = replace(REPORT_LAYOUT, fp8_dispatch=False)
    add("dispatch in BF16", 1.0, plain, replace(report_run(), layout=wide))
    return rows


def held_out_table(efficiency: float) -> list[dict[str, Any]]:
    """:func:`held_out` beside the model, tokens a second and GPU."""
    rows: list[dict[str, Any]] = []
    for each in held_out():
        ours = estimate(each.run, efficiency).tokens_s
        rows.append(
            {
                "run": each.name, "model_tokens_per_s_gpu": ours, "published_tokens_per_s_gpu": each.tokens_s,
                "error": ours / each.tokens_s - 1,
            }
        )  # fmt: skip
    return rows


NAMES = {"attention": "MLA projections", "gate": "router"}  # parts as the report's readers call them


def summary(run: Run, tokens: float, efficiency: float, usd_hour: float) -> dict[str, Any]:
    """Plain data of a run's estimate; keys name their units. Times are of one GPU a token, by term."""
    found = estimate(run, efficiency)
    parts: dict[str, int] = {}
    for part, flops in flops_by_part(run).items():
        name = "MTP" if part.startswith("MTP ") else NAMES.get(part, part)
        parts[name] = parts.get(name, 0) + flops
    low = sum(flops for part, flops in flops_by_part(run).items() if is_fp8(part))
    hours, gpus = found.hours(tokens), run.layout.gpus
    assert run.machine.bf16
    times = {
        "products in FP8": found.fp8,
        "products in BF16": found.bf16,
        "computed again": found.again,
        "multiprocessors that move tokens": found.multiprocessors,
        "all-to-all not hidden": found.exposed,
        "tensor parallel": found.tensor,
        "pipeline bubble": found.bubble,
    }
    return {
        "hardware": run.machine.name,
        "gpus": gpus,
        "tokens": tokens,
        "efficiency": efficiency,
        "train_flops_per_token_by_part": parts,
        "train_flops_per_token": found.flops,
        "fp8_flops_share": low / found.flops if run.precision == "fp8" else 0.0,
        "time_us_per_token_gpu": {term: 1e6 * value for term, value in times.items()},
        "all_to_all_hidden_us_per_token_gpu": 1e6 * found.hidden,
        "mfu_of_bf16_peak": found.flops / found.seconds / run.machine.bf16,
        "tokens_per_s_gpu": found.tokens_s,
        "tokens_per_s": found.tokens_s * gpus,
        "gpu_hours_per_trillion_tokens": found.hours(1e12),
        "gpu_hours": hours,
        "days": hours / gpus / 24,
        "cost_usd": hours * usd_hour,
        "energy_mwh": hours * run.machine.node_watts / 1e6,
    }
