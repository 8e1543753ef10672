"""A ``dsv3 serve`` process of one's own, for as long as a ``with`` lasts."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from dsv3.bench.load import Target
from dsv3.common.errors import Failure
from dsv3.serve.api.limits import KEY_VARIABLE

START = 900.0  # seconds a large model may take to load
STOP = 60.0  # seconds open answers may take to end


class Server:
    """Serves ``folder`` on a free port of 127.0.0.1; ``options``: of ``dsv3 serve``.

    ``target``: where it listens; ``process``: its process. Raises :class:`Failure` with the server's last
    line if it ends before it answers.
    """

    def __init__(self, folder: Path, options: Sequence[str] = ()):
        self.log = tempfile.TemporaryFile()  # noqa: SIM115  closed in __exit__
        command = [sys.executable, "-m", "dsv3", "serve", str(folder), "--port", "0", *options]
        known = {name: value for name, value in os.environ.items() if name != KEY_VARIABLE}
        self.process = subprocess.Popen(command, stdout=self.log, stderr=self.log, env=known)
        self.target = Target("127.0.0.1", 0)

    def said(self) -> str:
        """What the server has printed."""
        return os.pread(self.log.fileno(), os.fstat(self.log.fileno()).st_size, 0).decode(errors="replace")

    def __enter__(self) -> Server:
        end = time.monotonic() + START
        try:
            while time.monotonic() < end:
                if self.process.poll() is not None:
                    raise Failure(f"the server ended before it answered: {self.last_line()}")
                if self._answers():
                    return self
                time.sleep(0.1)
            raise Failure(f"the server has not answered within {START:.0f} s: {self.last_line()}")
        except BaseException:
            self.__exit__(None, None, None)
            raise

    def _answers(self) -> bool:
        found = re.search(r"at http://127\.0\.0\.1:(\d+)/", self.said())
        if found is None:
            return False
        self.target = Target("127.0.0.1", int(found[1]))
        try:
            return self.target.get("/health")[0] == 200
        except OSError:
            return False

    def last_line(self) -> str:
        """What it said last."""
        lines = self.said().strip().splitlines()
        return lines[-1] if lines else "no message"

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.terminate()
        try:
            self.process.wait(STOP)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.log.close()
