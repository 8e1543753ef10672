"""A server of the page whose answers are scripted, so that a test of the page needs no model.

What it answers is chosen by the first word of the last message: ``slow``, ``code``, ``hostile``, ``think``,
``cut``, ``busy``, ``fails``, anything else.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from dsv3.serve import page

HOSTILE = (
    "<img src=x onerror=\"document.title='owned'\"> <script>document.title='owned'</script>\n\n"
    "```html\n<script>document.title='owned'</script>\n```\n"
    "- <svg onload=\"document.title='owned'\">\n"
    "**<b id=owned>bold</b>** [a](javascript:alert(1)) ![b](http://example.invalid/x.png)"
)
CODE = (
    "A **list**:\n\n- one `x`\n  - inner\n- two\n\n```python\ndef f(__init__):\n    return 1\n```\n"
    + "wide " * 60
)


class FakeApi(ThreadingHTTPServer):
    """``requests``: bodies of chat requests; ``gone``: a client hung up; ``key``: wanted, if not empty."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.requests: list[dict[str, Any]] = []
        self.gone = threading.Event()
        self.key = ""
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/"


class _Handler(BaseHTTPRequestHandler):
    server: FakeApi

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _send(self, status: int, type_: str, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {
            "Content-Type": type_,
            "Content-Length": str(len(body)),
            **(headers or {}),
        }.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def _error(self, status: int, message: str, headers: dict[str, str] | None = None) -> None:
        body = json.dumps({"error": {"message": message, "type": "x", "param": None, "code": None}})
        self._send(status, "application/json", body.encode(), headers)

    def _locked(self) -> bool:
        wanted = self.server.key
        if not wanted or self.headers.get("Authorization") == f"Bearer {wanted}":
            return False
        self._error(401, "API key missing or unknown")
        return True

    def do_GET(self) -> None:
        found = page.files().get(self.path)
        if found:
            self._send(200, found[0], found[1], page.HEADERS)
        elif self.path == "/v1/models":
            if not self._locked():
                models = {"object": "list", "data": [{"id": "fake", "object": "model"}]}
                self._send(200, "application/json", json.dumps(models).encode())
        else:
            self._error(404, "no such page")

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self._locked():
            return
        self.server.requests.append(body)
        said = body["messages"][-1]["content"].split()[0]
        if said == "busy":
            self._error(429, "Too many requests at once.", {"Retry-After": "7"})
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        try:
            for event in self._answer(said, len(self.server.requests)):
                self.wfile.write(f"data: {event}\n\n".encode())
                self.wfile.flush()
        except (BrokenPipeError, ConnectionResetError):
            self.server.gone.set()

    def _answer(self, said: str, count: int) -> Iterator[str]:
        def part(finish: str | None = None, **delta: str) -> str:
            return json.dumps({"choices": [{"index": 0, "delta": delta, "finish_reason": finish}]})

        yield part(role="assistant")
        if said == "slow":
            for i in range(400):
                yield part(content=f"w{i} ")
                time.sleep(0.05)
        elif said == "think":
            yield part(reasoning_content="Let me see.")
            time.sleep(0.3)
            yield part(content="Seen.")
        elif said in ("hostile", "code"):
            text = {"hostile": HOSTILE, "code": CODE}[said]
            for i in range(0, len(text), 7):
                yield part(content=text[i : i + 7])
        else:
            yield part(content=f"Answer {count}")
            time.sleep(0.2)  # read as two pieces, even by a slow browser
            yield part(content=f" to {said}.")
        if said == "cut":
            return
        if said == "fails":
            yield json.dumps({"error": {"message": "the model gave up", "type": "server_error"}})
            return
        yield part(finish="stop")
        usage = {
            "prompt_tokens": 30,
            "prompt_cache_hit_tokens": 16,
            "prompt_cache_miss_tokens": 14,
            "completion_tokens": 12,
            "total_tokens": 42,
            "completion_tokens_details": {
                "accepted_prediction_tokens": 3,
                "rejected_prediction_tokens": 1,
                "reasoning_tokens": 5 if said == "think" else 0,
            },
        }
        yield json.dumps({"choices": [], "usage": usage})
        yield "[DONE]"
