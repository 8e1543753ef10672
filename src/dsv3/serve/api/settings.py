"""How the server behaves; how the engine runs is in :class:`dsv3.serve.options.Options`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dsv3.common.errors import UserError


@dataclass(frozen=True)
class Settings:
    """``model_name``: what clients call the model. ``api_keys``: none: everybody may ask.

    ``max_queue``: answers that may wait while ``max_batch`` others are made; more are refused with 429.
    ``max_body``: bytes of a request. ``request_seconds``: an answer that takes longer is ended with what
    there is of it. ``stall_seconds``: how long a client may read, or send, nothing. ``drain_seconds``: how
    long open requests may go on after SIGTERM. ``cors_origins``: web sites whose pages may ask; ``*``: all.
    """

    model_name: str = "dsv3"
    api_keys: Sequence[str] = ()
    max_queue: int = 64
    max_body: int = 8 << 20
    request_seconds: float = 600.0
    stall_seconds: float = 30.0
    drain_seconds: float = 30.0
    cors_origins: Sequence[str] = ()

    def __post_init__(self) -> None:
        for name, least in (("max_queue", 0), ("max_body", 1024), ("request_seconds", 0.01)):
            if getattr(self, name) < least:
                raise UserError(f"{name} ({getattr(self, name)}) must be at least {least}")
        for name in ("stall_seconds", "drain_seconds"):
            if getattr(self, name) < 0:
                raise UserError(f"{name} ({getattr(self, name)}) must be 0 or more")
        for key in self.api_keys:
            if not key.isascii() or not key.isprintable() or " " in key or not key:
                raise UserError("api_keys: a key must be printable ASCII without spaces; write one a line")
        for origin in self.cors_origins:
            if origin != "*" and not origin.startswith(("http://", "https://")):
                raise UserError(f"cors_origins ({origin!r}) must be like https://example.org, or *")
