"""Programs a model wrote, run where they can do little harm (the tests of report 5.1's code rewards).

``Sandbox().run(source)`` starts a new interpreter without site-packages or environment, puts it behind
:mod:`dsv3.evaluate.sandbox.jail`'s doors, feeds it ``stdin``, and kills everything it started when it ends,
talks too much, or its time is up.

**What it does not protect from.** It is a fence for code that goes wrong or cheats, not a vault for code
written to break out: the program speaks to the same kernel as you, so a flaw of the kernel is a way out, and
so are side channels (timing, caches). It may read ``/usr``, ``/lib`` and Python's own folders. It may use the
processor up to its time limit, and memory up to ``memory`` for each of its ``processes``, plus ``disk`` for
``/tmp``: so choose ``memory`` times ``processes`` below what the machine can spare, and run few at a time. Of
the weaker levels, ``filters`` does not bound the number of files written below the time limit, and
``limits`` keeps neither files nor network nor other processes of the same user from the program; it has to be
asked for by name. Run untrusted models' code in a virtual machine or a container besides.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import py_compile
import selectors
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

from dsv3.common.errors import Failure, UserError

Level = Literal["namespaces", "filters", "limits"]
LEVELS: tuple[Level, ...] = ("namespaces", "filters", "limits")
JAIL = Path(__file__).with_name("jail.py")
PYTHON = getattr(sys, "_base_executable", sys.executable)  # past a virtual environment's link
MIB = 1 << 20


@dataclass(frozen=True)
class Outcome:
    """How a program ended.

    ``status``: ``ok`` (exit 0), ``error`` (another code or a signal), ``timeout`` (wall or processor time) or
    ``output`` (more than allowed; what came before is kept). ``code``: exit code, minus the signal's number
    where one ended it. ``seconds``: wall time, start included.
    """

    status: Literal["ok", "error", "timeout", "output"]
    code: int
    stdout: str
    stderr: str
    seconds: float


@dataclass(frozen=True)
class Sandbox:
    """Limits of a program; ``level`` None takes the strongest of ``namespaces`` and ``filters`` allowed here.

    ``seconds``: wall time; processor time is the same, rounded up. ``memory``: bytes of address space a
    process. ``processes``: processes and threads at a time (at ``filters``: threads, by memory alone for
    root). ``disk``: bytes of all files (at ``namespaces``) or of one. ``output``: bytes of stdout and stderr
    kept each. ``read``: folders the program may read and import from, beside Python's own.

    Raises :class:`UserError` where the level cannot be had.
    """

    seconds: float = 5.0
    memory: int = 512 * MIB
    processes: int = 16
    disk: int = 16 * MIB
    output: int = 64 << 10
    read: tuple[str, ...] = ()
    level: Level | None = None

    def run(self, source: str, stdin: str = "") -> Outcome:
        """Run ``source`` as a main program. Safe to call from many threads at a time."""
        with self.started(source, stdin) as (process, begun):
            return self._follow(process, begun)

    @contextlib.contextmanager
    def started(
        self, source: str, stdin: str | None = None
    ) -> Iterator[tuple[subprocess.Popen[bytes], float]]:
        """The program as a process with pipes; on leaving, it and all it started are dead, its files gone.

        With ``stdin`` it also dies with the calling thread, kill -9 included. None leaves a pipe to write to,
        whose end the program has to heed. Yields the process and when it was started (monotonic).
        """
        level = self.level or strongest()
        begun = time.monotonic()
        base = tempfile.mkdtemp(prefix="dsv3-sandbox-")
        ears, status = os.pipe()
        process = None
        try:
            for folder in ("root", "work"):
                os.mkdir(os.path.join(base, folder))
            Path(base, "program.py").write_text(source, encoding="utf-8", errors="replace")
            limits = (
                status,
                int(stdin is not None),
                self.memory,
                int(self.seconds) + 1,
                self.processes,
                self.disk,
            )
            entrance: int | IO[bytes] = subprocess.PIPE
            if stdin is not None:
                entrance = tempfile.TemporaryFile()  # noqa: SIM115 (closed below, once the child has it)
                entrance.write(stdin.encode(errors="replace"))
                entrance.seek(0)
            process = subprocess.Popen(
                [
                    PYTHON, "-I", "-S", "-B", _compiled(), base, level, *map(str, limits),
                    *_python_folders(), "--", *self.read,
                ],
                stdin=entrance, stdout=subprocess.PIPE, stderr=subprocess.PIPE, pass_fds=(status,),
                env={"PATH": "/usr/bin:/bin", "HOME": "/tmp", "LC_ALL": "C.UTF-8"},
                cwd="/", start_new_session=True,
            )  # fmt: skip
            if not isinstance(entrance, int):
                entrance.close()
            os.close(status)
            status = -1
            said = os.read(ears, 1000)
            if said != b"ok":
                reason = said.decode(errors="replace") or "it ended before the program started"
                raise Unavailable(f"the sandbox could not be set up at level {level}: {reason}")
            yield process, begun
        finally:
            for descriptor in (ears, status):
                if descriptor >= 0:
                    os.close(descriptor)
            if process is not None:
                _kill(process)
            shutil.rmtree(base, ignore_errors=True)

    def _follow(self, process: subprocess.Popen[bytes], begun: float) -> Outcome:
        """Read what it says until it ends, says too much or is out of time."""
        assert process.stdout is not None and process.stderr is not None
        heard: dict[int, bytearray] = {}
        status: Literal["ok", "error", "timeout", "output"] = "ok"
        with selectors.DefaultSelector() as selector:
            for stream in (process.stdout, process.stderr):
                heard[stream.fileno()] = bytearray()
                selector.register(stream, selectors.EVENT_READ)
            # A daemon may hold the pipes open after the program's end; nobody waits for it.
            while selector.get_map() and status == "ok":
                left = begun + self.seconds - time.monotonic()
                if left <= 0:
                    status = "timeout"
                    break
                ready = selector.select(min(left, 0.05))
                if not ready and process.poll() is not None:
                    break
                for key, _ in ready:
                    piece = os.read(key.fd, 65536)
                    if not piece:
                        selector.unregister(key.fileobj)
                    heard[key.fd] += piece
                    if len(heard[key.fd]) > self.output:
                        status = "output"
        if status == "ok":
            try:
                process.wait(max(0.0, begun + self.seconds - time.monotonic()))
            except subprocess.TimeoutExpired:
                status = "timeout"
        _kill(process)
        code = process.returncode
        if status == "ok" and code:
            status = "timeout" if code == -signal.SIGXCPU else "error"
        out, err = (bytes(part[: self.output]).decode(errors="replace") for part in heard.values())
        return Outcome(status, code, out, err, time.monotonic() - begun)


class Unavailable(Failure):
    """This machine does not allow a level of the sandbox."""


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End the whole group; at ``namespaces`` the tree dies with its first process."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for stream in (process.stdin, process.stdout, process.stderr):
        if stream is not None:
            with contextlib.suppress(OSError):
                stream.close()


@functools.cache
def _compiled() -> str:
    """The jail as bytecode: compiling it anew for every program would be a third of the start."""
    folder = tempfile.mkdtemp(prefix="dsv3-jail-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    made = py_compile.compile(str(JAIL), os.path.join(folder, "jail.pyc"), doraise=True)
    assert made is not None
    return made


@functools.cache
def _python_folders() -> tuple[str, ...]:
    """Folders of the interpreter and its standard library."""
    base = {"installed_base": sys.base_prefix, "base": sys.base_prefix, "platbase": sys.base_exec_prefix}
    found = [sysconfig.get_path(name, vars=base) for name in ("stdlib", "platstdlib")]
    return tuple(dict.fromkeys(os.path.realpath(path) for path in (*found, *_shared_library()) if path))


def _shared_library() -> Sequence[str]:
    """The folder of libpython, where Python has one outside the system's folders."""
    folder = sysconfig.get_config_var("LIBDIR")
    return [folder] if sysconfig.get_config_var("Py_ENABLE_SHARED") and folder else []


@functools.cache
def strongest() -> Level:
    """The strongest level this machine allows; tried once."""
    reasons = []
    for level in LEVELS[:2]:
        try:
            if Sandbox(seconds=30, level=level).run("print(1)").stdout == "1\n":
                return level
            reasons.append(f"{level}: a first program did not run")
        except Unavailable as error:
            reasons.append(str(error))
    raise UserError(
        "code cannot be run safely here ("
        + "; ".join(reasons)
        + "); allow user namespaces, use a kernel with"
        " Landlock 3 and seccomp, or choose level='limits' for code you trust"
    )
