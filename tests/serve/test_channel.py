"""Frames over a socket: whole or not at all, whatever the system does with them."""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Iterator

import pytest

from dsv3.serve.channel import HEADER, MAGIC, VERSION, Broken, Channel, Frame, encode, wait


@pytest.fixture
def ends() -> Iterator[tuple[Channel, Channel]]:
    left, right = socket.socketpair()
    pair = Channel(left, "right"), Channel(right, "left", largest=2**24)
    yield pair
    for channel in pair:
        channel.close()


def pump(sender: Channel, receiver: Channel) -> list[Frame]:
    found: list[Frame] = []
    while sender.pending or not found:
        sender.flush()
        wait([receiver], 0.1)
        found += receiver.receive()
    return found


def raw(channel: Channel, data: bytes) -> None:
    channel.socket.sendall(data)


def test_messages_arrive_as_they_were_sent(ends: tuple[Channel, Channel]) -> None:
    left, right = ends
    blob = bytes(range(256)) * 5000  # more than the system takes at once
    left.send({"a": 1})
    left.send({"b": "日本 🙂", "c": [1.5, None]}, [memoryview(blob), memoryview(b""), memoryview(b"xyz")])
    left.send({})
    left.flush()
    assert left.pending and left.sent == 1 and left.stalled < 5
    first, second, third = pump(left, right)
    assert (first.message, len(first.payload)) == ({"a": 1}, 0)
    assert second.message == {"b": "日本 🙂", "c": [1.5, None]} and bytes(second.payload) == blob + b"xyz"
    assert third.message == {} and left.sent == 3
    assert right.receive() == [] and left.stalled == right.stalled == 0


def test_what_is_half_way_is_seen_to_stall(ends: tuple[Channel, Channel]) -> None:
    left, right = ends
    whole = b"".join(encode({"a": 1}))
    raw(left, whole[:40])
    assert right.receive() == []
    time.sleep(0.02)
    assert right.stalled >= 0.02
    raw(left, whole[40:])
    assert right.receive()[0].message == {"a": 1} and right.stalled == 0


def test_the_end_comes_after_what_was_sent(ends: tuple[Channel, Channel]) -> None:
    left, right = ends
    left.send({"last": True})
    left.flush()
    left.close()
    assert right.receive()[0].message == {"last": True}
    with pytest.raises(Broken, match=r"^left closed the connection$"):
        right.receive()
    with pytest.raises(Broken, match="left does not take what it is sent"):
        for _ in range(2):
            right.send({})
            right.flush()


def test_an_end_in_the_middle_of_a_message(ends: tuple[Channel, Channel]) -> None:
    left, right = ends
    raw(left, b"".join(encode({"a": 1}, [memoryview(b"1234")]))[:-1])
    left.close()
    with pytest.raises(Broken, match="in the middle of a message"):
        right.receive()


@pytest.mark.parametrize(
    ("place", "words"),
    [
        (0, "what is no frame"),
        (8, f"speaks version {VERSION + 1} of the format, this process {VERSION}"),
        (HEADER.size + 1, "do not match their checksum"),
        (-1, "do not match their checksum"),
        (24, "do not match their checksum"),
    ],
)
def test_damage_is_found(ends: tuple[Channel, Channel], place: int, words: str) -> None:
    left, right = ends
    data = bytearray(b"".join(encode({"a": 1}, [memoryview(b"1234")])))
    data[place] += 1
    raw(left, bytes(data))
    for _ in range(2):  # and it stays broken
        with pytest.raises(Broken, match=words):
            right.receive()


def test_a_frame_that_is_too_large_is_refused_before_memory_is_taken(ends: tuple[Channel, Channel]) -> None:
    left, right = ends
    raw(left, HEADER.pack(MAGIC, VERSION, 0, 64, 2**50, 0))
    with pytest.raises(Broken, match="16777216 is the limit"):
        right.receive()


def test_the_header_is_what_the_docstring_says() -> None:
    head = bytes(encode({"a": 1}, [memoryview(b"1234")])[0])
    assert head[:8] == b"dsv3wire" and struct.unpack("<HHIQ", head[8:24]) == (1, 0, 64, 4)
    assert head[HEADER.size :].rstrip() == b'{"a": 1}' and len(head) == HEADER.size + 64
