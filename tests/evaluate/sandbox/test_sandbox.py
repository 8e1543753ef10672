"""Hostile programs against the sandbox, at every level this machine allows."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from dsv3.common.errors import UserError
from dsv3.evaluate.sandbox import MIB, Level, Sandbox, Service, Unavailable, run
from dsv3.evaluate.sandbox.run import _compiled

SHORT = 1.5  # seconds for programs that never end
OTHERS: set[str] = set()  # processes that were there before


@pytest.fixture(params=["namespaces", "filters"])
def level(request: pytest.FixtureRequest) -> Level:
    try:
        Sandbox(level=request.param, seconds=30).run("pass")
    except Unavailable as reason:
        pytest.skip(str(reason))
    return request.param


@pytest.fixture(autouse=True)
def _others() -> Iterator[None]:
    """Services of other tests in this process are none of ours."""
    OTHERS.clear()
    OTHERS.update(left())
    yield


def left(jail: str = "") -> list[str]:
    """Processes of any sandbox of ours (or another caller's) that still live."""
    found = []
    for folder in Path("/proc").iterdir():
        try:
            words = (folder / "cmdline").read_bytes()
            dead = (folder / "stat").read_text().rsplit(")", 1)[1].split()[0] in "ZX"
        except OSError:
            continue
        if (jail or _compiled()).encode() in words and not dead and folder.name not in OTHERS:
            found.append(folder.name)
    return found


def none_left(jail: str = "") -> bool:
    for _ in range(100):
        if not left(jail):
            return True
        time.sleep(0.05)
    return False


def test_a_program_runs(level: Level) -> None:
    outcome = Sandbox(level=level, seconds=30).run("import math\nprint(math.gcd(12, 18), input())", "né")
    assert (outcome.status, outcome.stdout) == ("ok", "6 né\n")
    outcome = Sandbox(level=level, seconds=30).run("import sys\nprint('before')\nsys.exit(3)")
    assert (outcome.status, outcome.code, outcome.stdout) == ("error", 3, "before\n")
    outcome = Sandbox(level=level, seconds=30).run("raise KeyError('gone')")
    assert outcome.status == "error" and "KeyError: 'gone'" in outcome.stderr
    outcome = Sandbox(level=level, seconds=30).run("open('a', 'w').write('b'); print(open('a').read())")
    assert outcome.stdout == "b\n"  # a fresh folder to write to


def test_sleep_ends_in_time(level: Level) -> None:
    outcome = Sandbox(level=level, seconds=SHORT).run(
        "import time\nprint('here', flush=True)\ntime.sleep(999)"
    )
    assert outcome.status == "timeout" and outcome.stdout == "here\n"
    assert outcome.seconds < SHORT + 5 and none_left()


def test_signals_caught_and_a_busy_loop(level: Level) -> None:
    source = """
import signal
for number in range(1, 65):
    try: signal.signal(number, lambda *_: None)
    except (OSError, ValueError): pass
while True: pass
"""
    assert Sandbox(level=level, seconds=SHORT).run(source).status == "timeout"
    assert none_left()


def test_fork_bomb(level: Level) -> None:
    source = "import os\nwhile True:\n  try: os.fork()\n  except OSError: pass"
    seen: list[int] = []
    stop = threading.Event()

    def watch() -> None:
        while not stop.wait(0.1):
            seen.append(len(left()))

    watcher = threading.Thread(target=watch)
    watcher.start()
    outcome = Sandbox(level=level, seconds=SHORT, processes=8).run(source)
    stop.set()
    watcher.join()
    assert outcome.status == "timeout" and none_left()
    assert max(seen, default=0) <= 9  # eight, and the one who waits outside


def test_a_daemon_dies_too(level: Level) -> None:
    source = """
import os, sys, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        time.sleep(999)
    os._exit(0)
print("left")
"""
    outcome = Sandbox(level=level, seconds=20).run(source)
    if level == "namespaces":
        assert outcome.stdout == "left\n"
    else:
        assert "PermissionError" in outcome.stderr  # no processes at all
    assert outcome.seconds < 15 and none_left()


def test_leaving_the_process_group_does_not_help(level: Level) -> None:
    source = "import os, time\ntry: os.setsid()\nexcept OSError: pass\ntime.sleep(999)"
    assert Sandbox(level=level, seconds=SHORT).run(source).status == "timeout"
    assert none_left()


def test_a_killed_caller_leaves_nothing(level: Level) -> None:
    caller = f"""
from dsv3.evaluate.sandbox.run import Sandbox, _compiled
print(_compiled(), flush=True)
Sandbox(level={level!r}, seconds=600).run("import time; time.sleep(600)")
"""
    with subprocess.Popen([sys.executable, "-c", caller], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        jail = process.stdout.readline().strip()
        for _ in range(200):
            if len(left(jail)) == (2 if level == "namespaces" else 1):
                break
            time.sleep(0.05)
        time.sleep(0.5)  # past the doors
        process.kill()
    assert none_left(jail)


def test_endless_output_is_cut(level: Level) -> None:
    outcome = Sandbox(level=level, seconds=20, output=10_000).run("while True: print('x' * 999)")
    assert outcome.status == "output" and len(outcome.stdout) == 10_000 and none_left()
    outcome = Sandbox(level=level, seconds=20, output=10_000).run(
        "import sys\nwhile True: sys.stderr.write('y' * 999)"
    )
    assert outcome.status == "output" and len(outcome.stderr) == 10_000


def test_the_callers_files_and_environment(
    level: Level, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = tmp_path / "secret"
    secret.write_text("hidden answer")
    monkeypatch.setenv("DSV3_SECRET", "hidden token")
    source = f"""
import os
print(dict(os.environ))
paths = [{str(secret)!r}, "/etc/passwd", {str(Path(__file__))!r}, "/proc/{os.getpid()}/environ",
         f"/proc/{{os.getppid()}}/environ", "/proc/self/root/etc/passwd", "/proc/1/environ",
         "../../" * 9 + "etc/passwd"]
for path in paths:
    try: print(open(path).read())
    except OSError: print("closed")
try: open({str(tmp_path / "made")!r}, "w")
except OSError: print("closed")
"""
    outcome = Sandbox(level=level, seconds=30).run(source)
    assert outcome.status == "ok", outcome
    assert "hidden" not in outcome.stdout and "root:" not in outcome.stdout
    assert outcome.stdout.count("closed") == 9
    assert not (tmp_path / "made").exists()


def test_the_caller_cannot_be_killed(level: Level) -> None:
    source = f"""
import os, signal
for target in ({os.getpid()}, os.getppid(), -1, 0):
    for number in (signal.SIGTERM, signal.SIGKILL):
        try: os.kill(target, number)
        except OSError: pass
        if target <= 0: break
print("done")
"""
    heard: list[int] = []
    import signal

    before = signal.signal(signal.SIGTERM, lambda number, _: heard.append(number))
    try:
        Sandbox(level=level, seconds=20).run(source)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert not heard and none_left()


def test_no_network(level: Level) -> None:
    source = """
import socket
for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
    try:
        socket.socket(socket.AF_INET, kind).connect(("127.0.0.1", 9))
        print("open")
    except OSError:
        print("closed")
"""
    assert Sandbox(level=level, seconds=30).run(source).stdout == "closed\nclosed\n"


def test_memory_and_files_are_bounded(level: Level) -> None:
    sandbox = Sandbox(level=level, seconds=30, memory=256 * MIB, disk=1 * MIB)
    assert "MemoryError" in sandbox.run("x = bytearray(1 << 30)").stderr
    source = """
import os
total = 0
try:
    for at in range(20):
        with open(f"/tmp/{at}" if os.getcwd() == "/tmp" else str(at), "wb", buffering=0) as file:
            for _ in range(8): total += file.write(b"x" * (1 << 18))
except OSError: pass
print(total)
"""
    written = int(sandbox.run(source).stdout)
    assert 0 < written <= 1 * MIB


def test_privileges_do_not_come_back(level: Level) -> None:
    source = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
print([libc.unshare(flag) for flag in (1 << 28, 1 << 17, 1 << 30)])
print(libc.mount(b"none", b"/tmp", b"tmpfs", 0, b""), libc.chroot(b"/tmp"), libc.ptrace(0, 0, 0, 0))
try: os.setuid(0); print("root", os.listdir("/root"))
except OSError: print("closed")
"""
    lines = Sandbox(level=level, seconds=30).run(source).stdout.splitlines()
    assert lines == ["[-1, -1, -1]", "-1 -1 -1", "closed"]


def test_many_threads(level: Level) -> None:
    sandbox = Sandbox(level=level, seconds=60)
    with ThreadPoolExecutor(4) as pool:
        outcomes = list(pool.map(lambda n: sandbox.run(f"print({n} ** 2)"), range(8)))
    assert [int(outcome.stdout) for outcome in outcomes] == [n * n for n in range(8)]


def test_limits_are_asked_for_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Sandbox(level="limits", seconds=30).run("print(1)").stdout == "1\n"

    def refuse(self: Sandbox, source: str, stdin: str = "") -> None:
        raise Unavailable("not here")

    monkeypatch.setattr(Sandbox, "run", refuse)
    run.strongest.cache_clear()
    with pytest.raises(UserError, match="limits"):
        run.strongest()
    run.strongest.cache_clear()


def test_a_service_answers_from_threads_and_outlives_hostile_requests() -> None:
    setup = """
import math
def answer(request):
    if request == "forever":
        while True: pass
    if request == "die":
        import os; os._exit(1)
    if request == "poison":
        math.sqrt = lambda _: 0
    return math.sqrt(request) if isinstance(request, int) else None
"""
    service = Service(setup, seconds=3)
    try:
        with ThreadPoolExecutor(3) as pool:
            assert list(pool.map(service.ask, [4, 9, 16])) == [2, 3, 4]
        assert service.ask("poison") is None and service.ask(25) == 5
        assert service.ask("forever") is None
        assert service.ask("die") is None and service.ask(36) == 6
        assert service.process is not None
        service.process.kill()
        service.process.wait()
        assert service.ask(49) == 7  # started anew
    finally:
        service.close()
    assert none_left()


def test_a_folder_to_read_may_lie_below_tmp(level: Level, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("library")  # as a checkout's environment may
    folder.chmod(0o755)
    (folder / "given.py").write_text("word = 'found'")
    (folder / "given.py").chmod(0o644)
    for parent in [*folder.parents][:2]:
        parent.chmod(0o755)
    program = f"import sys; sys.path.insert(0, {str(folder)!r})\nimport given\nprint(given.word)"
    found = Sandbox(level=level, read=(str(folder),), seconds=20).run(program)
    assert found.stdout == "found\n", found
