"""Answers sampled by the serving engine from the very parameters in training: no copy, no file.

The engine computes with the model's own modules, so an optimizer step changes what it serves. Only what it
derived from the weights before has to go: cached latents and compiled layers (:meth:`Engine.forget`).
"""

from __future__ import annotations

import base64
from collections.abc import Sequence as Many
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from dsv3.common.errors import Failure
from dsv3.data.permutation import combine
from dsv3.data.tokenizer import Tokenizer
from dsv3.model import DeepSeekV3
from dsv3.serve.engine import Engine
from dsv3.serve.options import Options
from dsv3.serve.params import SamplingParams
from dsv3.train.grpo.routing import Recorder


@dataclass(frozen=True)
class Answer:
    """One answer: its ``tokens`` with the one that ended it, and their log-probabilities at temperature 1.

    ``whole``: it ended by itself, not at ``max_tokens``. ``routes``: int16 ``[T - 1, L, K]`` over prompt and
    answer, if they were recorded.
    """

    tokens: list[int]
    logprobs: list[float]
    text: str
    whole: bool
    routes: Tensor | None

    def plain(self) -> dict[str, Any]:
        """As JSON holds it."""
        found = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        if self.routes is not None:
            packed = base64.b64encode(self.routes.cpu().numpy().tobytes()).decode()
            found["routes"] = [packed, list(self.routes.shape)]
        return found

    @classmethod
    def of_plain(cls, found: dict[str, Any]) -> Answer:
        """What :meth:`plain` gave."""
        if found["routes"] is not None:
            packed, shape = found["routes"]
            numbers = torch.frombuffer(bytearray(base64.b64decode(packed)), dtype=torch.int16)
            found = {**found, "routes": numbers.view(shape)}
        return cls(**found)


class Rollouts:
    """An engine over a model in training. ``length``: tokens of prompt and answer at most."""

    def __init__(
        self,
        model: DeepSeekV3,
        tokenizer: Tokenizer,
        length: int,
        max_batch: int,
        draft_tokens: int = 0,
        record: bool = False,
    ):
        self.model = model
        options = Options(
            draft_tokens=draft_tokens,
            max_batch=max_batch,
            max_batch_tokens=max(512, max_batch * (1 + draft_tokens)),
            max_length=length,
            cache_tokens=max_batch * (length + 2 * draft_tokens),
        )
        self.engine = Engine(model, tokenizer, options)
        self.recorder = Recorder(self.engine) if record else None
        self.drafted = self.accepted = 0

    def generate(
        self, prompts: Many[list[int]], params: SamplingParams, serials: Many[int], seed: int
    ) -> list[list[Answer]]:
        """``params.n`` answers to each prompt, from the weights as they are now.

        What is drawn depends on ``seed`` and the prompt's ``serial`` alone. Raises :class:`Failure` when the
        model's logits are not finite.
        """
        engine = self.engine
        engine.forget()
        training = self.model.training
        self.model.eval()
        self.drafted = self.accepted = 0
        running = {}
        try:
            for number, (prompt, serial) in enumerate(zip(prompts, serials)):
                own = int(combine(seed, serial)[0]) >> 2
                request = engine.add_request(prompt, replace(params, seed=own), f"rollout-{number}")
                running[request] = engine.requests[request]
            while engine.busy:
                engine.step()
        finally:
            for request in running:
                engine.abort(request)
            self.model.train(training)
        found = []
        for request, sequences in running.items():
            if any(sequence.finish_reason == "error" for sequence in sequences):
                raise Failure(
                    "the policy's logits are not finite: resume from an earlier checkpoint with a lower"
                    " --optimizer.lr"
                )
            self.drafted += sum(sequence.drafted for sequence in sequences)
            self.accepted += sum(sequence.accepted for sequence in sequences)
            found.append(
                [
                    Answer(
                        sequence.answer,
                        [token.logprob for token in sequence.logprobs],
                        sequence.text.text,
                        sequence.finish_reason == "stop",
                        self.recorder.take(request, sequence.index) if self.recorder else None,
                    )
                    for sequence in sequences
                ]
            )
        return found


def pad(rows: Many[Many[float]], dtype: torch.dtype) -> Tensor:
    """Rows of different lengths as one tensor, zeros behind."""
    found = torch.zeros(len(rows), max(map(len, rows)), dtype=dtype)
    for number, row in enumerate(rows):
        found[number, : len(row)] = torch.tensor(row, dtype=dtype)
    return found
