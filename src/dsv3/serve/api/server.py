"""A listening server: the port taken first, and a stop that lets open streams finish."""

from __future__ import annotations

import asyncio
import logging
import socket
from types import FrameType

import uvicorn
from fastapi import FastAPI

from dsv3.common.errors import UserError
from dsv3.serve.api.app import drain

log = logging.getLogger("dsv3.serve")


def bind(host: str, port: int) -> socket.socket:
    """A socket of that address, not listening yet; :class:`UserError` if it cannot be had."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        found = socket.socket(family, kind, protocol)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
    except OSError as error:
        raise UserError(
            f"--host ({host}) and --port ({port}) cannot be listened on: {error.strerror or error};"
            " choose another --port (0: any that is free)"
        ) from None
    return found


class Listener(uvicorn.Server):
    """Uvicorn, but the first SIGTERM or Ctrl-C drains; a second one ends at once."""

    def __init__(self, app: FastAPI, drain_seconds: float):
        super().__init__(
            uvicorn.Config(
                app, http="h11", ws="none", log_config=None, access_log=False, server_header=False,
                timeout_graceful_shutdown=2, lifespan="on",
            )
        )  # fmt: skip
        self._worker, self._seconds = app.state.worker, drain_seconds
        self._draining: asyncio.Task[None] | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal has come; runs between two instructions of the event loop's thread."""
        if self._worker.draining:
            self.should_exit = True
            return
        self._worker.draining = True
        asyncio.get_event_loop().call_soon_threadsafe(self._drain)

    def _drain(self) -> None:
        log.info("draining", extra={"open_answers": self._worker.open_answers, "seconds": self._seconds})
        self._draining = asyncio.get_running_loop().create_task(self._drained())

    async def _drained(self) -> None:
        await drain(self._worker, self._seconds)
        self.should_exit = True
