"""The load generator: its arrivals, its prompts, its sums, and what it makes of good and bad answers."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import pytest

from dsv3.bench.load import Outcome, Target, arrivals, ask, percentiles, prompts, run, summary
from dsv3.common.errors import UserError


def test_arrivals_are_a_poisson_process() -> None:
    times = arrivals(rate=5, seconds=0, requests=20_000, seed=1)
    gaps = np.diff(times)
    assert np.all(gaps > 0)
    assert gaps.mean() == pytest.approx(1 / 5, rel=0.03)
    assert gaps.std() == pytest.approx(gaps.mean(), rel=0.03)  # exponential: as wide as it is long
    counts = np.histogram(times, bins=np.arange(0, times[-1] - 1, 1.0))[0]
    assert counts.var() == pytest.approx(counts.mean(), rel=0.1)
    assert times == arrivals(rate=5, seconds=0, requests=20_000, seed=1)
    assert times != arrivals(rate=5, seconds=0, requests=20_000, seed=2)


def test_arrivals_end_with_the_seconds() -> None:
    times = arrivals(rate=50, seconds=10, requests=0, seed=0)
    assert 400 < len(times) < 600 and times[-1] < 10


def test_prompts_share_their_beginning() -> None:
    text = "".join(chr(0x4E00 + i) for i in range(5000))
    found = prompts(text, 50, 200, 0.25, seed=0)
    assert all(len(prompt) == 200 for prompt in found)
    assert len({prompt[:50] for prompt in found}) == 1
    assert len({prompt[50] for prompt in found}) > 40
    assert found == prompts(text, 50, 200, 0.25, seed=0)
    assert len(set(prompts(text, 5, 200, 1.0, seed=0))) == 1
    with pytest.raises(UserError, match="prompt-length"):
        prompts("short", 1, 200, 0.5, seed=0)


def test_percentiles_against_a_sorted_list() -> None:
    values = [float(i) for i in range(101)][::-1]
    assert percentiles(values) == {"p50": 50.0, "p95": 95.0, "p99": 99.0}
    assert percentiles([]) == {"p50": None, "p95": None, "p99": None}


def test_the_sums_by_hand() -> None:
    one = Outcome(0.5, [0.1, 0.3, 0.4], 0.5, "abc", "length", 40, 16, 4, 2, 2)
    two = Outcome(1.0, [0.2, 0.6], 0.8, "de", "stop", 60, 32, 3, 1, 0)
    bad = Outcome(2.0, [0.1], 9.0, error="status 500")
    found = summary([one, two, bad])
    assert (found["requests"], found["answered"], found["errors"]) == (3, 2, {"status 500": 1})
    assert found["seconds"] == pytest.approx(1.8 - 0.5)
    assert found["tokens_per_second"] == pytest.approx(7 / 1.3)
    assert found["requests_per_second"] == pytest.approx(2 / 1.3)
    assert found["cache_hit_rate"] == pytest.approx(48 / 100)
    assert found["acceptance_rate"] == pytest.approx(3 / 5)
    assert found["time_to_first_token"]["p50"] == pytest.approx(0.15)
    assert found["time_between_pieces"]["p50"] == pytest.approx(0.2)  # of 0.2, 0.1, 0.4
    assert found["time_per_token"]["p50"] == pytest.approx((0.3 / 3 + 0.4 / 2) / 2)
    assert found["end_to_end"]["p99"] == pytest.approx(0.5 + 0.99 * 0.3)
    assert summary([bad])["tokens_per_second"] == 0.0
    twice = summary([one, two, bad], [one, two])
    assert twice["seconds"] == pytest.approx(2 * 1.3)
    assert (twice["completion_tokens"], twice["requests"]) == (14, 5)


@pytest.mark.parametrize(
    ("url", "word"),
    [
        ("http://192.168.0.9:80", "not this machine"),
        ("http://example.org", "not this machine"),
        ("https://127.0.0.1:1", "must be like"),
        ("127.0.0.1:8000", "must be like"),
        ("http://127.0.0.1:99999", "must be like"),
        ("http://127.0.0.1:80/v1", "must be like"),
    ],
)
def test_targets_are_this_machine(url: str, word: str) -> None:
    with pytest.raises(UserError, match=word):
        Target.parse(url)


def test_targets() -> None:
    for url in ("http://127.0.0.1:81", "http://localhost:81/", "http://[::1]:81", "http://127.9.9.9:81"):
        assert Target.parse(url).port == 81
    assert Target.parse("http://example.org", remote=True).host == "example.org"


class Handler(BaseHTTPRequestHandler):
    """Answers by the prompt: ``500``, ``cut``, ``error``, ``slow``, or a good answer of three pieces."""

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert self.headers["Authorization"] == "Bearer k" and body["stream"]
        prompt = body["prompt"]
        self.send_response(500 if prompt == "500" else 200)
        self.end_headers()

        def send(part: dict[str, Any]) -> None:
            self.wfile.write(f"data: {json.dumps(part)}\n\n".encode())

        if prompt == "500":
            return
        for piece in "abc":
            time.sleep(0.3 if prompt == "slow" else 0.02)
            send({"choices": [{"text": piece, "finish_reason": None}]})
        if prompt == "cut":
            return
        if prompt == "error":
            send({"error": {"message": "oh", "type": "server_error", "code": None}})
        send({"choices": [{"text": "", "finish_reason": "length"}]})
        details = {"accepted_prediction_tokens": 2, "rejected_prediction_tokens": 1}
        send({"choices": [], "usage": {
            "prompt_tokens": 9, "completion_tokens": 5, "prompt_cache_hit_tokens": 4,
            "completion_tokens_details": details,
        }})  # fmt: skip
        self.wfile.write(b"data: [DONE]\n\n")


@pytest.fixture(scope="module")
def target() -> Iterator[Target]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield Target("127.0.0.1", server.server_address[1], "k")
    server.shutdown()
    server.server_close()


def test_a_good_answer(target: Target) -> None:
    outcome = Outcome(0.0)
    ask(target, {"prompt": "good"}, outcome, time.perf_counter())
    assert (outcome.text, outcome.finish, outcome.error) == ("abc", "length", "")
    assert (outcome.prompt_tokens, outcome.cached_tokens, outcome.tokens) == (9, 4, 5)
    assert (outcome.accepted, outcome.rejected) == (2, 1)
    assert 0.02 <= outcome.pieces[0] < outcome.pieces[1] < outcome.pieces[2] <= outcome.end


@pytest.mark.parametrize(
    ("prompt", "error"), [("500", "status 500"), ("cut", "broke off"), ("error", "server_error")]
)
def test_bad_answers_are_errors(target: Target, prompt: str, error: str) -> None:
    outcome = Outcome(0.0)
    ask(target, {"prompt": prompt}, outcome, time.perf_counter())
    assert outcome.error == error


def test_nobody_there() -> None:
    outcome = Outcome(0.0)
    ask(Target("127.0.0.1", 9), {"prompt": "x"}, outcome, time.perf_counter())
    assert outcome.error == "ConnectionRefusedError"


def test_a_slow_answer_holds_up_no_other(target: Target) -> None:
    seen: list[Outcome] = []
    bodies = [{"prompt": "slow"}, {"prompt": "good"}, {"prompt": "500"}]
    outcomes = run(target, bodies, [0.0, 0.05, 0.1], seen.append)
    assert [one.error for one in outcomes] == ["", "", "status 500"]
    assert outcomes[0].end >= 0.9 and outcomes[1].end < 0.6
    assert {id(one) for one in seen} == {id(one) for one in outcomes} and seen[-1] is outcomes[0]
