"""A load for a server: requests that arrive as a Poisson process, what came of each, and what that sums to.

Open loop: a request is sent when its time has come, whether earlier ones are answered or not, and its times
are counted from then, so that a server that falls behind cannot hide it.
"""

from __future__ import annotations

import http.client
import ipaddress
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from dsv3.common.errors import UserError

PERCENTILES = (50, 95, 99)
MOST_OPEN = 512  # requests under way at once; one more is not sent and counts as an error
PATIENCE = 120.0  # seconds without a byte before a request is given up


@dataclass(frozen=True)
class Target:
    """Where a server listens: plain HTTP at ``host``:``port``; ``key`` goes with every request."""

    host: str
    port: int
    key: str = ""

    @classmethod
    def parse(cls, url: str, key: str = "", remote: bool = False) -> Target:
        """``http://127.0.0.1:8000``. Only this machine, unless ``remote``. Raises :class:`UserError`."""
        parts = urlsplit(url)
        try:
            port = parts.port or 80
        except ValueError:
            port = 0
        if parts.scheme != "http" or not parts.hostname or not port or parts.path not in ("", "/"):
            raise UserError(f"--url ({url}) must be like http://127.0.0.1:8000")
        if not remote and not is_loopback(parts.hostname):
            raise UserError(
                f"--url ({url}) is not this machine; --remote sends the load elsewhere, to a server of yours"
            )
        return cls(parts.hostname, port, key)

    def connect(self, timeout: float = PATIENCE) -> http.client.HTTPConnection:
        """A new connection, not yet open."""
        return http.client.HTTPConnection(self.host, self.port, timeout=timeout)

    @property
    def headers(self) -> dict[str, str]:
        """Of every request with a JSON body."""
        headers = {"Content-Type": "application/json"}
        return {**headers, "Authorization": f"Bearer {self.key}"} if self.key else headers

    def get(self, path: str, timeout: float = 10.0) -> tuple[int, str]:
        """Status and text of a GET. Raises :class:`OSError`, as a refused connection does."""
        connection = self.connect(timeout)
        try:
            connection.request("GET", path, headers=self.headers)
            response = connection.getresponse()
            return response.status, response.read().decode(errors="replace")
        finally:
            connection.close()


def is_loopback(host: str) -> bool:
    """Whether a name or address is this machine's own."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


@dataclass
class Outcome:
    """One request. Times are seconds since its arrival; ``pieces``: when each piece of text came."""

    arrival: float
    pieces: list[float] = field(default_factory=list)
    end: float = 0.0
    text: str = ""
    finish: str = ""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    tokens: int = 0
    accepted: int = 0
    rejected: int = 0
    error: str = ""


def arrivals(rate: float, seconds: float, requests: int, seed: int) -> list[float]:
    """Times of a Poisson process, ``rate`` a second: the first ``requests``; if 0, all before ``seconds``."""
    draw = np.random.default_rng(seed)
    times: list[float] = []
    now = 0.0
    while not requests or len(times) < requests:
        now += draw.exponential(1 / rate)
        if not requests and now >= seconds:
            break
        times.append(now)
    return times


def prompts(text: str, count: int, length: int, prefix_share: float, seed: int) -> list[str]:
    """Pieces of ``text`` of ``length`` characters each; the first ``prefix_share`` is the same in all."""
    shared = round(length * prefix_share)
    own = length - shared
    if len(text) < length + own:
        raise UserError(f"--prompt-length ({length}) is too long for a text of {len(text)} characters")
    draw = Random(seed)
    places = [draw.randrange(shared, len(text) - own + 1) for _ in range(count)]
    return [text[:shared] + text[place : place + own] for place in places]


def ask(target: Target, body: dict[str, Any], outcome: Outcome, began: float) -> None:
    """Stream one completion into ``outcome``, whose times count from ``began`` (of ``time.perf_counter``)."""
    connection = target.connect()
    try:
        body = {**body, "stream": True, "stream_options": {"include_usage": True}}
        connection.request("POST", "/v1/completions", json.dumps(body), target.headers)
        response = connection.getresponse()
        if response.status != 200:
            response.read()
            outcome.error = f"status {response.status}"
            return
        ended = False
        for line in response:
            if not line.startswith(b"data:"):
                continue
            data = line[5:].strip()
            if data == b"[DONE]":
                ended = True
                break
            _hear(json.loads(data), outcome, time.perf_counter() - began)
        if not ended:
            outcome.error = outcome.error or "broke off"
        elif outcome.finish not in ("stop", "length"):
            outcome.error = outcome.error or f"finish {outcome.finish or 'missing'}"
    except (OSError, http.client.HTTPException) as error:
        outcome.error = type(error).__name__
    finally:
        outcome.end = time.perf_counter() - began
        connection.close()


def _hear(part: dict[str, Any], outcome: Outcome, now: float) -> None:
    if "error" in part:
        outcome.error = str(part["error"].get("code") or part["error"].get("type") or "error")
    for choice in part.get("choices", ()):
        if choice.get("text"):
            outcome.pieces.append(now)
            outcome.text += choice["text"]
        outcome.finish = choice.get("finish_reason") or outcome.finish
    usage = part.get("usage")
    if usage:
        outcome.prompt_tokens = usage["prompt_tokens"]
        outcome.tokens = usage["completion_tokens"]
        outcome.cached_tokens = usage.get("prompt_cache_hit_tokens") or 0
        details = usage.get("completion_tokens_details") or {}
        outcome.accepted = details.get("accepted_prediction_tokens") or 0
        outcome.rejected = details.get("rejected_prediction_tokens") or 0


def run(
    target: Target,
    bodies: Sequence[dict[str, Any]],
    times: Sequence[float],
    finished: Callable[[Outcome], None] = lambda outcome: None,
) -> list[Outcome]:
    """Send each body when its time has come; returns what came of each when the last has ended.

    ``finished`` is called with each outcome as it ends, one at a time.
    """
    outcomes = [Outcome(arrival) for arrival in times]
    lock = threading.Lock()
    room = threading.Semaphore(MOST_OPEN)
    threads = []
    start = time.perf_counter()

    def one(body: dict[str, Any], outcome: Outcome) -> None:
        try:
            ask(target, body, outcome, start + outcome.arrival)
        finally:
            room.release()
            with lock:
                finished(outcome)

    for body, outcome in zip(bodies, outcomes):
        time.sleep(max(0.0, start + outcome.arrival - time.perf_counter()))
        if not room.acquire(blocking=False):
            outcome.error = "too many under way"
            with lock:
                finished(outcome)
            continue
        threads.append(threading.Thread(target=one, args=(body, outcome), daemon=True))
        threads[-1].start()
    for thread in threads:
        thread.join()
    return outcomes


def percentiles(values: Sequence[float]) -> dict[str, float | None]:
    """``{"p50": ..., "p95": ..., "p99": ...}``, interpolated between ranks; None without any value."""
    if not values:
        return {f"p{percent}": None for percent in PERCENTILES}
    return {f"p{percent}": float(np.percentile(values, percent)) for percent in PERCENTILES}


def between_pieces(outcomes: Sequence[Outcome]) -> list[float]:
    """Seconds from each piece of text to the next of its answer; drafts that stood come in one piece."""
    return [late - early for one in outcomes for early, late in zip(one.pieces, one.pieces[1:])]


def per_token(outcomes: Sequence[Outcome]) -> list[float]:
    """Seconds a token after the first piece, one mean an answer."""
    long = [one for one in outcomes if one.tokens > 1 and len(one.pieces) > 1]
    return [(one.pieces[-1] - one.pieces[0]) / (one.tokens - 1) for one in long]


def summary(*runs: Sequence[Outcome]) -> dict[str, Any]:
    """Throughput over the time from each run's first arrival to its last end; latencies of the answered in
    seconds.

    ``cache_hit_rate``: share of the prompts' tokens found in the cache; ``acceptance_rate``: share of the
    drafts that stood, None without drafts; ``errors``: how many of each kind.
    """
    every = [one for run in runs for one in run]
    good = [one for one in every if not one.error]
    seconds = 0.0
    for run in runs:
        answered = [one for one in run if not one.error]
        if answered:
            seconds += max(one.arrival + one.end for one in answered) - min(one.arrival for one in answered)
    tokens = sum(one.tokens for one in good)
    prompt = sum(one.prompt_tokens for one in good)
    drafted = sum(one.accepted + one.rejected for one in good)
    return {
        "requests": len(every),
        "answered": len(good),
        "errors": dict(Counter(one.error for one in every if one.error)),
        "seconds": seconds,
        "completion_tokens": tokens,
        "prompt_tokens": prompt,
        "tokens_per_second": tokens / seconds if seconds else 0.0,
        "requests_per_second": len(good) / seconds if seconds else 0.0,
        "time_to_first_token": percentiles([one.pieces[0] for one in good if one.pieces]),
        "time_between_pieces": percentiles(between_pieces(good)),
        "time_per_token": percentiles(per_token(good)),
        "end_to_end": percentiles([one.end for one in good]),
        "cache_hit_rate": sum(one.cached_tokens for one in good) / prompt if prompt else None,
        "acceptance_rate": sum(one.accepted for one in good) / drafted if drafted else None,
    }
