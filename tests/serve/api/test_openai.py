"""The API as the ``openai`` package speaks it."""

from __future__ import annotations

import json
import math

import openai
import pytest

from dsv3.data.chat import encode
from dsv3.serve.llm import LLM
from dsv3.serve.params import SamplingParams
from tests.serve.api.conftest import Api

ASK = [{"role": "user", "content": "some words"}]
GREEDY = {"model": "tiny", "temperature": 0}


@pytest.fixture(scope="module")
def alone(api: Api) -> LLM:
    """The same model without a server."""
    tokenizer = api.engine.tokenizer
    from tests.model.build import tiny_model

    return LLM(tiny_model(vocab_size=tokenizer.vocab_size, num_nextn_predict_layers=1), tokenizer=tokenizer)


def test_an_answer_is_the_engines(api: Api, alone: LLM) -> None:
    answer = api.openai.chat.completions.create(messages=ASK, max_tokens=12, **GREEDY)
    prompt, _ = encode(alone.tokenizer, ASK, add_generation_prompt=True)
    wanted = alone.generate([prompt], SamplingParams(max_tokens=12, temperature=0))[0]
    assert answer.choices[0].message.content == wanted.text
    assert answer.choices[0].finish_reason == wanted.finish_reason == "length"
    assert answer.model == "tiny" and answer.object == "chat.completion"
    usage = answer.usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (len(prompt), 12)
    assert usage.total_tokens == len(prompt) + 12
    assert usage.prompt_cache_hit_tokens + usage.prompt_cache_miss_tokens == len(prompt)


def test_a_stream_sums_to_the_answer(api: Api) -> None:
    wish = dict(messages=ASK, max_tokens=20, logprobs=True, top_logprobs=2, n=2, seed=5, model="tiny")
    whole = api.openai.chat.completions.create(**wish)
    texts, logprobs, reasons, usages = ["", ""], [[], []], [None, None], []
    stream = api.openai.chat.completions.create(**wish, stream=True, stream_options={"include_usage": True})
    heads = set()
    for chunk in stream:
        heads.add((chunk.id, chunk.created, chunk.object))
        if chunk.usage is not None:
            usages.append(chunk.usage)
            assert chunk.choices == []
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            logprobs[choice.index] += choice.logprobs.content if choice.logprobs else []
            reasons[choice.index] = choice.finish_reason
    for choice in whole.choices:
        assert texts[choice.index] == choice.message.content
        assert reasons[choice.index] == choice.finish_reason
        streamed, told = logprobs[choice.index], choice.logprobs.content
        assert [(a.token, a.bytes) for a in streamed] == [(b.token, b.bytes) for b in told]
        assert [a.logprob for a in streamed] == pytest.approx([b.logprob for b in told], abs=1e-4)
    assert len(heads) == 1
    assert len(usages) == 1 and usages[0].completion_tokens == whole.usage.completion_tokens


def test_the_stream_on_the_wire(api: Api) -> None:
    body = {"messages": ASK, "max_tokens": 3, "stream": True}
    with api.http.stream("POST", "/v1/chat/completions", json=body) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        events = response.read().decode().split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    first = json.loads(events[0].removeprefix("data: "))
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert "usage" not in first


def test_logprobs_are_the_tokens_of_the_answer(api: Api) -> None:
    answer = api.openai.chat.completions.create(
        messages=ASK, max_tokens=8, logprobs=True, top_logprobs=3, **GREEDY
    )
    told = answer.choices[0].logprobs.content
    content = b"".join(bytes(token.bytes) for token in told).decode("utf-8", "replace")
    for token in told:
        assert len(token.top_logprobs) == 3
        assert token.top_logprobs[0].logprob == token.logprob  # greedy takes the first
        assert sum(math.exp(other.logprob) for other in token.top_logprobs) <= 1 + 1e-5
    for control in api.engine.tokenizer.added:
        content = content.replace(control, "")
    assert content == answer.choices[0].message.content
    plain = api.openai.chat.completions.create(messages=ASK, max_tokens=2, logprobs=True, **GREEDY)
    assert [token.top_logprobs for token in plain.choices[0].logprobs.content] == [[], []]


def test_stop_seed_and_bias(api: Api) -> None:
    def ask(**wish: object) -> openai.types.chat.chat_completion.Choice:
        wish = {"max_tokens": 24, "model": "tiny", **wish}
        return api.openai.chat.completions.create(messages=ASK, **wish).choices[0]

    whole = ask(temperature=0).message.content
    stop = whole[5:7]
    ended = ask(temperature=0, stop=[stop, "never there"])
    assert ended.finish_reason == "stop"
    assert ended.message.content == whole[: whole.index(stop)]
    assert ask(seed=3).message.content == ask(seed=3).message.content != ask(seed=4).message.content
    assert ask(seed=-1).message.content == ask(seed=-1).message.content
    token = api.engine.tokenizer.encode("words")[-1]
    forced = ask(logit_bias={str(token): 100}, temperature=0, max_tokens=4).message.content
    assert forced == api.engine.tokenizer.decode([token] * 4)
    assert ask(max_completion_tokens=3, max_tokens=9, logprobs=True).logprobs.content[3:] == []


def test_next_to_nothing_is_the_likeliest_token(api: Api) -> None:
    greedy = api.openai.completions.create(prompt=[5, 6], **GREEDY).choices[0].text
    for wish in ({"temperature": 1e-300}, {"top_p": 5e-324}, {"top_p": 0}, {"temperature": 1e-4}):
        answer = api.openai.completions.create(prompt=[5, 6], model="tiny", **wish)
        assert answer.choices[0].text == greedy
    for bad in (5e-324, 0, 11):
        with pytest.raises(openai.UnprocessableEntityError, match="repetition_penalty"):
            api.openai.completions.create(prompt=[5], extra_body={"repetition_penalty": bad}, model="tiny")


def test_completions_of_texts_and_token_ids(api: Api, alone: LLM) -> None:
    tokenizer = alone.tokenizer
    texts = ["some", "words to"]
    forms = [texts, [tokenizer.encode(text) for text in texts]]
    wanted = [out.text for out in alone.generate(texts, SamplingParams(max_tokens=6, temperature=0))]
    for form in forms:
        answer = api.openai.completions.create(prompt=form, max_tokens=6, **GREEDY)
        assert [choice.text for choice in answer.choices] == wanted
        assert [choice.index for choice in answer.choices] == [0, 1]
    for form, text in ((texts[1], wanted[1]), (forms[1][1], wanted[1])):
        answer = api.openai.completions.create(prompt=form, max_tokens=6, **GREEDY)
        assert [choice.text for choice in answer.choices] == [text]
    many = api.openai.completions.create(prompt=texts, n=2, max_tokens=3, seed=1, model="tiny")
    assert [choice.index for choice in many.choices] == [0, 1, 2, 3]
    assert len({choice.text for choice in many.choices}) == 4
    assert api.openai.completions.create(prompt="", max_tokens=2, **GREEDY).usage.prompt_tokens == 1


def test_completions_stream(api: Api) -> None:
    wish = dict(prompt=["some", "words"], max_tokens=7, logprobs=1, **GREEDY)
    whole = api.openai.completions.create(**wish)
    texts, tokens, offsets = ["", ""], [[], []], [[], []]
    for chunk in api.openai.completions.create(**wish, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            if choice.logprobs:
                tokens[choice.index] += choice.logprobs.tokens
                offsets[choice.index] += choice.logprobs.text_offset
    assert texts == [choice.text for choice in whole.choices]
    assert tokens == [choice.logprobs.tokens for choice in whole.choices]
    assert offsets == [choice.logprobs.text_offset for choice in whole.choices]
    ended = sum(choice.finish_reason == "stop" for choice in whole.choices)  # by a token that is not told
    assert sum(map(len, tokens)) + ended == whole.usage.completion_tokens


def test_models(api: Api) -> None:
    (model,) = api.openai.models.list().data
    assert model.id == "tiny" and model.max_model_len == 512
    assert api.openai.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError, match="'other' is not served"):
        api.openai.models.retrieve("other")
    with pytest.raises(openai.NotFoundError, match="'tiny' is") as raised:
        api.openai.chat.completions.create(messages=ASK, model="gpt-4o")
    assert raised.value.code == "model_not_found" and raised.value.param == "model"


@pytest.mark.parametrize(
    ("wish", "param"),
    [
        ({"temperature": 2.5}, "temperature"),
        ({"n": 0}, "n"),
        ({"top_logprobs": 3}, None),
        ({"logit_bias": {"9999999": 1}}, "logit_bias"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"stop": ""}, None),
        ({"max_tokens": 0}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "tool", "content": "x", "tool_call_id": "no"}]}, None),
        ({"tool_choice": "required"}, None),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools.0.function.name"),
        ({"n": 100}, None),
    ],
)
def test_bad_values_are_refused(api: Api, wish: dict[str, object], param: str | None) -> None:
    with pytest.raises(openai.UnprocessableEntityError) as raised:
        api.openai.chat.completions.create(**{"messages": ASK, "model": "tiny", **wish})
    assert raised.value.type == "invalid_request_error"
    if param:
        assert raised.value.param == param
    value = next(iter(wish.values()))
    if param and isinstance(value, float | int):
        assert f" {param} ({value}): " in raised.value.message
    api.idle()


def test_a_prompt_beyond_the_context(api: Api) -> None:
    with pytest.raises(openai.BadRequestError, match="shorten it") as raised:
        api.openai.completions.create(prompt=[[5], [5] * 600], model="tiny")
    assert raised.value.code == "context_length_exceeded"
    with pytest.raises(openai.UnprocessableEntityError, match="holds token 99999"):
        api.openai.completions.create(prompt=[[5], [99999]], model="tiny")
    api.idle()
