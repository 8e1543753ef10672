"""Experts: a solver that may slip, a real engine over a random model, a server that misbehaves."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from dsv3.common.errors import Failure, UserError
from dsv3.config import recipe as recipes
from dsv3.config.distill import DistillRecipe
from dsv3.data.tokenizer import Tokenizer, train
from dsv3.evaluate import tasks
from dsv3.evaluate.experts import Answer, Endpoint, Engine, Question, Solver, said, slipped
from dsv3.evaluate.tasks import Solution
from dsv3.serve.llm import LLM
from tests.model.build import tiny_model


def recipe_of(**changes: Any) -> DistillRecipe:
    tree = {"prompts": {"tasks": [{"name": "sums", "count": 1}]}, **changes}
    return recipes.validate(DistillRecipe, tree)


def question(task: str = "sums", index: int = 0, difficulty: int = 2) -> Question:
    source = tasks.get(task, difficulty)
    example = source.sample(index)
    return Question(example.id, example.prompt, example.row(), source.solve(example))


# -- solver


@pytest.mark.parametrize("name", tasks.GENERATORS)
def test_a_slip_is_one_character_and_mostly_wrong(name: str) -> None:
    source = tasks.get(name, 2)
    wrong = 0
    for index in range(40):
        example = source.sample(index)
        solution = source.solve(example)
        assert solution is not None
        other = slipped(solution, index)
        assert len(other.answer) == len(solution.answer)
        assert sum(a != b for a, b in zip(other.answer, solution.answer)) == 1
        wrong += source.verify(other.reasoned(), example) == 0
    assert wrong >= 36  # 2/4 may become 3/6, and a countdown may be reached another way


def test_a_solver_slips_as_often_as_told_and_repeats_itself() -> None:
    questions = [question(index=index) for index in range(60)]
    first = list(Solver(4, 0.25, seed=1).answer(questions))
    assert first == list(Solver(4, 0.25, seed=1).answer(questions))
    wrong = sum(
        tasks.get("sums", 2).verify(a.text, tasks.Example(q.id, "sums", q.prompt, "", q.row["metadata"])) == 0
        for q, answers in first
        for a in answers
    )
    assert 35 <= wrong <= 85  # 60 of 240 expected, 6.7 the standard deviation
    assert all(a.finish_reason == "stop" for _, answers in Solver(1, 0, 0).answer(questions) for a in answers)


def test_a_solver_does_not_slip_where_it_has_no_box() -> None:
    code = Solution("", "def f(): pass", "```python\ndef f(): pass\n```")
    assert slipped(code, 0) == code


# -- engine


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train(["some words to learn from, What is 1 + 2? and to say again"] * 9, 340)


def parts(recipe: DistillRecipe) -> tuple[Any, ...]:
    return recipe.expert, recipe.sampling, recipe.system, recipe.seed


def engine_of(tokenizer: Tokenizer, recipe: DistillRecipe, max_batch: int) -> Engine:
    model = tiny_model(vocab_size=tokenizer.vocab_size)
    return Engine(*parts(recipe), LLM(model, tokenizer=tokenizer, max_batch=max_batch, max_length=400))


def test_an_engines_answers_depend_on_question_and_seed_alone(tokenizer: Tokenizer) -> None:
    recipe = recipe_of(
        expert={"kind": "engine", "model": "given", "concurrency": 4},
        sampling={"samples": 3, "max_tokens": 12},
        seed=5,
    )
    questions = [question(index=index) for index in range(5)]
    together = {q.id: answers for q, answers in engine_of(tokenizer, recipe, 4).answer(questions)}
    assert set(together) == {q.id for q in questions}
    assert all(len(answers) == 3 for answers in together.values())
    for one in questions:  # alone, in another order
        assert list(engine_of(tokenizer, recipe, 2).answer([one])) == [(one, together[one.id])]
    texts = [answer.text for answers in together.values() for answer in answers]
    assert len(set(texts)) > 10 and all(answer.tokens == 12 for answer in together[questions[0].id])
    reseeded = recipe.model_copy(update={"seed": 6})
    assert list(engine_of(tokenizer, reseeded, 4).answer(questions[:1])) != [
        (questions[0], together[questions[0].id])
    ]


def test_a_prompt_too_long_for_the_model_is_named(tokenizer: Tokenizer) -> None:
    recipe = recipe_of(expert={"kind": "engine", "model": "given"}, system="word " * 400)
    with pytest.raises(UserError, match=r"has \d+ tokens, and the model takes 400"):
        list(engine_of(tokenizer, recipe, 2).answer([question()]))


# -- endpoint

Reply = tuple[int, dict[str, str], Any]


class Server(ThreadingHTTPServer):
    """Answers chat requests by ``script(body, number of the request)``: status, headers, body; or raises."""

    daemon_threads = True

    def __init__(self, script: Callable[[dict[str, Any], int], Reply]):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.script = script
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[Any] = []
        self.at_once = self.most_at_once = 0
        self.lock = threading.Lock()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class _Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.bodies.append(body)
            self.server.headers.append(self.headers)
            number = len(self.server.bodies)
            self.server.at_once += 1
            self.server.most_at_once = max(self.server.most_at_once, self.server.at_once)
        try:
            status, headers, reply = self.server.script(body, number)
            data = reply if isinstance(reply, bytes) else json.dumps(reply).encode()
            self.send_response(status)
            for name, value in {"Content-Type": "application/json", **headers}.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)
        except (BrokenPipeError, ConnectionResetError, ConnectionAbortedError):
            self.close_connection = True
        finally:
            with self.server.lock:
                self.server.at_once -= 1


def answer_of(text: str, finish: str = "stop", **more: Any) -> Any:
    message = {"role": "assistant", "content": text, **more}
    return {
        "id": "x", "object": "chat.completion", "created": 0, "model": "m",
        "choices": [{"index": 0, "message": message, "finish_reason": finish}],
        "usage": {"prompt_tokens": 3, "completion_tokens": 7, "total_tokens": 10},
    }  # fmt: skip


@pytest.fixture
def serve() -> Iterator[Callable[..., Server]]:
    started: list[Server] = []

    def start(script: Callable[[dict[str, Any], int], Reply]) -> Server:
        started.append(Server(script))
        return started[-1]

    yield start
    for server in started:
        server.shutdown()
        server.server_close()


def endpoint(server: Server, samples: int = 2, **expert: Any) -> Endpoint:
    options = {"kind": "endpoint", "model": "m", "base_url": server.url, "retries": 0, "timeout": 5, **expert}
    sampling = {"samples": samples, "max_tokens": 9}
    return Endpoint(*parts(recipe_of(expert=options, sampling=sampling, system="Think.")))


def by_id(expert: Endpoint, questions: list[Question]) -> dict[str, list[Answer]]:
    return {asked.id: answers for asked, answers in expert.answer(questions)}


def test_an_endpoint_is_asked_with_everything(
    serve: Callable[..., Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    server = serve(lambda body, _: (200, {}, answer_of(f"seed {body['seed']}")))
    monkeypatch.setenv("SOME_KEY", "secret")
    questions = [question(index=index) for index in range(3)]
    found = by_id(endpoint(server, api_key_variable="SOME_KEY"), questions)
    assert set(found) == {q.id for q in questions}
    seeds = [body["seed"] for body in server.bodies]
    assert len(set(seeds)) == 6  # each answer its own
    assert {a.text for answers in found.values() for a in answers} == {f"seed {seed}" for seed in seeds}
    assert all(a == Answer(a.text, "stop", 7) for answers in found.values() for a in answers)
    body = server.bodies[0]
    assert body["messages"][0] == {"role": "system", "content": "Think."}
    assert (body["model"], body["temperature"], body["top_p"], body["max_tokens"]) == ("m", 1.0, 0.95, 9)
    assert server.headers[0]["Authorization"] == "Bearer secret"
    again = by_id(endpoint(server), questions[:1])
    assert again[questions[0].id] == found[questions[0].id]  # the same seeds


def test_no_more_requests_at_once_than_told(serve: Callable[..., Server]) -> None:
    def slow(body: dict[str, Any], _: int) -> Reply:
        time.sleep(0.05)
        return 200, {}, answer_of("x")

    server = serve(slow)
    list(endpoint(server, concurrency=3).answer([question(index=index) for index in range(6)]))
    assert server.most_at_once == 3 and len(server.bodies) == 12


def test_busy_and_broken_servers_are_asked_again(serve: Callable[..., Server]) -> None:
    def script(body: dict[str, Any], number: int) -> Reply:
        if number == 1:
            return 429, {"Retry-After": "0.2"}, {"error": {"message": "busy"}}
        if number == 2:
            return 503, {"Retry-After": "0.05"}, b"down"
        if number == 3:
            raise ConnectionResetError
        return 200, {}, answer_of("at last")

    server = serve(script)
    started = time.monotonic()
    [(_, answers)] = list(endpoint(server, samples=1, retries=3).answer([question()]))
    assert answers == [Answer("at last", "stop", 7)] and len(server.bodies) == 4
    assert time.monotonic() - started >= 0.25  # as long as it asked for


def test_an_answer_that_keeps_failing_is_an_error_and_the_rest_goes_on(serve: Callable[..., Server]) -> None:
    bad = question(index=0)

    def script(body: dict[str, Any], number: int) -> Reply:
        if body["messages"][-1]["content"] == bad.prompt:
            return 500, {"Retry-After": "0.01"}, {"error": {"message": "out of memory"}}
        return 200, {}, answer_of("fine")

    server = serve(script)
    questions = [bad, *(question(index=index) for index in range(1, 4))]
    found = by_id(endpoint(server, samples=1, retries=2, concurrency=1), questions)
    assert found[bad.id][0].finish_reason == "error" and "out of memory" in (found[bad.id][0].error or "")
    assert all(found[other.id][0].text == "fine" for other in questions[1:])
    assert len(server.bodies) == 3 + 3  # a request and two retries, then the others


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        ((200, {}, b"<html>no API here"), "Error"),
        ((200, {}, {"choices": []}), "IndexError"),
        ((200, {}, {"unexpected": 1}), "TypeError"),
    ],
)
def test_what_is_no_answer_is_an_error(serve: Callable[..., Server], reply: Reply, words: str) -> None:
    [(_, [answer])] = list(endpoint(serve(lambda *_: reply), samples=1).answer([question()]))
    assert answer.finish_reason == "error" and words in (answer.error or "")


def test_a_silent_server_costs_no_more_than_the_time_out(serve: Callable[..., Server]) -> None:
    gone = threading.Event()

    def silent(body: dict[str, Any], _: int) -> Reply:
        gone.wait(20)
        raise BrokenPipeError

    started = time.monotonic()
    try:
        [(_, [answer])] = list(endpoint(serve(silent), samples=1, timeout=0.3).answer([question()]))
    finally:
        gone.set()
    assert answer.finish_reason == "error" and "timed out" in (answer.error or "").lower()
    assert time.monotonic() - started < 5


def test_a_server_that_stays_down_ends_the_run(serve: Callable[..., Server]) -> None:
    server = serve(lambda *_: (500, {}, {"error": {"message": "no GPU"}}))
    expert = endpoint(server, give_up=3, concurrency=2)
    with pytest.raises(Failure, match=r"failed 3 times in a row, .*no GPU.*--resume auto"):
        list(expert.answer([question(index=index) for index in range(20)]))
    assert len(server.bodies) <= 5


@pytest.mark.parametrize(("status", "message"), [(401, "bad key"), (404, "no model m"), (400, "too long")])
def test_a_refusal_ends_the_run_at_once(serve: Callable[..., Server], status: int, message: str) -> None:
    server = serve(lambda *_: (status, {}, {"error": {"message": message}}))
    with pytest.raises(Failure, match=rf"refuses the request with HTTP {status}: .*{message}"):
        list(endpoint(server, retries=3, concurrency=1).answer([question(index=i) for i in range(9)]))
    assert len(server.bodies) == 1


def test_reasoning_beside_the_content_becomes_thoughts() -> None:
    class Message:
        content = "4"
        reasoning_content: Any = " 2 + 2 = 4\n"

    assert said(Message()) == "<think>\n2 + 2 = 4\n</think>\n\n4"
    Message.content = "<think>2 + 2</think>4"
    assert said(Message()) == "<think>2 + 2</think>4"
    Message.content, Message.reasoning_content = "4", None
    assert said(Message()) == "4"


def test_no_client_no_endpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dsv3.evaluate.experts.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'dsv3\[distill\]'"):
        endpoint = {"kind": "endpoint", "model": "m", "base_url": "http://127.0.0.1:1/v1"}
        Endpoint(*parts(recipe_of(expert=endpoint)))
