"""A library that judges what a model wrote, kept running inside the sandbox: its import is paid once.

Each request is answered by a fork of the server, so that what a text manages to run there changes no later
answer (at level ``filters`` no fork is allowed, and the server itself answers). A request out of time is
given up, from whatever thread it came; the server is started anew where it died.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sysconfig
import threading
import time
from contextlib import ExitStack
from typing import Any

from dsv3.evaluate.sandbox.run import MIB, Sandbox

# What runs inside, after a setup that defines ``answer(request)``.
LOOP = """
import json, os, select, signal, sys

def served(line):
    try:
        return json.dumps({"value": answer(json.loads(line))})
    except BaseException as error:
        return json.dumps({"error": f"{type(error).__name__}: {error}"[:500]})

def forked(line, seconds):
    ears, mouth = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(ears)
        data = served(line).encode()
        while data:
            data = data[os.write(mouth, data):]
        os._exit(0)
    os.close(mouth)
    said = b""
    while select.select([ears], [], [], seconds)[0]:
        piece = os.read(ears, 65536)
        if not piece:
            break
        said += piece
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(ears)
    return said.decode() or json.dumps({"error": "out of time"})

mouth = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # what libraries print is not an answer
print("ready", file=mouth, flush=True)
for line in sys.stdin:
    try:
        said = forked(line, SECONDS)
    except PermissionError:
        said = served(line)
    print(said.replace("\\n", " "), file=mouth, flush=True)
"""


class Service:
    """``setup`` is source that defines ``answer(request)``, JSON in and JSON out, with site-packages at hand.

    ``seconds`` bound one answer; the first also waits ``start`` for the imports.
    """

    def __init__(self, setup: str, seconds: float = 5.0, start: float = 120.0):
        self.seconds, self.start = seconds, start
        environment = "import os\nos.environ.update(OMP_NUM_THREADS='1', OPENBLAS_NUM_THREADS='1')\n"
        self.source = environment + setup + f"\nSECONDS = {seconds}\n" + LOOP
        folders = dict.fromkeys(sysconfig.get_path(name) for name in ("purelib", "platlib"))
        self.sandbox = Sandbox(seconds=1e6, memory=4096 * MIB, read=tuple(folders))
        self.lock = threading.Lock()
        self.stack: ExitStack | None = None
        self.process: subprocess.Popen[bytes] | None = None

    def ask(self, request: Any) -> Any:
        """The server's answer; None where it failed or took too long. Callable from any thread."""
        with self.lock:
            if self.process is None or self.process.poll() is not None:
                self.close()
                self.stack = ExitStack()
                self.process, _ = self.stack.enter_context(self.sandbox.started(self.source))
                assert self.process.stderr is not None
                threading.Thread(target=_drain, args=(self.process.stderr.fileno(),), daemon=True).start()
                if self._line(self.start) != "ready":
                    self.close()
                    return None
            assert self.process is not None and self.process.stdin is not None
            try:
                self.process.stdin.write(json.dumps(request).encode() + b"\n")
                self.process.stdin.flush()
                # Twice: the server itself gives a request up after `seconds`, and stays.
                said = self._line(2 * self.seconds + 1)
                return json.loads(said).get("value")
            except (OSError, ValueError, AttributeError):
                self.close()
                return None

    def _line(self, seconds: float) -> str:
        """One line of the server; empty when it is late, has ended, or says too much."""
        assert self.process is not None and self.process.stdout is not None
        until, said = time.monotonic() + seconds, b""
        descriptor = self.process.stdout.fileno()
        while not said.endswith(b"\n") and len(said) < MIB:
            left = until - time.monotonic()
            if left <= 0 or not select.select([descriptor], [], [], left)[0]:
                return ""
            piece = os.read(descriptor, 65536)
            if not piece:
                return ""
            said += piece
        return said.decode(errors="replace").strip()

    def close(self) -> None:
        """End the server and all it started."""
        stack, self.stack, self.process = self.stack, None, None
        if stack is not None:
            stack.close()


def _drain(descriptor: int) -> None:
    """Read and forget what the server's libraries print, lest the pipe fill up."""
    try:
        while os.read(descriptor, 65536):
            pass
    except OSError:
        return
