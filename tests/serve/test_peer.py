"""The decode process's loop, in this process: what comes in broken is dropped, and nobody else notices."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from dsv3.serve.channel import Channel, encode
from dsv3.serve.engine import Engine
from dsv3.serve.handover import take, to_wire
from dsv3.serve.params import SamplingParams
from dsv3.serve.peer import Decode
from tests.serve.test_handover import WISH, engine, stayed, step_until_it_answers
from tests.serve.test_schedules import beginning

PROMPT = list(beginning(0)[:40])


class Bench:
    """A decode loop, turned by hand, with both ends of what it talks to."""

    def __init__(self, folder: str, timeout: float = 30.0, blocks: int = 16):
        front, control = socket.socketpair()
        self.path = str(Path(folder) / "door")
        self.front = Channel(front, "decode")
        self.decode = Decode(engine(1, blocks=blocks), Channel(control, "front"), timeout, self.path)

    def connect(self) -> socket.socket:
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(self.path)
        return connection

    def turn(self) -> list[dict[str, Any]]:
        """A round of its loop; what it says to the front."""
        for frame in self.decode.control.receive():
            self.decode.hear(frame.message)
        self.decode.transfer()
        if self.decode.engine.busy:
            for update in self.decode.engine.step():
                self.decode.tell(update)
        self.decode.control.flush()
        return [frame.message for frame in self.front.receive()]

    def close(self) -> None:
        for channel in (self.front, self.decode.control, *self.decode.incoming):
            channel.close()
        self.decode.door.close()


@pytest.fixture
def bench() -> Iterator[Bench]:
    with TemporaryDirectory() as folder:
        bench = Bench(folder)
        yield bench
        assert bench.decode.engine.blocks.used == 0 and not bench.decode.waiting
        bench.close()


def frame(key: str, prompt: list[int] = PROMPT, params: SamplingParams = WISH, drafts: int = 1) -> bytes:
    one: Engine = engine(drafts)
    message, parts = to_wire(take(one, step_until_it_answers(one, prompt, params, 0)))
    return b"".join(encode({**message, "key": key}, parts))


def answer(bench: Bench) -> list[int]:
    """Of request 1, once it has ended."""
    found: list[int] = []
    for _ in range(50):
        for said in bench.turn():
            if said["kind"] == "update" and said["id"] == 1:
                found += said["token_ids"]
                if said["finish_reason"]:
                    return found
    raise AssertionError("it never ended")


def test_an_answer_goes_on(bench: Bench) -> None:
    prefill = bench.connect()
    prefill.sendall(frame("1.0"))
    assert [said["kind"] for said in bench.turn()[:2]] == ["taken", "update"]
    rest = answer(bench)
    assert rest == stayed(tuple(PROMPT), None, 1, "float32").answer[-len(rest) :]
    prefill.close()


@pytest.mark.parametrize("damage", ["checksum", "magic", "cut", "rows"])
def test_what_comes_broken_is_dropped(bench: Bench, damage: str) -> None:
    data = bytearray(frame("0.0"))
    if damage == "checksum":
        data[-1] ^= 1
    elif damage == "magic":
        data[0] ^= 1
    elif damage == "cut":
        del data[-1]
    else:
        one = engine(1)
        message, parts = to_wire(take(one, step_until_it_answers(one, PROMPT, WISH, 0)))
        data = bytearray(b"".join(encode({**message, "key": "0.0"}, [*parts, memoryview(b"1234")])))
    prefill = bench.connect()
    prefill.sendall(bytes(data))
    if damage == "cut":
        prefill.close()
    said = bench.turn()
    # Of what was cut off nothing was promised; the prefill process's own death tells the front.
    assert [one["kind"] for one in said] == ([] if damage == "cut" else ["broken"])
    assert not bench.decode.incoming and not bench.decode.engine.busy
    again = bench.connect()
    again.sendall(frame("1.0"))
    assert answer(bench)
    for connection in (prefill, again):
        connection.close()


def test_a_transfer_that_stands_still_is_given_up() -> None:
    with TemporaryDirectory() as folder:
        bench = Bench(folder, timeout=0.05)
        prefill = bench.connect()
        prefill.sendall(frame("0.0")[:-1])
        assert bench.turn() == []
        time.sleep(0.1)
        (said,) = bench.turn()
        assert said["kind"] == "broken" and "has sent nothing more for 0.05 s" in said["error"]
        assert not bench.decode.incoming
        prefill.close()
        bench.close()


def test_an_answer_of_another_kind_of_engine_is_lost_alone(bench: Bench) -> None:
    prefill = bench.connect()
    prefill.sendall(frame("0.0", drafts=0) + frame("1.0"))
    said = bench.turn()
    assert [one["kind"] for one in said[:3]] == ["taken", "taken", "lost"]
    assert (said[2]["id"], said[2]["index"]) == (0, 0) and "layers 2" in said[2]["error"]
    assert answer(bench)
    prefill.close()


def test_aborted_while_it_waits_for_room_or_runs() -> None:
    with TemporaryDirectory() as folder:
        bench = Bench(folder, blocks=6)
        prefill = bench.connect()
        long = replace(WISH, max_tokens=25)
        for number, length in enumerate((40, 45, 40)):
            prefill.sendall(frame(f"{number}.0", list(beginning(number % 2)[:length]), long))
        bench.turn()
        assert (len(bench.decode.engine.requests), bench.decode.moving) == (1, 2)
        bench.front.send({"kind": "abort", "id": 0})
        bench.front.send({"kind": "abort", "id": 2})
        bench.front.flush()
        bench.turn()
        assert (list(bench.decode.engine.requests), bench.decode.moving) == (["1.0"], 0)
        assert answer(bench)
        assert bench.decode.engine.blocks.used == 0
        prefill.close()
        bench.close()
