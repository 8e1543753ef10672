"""Moving average of the weights, in CPU memory, updated beside the training (report 5, memory).

The update runs in a thread while the next forward and backward run; the optimizer waits for it before it
changes the weights again, so the average always sees the weights of one step.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from dsv3.model import DeepSeekV3
from dsv3.train.trainer import Callback, StepReport, Trainer

PREFIX = "ema/"


class EMA(Callback):
    """``average = decay * average + (1 - decay) * weights`` after every optimizer step."""

    def __init__(self, decay: float):
        self.decay = decay
        self.average: dict[str, Tensor] = {}
        self.pool = ThreadPoolExecutor(1, thread_name_prefix="ema")
        self.pending: Future[None] | None = None

    def on_start(self, trainer: Trainer) -> None:
        """Begin with the weights as they are, unless the run was resumed."""
        if not self.average:
            self.average = {n: p.detach().cpu().clone() for n, p in trainer.model.named_parameters()}

    def before_update(self, trainer: Trainer) -> None:
        """Wait: the weights are about to change."""
        self.wait()

    def wait(self) -> None:
        """Until the average holds the last step; raises what the thread raised."""
        if self.pending is not None:
            self.pending.result()
            self.pending = None

    def on_step(self, trainer: Trainer, report: StepReport) -> None:
        """Start the update."""
        weights = dict(trainer.model.named_parameters())
        self.pending = self.pool.submit(self._update, {n: p.detach() for n, p in weights.items()})

    @torch.no_grad()
    def _update(self, weights: dict[str, Tensor]) -> None:
        for name, weight in weights.items():
            self.average[name].lerp_(weight.to("cpu"), 1 - self.decay)

    def on_checkpoint(self, trainer: Trainer) -> dict[str, Tensor]:
        """The average, under ``ema/``."""
        self.wait()
        return {PREFIX + name: value for name, value in self.average.items()}

    def on_resume(self, trainer: Trainer, tensors: dict[str, Tensor]) -> None:
        """Take it up again."""
        kept = {name.removeprefix(PREFIX): t for name, t in tensors.items() if name.startswith(PREFIX)}
        self.average = {name: value.clone() for name, value in kept.items()}

    @torch.no_grad()
    def load_into(self, model: DeepSeekV3) -> None:
        """Put the average in place of the weights."""
        self.wait()
        for name, parameter in model.named_parameters():
            parameter.copy_(self.average[name])

    def on_end(self, trainer: Trainer) -> None:
        """Finish the last update."""
        self.wait()
        self.pool.shutdown()
