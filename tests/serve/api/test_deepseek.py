"""What DeepSeek's own API has beyond OpenAI's."""

from __future__ import annotations

from dsv3.data.chat import encode
from dsv3.data.tokenizer import Tokenizer
from dsv3.serve.api.chat import Choice, prompt
from dsv3.serve.api.schemas import ChatRequest
from dsv3.serve.updates import Update
from tests.serve.api.conftest import Api

ASK = {"role": "user", "content": "some words"}


def test_its_paths(api: Api) -> None:
    for prefix in ("", "/v1", "/beta"):
        assert api.http.get(f"{prefix}/models").status_code == 200
        found = api.http.post(f"{prefix}/chat/completions", json={"messages": [ASK], "max_tokens": 1})
        assert found.status_code == 200
        assert api.http.post(f"{prefix}/completions", json={"prompt": "a"}).status_code == 200


def test_prefix_completion_continues_the_answer(api: Api) -> None:
    def ask(*messages: object, tokens: int) -> str:
        body = {"messages": messages, "max_tokens": tokens, "temperature": 0}
        answer = api.http.post("/beta/chat/completions", json=body).json()
        return answer["choices"][0]["message"]["content"]

    # A prefix that is a whole token keeps the tokens of the rest as they were.
    bias = {str(api.engine.tokenizer.encode("some")[0]): 100}
    body = {"messages": [ASK], "max_tokens": 1, "temperature": 0, "logit_bias": bias}
    head = api.http.post("/chat/completions", json=body).json()["choices"][0]["message"]["content"]
    begun = {"role": "assistant", "content": head, "prefix": True}
    ids, _ = encode(api.engine.tokenizer, [ASK], add_generation_prompt=True)
    ids += api.engine.tokenizer.encode(head)
    raw = {"prompt": ids, "max_tokens": 6, "temperature": 0}
    assert ask(ASK, begun, tokens=6) == api.http.post("/completions", json=raw).json()["choices"][0]["text"]


def test_the_prompt_of_a_prefix_with_reasoning(tokenizer: Tokenizer) -> None:
    def made(**last: object) -> tuple[str, bool]:
        message = {"role": "assistant", "prefix": True, **last}
        ids, thinks = prompt(tokenizer, ChatRequest(messages=[ASK, message]))
        return tokenizer.decode(ids), thinks

    begin = "<｜begin▁of▁sentence｜><｜User｜>some words<｜Assistant｜>"
    assert made(content="a", reasoning_content="r") == (f"{begin}<think>\nr\n</think>\n\na", False)
    assert made(content="", reasoning_content="r") == (f"{begin}<think>\nr\n", True)
    assert made(content="<think>\nr") == (f"{begin}<think>\nr", True)
    assert made(content="a") == (f"{begin}a", False)


def test_tool_results_stand_in_the_order_of_their_calls(tokenizer: Tokenizer) -> None:
    calls = [{"id": name, "function": {"name": name, "arguments": "{}"}} for name in "fg"]
    messages = [
        {"role": "developer", "content": [{"type": "text", "text": "be"}, {"type": "text", "text": " kind"}]},
        ASK,
        {"role": "assistant", "tool_calls": calls},
        {"role": "tool", "tool_call_id": "g", "content": "of g"},
        {"role": "tool", "tool_call_id": "f", "content": "of f"},
    ]
    ids, _ = prompt(tokenizer, ChatRequest(messages=messages))
    text = tokenizer.decode(ids)
    assert text.startswith(
        "<｜begin▁of▁sentence｜>be kind<｜User｜>some words<｜Assistant｜><｜tool▁calls▁begin｜>"
    )
    assert text.endswith(
        "<｜tool▁outputs▁begin｜><｜tool▁output▁begin｜>of f<｜tool▁output▁end｜>"
        "<｜tool▁output▁begin｜>of g<｜tool▁output▁end｜><｜tool▁outputs▁end｜>"
    )


def test_fill_in_the_middle(api: Api) -> None:
    tokenizer = api.engine.tokenizer
    filled = api.http.post("/beta/completions", json={"prompt": "some", "suffix": "again", "temperature": 0})
    ids = tokenizer.encode("<｜fim▁begin｜>some<｜fim▁hole｜>again<｜fim▁end｜>", special=True)
    raw = api.http.post("/completions", json={"prompt": ids, "temperature": 0}).json()
    assert filled.json()["choices"][0]["text"] == raw["choices"][0]["text"]
    assert filled.json()["usage"]["prompt_tokens"] == len(ids)
    assert filled.json()["usage"]["completion_tokens"] == 16


def test_usage_counts_the_cache_and_the_drafts(api: Api) -> None:
    body = {"prompt": [7, 8, 9, 10] * 10, "max_tokens": 12, "temperature": 0}
    api.http.post("/completions", json=body)
    usage = api.http.post("/completions", json=body).json()["usage"]
    assert usage["prompt_cache_hit_tokens"] == usage["prompt_tokens_details"]["cached_tokens"] == 32
    assert usage["prompt_cache_miss_tokens"] == 8 and usage["prompt_tokens"] == 40
    details = usage["completion_tokens_details"]
    assert details["accepted_prediction_tokens"] + details["rejected_prediction_tokens"] > 0


def test_reasoning_beside_content(api: Api) -> None:
    """A prefix inside of reasoning: all that a random model adds is reasoning."""
    begun = {"role": "assistant", "content": "<think>\nso", "prefix": True}
    body = {"messages": [ASK, begun], "max_tokens": 9, "temperature": 0}
    answer = api.http.post("/chat/completions", json=body).json()
    message = answer["choices"][0]["message"]
    assert message["reasoning_content"] and message["content"] == ""
    assert answer["usage"]["completion_tokens_details"]["reasoning_tokens"] == 9


def test_reasoning_tokens_are_counted_to_the_tag(api: Api) -> None:
    tokenizer, server = api.engine.tokenizer, _server(api)
    text = "<think>\nsome words\n</think>\n\nagain"
    ids = tokenizer.encode(text, special=True)
    wanted = ids.index(tokenizer.special("end_think")) + 1
    for size in (1, 2, 3, len(ids)):
        choice, delta = Choice(server, False, False), {"reasoning_content": "", "content": ""}
        for start in range(0, len(ids), size):
            piece = ids[start : start + size]
            last = "stop" if start + size >= len(ids) else None
            found, _ = choice.take(Update("r", 0, piece, tokenizer.decode(piece), finish_reason=last))
            delta = {name: delta[name] + found.get(name, "") for name in delta}
        assert delta == {"reasoning_content": "some words", "content": "again"}
        assert choice.reasoning_tokens == wanted


def _server(api: Api):  # type: ignore[no-untyped-def]
    from dsv3.serve.api.answering import Server
    from dsv3.serve.api.settings import Settings

    return Server(api.engine, api.worker, Settings())
