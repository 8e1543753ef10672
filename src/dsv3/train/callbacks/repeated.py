"""What is measured now and then while training, and when it ends."""

from __future__ import annotations

from abc import abstractmethod

from dsv3.train.trainer import Callback, StepReport, Trainer


class Repeated(Callback):
    """A measurement every ``every`` steps and at the end of the run; with ``first`` before the first too.

    No step is measured twice, and a run that was only asked to stop is not measured: it goes on later.
    """

    def __init__(self, every: int, first: bool = False):
        self.every, self.first = every, first
        self.last_step = -1

    def measure(self, trainer: Trainer) -> None:
        """Measure now, unless this step already was."""
        if self.last_step != trainer.state.step:
            self.last_step = trainer.state.step
            self.read(trainer)

    @abstractmethod
    def read(self, trainer: Trainer) -> None:
        """The measurement."""

    def on_start(self, trainer: Trainer) -> None:
        """Where a new run begins."""
        if self.first and trainer.state.step == 0:
            self.measure(trainer)

    def on_step(self, trainer: Trainer, report: StepReport) -> None:
        """Now and then."""
        if trainer.state.step % self.every == 0:
            self.measure(trainer)

    def on_end(self, trainer: Trainer) -> None:
        """Once more at the end."""
        if trainer.finished:
            self.measure(trainer)
