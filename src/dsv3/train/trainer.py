"""The training loop. It knows steps, tokens and loss.

What is minimised, and on which data, is the objective's; everything else that happens is a callback's.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, Protocol

import torch
from torch import Tensor

from dsv3.common.errors import Failure
from dsv3.config.train import TrainRecipe
from dsv3.model import DeepSeekV3
from dsv3.parallel.pipeline import Pipeline
from dsv3.parallel.weights import Weights
from dsv3.parallel.world import World
from dsv3.train.balance import Balancer, max_violation
from dsv3.train.optimizer import clip_gradients
from dsv3.train.schedules import Extent, Schedules


class TrainingFailed(Failure):
    """The run cannot go on (its last good checkpoint stays); the message says why and what to do."""


@dataclass
class Progressed:
    """How far a run has come: all a checkpoint must remember beside tensors."""

    step: int = 0
    tokens: int = 0
    samples: int = 0  # sequences
    skipped: int = 0  # steps left out for a non-finite loss or gradient, in all
    skipped_in_row: int = 0
    reached: bool = False  # validation.target, which ends the run


@dataclass(frozen=True)
class StepReport:
    """One step, as callbacks see it. ``loads``: tokens an expert, by layer."""

    metrics: dict[str, Any]
    loads: dict[int, list[int]]
    seconds: float


@dataclass(frozen=True)
class Accumulated:
    """What the passes of one step came to: loss, tokens seen, and the objective's own ``metrics``."""

    loss: float
    tokens: int
    metrics: dict[str, Any]


class Objective(Protocol):
    """What a stage minimises. One that keeps something from step to step is a :class:`Callback` too."""

    extent: Extent

    def accumulate(self, trainer: Trainer, sequences: int) -> Accumulated:
        """Forward and backward of a whole step's ``sequences``: gradients stay in the parameters.

        The sequences follow the ``trainer.state.samples`` taken before; routing statistics of every forward
        go to ``trainer.balancer.add``.
        """


class Callback:
    """Something that happens beside training. Every hook does nothing unless a callback overrides it."""

    def on_start(self, trainer: Trainer) -> None:
        """Once, before the first step of this process."""

    def before_update(self, trainer: Trainer) -> None:
        """The gradients are ready; the weights are about to change."""

    def on_step(self, trainer: Trainer, report: StepReport) -> None:
        """After each step."""

    def on_checkpoint(self, trainer: Trainer) -> dict[str, Tensor]:
        """Tensors to store in a checkpoint, under names of the callback's own."""
        return {}

    def on_resume(self, trainer: Trainer, tensors: dict[str, Tensor]) -> None:
        """What the checkpoint stored, all callbacks' and the optimizer's."""

    def on_end(self, trainer: Trainer) -> None:
        """Once, after the last step (also after a stop by signal)."""


@dataclass
class Trainer:
    """Trains ``model`` by ``recipe`` to the end of the objective's extent, or until a signal asks to stop."""

    recipe: TrainRecipe
    model: DeepSeekV3
    objective: Objective
    optimizer: torch.optim.Optimizer
    callbacks: Sequence[Callback] = ()
    world: World = field(default_factory=World)
    weights: Weights = None  # type: ignore[assignment]  # the whole model's, unless a layout cuts them
    pipeline: Pipeline | None = None
    state: Progressed = field(default_factory=Progressed)
    stopping: str | None = None  # name of the signal that asked to stop

    def __post_init__(self) -> None:
        self.weights = self.weights or Weights(self.model)
        self.schedules = Schedules(self.recipe, self.objective.extent)
        self.balancer = Balancer(self.model.moe_layers(), self.world)
        self.device = self.weights.parameters()[0].device

    @property
    def seen(self) -> int:
        """How much of the objective's extent is done: what schedules are functions of."""
        return int(getattr(self.state, self.objective.extent.unit))

    @property
    def finished(self) -> bool:
        """Whether the run has seen all it is to see, or has reached its target."""
        return self.state.reached or self.seen >= self.objective.extent.total

    def train(self) -> None:
        """Run to the end. SIGTERM and SIGINT end the loop after the step in progress."""
        previous = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
        for number in previous:
            signal.signal(number, self._stop)
        try:
            self.model.train()
            for callback in self.callbacks:
                callback.on_start(self)
            while not self.finished and not self._asked_to_stop():
                report = self.step()
                for callback in self.callbacks:
                    callback.on_step(self, report)
            for callback in self.callbacks:
                callback.on_end(self)
        except RuntimeError as error:
            if not self.world.lost(error):
                raise
            raise self.world.blame(error, f"after step {self.state.step}") from error
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _asked_to_stop(self) -> bool:
        """Whether any rank was: all stop after the same step."""
        asked = any(row[0] for row in self.world.gather([self.stopping is not None]))
        if asked and self.stopping is None:
            self.stopping = "a signal to another rank"
        return asked

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self.stopping = signal.Signals(number).name
        signal.signal(number, signal.default_int_handler)  # asked twice: stop at once

    def step(self) -> StepReport:
        """One optimizer step: forward and backward of every micro batch, clip, update, balance."""
        started = time.perf_counter()
        state, seen = self.state, self.seen
        sequences = self.schedules.sequences(seen)
        learning_rate, gamma = self.schedules.learning_rate(seen), self.schedules.gamma(seen)

        done = self.objective.accumulate(self, sequences)
        with self.world.clock.waiting("in the sum of gradients"):
            self.weights.collect()
        norm = clip_gradients(self.weights, self.recipe.optimizer.clip, self.world)
        self.balancer.gather()
        finite = math.isfinite(done.loss) and math.isfinite(norm)
        for callback in self.callbacks:
            callback.before_update(self)
        if finite:
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate
            self.optimizer.step()
            with self.world.clock.waiting("in the gathering of weights"):
                self.weights.publish()
            self.balancer.update(gamma)
            state.skipped_in_row = 0
        else:
            state.skipped += 1
            state.skipped_in_row += 1
        self.weights.clear()
        loads = self.balancer.take()
        state.step += 1
        state.samples += sequences
        state.tokens += done.tokens
        if state.skipped_in_row >= self.recipe.max_skipped:
            raise TrainingFailed(
                f"loss ({done.loss}) or gradient norm ({norm}) was not finite for {state.skipped_in_row} "
                f"steps in a row, the last of them {state.step}: resume from its last checkpoint with a "
                "lower --optimizer.lr, or look at the data"
            )
        seconds = time.perf_counter() - started
        metrics = {
            "step": state.step,
            "tokens": state.tokens,
            "loss": done.loss,
            **done.metrics,
            "grad_norm": norm,
            "lr": learning_rate,
            "gamma": gamma,
            "batch_sequences": sequences,
            "tokens_per_second": done.tokens / seconds,
            "skipped": state.skipped,
            "max_violation": {layer: round(max_violation(load), 4) for layer, load in loads.items()},
        }
        return StepReport(metrics, loads, seconds)
