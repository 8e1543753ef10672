"""Who answers the prompts of distillation (report 5.1): a solver, a model in this process, or a server.

An expert takes questions and gives each one's answers back as soon as it has them, in any order. What it
answers to a question depends on the question and the seed alone, so that a run that was killed goes on to the
same end (a server keeps this as far as it keeps to its seeds).
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from dsv3.common.errors import Failure, UserError
from dsv3.config.distill import ExpertSection, SamplingSection
from dsv3.data.special import END_THINK, THINK
from dsv3.evaluate.tasks import Solution
from dsv3.evaluate.tasks.base import seeded

if TYPE_CHECKING:
    from openai import AsyncOpenAI

    from dsv3.serve.llm import LLM
    from dsv3.serve.params import SamplingParams

LONGEST_PAUSE = 60.0  # seconds the client waits between two tries at most
ALPHABET = "0123456789abcdefghijklmnopqrstuvwxyz"


@dataclass(frozen=True)
class Question:
    """A problem. ``row``: the columns its verifier needs. ``solution``: steps and answer, where known."""

    id: str
    prompt: str
    row: dict[str, Any] = field(default_factory=dict)
    solution: Solution | None = None
    original: str | None = None  # the answer as its source writes it

    def messages(self, system: str) -> list[dict[str, str]]:
        """What a model is asked."""
        start = [{"role": "system", "content": system}] if system else []
        return [*start, {"role": "user", "content": self.prompt}]


@dataclass(frozen=True)
class Answer:
    """``finish_reason``: stop, length or error (``text`` is empty and ``error`` says why)."""

    text: str
    finish_reason: str
    tokens: int | None = None
    error: str | None = None


Answered = Iterator[tuple[Question, list[Answer]]]


class Expert(Protocol):
    """Answers questions, ``sampling.samples`` times each."""

    def answer(self, questions: Sequence[Question]) -> Answered: ...


def open_expert(options: ExpertSection, sampling: SamplingSection, system: str, seed: int) -> Expert:
    """The expert of a recipe; raises :class:`UserError` for a model or a package that is not there."""
    if options.kind == "solver":
        return Solver(sampling.samples, options.slips, seed)
    if options.kind == "engine":
        return Engine(options, sampling, system, seed)
    return Endpoint(options, sampling, system, seed)


class Solver:
    """The tasks' own worked steps; with ``slips``, that chance of one wrong character in an answer."""

    def __init__(self, samples: int, slips: float, seed: int):
        self.samples, self.slips, self.seed = samples, slips, seed

    def answer(self, questions: Sequence[Question]) -> Answered:
        """Every question must have a solution: the caller sees to that before anything is written."""
        for question in questions:
            yield question, [self._one(question, sample) for sample in range(self.samples)]

    def _one(self, question: Question, sample: int) -> Answer:
        assert question.solution is not None
        rng = seeded("slip", self.seed, question.id, sample)
        solution = question.solution
        if rng.random() < self.slips:
            solution = slipped(solution, rng.randrange(1 << 30))
        return Answer(solution.reasoned(), "stop")


def slipped(solution: Solution, seed: int) -> Solution:
    """A solution with one character of its answer exchanged, as from a slip in the last step.

    Where the last line of the reasoning ends in the answer it ends in the wrong one.
    """
    if solution.response or not solution.answer:
        return solution
    rng = seeded("character", seed)
    places = [at for at, letter in enumerate(solution.answer) if letter.isalnum()]
    at = rng.choice(places or [0])
    kind = ALPHABET[:10] if solution.answer[at].isdigit() else ALPHABET[10:]
    wrong = (
        solution.answer[:at] + rng.choice(kind.replace(solution.answer[at], "")) + solution.answer[at + 1 :]
    )
    reasoning = solution.reasoning
    if reasoning.endswith(solution.answer):
        reasoning = reasoning.removesuffix(solution.answer) + wrong
    return Solution(reasoning, wrong)


class Engine:
    """A model folder in this process, answering as many questions at once as ``concurrency`` allows."""

    def __init__(
        self,
        options: ExpertSection,
        sampling: SamplingSection,
        system: str,
        seed: int,
        llm: LLM | None = None,
    ):
        from dsv3.data.tokenizer import Tokenizer
        from dsv3.serve.llm import LLM

        if llm is None:
            assert options.model is not None
            llm = LLM(
                options.model,
                tokenizer=Tokenizer.load(Path(options.model)),
                quantize=options.quantize,
                draft_tokens=options.draft_tokens,
                max_batch=options.concurrency,
                max_batch_tokens=max(512, options.concurrency * (1 + options.draft_tokens)),
            )
        self.llm, self.system, self.sampling, self.seed = llm, system, sampling, seed
        self.together = 1 + options.concurrency // sampling.samples  # one more than fits: no gaps

    def answer(self, questions: Sequence[Question]) -> Answered:
        """The engine is kept full: a new question enters as soon as another is answered."""
        engine, waiting = self.llm.engine, iter(questions)
        opened: dict[str, tuple[Question, list[Any]]] = {}
        try:
            while True:
                for question in islice(waiting, self.together - len(opened)):
                    name = engine.add_request(*self._request(question))
                    opened[name] = question, engine.requests[name]
                if not opened:
                    return
                for update in engine.step():
                    if update.usage is not None:
                        question, sequences = opened.pop(update.request_id)
                        yield (
                            question,
                            [
                                Answer(s.text.text, s.finish_reason or "error", len(s.answer))
                                for s in sequences
                            ],
                        )
        finally:
            for name in opened:
                engine.abort(name)

    def _request(self, question: Question) -> tuple[list[int], SamplingParams]:
        from dsv3.data.chat import encode
        from dsv3.serve.params import SamplingParams

        assert self.llm.tokenizer is not None
        messages = question.messages(self.system)
        prompt = encode(self.llm.tokenizer, messages, add_generation_prompt=True)[0]
        sampling, room = self.sampling, self.llm.engine.max_length - len(prompt)
        if room < 1:
            raise UserError(
                f"prompt {question.id} has {len(prompt)} tokens, and the model takes"
                f" {self.llm.engine.max_length} with the answer"
            )
        return prompt, SamplingParams(
            max_tokens=min(sampling.max_tokens, room),
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            n=sampling.samples,
            seed=seeded(self.seed, question.id).randrange(1 << 31),
        )


class Endpoint:
    """A server that speaks OpenAI's API: ``concurrency`` requests at once, one an answer.

    Time-outs, broken connections, 408, 409, 429 and 5xx are tried again by the client, waiting longer each
    time (and as long as ``Retry-After`` says); an answer that still fails is an error of its own, asked again
    when the run is resumed. What would fail for every request (a wrong key, an unknown model) ends the run,
    and so do ``give_up`` failures in a row.
    """

    def __init__(self, options: ExpertSection, sampling: SamplingSection, system: str, seed: int):
        if find_spec("openai") is None:
            raise UserError("expert.kind (endpoint) needs the client: pip install 'dsv3[distill]'")
        self.options, self.sampling, self.system, self.seed = options, sampling, system, seed

    def answer(self, questions: Sequence[Question]) -> Answered:
        """Raises :class:`Failure` where going on makes no sense; what was answered before is not lost."""
        from openai import AsyncOpenAI

        options = self.options
        jobs = ((question, sample) for question in questions for sample in range(self.sampling.samples))
        found: dict[str, dict[int, Answer]] = {}
        failed_in_row = 0
        with asyncio.Runner() as runner:  # leaving it cancels what is still open
            client = AsyncOpenAI(
                base_url=options.base_url,
                api_key=os.environ.get(options.api_key_variable) or "none",
                timeout=options.timeout,
                max_retries=options.retries,
            )
            opened: dict[asyncio.Task[Answer], tuple[Question, int]] = {}
            while True:
                for question, sample in islice(jobs, options.concurrency - len(opened)):
                    task = runner.get_loop().create_task(self._ask(client, question, sample))
                    opened[task] = question, sample
                if not opened:
                    runner.run(client.close())
                    return
                finished, _ = runner.run(asyncio.wait(opened, return_when=asyncio.FIRST_COMPLETED))
                for task in finished:
                    question, sample = opened.pop(task)
                    answer = task.result()
                    failed_in_row = failed_in_row + 1 if answer.error else 0
                    if failed_in_row >= options.give_up:
                        raise Failure(
                            f"expert.base_url ({options.base_url}) failed {failed_in_row} times in a row, the"
                            f" last with: {answer.error}; what came before is kept, go on with --resume auto"
                        )
                    answers = found.setdefault(question.id, {})
                    answers[sample] = answer
                    if len(answers) == self.sampling.samples:
                        del found[question.id]
                        yield question, [answers[at] for at in sorted(answers)]

    async def _ask(self, client: AsyncOpenAI, question: Question, sample: int) -> Answer:
        import openai

        options, sampling = self.options, self.sampling
        messages: Any = question.messages(self.system)
        seed = seeded(self.seed, question.id, sample).randrange(1 << 31)
        # The client's limit is on each silence of the server; this one is on a request and all its retries.
        longest = (options.timeout + LONGEST_PAUSE) * (1 + options.retries)
        try:
            async with asyncio.timeout(longest):
                reply = await client.chat.completions.create(
                    model=options.model or "", messages=messages, temperature=sampling.temperature,
                    top_p=sampling.top_p, max_tokens=sampling.max_tokens, seed=seed,
                )  # fmt: skip
            choice = reply.choices[0]
        except openai.APIStatusError as error:
            if error.status_code in (408, 409, 429) or error.status_code >= 500:
                return Answer("", "error", error=f"HTTP {error.status_code}: {_line(error)}")
            raise Failure(
                f"expert.base_url ({options.base_url}) refuses the request with HTTP {error.status_code}:"
                f" {_line(error)}; look at expert.model and at {options.api_key_variable}"
            ) from None
        except (openai.OpenAIError, TimeoutError, IndexError, TypeError, AttributeError, ValueError) as error:
            return Answer(
                "", "error", error=f"{type(error).__name__}: {_line(error)}"
            )  # no answer, or no API
        tokens = reply.usage.completion_tokens if reply.usage else None
        return Answer(said(choice.message), choice.finish_reason or "stop", tokens)


def said(message: Any) -> str:
    """A reply as one text: reasoning that a server gives beside the content goes before it, in its tags."""
    content = message.content or ""
    thoughts = getattr(message, "reasoning_content", None) or getattr(message, "reasoning", None)
    if not thoughts or END_THINK in content:
        return content
    return f"{THINK}\n{str(thoughts).strip()}\n{END_THINK}\n\n{content.strip()}"


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
