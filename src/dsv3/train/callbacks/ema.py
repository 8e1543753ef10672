"""Moving average of the weights, in CPU memory, updated beside the training (report 5, memory).

The update runs in a thread while the next forward and backward run; the optimizer waits for it before it
changes the weights again, so the average always sees the weights of one step.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from dsv3.parallel.weights import Weights
from dsv3.train.trainer import Callback, StepReport, Trainer

PREFIX = "ema/"


class EMA(Callback):
    """``average = decay * average + (1 - decay) * weights`` after every optimizer step.

    Of what this rank updates: the average is cut as the optimizer's state is.
    """

    def __init__(self, decay: float):
        self.decay = decay
        self.average: dict[str, Tensor] = {}
        self.pool = ThreadPoolExecutor(1, thread_name_prefix="ema")
        self.pending: Future[None] | None = None

    def on_start(self, trainer: Trainer) -> None:
        """Begin with the weights as they are, unless the run was resumed."""
        if not self.average:
            self.average = {n: p.detach().cpu().clone() for n, p in trainer.weights.named_parameters()}

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
        weights = {name: p.detach() for name, p in trainer.weights.named_parameters()}
        self.pending = self.pool.submit(self._update, weights)

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
    def load_into(self, weights: Weights) -> None:
        """Put the average in place of the weights."""
        self.wait()
        for name, parameter in weights.named_parameters():
            parameter.copy_(self.average[name])
        weights.publish()

    def on_end(self, trainer: Trainer) -> None:
        """Finish the last update."""
        self.wait()
        self.pool.shutdown()
