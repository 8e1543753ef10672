"""The training loop. It knows steps, tokens and loss; everything else is a callback."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from dsv3.common.errors import Failure
from dsv3.config.train import PretrainRecipe
from dsv3.data.loader import TokenLoader
from dsv3.model import DeepSeekV3
from dsv3.train.balance import Balancer, max_violation
from dsv3.train.objective import Losses, Share, labels, pretrain_loss
from dsv3.train.optimizer import clip_gradients
from dsv3.train.schedules import Schedules


class TrainingFailed(Failure):
    """The run cannot go on (its last good checkpoint stays); the message says why and what to do."""


@dataclass
class Progressed:
    """How far a run has come: all a checkpoint must remember beside tensors."""

    step: int = 0
    tokens: int = 0
    samples: int = 0  # sequences taken from the loader
    skipped: int = 0  # steps left out for a non-finite loss or gradient, in all
    skipped_in_row: int = 0


@dataclass(frozen=True)
class StepReport:
    """One step, as callbacks see it. ``loads``: tokens an expert, by layer."""

    metrics: dict[str, Any]
    loads: dict[int, list[int]]
    seconds: float


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
    """Trains ``model`` by ``recipe`` until its tokens are used up, or a signal asks to stop."""

    recipe: PretrainRecipe
    model: DeepSeekV3
    loader: TokenLoader
    optimizer: torch.optim.Optimizer
    callbacks: Sequence[Callback] = ()
    state: Progressed = field(default_factory=Progressed)
    stopping: str | None = None  # name of the signal that asked to stop

    def __post_init__(self) -> None:
        self.schedules = Schedules(self.recipe)
        self.balancer = Balancer(self.model.moe_layers())
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.device = self.model.lm_head.weight.device

    @property
    def finished(self) -> bool:
        """Whether every token of the recipe has been seen."""
        return self.state.tokens >= self.recipe.total_tokens

    def train(self) -> None:
        """Run to the end. SIGTERM and SIGINT end the loop after the step in progress."""
        previous = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
        for number in previous:
            signal.signal(number, self._stop)
        try:
            self.model.train()
            for callback in self.callbacks:
                callback.on_start(self)
            while not self.finished and self.stopping is None:
                report = self.step()
                for callback in self.callbacks:
                    callback.on_step(self, report)
            for callback in self.callbacks:
                callback.on_end(self)
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self.stopping = signal.Signals(number).name
        signal.signal(number, signal.default_int_handler)  # asked twice: stop at once

    def step(self) -> StepReport:
        """One optimizer step: forward and backward of every micro batch, clip, update, balance."""
        started = time.perf_counter()
        state, recipe = self.state, self.recipe
        sequences = self.schedules.sequences(state.tokens)
        learning_rate = self.schedules.learning_rate(state.tokens)
        mtp_weight = self.schedules.mtp_weight(state.tokens)
        gamma = self.schedules.gamma(state.tokens)

        losses = self._accumulate(sequences, mtp_weight)
        norm = clip_gradients(self.parameters, recipe.optimizer.clip)
        main = sum(float(x.main) for x in losses)
        mtp = [sum(float(x.mtp[k]) for x in losses) for k in range(len(losses[0].mtp))]
        finite = math.isfinite(main) and math.isfinite(norm)
        for callback in self.callbacks:
            callback.before_update(self)
        if finite:
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate
            self.optimizer.step()
            self.balancer.update(gamma)
            state.skipped_in_row = 0
        else:
            state.skipped += 1
            state.skipped_in_row += 1
        self.optimizer.zero_grad(set_to_none=True)
        loads = self.balancer.take()
        state.step += 1
        state.samples += sequences
        state.tokens += sequences * recipe.sequence_length
        if state.skipped_in_row >= recipe.max_skipped:
            raise TrainingFailed(
                f"loss ({main}) or gradient norm ({norm}) was not finite for {state.skipped_in_row} steps in "
                f"a row, the last of them {state.step}: resume from the last checkpoint with a lower "
                "--optimizer.lr, or look at the data"
            )
        seconds = time.perf_counter() - started
        metrics = {
            "step": state.step,
            "tokens": state.tokens,
            "loss": main,
            "mtp_loss": mtp,
            "balance_loss": sum(float(x.balance) for x in losses),
            "grad_norm": norm,
            "lr": learning_rate,
            "mtp_weight": mtp_weight,
            "gamma": gamma,
            "batch_sequences": sequences,
            "tokens_per_second": sequences * recipe.sequence_length / seconds,
            "skipped": state.skipped,
            "max_violation": {layer: round(max_violation(load), 4) for layer, load in loads.items()},
        }
        return StepReport(metrics, loads, seconds)

    def _accumulate(self, sequences: int, mtp_weight: float) -> list[Losses]:
        """Gradients of the whole step's batch, one micro batch at a time."""
        micro, length = self.recipe.batch.micro_sequences, self.recipe.sequence_length
        batches = [
            self.loader.batch(self.state.samples + first, min(micro, sequences))
            for first in range(0, sequences, micro)
        ]
        depths = 1 + len(self.model.mtp_modules)
        counts = [
            sum(int((labels(b.tokens_BT, length, k, b.documents_BT) >= 0).sum()) for b in batches)
            for k in range(depths)
        ]
        share = Share(counts, sequences)
        losses = []
        for batch in batches:
            documents = None if batch.documents_BT is None else batch.documents_BT.to(self.device)
            loss, parts = pretrain_loss(
                self.model, batch.tokens_BT.to(self.device), documents, length, share, mtp_weight
            )
            loss.backward()
            self.balancer.add(parts.router)
            losses.append(parts)
        return losses
