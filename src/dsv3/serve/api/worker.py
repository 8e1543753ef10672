"""The one thread that owns the engine, and what a request sees of it.

Commands go in through a queue and are carried out between steps; what a step adds to the answers comes back
in one call on the event loop. On this side of the queue all runs on the event loop, so nothing is locked.
"""

from __future__ import annotations

import asyncio
import logging
import math
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial

from dsv3.common.errors import UserError
from dsv3.serve.api.errors import ApiError, internal
from dsv3.serve.api.metrics import Metrics
from dsv3.serve.engine import Engine
from dsv3.serve.params import SamplingParams
from dsv3.serve.updates import Update, usage_of

log = logging.getLogger("dsv3.serve")

CUT = "insufficient_system_resource"  # DeepSeek's name for an answer the server could not finish
MOST_UNREAD = 4096  # updates that may wait for a client who reads more slowly than they come
MOST_PATIENCE = 60  # seconds a refused client is told to wait at most


class Job:
    """One HTTP request on the engine: its prompts, each an engine request, and their updates as they come.

    Made by :meth:`Worker.open`, which counts its answers; :meth:`close` must be called in the end.
    """

    def __init__(self, worker: Worker, job_id: str, answers: int):
        self.id, self.answers, self.created = job_id, answers, int(time.time())
        self.engine_ids: list[str] = []
        self.unfinished: set[str] = set()
        self.outcome = "aborted"
        self.accepted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._worker = worker
        self._updates: asyncio.Queue[Update | ApiError] = asyncio.Queue()
        self._started = time.monotonic()
        self._last = 0.0
        self._timer: asyncio.TimerHandle | None = None

    async def start(self, prompts: Sequence[Sequence[int]], params: SamplingParams, seconds: float) -> None:
        """Queue the prompts; returns when the engine has taken them.

        Raises :class:`UserError` for what the engine refuses. After ``seconds`` the answers are cut.
        """
        self.engine_ids = [f"{self.id}.{number}" for number in range(len(prompts))]
        self.unfinished = set(self.engine_ids)
        self._timer = asyncio.get_running_loop().call_later(seconds, self.cut)
        self._worker.add(self, prompts, params)
        await self.accepted

    def cut(self) -> None:
        """End the answers with what there is of them."""
        self._worker.cut(self)

    def push(self, update: Update, now: float) -> None:
        """An update, of a step that ended at ``now``."""
        metrics = self._worker.metrics
        if update.token_ids:
            if not self._last:
                metrics.first_token.observe(now - self._started)
            else:
                each = (now - self._last) / len(update.token_ids)
                for _ in update.token_ids:
                    metrics.between_tokens.observe(each)
            self._last = now
        if update.usage is not None:
            self.unfinished.discard(update.request_id)
            if not self.unfinished:
                self.outcome = update.finish_reason or "stop"
                metrics.request.observe(now - self._started)
        if self._updates.qsize() >= MOST_UNREAD:
            self.fail(ApiError(408, "the answer is read too slowly"))
        else:
            self._updates.put_nowait(update)

    def fail(self, error: ApiError | UserError) -> None:
        """End with an error: before the engine took the prompts, or in between."""
        self.outcome = "refused" if isinstance(error, UserError) else "error"
        if not self.accepted.done():
            self.accepted.set_exception(error)
        elif isinstance(error, ApiError):
            self._updates.put_nowait(error)

    async def updates(self, alive: float | None = None) -> AsyncIterator[tuple[int, Update] | None]:
        """The number of a prompt and what was added to one of its answers, until all have ended.

        With ``alive``, None comes after that many seconds without news. Raises :class:`ApiError`.
        """
        left = set(self.engine_ids)
        while left:
            try:
                found = await asyncio.wait_for(self._updates.get(), alive)
            except TimeoutError:
                yield None
                continue
            if isinstance(found, ApiError):
                raise found
            if found.usage is not None:
                left.discard(found.request_id)
            yield self.engine_ids.index(found.request_id), found

    def close(self) -> None:
        """Let go: what is unfinished is aborted and its blocks are free."""
        if self._timer is not None:
            self._timer.cancel()
        if self.accepted.done() and not self.accepted.cancelled():
            self.accepted.exception()  # seen, even if nobody waited for it
        self._worker.close(self)


class Worker:
    """Runs an engine for many requests at once.

    ``max_queue``: answers that may be open beyond those the engine makes at once.
    """

    def __init__(self, engine: Engine, metrics: Metrics, max_queue: int):
        self.engine, self.metrics = engine, metrics
        self.most = engine.options.max_batch + max_queue
        self.draining = self.failed = False
        self.open_answers = 0
        self.jobs: dict[str, Job] = {}
        self._of: dict[str, Job] = {}  # by the engine's request ids
        self._mean_seconds = 1.0  # of a request, for those who are told to come again
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    # On the event loop.

    def begin(self) -> None:
        """Start the thread; the running event loop gets what it finds."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    async def end(self) -> None:
        """Stop the thread after its step."""
        self._inbox.put(None)
        await asyncio.to_thread(self._thread.join, 60)

    def open(self, job_id: str, answers: int) -> Job:
        """Room for a request of so many answers, or :class:`ApiError` 429 or 503."""
        if self.failed:
            raise ApiError(503, "the engine has failed for good; the server must be started again")
        if self.draining:
            raise ApiError(503, "the server is shutting down; ask another, or again later", retry_after=5)
        if answers > self.most:
            raise ApiError(
                422,
                f"{answers} answers (n times prompts) are more than the {self.most} that may be open at once",
            )
        if self.open_answers + answers > self.most:
            rounds = self.open_answers / self.engine.options.max_batch
            wait = min(MOST_PATIENCE, max(1, math.ceil(rounds * self._mean_seconds)))
            raise ApiError(
                429, f"{self.open_answers} answers are open, of {self.most} at most; come again later",
                code="rate_limit_exceeded", retry_after=wait,
            )  # fmt: skip
        job = self.jobs[job_id] = Job(self, job_id, answers)
        self.open_answers += answers
        return job

    def add(self, job: Job, prompts: Sequence[Sequence[int]], params: SamplingParams) -> None:
        """Hand a job's prompts to the engine."""
        self._of.update(dict.fromkeys(job.engine_ids, job))
        self._inbox.put(partial(self._add, job, list(job.engine_ids), prompts, params))

    def cut(self, job: Job) -> None:
        """End a job's answers where they are."""
        self._inbox.put(partial(self._cut, list(job.engine_ids)))

    def close(self, job: Job) -> None:
        """Forget a job, once."""
        if self.jobs.pop(job.id, None) is None:
            return
        self.open_answers -= job.answers
        for engine_id in job.engine_ids:
            self._of.pop(engine_id, None)
        if job.unfinished:
            self._inbox.put(partial(self._abort, list(job.engine_ids)))
        if job.engine_ids:
            self.metrics.requests.labels(job.outcome).inc()
            self._mean_seconds += 0.1 * (time.monotonic() - job._started - self._mean_seconds)

    def _deliver(self, updates: list[Update], now: float) -> None:
        for update in updates:
            job = self._of.get(update.request_id)
            if job is not None:
                job.push(update, now)

    def _taken(self, job: Job, error: ApiError | UserError | None) -> None:
        if error is not None:
            job.unfinished.clear()  # nothing of it is left on the engine
            job.fail(error)
        elif not job.accepted.done():
            job.accepted.set_result(None)

    def _end_of_engine(self) -> None:
        self.failed = True
        for job in list(self.jobs.values()):
            self._taken(job, internal(job.id))

    # On the engine's thread.

    def _post(self, function: Callable[..., None], *arguments: object) -> None:
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(function, *arguments)
        except RuntimeError:  # the loop has closed: nobody is left to hear of it
            log.debug("an update came after the event loop had closed")

    def _run(self) -> None:
        try:
            while True:
                try:
                    command = self._inbox.get(block=not self.engine.busy)
                except queue.Empty:
                    command = self._step
                if command is None:
                    return
                try:
                    command()
                except Exception:
                    log.exception("the engine failed; its open requests are given up")
                    self._give_up()
        except Exception:
            log.critical("the engine cannot be cleared and is left alone", exc_info=True)
            self._post(self._end_of_engine)

    def _step(self) -> None:
        updates = self.engine.step()
        if updates:
            self._post(self._deliver, updates, time.monotonic())

    def _add(
        self, job: Job, engine_ids: list[str], prompts: Sequence[Sequence[int]], params: SamplingParams
    ) -> None:
        error: ApiError | UserError | None = None
        try:
            for engine_id, prompt in zip(engine_ids, prompts):
                self.engine.add_request(prompt, params, engine_id)
        except UserError as refusal:
            error = refusal
        except Exception:
            log.exception("the engine failed to take a request", extra={"request_id": job.id})
            error = internal(job.id)
        if error is not None:
            self._abort(engine_ids)
        self._post(self._taken, job, error)

    def _abort(self, engine_ids: list[str]) -> None:
        for engine_id in engine_ids:
            self.engine.abort(engine_id)

    def _cut(self, engine_ids: list[str]) -> None:
        updates: list[Update] = []
        for engine_id in engine_ids:
            sequences = [s for s in self.engine.requests.get(engine_id, []) if not s.finished]
            if not sequences:
                continue
            usage = usage_of(self.engine.requests[engine_id])
            for sequence in sequences:
                shown = len(sequence.text.text)
                sequence.text.close()
                rest = sequence.text.text[shown:]
                last = usage if sequence is sequences[-1] else None
                updates.append(Update(engine_id, sequence.index, [], rest, finish_reason=CUT, usage=last))
            self.engine.abort(engine_id)
        self._post(self._deliver, updates, time.monotonic())

    def _give_up(self) -> None:
        """After a failure: every open request ends, and no row of the cache is trusted again."""
        failed = list(self.engine.requests)
        self._abort(failed)
        self.engine.forget()
        self._post(self._all_failed, failed)

    def _all_failed(self, engine_ids: list[str]) -> None:
        for job in {self._of[engine_id] for engine_id in engine_ids if engine_id in self._of}:
            self._taken(job, internal(job.id))
