"""Messages between the processes of a split engine: framed, versioned, checksummed, never waiting.

A frame is a header, a JSON message and a payload of bytes (the numbers of arrays). Little-endian header:

    8 bytes  magic         b"dsv3wire"
    2        version       of this format and of what the messages mean
    2        zero
    4        JSON length   a multiple of 64, padded by spaces, so that arrays lie well
    8        payload length
    4        CRC-32        of JSON and payload

Reading and writing take what the socket has or accepts and return: a process that talks to two others must
never stand still for one of them. What is half-way shows in :attr:`Channel.stalled`.
"""

from __future__ import annotations

import json
import select
import socket
import struct
import time
import zlib
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dsv3.common.errors import Failure

MAGIC, VERSION = b"dsv3wire", 1
HEADER = struct.Struct("<8sHHIQI")
ALIGNMENT = 64
SMALL = 64 * 2**20  # bytes of a message without cache rows, at most


class Broken(Failure):
    """What the other end says is not to be understood, or it is gone: nothing more comes of this channel."""


class HungUp(Broken):
    """The other end is gone."""


@dataclass(frozen=True)
class Frame:
    """A message, and the bytes that came with it (empty for most)."""

    message: dict[str, Any]
    payload: memoryview


def encode(message: dict[str, Any], parts: Sequence[memoryview] = ()) -> list[memoryview]:
    """The bytes of a frame, in pieces; ``parts`` (flat, of bytes) are not copied."""
    text = json.dumps(message).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    checksum = zlib.crc32(text)
    for part in parts:
        checksum = zlib.crc32(part, checksum)
    header = HEADER.pack(MAGIC, VERSION, 0, len(text), sum(map(len, parts)), checksum)
    return [memoryview(header + text), *(part for part in parts if len(part))]


class Channel:
    """One end of a connection. ``name`` of the other end, for errors; ``largest`` frame taken, in bytes."""

    def __init__(self, connection: socket.socket, name: str, largest: int = SMALL):
        connection.setblocking(False)
        self.socket, self.name, self.largest = connection, name, largest
        self.pending = 0  # bytes accepted by send() and not yet by the system
        self.sent = 0  # frames wholly with the system
        self._out: deque[list[memoryview]] = deque()
        self._moved = time.monotonic()
        self._header: tuple[int, int, int] | None = None
        self._expect(HEADER.size)

    def fileno(self) -> int:
        """For ``select``."""
        return self.socket.fileno()

    @property
    def stalled(self) -> float:
        """Seconds for which nothing has moved of a frame that is half-way; 0 if none is."""
        half_way = self._out or self._at or self._header is not None
        return time.monotonic() - self._moved if half_way else 0.0

    def send(self, message: dict[str, Any], parts: Sequence[memoryview] = ()) -> None:
        """Queue a frame; :meth:`flush` writes it. The parts must stay as they are until then."""
        pieces = encode(message, parts)
        if not self._out:
            self._moved = time.monotonic()
        self._out.append(pieces)
        self.pending += sum(map(len, pieces))

    def flush(self) -> None:
        """Write as much as the system takes. :class:`HungUp` if the other end is gone."""
        try:
            while self._out:
                pieces = self._out[0]
                count = self.socket.send(pieces[0])
                self._moved = time.monotonic()
                self.pending -= count
                pieces[0] = pieces[0][count:]
                if not pieces[0]:
                    del pieces[0]
                if not pieces:
                    self._out.popleft()
                    self.sent += 1
        except BlockingIOError:
            return
        except OSError as error:
            raise HungUp(f"{self.name} does not take what it is sent: {error.strerror}") from None

    def receive(self) -> list[Frame]:
        """The frames that are complete by now.

        :class:`Broken` if the other end is gone or sends what is no frame, once the frames before are taken.
        """
        found: list[Frame] = []
        try:
            while True:
                if self._at == len(self._buffer):
                    found += self._complete()
                    continue
                count = self.socket.recv_into(self._buffer[self._at :])
                if not count:
                    middle = " in the middle of a message" if self._at or self._header else ""
                    raise HungUp(f"{self.name} closed the connection{middle}")
                self._moved = time.monotonic()
                self._at += count
        except BlockingIOError:
            return found
        except OSError as error:
            trouble: Broken = HungUp(f"{self.name} cannot be heard: {error.strerror}")
        except Broken as error:
            trouble = error
        if not found:
            raise trouble
        return found  # the trouble is still there at the next call

    def close(self) -> None:
        """Hang up; what was not sent is dropped."""
        self.socket.close()

    def _expect(self, size: int) -> None:
        self._buffer = np.empty(size, dtype=np.uint8).data  # not zeroed: it may be large
        self._at = 0

    def _complete(self) -> list[Frame]:
        if self._header is None:
            magic, version, _, text, payload, checksum = HEADER.unpack(self._buffer)
            if magic != MAGIC:
                raise Broken(f"{self.name} sends what is no frame: it begins with {magic!r}")
            if version != VERSION:
                raise Broken(f"{self.name} speaks version {version} of the format, this process {VERSION}")
            if text + payload > self.largest:
                raise Broken(f"{self.name} announces {text + payload} bytes; {self.largest} is the limit")
            self._header = text, payload, checksum
            self._expect(text + payload)
            return []
        text, _, checksum = self._header
        if zlib.crc32(self._buffer) != checksum:
            raise Broken(f"{self.name} sent {len(self._buffer)} bytes that do not match their checksum")
        frame = Frame(json.loads(bytes(self._buffer[:text])), self._buffer[text:])
        self._header = None
        self._expect(HEADER.size)
        return [frame]


def wait(channels: Sequence[Channel], seconds: float, listener: socket.socket | None = None) -> None:
    """Return when something can be read or what is queued can be written, or after ``seconds``."""
    readers: list[Any] = [*channels, *([] if listener is None else [listener])]
    select.select(readers, [channel for channel in channels if channel.pending], [], max(0.0, seconds))
