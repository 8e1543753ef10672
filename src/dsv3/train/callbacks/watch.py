"""Things that should not pass unseen: loss spikes and steps that were left out."""

from __future__ import annotations

import math
from collections import deque
from statistics import mean, pstdev

from dsv3.train.run import RunFolder
from dsv3.train.trainer import Callback, StepReport, Trainer

WINDOW = 50  # steps a spike is compared with
SPIKE = 6.0  # standard deviations above their mean


class Watch(Callback):
    """Logs a spike of the loss (against the steps before), skipped steps, and answers that nobody judges."""

    def __init__(self, run: RunFolder):
        self.run = run
        self.recent: deque[float] = deque(maxlen=WINDOW)
        self.skipped = 0
        self.judged = True

    def on_start(self, trainer: Trainer) -> None:
        """Count from where the run stands."""
        self.skipped = trainer.state.skipped

    def on_step(self, trainer: Trainer, report: StepReport) -> None:
        """Compare this step's loss with the window before it."""
        loss, step = report.metrics["loss"], trainer.state.step
        if trainer.state.skipped > self.skipped:
            self.skipped = trainer.state.skipped
            norm = report.metrics["grad_norm"]
            self.run.log(f"step {step} skipped: loss {loss}, gradient norm {norm}; weights unchanged")
        if "reward" in report.metrics:  # not in later steps on the same rollouts
            judged = report.metrics["reward"] is not None
            if self.judged and not judged:
                self.run.log(
                    f"step {step}: no reward function gave any answer a number; nothing is learnt from it"
                )
            self.judged = judged
        if not math.isfinite(loss):
            return
        if len(self.recent) == WINDOW:
            middle, spread = mean(self.recent), max(pstdev(self.recent), 0.01)
            if loss > middle + SPIKE * spread:
                self.run.log(
                    f"step {step}: loss spike, {loss:.3f} after {middle:.3f} +- {spread:.3f} ({WINDOW} steps)"
                )
        self.recent.append(loss)
