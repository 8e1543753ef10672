"""Metrics of every step: ``metrics.jsonl``, the progress bar, and trackers if asked for."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import psutil
import torch

from dsv3.common.errors import UserError
from dsv3.common.progress import Progress
from dsv3.plan.params import describe, train_flops_per_token
from dsv3.train.run import RunFolder
from dsv3.train.trainer import Callback, StepReport, Trainer

# Dense BF16 peaks of the data sheets, FLOP/s, for MFU. A device that is not listed gets no MFU.
PEAK_FLOPS = {
    "H200": 989e12, "H100": 989e12, "H800": 989e12, "GH200": 989e12, "B200": 2250e12, "A100": 312e12,
    "A800": 312e12, "L40S": 362e12, "RTX 4090": 165e12,
}  # fmt: skip


def device_peak(device: torch.device) -> float | None:
    """Peak BF16 FLOP/s of a device, None where unknown."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for key, peak in PEAK_FLOPS.items() if key in name), None)


def memory_bytes(device: torch.device) -> int:
    """Memory held: the device's peak allocation, or this process's resident set on a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return int(psutil.Process().memory_info().rss)


Tracker = Callable[[dict[str, Any], int], None]


def open_tracker(name: str, run: RunFolder) -> Tracker | None:
    """TensorBoard, wandb or trackio as a function of (numbers, step); None for ``none``.

    None for ``mlperf`` too, which wants more than numbers (:mod:`dsv3.train.callbacks.mlperf`).
    """
    if name in ("none", "mlperf"):
        return None
    module = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb", "trackio": "trackio"}[name]
    try:
        library = importlib.import_module(module)
    except ImportError:
        raise UserError(f"log.report_to ({name}) is not installed: pip install 'dsv3[track]'") from None
    if name == "tensorboard":
        writer = library.SummaryWriter(str(run.path / "tensorboard"))

        def send(numbers: dict[str, Any], step: int) -> None:
            for key, value in numbers.items():
                writer.add_scalar(key, value, step)

        return send
    library.init(project="dsv3", name=run.path.name)
    return lambda numbers, step: library.log(numbers, step=step)


class Metrics(Callback):
    """Writes what every step measured and moves the bar."""

    def __init__(self, run: RunFolder):
        self.run = run
        self.reward = ""  # the last, which steps on the same rollouts do not tell again

    def on_start(self, trainer: Trainer) -> None:
        """Say what is trained, and open the bar (and the tracker) where the run stands."""
        recipe, device = trainer.recipe, trainer.device
        self.run.log(f"{describe(recipe.model)}; {recipe.precision} on {device.type}")
        self.flops = train_flops_per_token(recipe.model, recipe.sequence_length)
        self.peak = device_peak(device)
        self.tracker = open_tracker(recipe.log.report_to, self.run)
        extent = trainer.objective.extent
        unit = "tok" if extent.unit == "tokens" else "sequences"
        seen = min(trainer.seen, extent.total)  # the last step may go past the end
        self.run.progress = Progress(recipe.stage, extent.total, unit, done=seen)

    def on_step(self, trainer: Trainer, report: StepReport) -> None:
        """One record, one move of the bar."""
        record = {**report.metrics, "memory_bytes": memory_bytes(trainer.device)}
        if self.peak:
            record["mfu"] = record["tokens_per_second"] * self.flops / self.peak
        if trainer.state.step % trainer.recipe.log.every == 0:
            self.run.metric({**record, "expert_load": report.loads})
            if self.tracker:
                numbers = {key: value for key, value in record.items() if isinstance(value, (int, float))}
                worst = max(record["max_violation"].values(), default=0.0)
                self.tracker({**numbers, "max_violation_worst": worst}, trainer.state.step)
        if self.run.progress is not None:
            if record.get("reward") is not None:  # a policy's loss is near 0 whatever it learns
                self.reward = f"  reward {record['reward']:.3f}"
            self.run.progress.note(f"loss {record['loss']:.3f}{self.reward}  lr {record['lr']:.1e}")
            seen = min(trainer.seen, trainer.objective.extent.total)
            self.run.progress.advance(max(0, seen - self.run.progress.done))

    def on_end(self, trainer: Trainer) -> None:
        """Close the bar."""
        if self.run.progress is not None:
            self.run.progress.__exit__(None, None, None)
            self.run.progress = None
