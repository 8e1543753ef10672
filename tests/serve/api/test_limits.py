"""Who may ask, how much, how long; and what becomes of the server when something goes wrong."""

from __future__ import annotations

import json
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import httpx2
import pytest

from dsv3.common.errors import UserError
from dsv3.serve.api.limits import KEY_VARIABLE, read_keys
from dsv3.serve.api.logs import JsonFormatter
from dsv3.serve.api.settings import Settings
from tests.serve.api.conftest import Api

Serving = Callable[..., AbstractContextManager[Api]]
CHAT = "/v1/chat/completions"
ASK = {"messages": [{"role": "user", "content": "some words"}], "temperature": 0}
LONG = {**ASK, "max_tokens": 400, "logit_bias": {"1": -100}}  # no end of sentence


def raw(length: int) -> bytes:
    """The head of a request."""
    head = f"POST {CHAT} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    return f"{head}content-length: {length}\r\n\r\n".encode()


def error(response: httpx2.Response, status: int) -> dict[str, str]:
    """The error of a response, which has the shape all have."""
    assert response.status_code == status, response.text
    body = response.json()
    assert list(body) == ["error"] and set(body["error"]) == {"message", "type", "param", "code"}
    return body["error"]


def test_keys(serving: Serving) -> None:
    with serving(api_keys=["one", "two"]) as api:
        for given in (
            {},
            {"Authorization": "Bearer three"},
            {"Authorization": "Basic one"},
            {"Authorization": "é"},
        ):
            headers = {name: value.encode("latin-1") for name, value in given.items()}
            response = api.http.post(CHAT, json=ASK, headers=headers)
            assert error(response, 401)["code"] == "invalid_api_key"
            assert response.headers["www-authenticate"] == "Bearer"
        for key in ("one", "two"):
            headers = {"Authorization": f"Bearer {key}"}
            assert api.http.post(CHAT, json={**ASK, "max_tokens": 1}, headers=headers).status_code == 200
        assert api.http.get("/metrics").status_code == 401
        assert api.http.get("/openapi.json").status_code == 401
        assert api.http.get("/health").status_code == 200
        assert api.http.get("/").status_code == 200


def test_where_keys_come_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY_VARIABLE, "a, b")
    (tmp_path / "keys").write_text("# of the office\nc\n\n d \n")
    assert read_keys(tmp_path / "keys") == ["a", "b", "c", "d"]
    monkeypatch.delenv(KEY_VARIABLE)
    assert read_keys(None) == []
    (tmp_path / "keys").write_text("# none\n")
    with pytest.raises(UserError, match="holds no key"):
        read_keys(tmp_path / "keys")
    with pytest.raises(UserError, match="cannot be read"):
        read_keys(tmp_path / "other")
    with pytest.raises(UserError, match="printable"):
        Settings(api_keys=["a b"])


def test_a_body_too_large_is_refused_declared_or_not(serving: Serving) -> None:
    with serving(max_body=4096) as api:
        content = json.dumps({**ASK, "user": "x" * 5000}).encode()
        assert "4096 bytes" in error(api.http.post(CHAT, content=content), 413)["message"]

        def chunks() -> Iterator[bytes]:  # without a content length
            yield content[:3000]
            yield content[3000:]

        headers = {"content-type": "application/json"}
        error(api.http.post(CHAT, content=chunks(), headers=headers), 413)
        assert api.http.post(CHAT, json={**ASK, "max_tokens": 1}).status_code == 200


def test_errors_name_the_kind_of_value_that_was_meant(api: Api) -> None:
    """Where a field may be of several kinds, not what the first of them wants."""
    picture = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}
    said = error(api.http.post(CHAT, json={**ASK, "messages": [picture]}), 422)
    assert said["param"] == "messages.0.content.0.type" and "'text'" in said["message"]
    for prompt, param, words in (
        ([], "prompt", "at least 1 item"),
        ([1, -1], "prompt.1", "(-1): Input should be greater than or equal to 0"),
        (["a"] * 300, "prompt", "at most 256 items"),
    ):
        said = error(api.http.post("/v1/completions", json={"prompt": prompt}), 422)
        assert said["param"] == param and words in said["message"]


def test_errors_have_one_shape(api: Api) -> None:
    headers = {"content-type": "application/json"}
    for content in (b"{", b"\xff", b"[" * 50_000, b'{"messages": ' + b"9" * 5000 + b"}"):
        error(api.http.post(CHAT, content=content, headers=headers), 400)
    plain = {"content-type": "text/plain"}
    for content, kind in ((b"[]", headers), (b"", headers), (json.dumps(ASK).encode(), plain)):
        said = error(api.http.post(CHAT, content=content, headers=kind), 422)["message"]
        assert said == "the body must be a JSON object, sent with the header Content-Type: application/json"
    bad = json.dumps({**ASK, "temperature": float("nan")}).encode()
    assert error(api.http.post(CHAT, content=bad, headers=headers), 422)["param"] == "temperature"
    surrogate = json.dumps({**ASK, "model": "\ud800"}).encode()
    error(api.http.post(CHAT, content=surrogate, headers=headers), 422)
    assert error(api.http.get("/v1/nothing"), 404)["type"] == "not_found_error"
    error(api.http.get("/docs"), 404)
    assert api.http.get(CHAT).headers["allow"] == "POST"
    error(api.http.get(CHAT), 405)


def test_lone_surrogates_are_read_as_the_replacement_character(api: Api) -> None:
    content = json.dumps({"prompt": "a\ud800", "max_tokens": 1, "echo": True}).encode()
    answer = api.http.post("/v1/completions", content=content, headers={"content-type": "application/json"})
    assert answer.json()["choices"][0]["text"].startswith("a\ufffd")


def test_request_ids_are_given_back(api: Api) -> None:
    assert api.http.get("/health", headers={"X-Request-Id": "a-1.b"}).headers["x-request-id"] == "a-1.b"
    for bad in ('a"b', "x" * 65, "a b"):
        given = api.http.get("/health", headers={"X-Request-Id": bad}).headers["x-request-id"]
        assert given != bad and len(given) == 32


def test_a_full_queue_refuses_and_says_when_to_come_back(
    serving: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving({"max_batch": 1}, max_queue=1) as api:
        api.slow(monkeypatch)
        with api.http.stream("POST", CHAT, json={**LONG, "stream": True}) as first:
            lines = first.iter_lines()
            next(lines)
            with api.http.stream("POST", CHAT, json={**LONG, "stream": True}) as second:
                more = second.iter_lines()  # kept: a response whose lines nobody holds is closed
                next(more)
                refused = api.http.post(CHAT, json=ASK)
                assert error(refused, 429)["type"] == "rate_limit_error"
                assert 1 <= int(refused.headers["retry-after"]) <= 60
                assert "more than the 2" in error(api.http.post(CHAT, json={**ASK, "n": 3}), 422)["message"]
                metrics = api.http.get("/metrics").text
                assert "dsv3_requests_running 1.0" in metrics and "dsv3_requests_waiting 1.0" in metrics
        api.idle()
        assert api.http.post(CHAT, json={**ASK, "max_tokens": 1}).status_code == 200


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_frees_its_blocks(
    api: Api, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    api.slow(monkeypatch)
    body = json.dumps({**LONG, "stream": stream}).encode()
    made = api.engine.stats.completion_tokens
    with socket.create_connection(("127.0.0.1", api.port)) as client:
        client.sendall(raw(len(body)) + body)
        api.until(lambda: api.engine.blocks.used > 0 and api.engine.stats.completion_tokens > made)
    api.idle()
    assert api.engine.stats.completion_tokens - made < 400
    assert 'dsv3_requests_total{outcome="aborted"}' in api.http.get("/metrics").text


def test_a_client_that_reads_nothing_is_dropped(serving: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving({"max_length": 4000, "cache_tokens": 4096}, stall_seconds=0.3) as api:
        body = json.dumps({**LONG, "max_tokens": 3900, "stream": True, "logprobs": True, "top_logprobs": 20})
        api._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.connect(("127.0.0.1", api.port))
            client.sendall(raw(len(body)) + body.encode())
            api.until(lambda: api.engine.busy)
            api.idle()
        assert api.engine.stats.completion_tokens < 3900
        assert api.http.get("/health").status_code == 200


def test_a_body_that_does_not_come(serving: Serving) -> None:
    with serving(stall_seconds=0.2) as api, socket.create_connection(("127.0.0.1", api.port)) as client:
        client.sendall(raw(99) + b"{")
        assert b" 408 " in client.recv(100)


def test_unread_updates_do_not_pile_up(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dsv3.serve.api.worker.MOST_UNREAD", 0)
    response = api.http.post(CHAT, json={**ASK, "max_tokens": 400})
    assert "too slowly" in error(response, 408)["message"]
    api.idle()


@pytest.mark.parametrize("stream", [True, False])
def test_an_answer_that_takes_too_long_is_cut(
    serving: Serving, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    with serving(request_seconds=0.5) as api:
        api.slow(monkeypatch)
        response = api.http.post(CHAT, json={**LONG, "n": 2, "stream": stream})
        assert response.text.count('"finish_reason":"insufficient_system_resource"') == 2
        if not stream:
            assert 0 < response.json()["usage"]["completion_tokens"] < 800
        api.idle()


@pytest.mark.parametrize("stream", [True, False])
def test_an_engine_that_fails_fails_its_requests_only(
    api: Api, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, stream: bool
) -> None:
    step, steps = api.engine.step, 0

    def failing() -> object:
        nonlocal steps
        steps += 1
        if steps == 3:
            raise RuntimeError("of /some/secret/path")
        return step()

    monkeypatch.setattr(api.engine, "step", failing)
    with caplog.at_level(logging.ERROR, "dsv3.serve"):
        response = api.http.post(CHAT, json={**LONG, "stream": stream})
    assert "secret" not in response.text and "the server failed" in response.text
    assert any("engine failed" in record.getMessage() for record in caplog.records)
    if stream:
        *_, last, done, end = response.text.split("\n\n")
        assert json.loads(last.removeprefix("data: "))["error"]["type"] == "server_error"
        assert (done, end) == ("data: [DONE]", "")
    else:
        error(response, 500)
    api.idle()
    assert steps == 3  # given up, not gone on with
    assert not api.engine.blocks._named
    assert api.http.post(CHAT, json={**ASK, "max_tokens": 2}).status_code == 200


def test_an_engine_that_cannot_be_cleared_says_so(
    serving: Serving, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("broken")

    with serving() as api, caplog.at_level(logging.CRITICAL, "dsv3.serve"):
        monkeypatch.setattr(api.engine, "step", broken)
        monkeypatch.setattr(api.engine, "abort", broken)
        error(api.http.post(CHAT, json=ASK), 500)
        assert api.http.get("/health").json()["status"] == "failed"
        assert api.http.get("/health").status_code == 503
        error(api.http.post(CHAT, json=ASK), 503)


def test_a_fault_of_ours_is_a_clean_500(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("of /some/secret/path")

    monkeypatch.setattr("dsv3.serve.api.chat.prompt", broken)
    response = api.http.post(CHAT, json=ASK, headers={"X-Request-Id": "mine"})
    assert error(response, 500)["message"].endswith("under mine")
    assert response.headers["x-request-id"] == "mine"
    api.idle()
    monkeypatch.setattr(api.engine, "add_request", broken)
    error(api.http.post("/v1/completions", json={"prompt": "a"}), 500)
    api.idle()


def test_draining(serving: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(drain_seconds=0.6) as api:
        api.slow(monkeypatch)
        with api.http.stream("POST", CHAT, json={**LONG, "stream": True}) as stream:
            lines = stream.iter_lines()
            next(lines)
            assert api.listener._draining is None
            loop = api.worker._loop
            api.worker.draining = True
            refused = api.http.post(CHAT, json=ASK)
            assert error(refused, 503) and int(refused.headers["retry-after"]) > 0
            health = api.http.get("/health")
            assert health.status_code == 503 and health.json()["status"] == "draining"
            loop.call_soon_threadsafe(api.listener._drain)
            text = "\n".join(lines)
        assert '"finish_reason":"insufficient_system_resource"' in text and text.rstrip().endswith("[DONE]")
        api.thread.join(10)
        assert not api.thread.is_alive()


def test_other_sites_may_not_ask_unless_told(api: Api, serving: Serving) -> None:
    wish = {"Origin": "https://a.example", "Access-Control-Request-Method": "POST"}
    assert "access-control-allow-origin" not in api.http.options(CHAT, headers=wish).headers
    with serving(cors_origins=["https://a.example"], api_keys=["k"]) as other:
        allowed = other.http.options(CHAT, headers=wish)
        assert allowed.status_code == 200
        assert allowed.headers["access-control-allow-origin"] == "https://a.example"
        bad = {**wish, "Origin": "https://b.example"}
        assert "access-control-allow-origin" not in other.http.options(CHAT, headers=bad).headers


def test_metrics(api: Api) -> None:
    api.http.post(CHAT, json={**ASK, "max_tokens": 6})
    text = api.http.get("/metrics").text
    for name in (
        "dsv3_time_to_first_token_seconds_bucket", "dsv3_time_between_tokens_seconds_bucket",
        "dsv3_request_seconds_bucket", 'dsv3_requests_total{outcome="length"}', "dsv3_cache_use_ratio 0.0",
        "dsv3_prompt_tokens_total", "dsv3_generated_tokens_total", "dsv3_prefix_cache_hit_tokens_total",
        "dsv3_draft_tokens_total", "dsv3_accepted_draft_tokens_total",
        'dsv3_http_responses_total{status="200"}',
    ):  # fmt: skip
        assert name in text


def test_many_at_once_get_the_answers_they_get_alone(api: Api) -> None:
    bodies = [{"prompt": [number, 5], "max_tokens": 12, "temperature": 0} for number in range(20, 32)]
    alone = [api.http.post("/v1/completions", json=body).json()["choices"][0]["text"] for body in bodies]
    found: dict[int, str] = {}

    def ask(number: int) -> None:
        answer = httpx2.post(f"{api.url}/v1/completions", json=bodies[number], timeout=60)
        found[number] = answer.json()["choices"][0]["text"]

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(len(bodies))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[number] for number in range(len(bodies))] == alone
    api.idle()


def test_the_log_is_json() -> None:
    record = logging.LogRecord("dsv3.serve", logging.INFO, "f", 1, "a %s\n", ("b",), None)
    record.request_id = 'x"\n'
    line = JsonFormatter().format(record)
    assert "\n" not in line
    found = json.loads(line)
    assert (found["message"], found["level"], found["request_id"]) == ("a b\n", "info", 'x"\n')
    assert time.strftime("%Y") in found["time"]
