"""The two processes behind :class:`dsv3.serve.disaggregated.Disaggregated`: one reads prompts, one answers.

Each is an engine in a loop: hear the front, move handovers along, compute a step, say what came of it. It
ends when the front hangs up. Messages, by ``kind`` (``id`` is the request, ``index`` its answer):

    front to prefill    ask (prompt, params, to: the decode process's socket), abort, state
    front to decode     abort, state
    prefill to decode   a handover, with its arrays as payload
    either to front     ready or unfit, alive (while there is work), update, state, lost (of one answer)
    prefill to front    refused, handed (the system has all of it)
    decode to front     taken (all of it has arrived), broken (what is on its way is lost)

Only one process speaks of an answer's tokens: prefill if they end there, else decode, first token included.
"""

from __future__ import annotations

import json
import signal
import socket
import sys
import time
from abc import ABC, abstractmethod
from collections import deque
from dataclasses import asdict
from typing import Any

from dsv3.common.errors import Failure, UserError
from dsv3.serve.channel import SMALL, Broken, Channel, HungUp, wait
from dsv3.serve.engine import Engine
from dsv3.serve.handover import Handover, from_wire, give, logprobs_to_json, params_of, take, to_wire
from dsv3.serve.llm import LLM
from dsv3.serve.sequence import Sequence
from dsv3.serve.updates import Update, usage_of

BACKLOG = 2**28  # bytes of handovers not yet sent, from which on no further prompt is computed


class Peer(ABC):
    """What both have in common. ``timeout``: seconds after which a standing transfer is given up."""

    def __init__(self, engine: Engine, control: Channel, timeout: float):
        self.engine, self.control, self.timeout = engine, control, timeout
        self.alive_every = min(1.0, timeout / 4)

    def run(self) -> None:
        """Work until the front hangs up (:class:`Broken`)."""
        said = 0.0
        while True:
            stepping = self.engine.busy and self.may_step()
            wait([self.control, *self.connections()], 0 if stepping else self.alive_every, self.listener())
            for frame in self.control.receive():
                self.hear(frame.message)
            self.transfer()
            if self.engine.busy and self.may_step():
                for update in self.engine.step():
                    self.tell(update)
            if (self.engine.busy or self.moving) and time.monotonic() - said > self.alive_every:
                self.control.send({"kind": "alive"})
                said = time.monotonic()
            self.control.flush()

    def hear(self, message: dict[str, Any]) -> None:
        """What the front wants."""
        if message["kind"] == "state":
            self.control.send(
                {
                    "kind": "state",
                    "blocks_used": self.engine.blocks.used,
                    "requests": len(self.engine.requests),
                    "moving": self.moving,
                    "bytes_pending": sum(channel.pending for channel in self.connections()),
                }
            )

    def update(self, key: str, new: Update) -> None:
        """Say what has been added to an answer."""
        number, index = split(key)
        told = {field: getattr(new, field) for field in ("token_ids", "text", "finish_reason")}
        for field in ("logprobs", "prompt_logprobs"):
            told[field] = logprobs_to_json(getattr(new, field))
        told["usage"] = new.usage and asdict(new.usage)
        self.control.send({**told, "kind": "update", "id": number, "index": index})

    @property
    @abstractmethod
    def moving(self) -> int:
        """Handovers on their way."""

    def may_step(self) -> bool:
        """Whether the engine may go on."""
        return True

    def listener(self) -> socket.socket | None:
        """Where connections come in."""
        return None

    @abstractmethod
    def connections(self) -> list[Channel]:
        """To or from the other process."""

    @abstractmethod
    def transfer(self) -> None:
        """Move handovers along."""

    @abstractmethod
    def tell(self, update: Update) -> None:
        """A step has added to an answer."""


def key_of(number: int, index: int) -> str:
    """The name of one answer of a request."""
    return f"{number}.{index}"


def split(key: str) -> tuple[int, int]:
    """The request and the answer of a name."""
    number, _, index = key.partition(".")
    return int(number), int(index)


class Prefill(Peer):
    """Reads prompts and chooses the first token; then the answer goes to the decode process."""

    def __init__(self, engine: Engine, control: Channel, timeout: float):
        super().__init__(engine, control, timeout)
        self.asked: dict[str, list[Sequence]] = {}
        self.path = ""
        self.data: Channel | None = None
        self.frames = 0  # queued on it
        self.sending: deque[tuple[int, str]] = deque()  # number of the frame, name of the answer

    @property
    def moving(self) -> int:
        """Handovers not wholly sent."""
        return len(self.sending)

    def may_step(self) -> bool:
        """Not while too much waits to be sent."""
        return self.data is None or self.data.pending < BACKLOG

    def connections(self) -> list[Channel]:
        """To the decode process."""
        return [] if self.data is None else [self.data]

    def hear(self, message: dict[str, Any]) -> None:
        """See :class:`Peer`."""
        super().hear(message)
        request = str(message.get("id"))
        if message["kind"] == "ask":
            if message["to"] != self.path:  # a new decode process
                self._hang_up("the decode process was replaced")
                self.path = message["to"]
            try:
                self.engine.add_request(message["prompt"], params_of(message["params"]), request)
            except UserError as error:
                self.control.send({"kind": "refused", "id": message["id"], "error": str(error)})
            else:
                self.asked[request] = self.engine.requests[request]
        elif message["kind"] == "abort":
            self.engine.abort(request)
            self.asked.pop(request, None)

    def tell(self, update: Update) -> None:
        """An answer has its first token: it goes, unless that was all."""
        sequence = self.asked[update.request_id][update.index]
        key = key_of(int(update.request_id), update.index)
        if sequence.finished:
            self.update(key, whole(sequence))
        else:
            self._send(key, take(self.engine, sequence))
        if all(other.finished for other in self.asked[update.request_id]):
            self.engine.abort(update.request_id)
            del self.asked[update.request_id]

    def _send(self, key: str, handover: Handover) -> None:
        if self.data is None:
            connection = socket.socket(socket.AF_UNIX)
            try:
                connection.connect(self.path)
            except OSError as error:
                connection.close()
                self._lost(key, f"the decode process does not answer: {error.strerror}")
                return
            self.data, self.frames = Channel(connection, "the decode process"), 0
        message, parts = to_wire(handover)
        self.data.send({**message, "key": key}, parts)
        self.frames += 1
        self.sending.append((self.frames, key))

    def transfer(self) -> None:
        """See :class:`Peer`."""
        if self.data is None:
            return
        try:
            self.data.flush()
            self.data.receive()  # it says nothing, but may hang up
            if self.data.stalled > self.timeout:
                raise Broken(f"the decode process has taken nothing for {self.timeout:g} s")
        except Broken as error:
            self._hang_up(str(error))
            return
        while self.sending and self.sending[0][0] <= self.data.sent:
            number, index = split(self.sending.popleft()[1])
            self.control.send({"kind": "handed", "id": number, "index": index})

    def _hang_up(self, reason: str) -> None:
        if self.data is not None:
            self.data.close()
            self.data = None
        while self.sending:
            self._lost(self.sending.popleft()[1], reason)

    def _lost(self, key: str, reason: str) -> None:
        number, index = split(key)
        self.control.send({"kind": "lost", "id": number, "index": index, "error": reason})


class Decode(Peer):
    """Takes answers over, each when there is room for it, and goes on with them together."""

    def __init__(self, engine: Engine, control: Channel, timeout: float, path: str):
        super().__init__(engine, control, timeout)
        self.door = socket.socket(socket.AF_UNIX)
        self.door.bind(path)
        self.door.listen()
        self.door.setblocking(False)
        self.incoming: list[Channel] = []
        self.waiting: deque[tuple[str, Handover]] = deque()
        cache = engine.cache.nbytes + (engine.drafter.ends.nbytes if engine.drafter else 0)
        self.largest = cache + SMALL + 4 * engine.vocab_size * engine.options.draft_tokens

    @property
    def moving(self) -> int:
        """Handovers that have arrived and wait for room."""
        return len(self.waiting)

    def listener(self) -> socket.socket | None:
        """Where the prefill process, also a new one, comes in."""
        return self.door

    def connections(self) -> list[Channel]:
        """From prefill processes."""
        return self.incoming

    def hear(self, message: dict[str, Any]) -> None:
        """See :class:`Peer`."""
        super().hear(message)
        if message["kind"] == "abort":
            request = message["id"]
            for key in [key for key in self.engine.requests if split(key)[0] == request]:
                self.engine.abort(key)
            self.waiting = deque(item for item in self.waiting if split(item[0])[0] != request)

    def transfer(self) -> None:
        """See :class:`Peer`."""
        try:
            while True:
                connection, _ = self.door.accept()
                self.incoming.append(Channel(connection, "the prefill process", self.largest))
        except BlockingIOError:
            pass
        for channel in list(self.incoming):
            try:
                for frame in channel.receive():
                    self._arrived(frame.message["key"], from_wire(frame.message, frame.payload))
                if channel.stalled > self.timeout:
                    raise Broken(f"the prefill process has sent nothing more for {self.timeout:g} s")
            except HungUp:  # no "handed" was said of what is cut off
                self._close(channel)
            except Failure as error:
                self._close(channel)
                self.control.send({"kind": "broken", "error": str(error)})
        while self.waiting:
            key, handover = self.waiting[0]
            number, index = split(key)
            try:
                sequence = give(self.engine, handover, key)
            except UserError as error:
                self.waiting.popleft()
                self.control.send({"kind": "lost", "id": number, "index": index, "error": str(error)})
                continue
            if sequence is None:
                return
            self.waiting.popleft()
            self.update(key, whole(sequence))

    def _close(self, channel: Channel) -> None:
        channel.close()
        self.incoming.remove(channel)

    def _arrived(self, key: str, handover: Handover) -> None:
        number, index = split(key)
        self.control.send({"kind": "taken", "id": number, "index": index})
        self.waiting.append((key, handover))

    def tell(self, update: Update) -> None:
        """See :class:`Peer`."""
        self.update(update.request_id, update)


def whole(sequence: Sequence) -> Update:
    """Everything of an answer so far, as one update."""
    usage = usage_of([sequence]) if sequence.finished else None
    return Update(
        sequence.request_id, sequence.index, sequence.answer, sequence.text.text, sequence.logprobs,
        sequence.finish_reason, usage, sequence.prompt_logprobs or [],
    )  # fmt: skip


def main() -> None:
    """Run as ``python -m dsv3.serve.peer SETTING``, by the front only."""
    setting = json.loads(sys.argv[1])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the front's: it hangs up
    control = Channel(socket.socket(fileno=setting["control"]), "the front")
    try:
        engine = LLM(setting["folder"], **setting["model"], **setting["options"]).engine
    except UserError as error:
        control.send({"kind": "unfit", "error": str(error), "failure": isinstance(error, Failure)})
        control.flush()
        return
    timeout = setting["timeout"]
    peer: Peer
    if setting["role"] == "prefill":
        peer = Prefill(engine, control, timeout)
    else:
        peer = Decode(engine, control, timeout, setting["path"])
    control.send({"kind": "ready"})
    try:
        peer.run()
    except Broken:
        return


if __name__ == "__main__":
    main()
