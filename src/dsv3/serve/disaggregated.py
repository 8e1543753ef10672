"""Prefill and decode as separate processes (report 3.4), behind the same face as :class:`dsv3.LLM`.

Reading a prompt wants arithmetic, answering wants memory bandwidth; in one process each prompt that comes
in delays every answer that is being given. So one process reads prompts and hands each answer, with its cache
rows, to another that goes on with it. This is the front: it starts the two, asks, and passes on what they
say.

A process that dies, or is silent for ``timeout`` seconds while it has work, ends the requests that need it in
a :class:`Failure` that names it; the other one gives their blocks back and lives on. The next request starts
the missing process again.
"""

from __future__ import annotations

import json
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator
from collections.abc import Sequence as Many
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Any

import torch

from dsv3.common.errors import Failure, UserError
from dsv3.data.tokenizer import Tokenizer
from dsv3.serve.channel import Broken, Channel, wait
from dsv3.serve.handover import logprobs_from_json
from dsv3.serve.llm import Completion, Output
from dsv3.serve.params import SamplingParams
from dsv3.serve.prompts import Prompt, encode, pairs
from dsv3.serve.updates import Update, Usage

PREFILL, DECODE = "prefill", "decode"
HANDED, DONE = "handed", "done"  # other places an answer can be: on its way, at its end
NEEDS = {PREFILL: {PREFILL}, DECODE: {PREFILL, HANDED, DECODE}}  # answers there are lost with the process


@dataclass
class Peer:
    """A process. ``heard``: when it last said something, or got work."""

    role: str
    process: subprocess.Popen[bytes]
    channel: Channel
    path: str
    heard: float
    ready: bool = False
    state: dict[str, Any] | None = None

    def __str__(self) -> str:
        return f"the {self.role} process (pid {self.process.pid})"


@dataclass
class Request:
    """``places``: where each of its answers is."""

    number: int
    prompt: list[int]
    places: list[str]
    usages: list[Usage | None]
    updates: deque[Update] = field(default_factory=deque)
    trouble: UserError | None = None

    @property
    def finished(self) -> bool:
        """Whether all answers have ended."""
        return all(place == DONE for place in self.places)


class Disaggregated:
    """Batched generation by a prefill and a decode process.

    ``folder``: a Hugging Face folder; its tokenizer is used if it has one. ``dtype``, ``device``,
    ``quantize`` and ``options`` as for :class:`dsv3.LLM`, for either process (each holds the model and a
    cache of its own). ``timeout``: seconds; longer than the longest step. For one thread, whose streams may
    be read in turns. Use as a context manager, or :meth:`close` it.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        dtype: torch.dtype | str | None = None,
        device: str = "cpu",
        quantize: str | None = None,
        timeout: float = 60.0,
        **options: Any,
    ):
        if not timeout > 0:
            raise UserError(f"timeout ({timeout}) must be above 0 seconds")
        kind = None if dtype is None else str(dtype).removeprefix("torch.")
        self._setting = {
            "folder": str(folder), "options": options, "timeout": timeout,
            "model": {"dtype": kind, "device": device, "quantize": quantize},
        }  # fmt: skip
        self.timeout = timeout
        file = Path(folder) / "tokenizer.json"
        self.tokenizer = Tokenizer.load(folder) if file.is_file() else None
        self._sockets = TemporaryDirectory(prefix="dsv3-")  # for its owner only; short, as sockets want it
        self._peers: dict[str, Peer] = {}
        self._requests: dict[int, Request] = {}
        self._started = self._asked = 0
        self._closed, self._last_words = False, ""
        self._ready()

    def __enter__(self) -> Disaggregated:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End both processes."""
        self._closed = True
        for peer in self._peers.values():
            peer.channel.close()
        for peer in self._peers.values():
            _end(peer.process)
        self._peers.clear()
        self._sockets.cleanup()

    def encode(self, prompt: Prompt) -> list[int]:
        """A prompt as token ids; an empty text is a begin-of-sentence token."""
        return encode(prompt, self.tokenizer)

    def generate(
        self, prompts: Prompt | Many[Prompt], params: SamplingParams | Many[SamplingParams] | None = None
    ) -> list[Output]:
        """Answer prompts, in the order given. See :meth:`dsv3.LLM.generate`.

        Raises :class:`Failure` naming the process that died or fell silent; nothing of the call goes on then.
        """
        asked = pairs(prompts, params, self.encode)
        self._ready()
        requests = [self._ask(prompt, wish) for prompt, wish in asked]
        try:
            while not all(request.finished for request in requests):
                self._turn()
                for request in requests:
                    if request.trouble is not None:
                        raise request.trouble
        finally:
            for request in requests:
                self._drop(request)
        return [_output(request) for request in requests]

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[Update]:
        """The updates of one prompt as they come; leaving the loop early gives the request up."""
        ids = self.encode(prompt)
        self._ready()
        request = self._ask(ids, params or SamplingParams())
        try:
            while request.updates or not request.finished:
                while request.updates:
                    yield request.updates.popleft()
                if request.finished:
                    return
                self._turn()
                if request.trouble is not None:
                    raise request.trouble
        finally:
            self._drop(request)

    def state(self, role: str) -> dict[str, Any]:
        """What ``prefill`` or ``decode`` holds: blocks_used, requests, moving (handovers), bytes_pending."""
        self._ready()
        peer, until = self._peers[role], time.monotonic() + self.timeout
        peer.state = None
        peer.channel.send({"kind": "state"})
        while peer.state is None:
            self._turn()
            if role not in self._peers or time.monotonic() > until:
                raise Failure(f"{peer} does not say how it is")
        return {"pid": peer.process.pid, **peer.state}

    def _ready(self) -> None:
        """Both processes run and have read the model."""
        if self._closed:
            raise UserError("this Disaggregated is closed; make a new one")
        for peer in list(self._peers.values()):
            if peer.process.poll() is not None:
                self._lose(peer, _end(peer.process))
        for role in (PREFILL, DECODE):
            if role not in self._peers:
                self._peers[role] = self._start(role)
        while not all(peer.ready for peer in self._peers.values()):
            self._turn()
            if len(self._peers) < 2:
                raise Failure(self._last_words)

    def _start(self, role: str) -> Peer:
        self._started += 1
        ours, theirs = socket.socketpair()
        path = f"{self._sockets.name}/{role}-{self._started}"
        setting = {**self._setting, "role": role, "control": theirs.fileno(), "path": path}
        process = subprocess.Popen(
            [sys.executable, "-m", "dsv3.serve.peer", json.dumps(setting)],
            pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL,
        )  # fmt: skip
        theirs.close()
        return Peer(role, process, Channel(ours, f"the {role} process"), path, time.monotonic())

    def _ask(self, prompt: list[int], params: SamplingParams) -> Request:
        if params.seed is None:
            params = replace(params, seed=secrets.randbits(62))
        self._asked += 1
        request = Request(self._asked, prompt, [PREFILL] * params.n, [None] * params.n)
        self._requests[request.number] = request
        told = {"kind": "ask", "id": request.number, "prompt": prompt, "params": asdict(params)}
        self._touch(PREFILL)
        self._peers[PREFILL].channel.send({**told, "to": self._peers[DECODE].path})
        return request

    def _drop(self, request: Request) -> None:
        """Forget a request; whoever works on it stops."""
        if self._requests.pop(request.number, None) is not None and not request.finished:
            for peer in self._peers.values():
                peer.channel.send({"kind": "abort", "id": request.number})
                with suppress(Broken):  # seen at the next turn
                    peer.channel.flush()

    def _holds(self, role: str) -> bool:
        here = {PREFILL} if role == PREFILL else {HANDED, DECODE}
        return any(here & set(request.places) for request in self._requests.values())

    def _touch(self, role: str) -> None:
        """Silence counts from here if the process had no work before."""
        if role in self._peers and not self._holds(role):
            self._peers[role].heard = time.monotonic()

    def _turn(self) -> None:
        """Pass on what there is to say, and hear what there is to hear, within a tenth of a second."""
        wait([peer.channel for peer in self._peers.values()], min(0.1, self.timeout / 4))
        for peer in list(self._peers.values()):
            try:
                peer.channel.flush()
                for frame in peer.channel.receive():
                    peer.heard = time.monotonic()
                    self._hear(peer, frame.message)
            except Broken:
                self._lose(peer, _end(peer.process, patience=1.0))
        for peer in list(self._peers.values()):
            if peer.ready and self._holds(peer.role) and time.monotonic() - peer.heard > self.timeout:
                _end(peer.process)
                self._lose(peer, f"has said nothing for {self.timeout:g} s and was ended")

    def _hear(self, peer: Peer, message: dict[str, Any]) -> None:
        kind = message["kind"]
        if kind == "ready":
            peer.ready = True
        elif kind == "state":
            peer.state = message
        elif kind == "unfit":
            self.close()
            raise (Failure if message["failure"] else UserError)(message["error"])
        elif kind == "broken":
            for request in list(self._requests.values()):
                if HANDED in request.places:
                    self._fail(request, Failure(f"a handover did not arrive: {message['error']}"))
        elif kind != "alive":
            meant = self._requests.get(message["id"])
            if meant is not None:
                self._hear_of(meant, message)
            elif kind in ("taken", "update"):  # it was given up while it travelled
                peer.channel.send({"kind": "abort", "id": message["id"]})

    def _hear_of(self, request: Request, message: dict[str, Any]) -> None:
        kind, index = message["kind"], message.get("index", 0)
        if kind == "handed":
            if request.places[index] == PREFILL:  # else the decode process was quicker to say so
                self._touch(DECODE)
                request.places[index] = HANDED
        elif kind == "taken":
            self._touch(DECODE)
            request.places[index] = DECODE
        elif kind == "refused":
            self._fail(request, UserError(message["error"]))
        elif kind == "lost":
            self._fail(request, Failure(f"an answer was lost on its way to decoding: {message['error']}"))
        elif kind == "update":
            if message["finish_reason"] is not None:
                request.places[index] = DONE
                request.usages[index] = Usage(**message["usage"])
            request.updates.append(_update(message, _total(request) if request.finished else None))

    def _fail(self, request: Request, trouble: UserError) -> None:
        request.trouble = trouble
        self._drop(request)

    def _lose(self, peer: Peer, what: str) -> None:
        peer.channel.close()
        del self._peers[peer.role]
        self._last_words = f"{peer} {what}"
        for request in list(self._requests.values()):
            held = sum(place in NEEDS[peer.role] for place in request.places)
            if held:
                self._fail(request, Failure(f"{self._last_words}; ask again, and it is started anew"))


def _end(process: subprocess.Popen[bytes], patience: float = 0.0) -> str:
    """Make sure that a process has ended, of its own within ``patience`` seconds or not; how it did."""
    try:
        code = process.wait(patience)
    except subprocess.TimeoutExpired:
        process.kill()
        code = process.wait()
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


def _update(message: dict[str, Any], usage: Usage | None) -> Update:
    return Update(
        str(message["id"]), message["index"], message["token_ids"], message["text"],
        logprobs_from_json(message["logprobs"]), message["finish_reason"], usage,
        logprobs_from_json(message["prompt_logprobs"]),
    )  # fmt: skip


def _total(request: Request) -> Usage:
    """Of all answers; the prompt is counted once, as the first answer found it."""
    usages = [usage for usage in request.usages if usage is not None]
    return replace(
        usages[0],
        completion_tokens=sum(usage.completion_tokens for usage in usages),
        drafted=sum(usage.drafted for usage in usages),
        accepted=sum(usage.accepted for usage in usages),
    )


def _output(request: Request) -> Output:
    completions = []
    for index in range(len(request.places)):
        mine = [update for update in request.updates if update.index == index]
        reason = mine[-1].finish_reason
        assert reason is not None
        completions.append(
            Completion(
                "".join(update.text for update in mine),
                [token for update in mine for token in update.token_ids],
                [logprob for update in mine for logprob in update.logprobs],
                reason,
            )
        )
    scores = next((update.prompt_logprobs for update in request.updates if update.prompt_logprobs), [])
    return Output(request.prompt, completions, _total(request), scores)
