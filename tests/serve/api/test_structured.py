"""Answers that must be JSON or a tool call, and a prompt's own probabilities."""

from __future__ import annotations

import json

import openai
import pytest
import torch

from tests.serve.api.conftest import Api

ASK = [{"role": "user", "content": "some words"}]
CITY = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Rome"]}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "description": "Tells it.", "parameters": CITY}},
    {"type": "function", "function": {"name": "where", "parameters": CITY}},
]


def test_json_schema(api: Api) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "city", "schema": CITY, "strict": True}}
    for seed in range(3):
        answer = api.openai.chat.completions.create(
            messages=ASK, model="tiny", response_format=form, seed=seed, max_tokens=400
        )
        if answer.choices[0].finish_reason == "stop":
            assert json.loads(answer.choices[0].message.content)["city"] in ("Paris", "Rome")
        else:
            assert answer.choices[0].finish_reason == "length"


def test_json_object(api: Api) -> None:
    answer = api.openai.chat.completions.create(
        messages=ASK, model="tiny", response_format={"type": "json_object"}, seed=1, max_tokens=20
    )
    assert answer.choices[0].message.content.lstrip()[:1] == "{"


def test_a_bad_schema_is_refused(api: Api) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nonsense"}}}
    with pytest.raises(openai.UnprocessableEntityError, match="json_schema"):
        api.openai.chat.completions.create(messages=ASK, model="tiny", response_format=form)
    api.idle()


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "where"}}])
def test_a_call_is_made_and_streamed(api: Api, choice: object) -> None:
    wish = dict(messages=ASK, model="tiny", tools=TOOLS, tool_choice=choice, seed=2, max_tokens=400)
    whole = api.openai.chat.completions.create(**wish, parallel_tool_calls=False).choices[0]
    (call,) = whole.message.tool_calls
    assert whole.finish_reason == "tool_calls" and whole.message.content is None
    assert call.function.name in (["weather", "where"] if choice == "required" else ["where"])
    assert call.function.arguments in ('{"city": "Paris"}', '{"city": "Rome"}')
    with api.openai.chat.completions.stream(**wish, parallel_tool_calls=False) as stream:
        final = stream.get_final_completion().choices[0]
    (streamed,) = final.message.tool_calls
    assert streamed.function.name == call.function.name
    assert streamed.function.arguments == call.function.arguments
    assert final.finish_reason == "tool_calls" and not final.message.content
    # The conversation goes on from there.
    made = whole.message.model_dump(exclude_none=True)
    result = {"role": "tool", "tool_call_id": call.id, "content": "sunny"}
    more = api.openai.chat.completions.create(
        messages=[*ASK, made, result], model="tiny", tools=TOOLS, tool_choice="none", max_tokens=4
    )
    assert more.choices[0].message.tool_calls is None


def test_several_calls(api: Api) -> None:
    found = set()
    for seed in range(4):
        answer = api.openai.chat.completions.create(
            messages=ASK, model="tiny", tools=TOOLS, tool_choice="required", seed=seed, max_tokens=400
        ).choices[0]
        found.add(len(answer.message.tool_calls))
        assert [call.id for call in answer.message.tool_calls] == list(
            dict.fromkeys(call.id for call in answer.message.tool_calls)
        )
        if answer.finish_reason == "tool_calls":
            assert all("city" in json.loads(call.function.arguments) for call in answer.message.tool_calls)
    assert max(found) > 1


def test_a_schema_or_a_call(api: Api) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "city", "schema": CITY}}
    for seed in range(4):
        answer = api.openai.chat.completions.create(
            messages=ASK, model="tiny", tools=TOOLS, response_format=form, seed=seed, max_tokens=400
        ).choices[0]
        said = answer.message.content
        assert answer.message.tool_calls or said.lstrip()[:1] == "{"


def test_echo_tells_the_probabilities_of_the_prompt(api: Api) -> None:
    prompt = [5, 9, 300, 22, 7, 7, 40]
    answer = api.openai.completions.create(
        prompt=[prompt, [8, 9]], model="tiny", max_tokens=0, echo=True, logprobs=2, temperature=0
    )
    with torch.inference_mode():
        logits = api.engine.model(torch.tensor([prompt])).logits_BTV[0, :, : api.engine.vocab_size]
    wanted = logits.float().log_softmax(-1)[range(len(prompt) - 1), prompt[1:]].tolist()
    told = answer.choices[0].logprobs
    assert told.token_logprobs[0] is None and told.top_logprobs[0] is None
    assert told.token_logprobs[1:] == pytest.approx(wanted, abs=2e-3)
    assert all(len(top) == 2 for top in told.top_logprobs[1:])
    assert answer.choices[0].text == api.engine.tokenizer.decode(prompt)
    assert answer.choices[0].finish_reason == "length"
    assert len(answer.choices[1].logprobs.tokens) == 2
    assert answer.usage.completion_tokens == 0


def test_echo_with_an_answer(api: Api) -> None:
    wish = dict(prompt="some words", model="tiny", max_tokens=3, logprobs=1, temperature=0, n=2)
    plain = api.openai.completions.create(**wish)
    for choice, bare in zip(api.openai.completions.create(**wish, echo=True).choices, plain.choices):
        assert choice.text == "some words" + bare.text
        known = len(choice.logprobs.tokens) - len(bare.logprobs.tokens)
        assert choice.logprobs.tokens[known:] == bare.logprobs.tokens
        assert choice.logprobs.text_offset[known] == len("some words")
    streamed = api.openai.completions.create(**{**wish, "n": 1}, echo=True, stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == choice.text
    plain = api.openai.completions.create(prompt="some", model="tiny", max_tokens=0, echo=True)
    assert plain.choices[0].text == "some" and plain.choices[0].logprobs is None
