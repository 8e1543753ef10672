"""What stands before the endpoints: who may ask, how much may be sent, how long a client may stand still."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import os
from collections.abc import Collection, Sequence
from pathlib import Path

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dsv3.common.errors import UserError
from dsv3.serve.api.errors import ApiError

KEY_VARIABLE = "DSV3_API_KEY"


def read_keys(file: Path | None) -> list[str]:
    """API keys: one a line of ``file`` (# begins a comment), and ``DSV3_API_KEY``, commas between several."""
    keys = [key.strip() for key in os.environ.get(KEY_VARIABLE, "").split(",")]
    if file is not None:
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--api-key-file ({file}) cannot be read: {error}") from None
        found = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
        if not found:
            raise UserError(f"--api-key-file ({file}) holds no key; write one a line")
        keys += found
    return [key for key in keys if key]


class StalledError(Exception):
    """A client took nothing of its answer for too long."""


class Limits:
    """Checks the key, counts the body's bytes as they come, and drops a client that stands still.

    ``free``: paths that need no key.
    """

    def __init__(
        self, app: ASGIApp, keys: Sequence[str], free: Collection[str], max_body: int, stall_seconds: float
    ):
        self._app, self._free = app, frozenset(free)
        self._keys = [hashlib.sha256(key.encode()).digest() for key in keys]
        self._max_body, self._stall = max_body, stall_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        if scope["path"] not in self._free and not self._known(headers.get("authorization", "")):
            refusal = ApiError(
                401, "no valid API key: send the header Authorization: Bearer KEY", code="invalid_api_key"
            )
            await refusal.response()(scope, receive, send)
            return
        too_large = f"the body is larger than {self._max_body} bytes"
        declared = headers.get("content-length", "0")
        if not declared.isdecimal() or len(declared) > 18 or int(declared) > self._max_body:
            await ApiError(413, too_large).response()(scope, receive, send)
            return
        got, whole = 0, False

        async def counted() -> Message:
            nonlocal got, whole
            if whole:
                return await receive()  # waits until the client goes away
            try:
                async with asyncio.timeout(self._stall):
                    message = await receive()
            except TimeoutError:
                raise HTTPException(408, "the body did not come in time") from None
            got += len(message.get("body", b""))
            whole = not message.get("more_body", False)
            if got > self._max_body:
                raise HTTPException(413, too_large)
            return message

        async def hurried(message: Message) -> None:
            try:
                async with asyncio.timeout(self._stall):
                    await send(message)
            except TimeoutError:
                raise StalledError(f"the client read nothing for {self._stall} seconds") from None

        await self._app(scope, counted, hurried)

    def _known(self, authorization: str) -> bool:
        """Compares with every key in constant time, so that the time taken tells nothing of any."""
        if not self._keys:
            return True
        scheme, _, key = authorization.partition(" ")
        digest = hashlib.sha256(key.strip().encode()).digest()
        found = False
        for known in self._keys:
            found |= hmac.compare_digest(digest, known)
        return found and scheme.lower() == "bearer"
