"""The engine: requests in, tokens out, one step at a time.

A step: the scheduler picks what to compute, the runner computes it, tokens are chosen and drafts verified,
finished sequences give their blocks back. Nothing runs between steps, so requests may be added and aborted
there; a server calls :meth:`Engine.step` in a loop. Only :meth:`Engine.check` may be called at any time, from
any thread: a server asks it first, so that a new grammar is compiled while the engine goes on.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable
from collections.abc import Sequence as Many

import torch
from torch import Tensor

from dsv3.common.errors import UserError
from dsv3.data.tokenizer import Tokenizer
from dsv3.model import DeepSeekV3
from dsv3.serve.attention import install
from dsv3.serve.blocks import BlockManager
from dsv3.serve.cache import LatentCache
from dsv3.serve.grammar import Grammars
from dsv3.serve.graphs import replays
from dsv3.serve.layers import keep_bf16
from dsv3.serve.options import Options
from dsv3.serve.params import SamplingParams
from dsv3.serve.runner import Runner, States
from dsv3.serve.sampler import logprobs
from dsv3.serve.scheduler import Chunk, Scheduler
from dsv3.serve.sequence import Sequence, TokenLogprob
from dsv3.serve.speculation import Drafter, verify
from dsv3.serve.text import Detokeniser
from dsv3.serve.updates import Stats, Update, usage_of

SCORED = 64  # prompt tokens whose logits are held at once


class Engine:
    """A model, its cache and the requests on it. Not thread-safe: one caller at a time.

    ``tokenizer``: None for token ids only (no text, no stop texts). ``vocab_size``: ids from there on are
    never chosen; None: the tokenizer's.
    """

    def __init__(self, model: DeepSeekV3, tokenizer: Tokenizer | None = None, options: Options | None = None):
        self.model, self.tokenizer = model, tokenizer
        keep_bf16(model)
        self.options = options = options or Options()
        config, drafts = model.config, options.draft_tokens
        if drafts and not model.mtp_modules:
            raise UserError(f"draft_tokens ({drafts}) needs an MTP module, and this model has none; use 0")
        embedding = model.model.embed_tokens
        dtype, device = embedding.compute_dtype or embedding.weight.dtype, embedding.weight.device
        room = options.room(config, dtype, device)
        self.max_length = room.max_length
        self.vocab_size = min(config.vocab_size, tokenizer.vocab_size if tokenizer else config.vocab_size)
        self.cache = LatentCache(
            room.layers, room.blocks * room.block, config.kv_lora_rank, config.qk_rope_head_dim, room.kind,
            dtype, device, room.block, replays(device),
        )  # fmt: skip
        self.blocks = BlockManager(room.blocks, room.block)
        self.scheduler = Scheduler(self.blocks, options.max_batch, options.max_batch_tokens, drafts)
        self.runner = Runner(model, self.cache)
        self.drafter = Drafter(model, self.cache, drafts, self.vocab_size) if drafts else None
        self.grammars = Grammars(tokenizer, self.vocab_size) if tokenizer else None
        self.stats = Stats(drafted_at=[0] * drafts, accepted_at=[0] * drafts)
        self.requests: dict[str, list[Sequence]] = {}
        self._unfinished: dict[str, int] = {}  # answers of a request
        self._added = 0
        self.on_finish: Callable[[Sequence], None] | None = None  # called while the cache still has its rows
        install(model)

    @property
    def busy(self) -> bool:
        """Whether any request is unfinished."""
        return bool(self.requests)

    def add_request(
        self, prompt: Many[int], params: SamplingParams | None = None, request_id: str | None = None
    ) -> str:
        """Queue a prompt of token ids; returns the request's id.

        Raises :class:`UserError` for a prompt that is empty, too long or names a token there is not.
        """
        params = params or SamplingParams()
        request_id = f"request-{self._added}" if request_id is None else request_id
        if request_id in self.requests:
            raise UserError(f"request_id ({request_id!r}) is in use; choose another")
        self.check(prompt, params)
        self._added += 1
        stop_ids = frozenset(params.stop_token_ids)
        if params.constraint is not None or not params.ignore_eos:
            stop_ids |= self.eos_ids
        seed = secrets.randbits(62) if params.seed is None else params.seed
        unscored: list[TokenLogprob | None] = [None] * min(params.prompt_logprobs_from, len(prompt))
        sequences: list[Sequence] = []
        for index in range(params.n):
            sequences.append(
                Sequence(
                    request_id, index, list(prompt), params,
                    seed=seed + 0x2545F4914F6CDD1D * index,
                    max_length=min(len(prompt) + params.max_tokens, self.max_length),
                    stop_ids=stop_ids,
                    text=self._detokeniser(params),
                    leader=sequences[0] if sequences else None,
                    matcher=self.grammars.start(params) if self.grammars and params.constraint else None,
                    prompt_logprobs=None if params.prompt_logprobs is None or index else unscored.copy(),
                )
            )  # fmt: skip
            self.scheduler.add(sequences[-1])
        self.requests[request_id] = sequences
        self._unfinished[request_id] = params.n
        self.stats.prompt_tokens += len(prompt)
        return request_id

    def check(self, prompt: Many[int], params: SamplingParams) -> None:
        """Refuse what cannot be served, before anything is queued; from any thread.

        Takes microseconds, but for a schema or grammar not seen lately: that is compiled.
        """
        if not prompt:
            raise UserError("the prompt is empty; give at least one token (begin of sentence, for example)")
        if len(prompt) + min(params.max_tokens, 1) > self.max_length:
            raise UserError(
                f"the prompt has {len(prompt)} tokens and max_length is {self.max_length}, answer included:"
                " shorten it, raise max_length and cache_tokens, or extend the model"
            )
        known = self.model.config.vocab_size
        if params.prompt_logprobs is not None:
            known = self.vocab_size  # others have no probability
        wrong = next((token for token in prompt if not 0 <= token < known), None)
        if wrong is not None:
            raise UserError(f"the prompt holds token {wrong}; the model knows 0 to {known - 1}")
        biased = max(params.logit_bias, default=0)
        if biased >= self.vocab_size:
            raise UserError(f"logit_bias names token {biased}; there are {self.vocab_size}")
        if params.stop and self.tokenizer is None:
            raise UserError(f"stop ({list(params.stop)}) needs a tokenizer; give stop_token_ids without one")
        if params.constraint is not None:
            if self.grammars is None:
                raise UserError(f"{params.constraint_name} needs a tokenizer, and this engine has none")
            self.grammars.start(params)

    @property
    def eos_ids(self) -> frozenset[int]:
        """Tokens that end every answer: end of sentence, by the tokenizer or else by the configuration."""
        return frozenset((self.tokenizer.eos_id if self.tokenizer else self.model.config.eos_token_id,))

    def abort(self, request_id: str) -> None:
        """Give a request up; its blocks are free at once. An id that is not there (any more) is ignored."""
        self._unfinished.pop(request_id, None)
        for sequence in self.requests.pop(request_id, []):
            if not sequence.finished:
                sequence.end("abort")
                self.scheduler.remove(sequence)

    def forget(self) -> None:
        """Find nothing of the cache again: to be called when the model's weights have changed.

        :class:`UserError` while requests are unfinished.
        """
        if self.busy:
            raise UserError(f"{len(self.requests)} requests are unfinished; step or abort them first")
        self.blocks.forget()
        install(self.model)  # the cores derive from matrices in other formats
        self.runner.layers.refresh()
        if self.drafter:
            self.drafter.layers.refresh()

    @torch.inference_mode()
    def step(self) -> list[Update]:
        """Compute a batch; returns what it added to each answer."""
        chunks = self.scheduler.schedule()
        if not chunks:
            return []
        self.stats.steps += 1
        states = self.runner.run(chunks)
        if self.drafter:
            self.drafter.keep_ends(chunks, states)
        sampling = [chunk for chunk in chunks if chunk.samples]
        before = [(len(chunk.sequence.tokens), len(chunk.sequence.text.text)) for chunk in sampling]
        self._score(chunks, states)
        choosing = [chunk for chunk in sampling if not _ended(chunk.sequence)]
        if choosing:
            self._extend(choosing, self._logits(chunks, states))
        good, begins = [], []
        for chunk, begin in zip(chunks, states.begins):
            sequence = chunk.sequence
            if sequence.finish_reason == "error":
                continue
            sequence.computed = len(sequence.tokens) - 1 if chunk.samples else chunk.stop
            if sequence.computed > chunk.start:  # or the last token of a prompt that is only read
                good.append(chunk)
                begins.append(begin)
        if self.drafter and good:
            self.drafter.advance(good, States(states.hidden_ND, begins))
        for chunk in good:
            self.blocks.register(chunk.sequence)
        for chunk in sampling:
            if chunk.sequence.finished:
                if self.on_finish is not None:
                    self.on_finish(chunk.sequence)
                self.scheduler.remove(chunk.sequence)
        return [self._update(chunk.sequence, *start) for chunk, start in zip(sampling, before)]

    def _logits(self, chunks: list[Chunk], states: States) -> Tensor:
        """FP32, the last token's and the drafts' of every sequence that chooses a token."""
        rows = [
            begin + place - chunk.start
            for chunk, begin in zip(chunks, states.begins)
            if chunk.samples and not chunk.sequence.finished
            for place in range(len(chunk.sequence.tokens) - 1, chunk.stop)
        ]
        hidden = states.hidden_ND[rows]
        return self.model.lm_head(hidden)[:, : self.vocab_size].float()

    def _score(self, chunks: list[Chunk], states: States) -> None:
        """Of prompts whose log-probabilities are wanted: each place tells that of the token after it."""
        wanted = [
            (chunk.sequence, place, begin + place - 1 - chunk.start)
            for chunk, begin in zip(chunks, states.begins)
            if chunk.sequence.prompt_logprobs is not None
            for place in range(
                len(chunk.sequence.prompt_logprobs), min(chunk.stop + 1, chunk.sequence.prompt_length)
            )
        ]
        for first in range(0, len(wanted), SCORED):
            sequences, places, rows = zip(*wanted[first : first + SCORED])
            logits_RV = self.model.lm_head(states.hidden_ND[list(rows)])[:, : self.vocab_size].float()
            tokens = [sequence.tokens[place] for sequence, place in zip(sequences, places)]
            counts = [sequence.params.prompt_logprobs for sequence in sequences]
            for sequence, found in zip(sequences, logprobs(logits_RV, tokens, counts)):
                sequence.prompt_logprobs.append(found)

    def _extend(self, chunks: list[Chunk], logits_RV: Tensor) -> None:
        """Choose the next tokens, more than one where drafts stand, and append them.

        A sequence whose logits are not finite ends in an error; the others go on.
        """
        sequences = [chunk.sequence for chunk in chunks]
        finite = logits_RV.sum(dim=-1).isfinite().tolist()
        if not all(finite):
            sequences, rows = _fail(sequences, finite)
            if not rows:
                return
            logits_RV = logits_RV[rows]
        chosen = verify(logits_RV, sequences)
        told = _logprobs(logits_RV, sequences, chosen)
        for sequence, tokens in zip(sequences, chosen):
            drafted, accepted = len(sequence.drafts), len(tokens) - 1
            sequence.drafted += drafted
            sequence.accepted += accepted
            for place in range(drafted):
                self.stats.drafted_at[place] += 1
                self.stats.accepted_at[place] += place < accepted
            known = len(sequence.tokens)
            sequence.extend(tokens, told.get(sequence, []))
            self.stats.completion_tokens += len(sequence.tokens) - known

    def _update(self, sequence: Sequence, tokens: int, shown: int) -> Update:
        request_id, usage = sequence.request_id, None
        self._unfinished[request_id] -= sequence.finished
        if not self._unfinished[request_id]:
            usage = usage_of(self.requests.pop(request_id))
            self.stats.cached_tokens += usage.cached_tokens
            del self._unfinished[request_id]
        return Update(
            request_id,
            sequence.index,
            sequence.tokens[tokens:],
            sequence.text.text[shown:],
            sequence.logprobs[tokens - sequence.prompt_length :],
            sequence.finish_reason,
            usage,
            sequence.prompt_logprobs or [] if tokens == sequence.prompt_length else [],
        )

    def _detokeniser(self, params: SamplingParams) -> Detokeniser:
        if self.tokenizer is None:
            return Detokeniser(None)
        hidden = self.tokenizer.hidden_ids if params.skip_special else frozenset[int]()
        return Detokeniser(self.tokenizer.token_bytes, hidden, params.stop)


def _ended(sequence: Sequence) -> bool:
    """End a sequence that wants no token, or whose prompt has scores that are not numbers; whether it did."""
    scores = sequence.prompt_logprobs if len(sequence.tokens) == sequence.prompt_length else None
    if any(score is not None and math.isnan(score.logprob) for score in scores or ()):
        sequence.end("error")
    elif len(sequence.tokens) >= sequence.max_length:
        sequence.end("length")
    return sequence.finished


def _fail(sequences: Many[Sequence], finite: list[bool]) -> tuple[list[Sequence], list[int]]:
    """End the sequences with a row that is not finite; the others, and their rows."""
    good: list[Sequence] = []
    rows: list[int] = []
    first = 0
    for sequence in sequences:
        stop = first + len(sequence.drafts) + 1
        if all(finite[first:stop]):
            good.append(sequence)
            rows += range(first, stop)
        else:
            sequence.end("error")
        first = stop
    return good, rows


def _logprobs(
    logits_RV: Tensor, sequences: Many[Sequence], chosen: Many[list[int]]
) -> dict[Sequence, list[TokenLogprob]]:
    """Of the sequences that want them, those of their new tokens."""
    rows: list[int] = []
    tokens: list[int] = []
    counts: list[int] = []
    first = 0
    for sequence, new in zip(sequences, chosen):
        if sequence.params.logprobs is not None:
            rows += range(first, first + len(new))
            tokens += new
            counts += [sequence.params.logprobs] * len(new)
        first += len(sequence.drafts) + 1
    if not rows:
        return {}
    found = iter(logprobs(logits_RV[rows], tokens, counts))
    return {
        sequence: [next(found) for _ in new]
        for sequence, new in zip(sequences, chosen)
        if sequence.params.logprobs is not None
    }
