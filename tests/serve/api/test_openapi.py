"""The OpenAPI document, and requests made of it: whatever comes, the server does not fail."""

from __future__ import annotations

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.serve.api.conftest import Api

ENDPOINTS = [
    ("POST", "/v1/chat/completions"), ("POST", "/v1/completions"), ("GET", "/v1/models"),
    ("GET", "/v1/models/{name}"), ("GET", "/health"), ("GET", "/metrics"),
]  # fmt: skip
QUIET = dict(
    deadline=None, database=None, derandomize=True, phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)  # fmt: skip


def test_the_document_names_what_is_served(api: Api) -> None:
    document = api.http.get("/openapi.json").json()
    assert {(method.upper(), path) for path, item in document["paths"].items() for method in item} == set(
        ENDPOINTS
    )
    wanted = set(document["components"]["schemas"])
    assert {"ChatRequest", "CompletionRequest", "ChatCompletion", "Completion", "ErrorBody"} <= wanted


def try_out(api: Api, method: str, path: str, examples: int) -> None:
    schema = schemathesis.openapi.from_url(f"{api.url}/openapi.json")
    operation = schema[path][method]
    modes = [schemathesis.GenerationMode.POSITIVE]
    if method == "POST":
        modes.append(schemathesis.GenerationMode.NEGATIVE)
    for mode in modes:

        @given(case=operation.as_strategy(generation_mode=mode))
        @settings(max_examples=examples, **QUIET)
        def ask(case: schemathesis.Case) -> None:
            if isinstance(case.body, dict):  # the fields are tried, not how long a random model can go on
                case.body["max_tokens"] = 2
                case.body.pop("max_completion_tokens", None)
            response = case.call(timeout=30)
            assert response.status_code < 500, response.text
            if response.status_code >= 400:
                assert set(response.json()["error"]) == {"message", "type", "param", "code"}

        ask()
    api.idle()


@pytest.mark.parametrize(("method", "path"), ENDPOINTS)
def test_whatever_comes_the_server_does_not_fail(api: Api, method: str, path: str) -> None:
    try_out(api, method, path, 5)


@pytest.mark.slow
@pytest.mark.parametrize(("method", "path"), ENDPOINTS[:2])
def test_whatever_comes_at_length(api: Api, method: str, path: str) -> None:
    try_out(api, method, path, 200)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
FIELDS = [
    "n", "temperature", "top_p", "top_k", "min_p", "logit_bias", "seed", "stop", "stream", "suffix",
    "stream_options", "logprobs", "top_logprobs", "response_format", "tools", "tool_choice", "echo",
    "best_of", "model",
]  # fmt: skip


@given(values=st.dictionaries(st.sampled_from(FIELDS), json_values, max_size=2))
@settings(max_examples=60, **QUIET)
def test_fields_with_any_value(api: Api, values: dict[str, object]) -> None:
    import json

    for path, body in (
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]}),
        ("/v1/completions", {"prompt": [5, 6]}),
    ):
        content = json.dumps({**body, "max_tokens": 1, **values}).encode()
        response = api.http.post(path, content=content, headers={"content-type": "application/json"})
        assert response.status_code < 500, response.text
