"""``dsv3 bench serve --soak``: a server among good, bad, aborted and oversized requests, and a check-up.

Some clients ask at random for a while. All the time a good request must be answered as the idle server
answered it, and every other in the way it deserves. Afterwards no cache block may be held, memory may not
have grown, and the idle server must answer as before.
"""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from random import Random
from statistics import median
from typing import Any

import psutil

from dsv3.bench.load import Outcome, Target, ask
from dsv3.bench.machine import machine
from dsv3.bench.serve import default_text
from dsv3.bench.server import Server
from dsv3.common.errors import Failure
from dsv3.common.progress import Progress

CLIENTS = 6
PAUSE = 0.1  # seconds a client waits between requests, on average
PROMPTS = 12
ANSWER = 24  # tokens
LONG, LONG_ANSWER = 3, 220  # so many prompts have long answers, which crowd the cache
# A small cache and queue: blocks are evicted, answers preempted, requests refused. All of the cache has been
# touched after a short while, so that later growth of memory is not its.
OPTIONS = ("--cache-tokens", "640", "--max-batch", "4", "--max-queue", "4", "--max-body", "65536",
           "--log-level", "error")  # fmt: skip
GROWTH = 1.05  # memory of the last quarter may be so many times that of the second

BUSY = ("dsv3_requests_running", "dsv3_requests_waiting", "dsv3_cache_blocks_used")

BROKEN: tuple[tuple[str, str, bytes], ...] = (
    ("/v1/completions", "POST", b'{"prompt": "x", "max_tokens"'),
    ("/v1/completions", "POST", b"\xff\xfe\x00"),
    ("/v1/completions", "POST", b""),
    ("/v1/completions", "POST", b"[" * 20_000),
    ("/v1/completions", "POST", b'{"max_tokens": 4}'),
    ("/v1/completions", "POST", b'{"prompt": {"a": 1}}'),
    ("/v1/completions", "POST", b'{"prompt": "x", "max_tokens": "many"}'),
    ("/v1/completions", "POST", b'{"prompt": "x", "temperature": -1}'),
    ("/v1/completions", "POST", b'{"prompt": "x", "temperature": NaN}'),
    ("/v1/completions", "POST", b'{"prompt": [999999999]}'),
    ("/v1/completions", "POST", b'{"prompt": "x", "seed": 1e400}'),
    ("/v1/chat/completions", "POST", b'{"messages": []}'),
    ("/v1/chat/completions", "POST", b'{"messages": "hello"}'),
    ("/v1/chat/completions", "POST", b'{"messages": [{"role": "robot", "content": "x"}]}'),
    ("/v1/chat/completions", "POST", b'{"messages": [{"role": "user", "content": "x"}], "n": 0}'),
    ("/v1/chat/completions", "GET", b""),
    ("/v1/models/none", "GET", b""),
    ("/nowhere", "GET", b""),
)


class Soak:
    """The clients and what they have seen. ``wrong``: what no request deserves, a line each kind."""

    def __init__(self, target: Target, seed: int):
        self.target, self.seed = target, seed
        text = default_text()
        draw = Random(seed)
        places = [draw.randrange(len(text) - 400) for _ in range(PROMPTS)]
        self.prompts = [text[place : place + draw.randrange(40, 400)] for place in places]
        self.expected: list[str] = []
        self.seen: Counter[str] = Counter()
        self.wrong: Counter[str] = Counter()
        self.lock = threading.Lock()
        self.done = threading.Event()
        self.kinds: list[tuple[Callable[[Random], str], int]] = [
            (self._good, 8), (self._chat, 3), (self._sampled, 3), (self._bad, 5), (self._aborted, 4),
            (self._half, 1), (self._oversized, 2),
        ]  # fmt: skip

    def greedy(self, place: int) -> Outcome:
        """The greedy answer to a prompt, streamed."""
        outcome = Outcome(0.0)
        tokens = LONG_ANSWER if place < LONG else ANSWER
        body = {"prompt": self.prompts[place], "max_tokens": tokens, "temperature": 0}
        ask(self.target, body, outcome, time.perf_counter())
        return outcome

    def idle_answers(self) -> list[str]:
        """Answers to all prompts, one after the other."""
        outcomes = [self.greedy(place) for place in range(PROMPTS)]
        error = next((one.error for one in outcomes if one.error), None)
        if error:
            raise Failure(f"the idle server does not answer: {error}")
        return [one.text for one in outcomes]

    def client(self, number: int) -> None:
        """Ask at random until ``done``."""
        draw = Random(f"{self.seed} {number}")
        functions, weights = zip(*self.kinds)
        while not self.done.is_set():
            function = draw.choices(functions, weights)[0]
            try:
                found = function(draw)
            except (OSError, http.client.HTTPException, ValueError) as error:
                found = f"wrong: {type(error).__name__}: {error}"
            name = function.__name__.strip("_")
            with self.lock:
                self.seen[f"{name}: {found.split(':')[0]}"] += 1
                if found.startswith("wrong"):
                    self.wrong[f"{name}: {found}"] += 1
            time.sleep(draw.expovariate(1 / PAUSE))

    def _post(self, path: str, body: bytes, method: str = "POST") -> tuple[int, bytes]:
        connection = self.target.connect()
        try:
            connection.request(method, path, body, self.target.headers)
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()

    def _good(self, draw: Random) -> str:
        place = draw.randrange(PROMPTS)
        outcome = self.greedy(place)
        if outcome.error == "status 429":
            return "refused"
        if outcome.error:
            return f"wrong: {outcome.error}"
        return "as idle" if outcome.text == self.expected[place] else "wrong: another answer than idle"

    def _chat(self, draw: Random) -> str:
        body = {"messages": [{"role": "user", "content": draw.choice(self.prompts)}], "max_tokens": ANSWER}
        return self._answered(self._post("/v1/chat/completions", json.dumps(body).encode()), 1)

    def _sampled(self, draw: Random) -> str:
        body = {
            "prompt": draw.choice(self.prompts), "max_tokens": ANSWER, "n": 2, "logprobs": 2,
            "temperature": 1.2, "top_p": 0.9, "stop": ["\n\n"],
        }  # fmt: skip
        return self._answered(self._post("/v1/completions", json.dumps(body).encode()), 2)

    def _answered(self, found: tuple[int, bytes], answers: int) -> str:
        status, content = found
        if status == 429:
            return "refused"
        if status != 200 or len(json.loads(content)["choices"]) != answers:
            return f"wrong: {status}: {content[:200]!r}"
        return "answered"

    def _bad(self, draw: Random) -> str:
        path, method, body = draw.choice(BROKEN)
        status, content = self._post(path, body, method)
        good = 400 <= status < 500 and "message" in json.loads(content)["error"]
        return "refused" if good else f"wrong: {status} to {method} {path} {body[:60]!r}"

    def _oversized(self, draw: Random) -> str:
        long = "word " * 5000  # fits the body, not the cache
        text = draw.choice((long, long * 4))
        status, content = self._post("/v1/completions", json.dumps({"prompt": text}).encode())
        good = status in (400, 413, 422, 429) and "message" in json.loads(content)["error"]
        return "refused" if good else f"wrong: {status} to {len(text)} characters"

    def _aborted(self, draw: Random) -> str:
        """Hang up in the middle of a stream, or before it begins."""
        connection = self.target.connect()
        try:
            body = {"prompt": draw.choice(self.prompts), "max_tokens": 200, "stream": True, "n": 2}
            connection.request("POST", "/v1/completions", json.dumps(body), self.target.headers)
            if draw.random() < 0.7:
                response = connection.getresponse()
                if response.status == 429:
                    return "refused"
                for _ in range(draw.randrange(1, 12)):
                    response.readline()
        finally:
            connection.close()
        return "hung up"

    def _half(self, draw: Random) -> str:
        """Promise a body and hang up before its end."""
        connection = self.target.connect()
        try:
            connection.putrequest("POST", "/v1/completions")
            connection.putheader("Content-Type", "application/json")
            connection.putheader("Content-Length", "1000")
            connection.endheaders(b'{"prompt": "')
        finally:
            connection.close()
        return "hung up"


def gauges(target: Target) -> dict[str, float]:
    """The server's metrics without labels."""
    lines = target.get("/metrics")[1].splitlines()
    pairs = (line.split() for line in lines if line and line[0] != "#" and "{" not in line)
    return {name: float(value) for name, value in pairs}


def bench(folder: Path, minutes: float, seed: int = 0) -> dict[str, Any]:
    """Soak a server of ``folder``; ``failed`` in the result names what did not hold."""
    seconds = 60 * minutes
    with Server(folder, OPTIONS) as server:
        soak = Soak(server.target, seed)
        soak.expected = soak.idle_answers()
        process = psutil.Process(server.process.pid)
        threads = [threading.Thread(target=soak.client, args=(n,), daemon=True) for n in range(CLIENTS)]
        memory: list[int] = []
        begin = time.monotonic()
        for thread in threads:
            thread.start()
        try:
            with Progress("soak", seconds, "s") as bar:
                while (left := begin + seconds - time.monotonic()) > 0:
                    time.sleep(min(left, max(0.2, seconds / 400)))
                    if server.process.poll() is not None:
                        raise Failure(f"the server ended: {server.last_line()}")
                    memory.append(process.memory_info().rss)
                    bar.note(f"{soak.seen.total()} requests, {memory[-1] / 2**20:.0f} MiB")
                    bar.advance(time.monotonic() - begin - bar.done)
        finally:
            soak.done.set()
        for thread in threads:
            thread.join()
        after = _when_idle(server.target)
        same = soak.idle_answers() == soak.expected
    early, late = by_quarter(memory)
    checks = check_up(bool(soak.wrong), after, early, late, same)
    return {
        "minutes": minutes,
        "failed": [check for check, holds in checks.items() if not holds],
        "checks": checks,
        "requests": dict(sorted(soak.seen.items())),
        "wrong": dict(soak.wrong),
        "memory_bytes": {"second_quarter": int(early), "last_quarter": int(late), "most": max(memory)},
        "preemptions": after["dsv3_preemptions_total"],
        "prefix_cache_hit_tokens": after["dsv3_prefix_cache_hit_tokens_total"],
        "machine": machine(),
    }


def by_quarter(memory: Sequence[int]) -> tuple[float, float]:
    """Medians of the second and of the last quarter."""
    quarter = max(1, len(memory) // 4)
    return median(memory[quarter : 2 * quarter] or memory), median(memory[-quarter:])


def check_up(
    wrong: bool, after: Mapping[str, float], early: float, late: float, same: bool
) -> dict[str, bool]:
    """What must hold afterwards, and whether it does."""
    return {
        "every request got what it deserves": not wrong,
        "no request is left": after["dsv3_requests_running"] == after["dsv3_requests_waiting"] == 0,
        "no cache block is held": after["dsv3_cache_blocks_used"] == 0,
        "memory is flat": late <= GROWTH * early,
        "the idle server answers as before": same,
    }


def _when_idle(target: Target, patience: float = 60.0) -> dict[str, float]:
    """Metrics once nothing runs; after ``patience`` as they are."""
    end = time.monotonic() + patience
    while True:
        found = gauges(target)
        busy = any(found[name] for name in BUSY)
        if not busy or time.monotonic() > end:
            return found
        time.sleep(0.2)


def report(result: dict[str, Any]) -> str:
    """What was asked, and whether all held."""
    memory = result["memory_bytes"]
    total = sum(result["requests"].values())
    lines = [f"{result['minutes']:g} minutes, {total} requests by {CLIENTS} clients"]
    lines += [f"  {name:<28} {count}" for name, count in result["requests"].items()]
    lines += [f"wrong, {count} x {what}" for what, count in result["wrong"].items()]
    lines.append(
        f"memory {memory['second_quarter'] / 2**20:.1f} MiB in the second quarter,"
        f" {memory['last_quarter'] / 2**20:.1f} MiB in the last;"
        f" {result['preemptions']:.0f} preemptions,"
        f" {result['prefix_cache_hit_tokens']:.0f} tokens of prompts from the cache"
    )
    lines += [f"{'held' if holds else 'FAILED'}: {check}" for check, holds in result["checks"].items()]
    return "\n".join(lines)
