"""``dsv3.LLM``: a model to generate with, from a folder or an object, and nothing else to set up."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Iterator
from collections.abc import Sequence as Many
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from dsv3.checkpoint.hf import load
from dsv3.common.errors import UserError, nearest
from dsv3.common.progress import Progress
from dsv3.data.fim import join
from dsv3.data.tokenizer import Tokenizer
from dsv3.model import DeepSeekV3
from dsv3.serve.engine import Engine
from dsv3.serve.options import Options
from dsv3.serve.params import SamplingParams
from dsv3.serve.prompts import Prompt, encode, pairs
from dsv3.serve.sequence import Sequence, TokenLogprob
from dsv3.serve.updates import Update, Usage


@dataclass(frozen=True)
class Completion:
    """One answer. ``finish_reason``: stop, length, abort or error (logits that are not finite)."""

    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprob]
    finish_reason: str


@dataclass(frozen=True)
class Output:
    """A prompt's answers, ``params.n`` of them; the attributes of the first are at hand.

    ``prompt_logprobs``: if they were asked for, one a token of the prompt, None for the first.
    """

    prompt_token_ids: list[int]
    completions: list[Completion]
    usage: Usage
    prompt_logprobs: list[TokenLogprob | None] = field(default_factory=list)

    @property
    def text(self) -> str:
        """The answer's text, without stop texts and control tokens."""
        return self.completions[0].text

    @property
    def token_ids(self) -> list[int]:
        """The answer's tokens, with the one that ended it."""
        return self.completions[0].token_ids

    @property
    def logprobs(self) -> list[TokenLogprob]:
        """One a token if they were asked for, else none."""
        return self.completions[0].logprobs

    @property
    def finish_reason(self) -> str:
        """stop, length, abort or error."""
        return self.completions[0].finish_reason


class LLM:
    """Batched generation; calls from several threads, and streams read in turns, share the batches.

    ``model``: a Hugging Face folder, or a model. ``tokenizer``: None: the folder's, if it has one; without a
    tokenizer prompts are token ids and answers have no text. ``dtype``, ``device``, ``quantize``: as for
    :func:`dsv3.load`. ``options``: the fields of :class:`dsv3.serve.options.Options`.
    """

    def __init__(
        self,
        model: str | Path | DeepSeekV3,
        *,
        tokenizer: Tokenizer | None = None,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str = "cpu",
        quantize: str | None = None,
        **options: Any,
    ):
        known = Options.__dataclass_fields__
        unknown = next((name for name in options if name not in known), None)
        if unknown is not None:
            raise UserError(f"option {unknown!r} is unknown{nearest(unknown, known)}: {', '.join(known)}")
        settings = Options(**options)
        if not isinstance(model, DeepSeekV3):
            if tokenizer is None and (Path(model) / "tokenizer.json").is_file():
                tokenizer = Tokenizer.load(model)
            model = load(model, dtype, device, quantize)
        elif (dtype, quantize) != (None, None):
            raise UserError("dtype and quantize are for a folder; a model comes as it is")
        self.tokenizer = tokenizer
        self.engine = Engine(model, tokenizer, settings)
        self._lock = threading.Lock()
        # Of each request: where its call finds what any call's step made for it.
        self._boxes: dict[str, list[Update]] = {}
        self._left: deque[str] = deque()  # to be given up

    def encode(self, prompt: Prompt, suffix: str | None = None) -> list[int]:
        """A prompt as token ids; an empty text is a begin-of-sentence token.

        With ``suffix``: fill in the middle, what is asked for stands between the two (PSM, report 4.1).
        """
        if suffix is None:
            return encode(prompt, self.tokenizer)
        if self.tokenizer is None or not isinstance(prompt, str):
            raise UserError("suffix is for a text prompt, and needs a tokenizer: pass tokenizer=...")
        return join(self.tokenizer, self.tokenizer.encode(prompt), [], self.tokenizer.encode(suffix))

    def generate(
        self,
        prompts: Prompt | Many[Prompt],
        params: SamplingParams | Many[SamplingParams] | None = None,
        progress: bool = False,
    ) -> list[Output]:
        """Answer prompts (texts, or lists of token ids), in the order given; all share the batches.

        ``params``: for all, or one each. ``progress`` shows a bar of finished prompts.
        """
        asked = pairs(prompts, params, self.encode)
        for ids, wish in asked:
            self.engine.check(ids, wish)
        requests: dict[str, list[Sequence]] = {}
        with self._lock:
            for ids, wish in asked:
                request = self.engine.add_request(ids, wish)
                requests[request] = self.engine.requests[request]
            box = self._open(requests)
        usages: dict[str, Usage] = {}
        with Progress("generate", len(asked), "prompts") if progress else nullcontext() as bar:
            for update in self._updates(requests, box):
                if update.usage is not None:
                    usages[update.request_id] = update.usage
                    if bar is not None:
                        bar.advance(1)
        return [
            Output(
                ids,
                [_completion(sequence) for sequence in requests[request]],
                usages[request],
                requests[request][0].prompt_logprobs or [],
            )
            for (ids, _), request in zip(asked, requests)
        ]

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[Update]:
        """The updates of one prompt as they come; leaving the loop early gives the request up."""
        ids = self.encode(prompt)
        with self._lock:
            request = self.engine.add_request(ids, params)
            box = self._open([request])
        yield from self._updates([request], box)

    def _open(self, requests: Iterable[str]) -> list[Update]:
        box: list[Update] = []
        self._boxes.update((request, box) for request in requests)
        return box

    def _updates(self, requests: Iterable[str], box: list[Update]) -> Iterator[Update]:
        """What is added to some requests until they end, by a step of this call or of another one.

        They are given up where the loop is left before, by Ctrl-C for one: no later call must find them.
        """
        unfinished = set(requests)
        try:
            while unfinished:
                with self._lock:
                    self._give_up()
                    if not box:
                        for update in self.engine.step():
                            if update.request_id in self._boxes:
                                self._boxes[update.request_id].append(update)
                    if not box:
                        unfinished.intersection_update(self.engine.requests)
                    updates, box[:] = list(box), []
                for update in updates:
                    if update.usage is not None:
                        unfinished.discard(update.request_id)
                    yield update
        finally:
            self._left.extend(requests)
            # Not waited for: a forgotten stream may be collected while this very thread is in a step.
            if self._lock.acquire(blocking=False):
                try:
                    self._give_up()
                finally:
                    self._lock.release()

    def _give_up(self) -> None:
        while self._left:
            request = self._left.popleft()
            self.engine.abort(request)
            self._boxes.pop(request, None)


def _completion(sequence: Sequence) -> Completion:
    assert sequence.finish_reason is not None
    return Completion(sequence.text.text, sequence.answer, sequence.logprobs, sequence.finish_reason)
