"""Answers under a schema or a grammar: always of it, whatever the schedule, with drafts or without."""

from __future__ import annotations

import gc
import json
import random
import weakref
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import jsonschema
import pytest
import tokenizers
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dsv3
from dsv3.data.special import FIRST
from dsv3.data.tokenizer import Tokenizer, train
from dsv3.model import DeepSeekV3
from dsv3.serve import grammar as grammar_module
from dsv3.serve.engine import Engine
from dsv3.serve.grammar import Grammars, forbidden
from dsv3.serve.options import Options
from dsv3.serve.params import SamplingParams
from dsv3.serve.sequence import Sequence
from tests.model.build import tiny_model
from tests.serve.conftest import surprise

OBJECT = {"type": "object"}
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 4},
        "n": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 99}, "maxItems": 2},
        "ok": {"type": "boolean"},
    },
    "required": ["name", "n"],
    "additionalProperties": False,
}


@cache
def tokenizer() -> Tokenizer:
    return train(['{"name": "some words", "n": [1, 23], "ok": true, "x": null}, and é 🙂\n'] * 9, 320)


@cache
def model() -> DeepSeekV3:
    return tiny_model(
        seed=3, vocab_size=tokenizer().vocab_size + 5, num_hidden_layers=2, num_nextn_predict_layers=1
    ).eval()


@cache
def few_blanks(less: float) -> dict[int, float]:
    """A bias against blanks, which would fill the answers of a random model."""
    return {number: -less for number, text in enumerate(tokenizer().token_bytes) if text and text.isspace()}


def engine_of(drafts: int = 0, **options: Any) -> Engine:
    options = {"cache_tokens": 512, "max_length": 120, **options}
    return Engine(model(), tokenizer(), Options(draft_tokens=drafts, **options))


def answers(engine: Engine, prompt: list[int], params: SamplingParams) -> list[Sequence]:
    made = engine.requests[engine.add_request(prompt, params)]
    while engine.busy:
        engine.step()
    return made


@pytest.fixture
def unrehearsed(monkeypatch: pytest.MonkeyPatch) -> None:
    """No process for each schema of a test that is about something else."""
    monkeypatch.setattr(Grammars, "_rehearse", lambda *_: None)


def check(sequence: Sequence, schema: dict[str, Any]) -> None:
    """Whole and valid, or cut off and called so."""
    if sequence.finish_reason == "stop":
        jsonschema.validate(json.loads(sequence.text.text), schema, jsonschema.Draft202012Validator)
    else:
        assert sequence.finish_reason == "length" and len(sequence.answer) == sequence.params.max_tokens


# Any schedule


leaves = st.sampled_from(
    [
        {"type": "integer", "minimum": 0, "maximum": 120},
        {"type": "boolean"},
        {"enum": ["a", 'b"\n', 1, None]},
        {"type": "string", "maxLength": 3},
        {"type": "string", "pattern": "^[ab]{1,2}$"},
        {"anyOf": [{"type": "null"}, {"const": [1, {"a": 2}]}]},
    ]
)
schemas = (
    leaves
    | st.just(OBJECT)
    | st.builds(
        lambda items, most: {"type": "array", "items": items, "maxItems": most}, leaves, st.integers(0, 2)
    )
    | st.builds(
        lambda fields, needed, closed: {
            "type": "object",
            "properties": dict(zip("abc", fields)),
            "required": list("abc"[:needed]),
            "additionalProperties": not closed,
        },
        st.lists(leaves, min_size=1, max_size=3),
        st.integers(0, 2),
        st.booleans(),
    )
)


@dataclass(frozen=True)
class Ask:
    schema: str | None  # as JSON, None for a free request
    prompt: tuple[int, ...]
    seed: int | None  # None: greedy
    penalty: float
    max_tokens: int
    at: int
    aborted: int | None

    @property
    def params(self) -> SamplingParams:
        return SamplingParams(
            json_schema=None if self.schema is None else json.loads(self.schema),
            max_tokens=self.max_tokens,
            temperature=0 if self.seed is None else 0.9,
            seed=self.seed,
            repetition_penalty=self.penalty,
            logit_bias=few_blanks(3) if self.schema else {},
        )


asks = st.builds(
    Ask,
    schema=st.none() | schemas.map(json.dumps),
    prompt=st.integers(1, 45).map(lambda length: tuple(range(40, 40 + length))),
    seed=st.none() | st.integers(0, 2),
    penalty=st.sampled_from([1.0, 1.0, 1.3]),
    max_tokens=st.integers(1, 40),
    at=st.integers(0, 10),
    aborted=st.none() | st.none() | st.integers(0, 8),
)


@cache
def alone(ask: Ask, drafts: int) -> list[int]:
    return answers(engine_of(drafts), list(ask.prompt), ask.params)[0].answer


@settings(max_examples=15)
@given(st.lists(asks, min_size=1, max_size=5), st.integers(0, 2), st.integers(0, 40), st.integers(7, 12))
def test_any_schedule(unrehearsed: None, wanted: list[Ask], drafts: int, budget: int, blocks: int) -> None:
    engine = engine_of(
        drafts,
        max_batch=4,
        max_batch_tokens=4 * (1 + drafts) + budget,
        cache_tokens=16 * blocks,
        max_length=100,
    )
    made: dict[int, Sequence] = {}
    step = 0
    while engine.busy or len(made) < len(wanted):
        for number, ask in enumerate(wanted):
            if ask.at == step:
                (made[number],) = engine.requests[
                    engine.add_request(list(ask.prompt), ask.params, str(number))
                ]
            if ask.aborted is not None and step == ask.at + ask.aborted:
                engine.abort(str(number))
        engine.step()
        step += 1
        assert step < 2000
    assert engine.blocks.used == 0
    for number, sequence in made.items():
        ask = wanted[number]
        expected = alone(ask, drafts if ask.seed is not None else 0)  # greedy: as without drafts
        assert sequence.answer == expected[: len(sequence.answer)]
        if sequence.finish_reason != "abort":
            assert len(sequence.answer) == len(expected)
            if ask.schema is not None:
                check(sequence, json.loads(ask.schema))


def test_schedules_reach_what_they_are_for(unrehearsed: None) -> None:
    """Whole documents, cut ones, drafts that stand and preemption under a grammar."""
    engine = engine_of(2, max_batch=4, max_batch_tokens=30, cache_tokens=16 * 9, max_length=100)
    made = []
    for number in range(8):
        ask = Ask(
            json.dumps(PERSON), tuple(range(40, 60)), number % 3 or None, 1.0, 20 + 10 * number, 0, None
        )
        made += engine.requests[engine.add_request(list(ask.prompt), ask.params)]
    while engine.busy:
        engine.step()
    for sequence in made:
        check(sequence, PERSON)
    assert Counter(sequence.finish_reason for sequence in made).keys() == {"stop", "length"}
    assert engine.scheduler.preemptions > 0 and 0 < engine.stats.acceptance < 1


def test_drafts_are_of_the_grammar(unrehearsed: None) -> None:
    engine = engine_of(2)
    wish = SamplingParams(max_tokens=60, json_schema=PERSON, seed=1)
    grammars, seen = Grammars(tokenizer(), engine.vocab_size), 0
    (sequence,) = engine.requests[engine.add_request([1, 2, 3], wish)]
    while engine.busy:
        engine.step()
        own = grammars.start(wish)
        assert all(own.advance(token) for token in sequence.answer)
        for draft in sequence.drafts:
            assert own.complete or own.advance(draft)
            seen += 1
    assert seen > 20


# Sampling


SMALL = ["a", "b", "ab", "ba", "c"]


@cache
def small() -> tuple[DeepSeekV3, Tokenizer]:
    inner = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocab={text: number for number, text in enumerate(SMALL)}, merges=[])
    )
    inner.add_special_tokens([FIRST[1]])
    words = Tokenizer(inner)
    assert words.vocab_size == 6 and words.eos_id == 5
    return tiny_model(vocab_size=6, num_hidden_layers=2, num_nextn_predict_layers=1).eval(), words


@torch.no_grad()
def exact(prompt: list[int], temperature: float, biased: dict[int, float]) -> dict[tuple[int, ...], float]:
    """The probability of every answer that spells two or three of a and b, from whole forwards."""
    whole = {x + y + z for x in "ab" for y in "ab" for z in ("a", "b", "")}
    found: dict[tuple[int, ...], float] = {}

    def go(answer: tuple[int, ...], text: str, share: float) -> None:
        logits = small()[0](torch.tensor([[*prompt, *answer]]), mtp=False).logits_BTV[0, -1]
        for token, bias in biased.items():
            logits[token] += bias
        fits = [any(word.startswith(text + piece) for word in whole) for piece in SMALL] + [text in whole]
        row = (logits / temperature).masked_fill(~torch.tensor(fits), -torch.inf).softmax(-1)
        for token in range(6):
            if fits[token]:
                longer = text + SMALL[token] if token < 5 else text
                if token == 5 or len(longer) == 3:  # the end, or nothing can follow
                    found[(*answer, token)] = share * float(row[token])
                else:
                    go((*answer, token), longer, share * float(row[token]))

    go((), "", 1.0)
    return found


@pytest.mark.parametrize("drafts", [0, 1, 2])
def test_sampled_answers_have_the_models_distribution(unrehearsed: None, drafts: int) -> None:
    net, words = small()
    engine = Engine(net, words, Options(drafts, max_batch=250, max_batch_tokens=1024, cache_tokens=8192))
    wish = SamplingParams(
        max_tokens=9, temperature=0.8, grammar="start: /[ab]{2,3}/", n=1000, seed=5, logit_bias={2: 0.5}
    )
    made = answers(engine, [1, 3, 2, 2, 0], wish)
    assert {sequence.finish_reason for sequence in made} == {"stop"}
    counts = Counter(tuple(sequence.answer) for sequence in made)
    assert surprise(counts, exact([1, 3, 2, 2, 0], 0.8, {2: 0.5})) < 4
    if drafts:
        assert 0.05 < engine.stats.acceptance < 0.95


# Ends


def test_ends(unrehearsed: None) -> None:
    """A document that may end or go on ends by end of sentence, one that must end ends there."""
    words, engine = tokenizer(), engine_of(1)
    push = {words.eos_id: 50.0, **few_blanks(50)}
    number = SamplingParams(json_schema={"type": "integer"}, max_tokens=9, logit_bias=push, ignore_eos=True)
    (sequence,) = answers(engine, [5], number)
    assert sequence.finish_reason == "stop" and sequence.answer[-1] == words.eos_id
    digits = str(json.loads(sequence.text.text)).removeprefix("-")
    assert len(digits) == 1 and len(sequence.answer) <= 3  # not before a digit, and right after one
    (sequence,) = answers(engine, [5], replace(number, logit_bias={words.eos_id: -50.0}, skip_special=False))
    assert sequence.finish_reason == "length" and json.loads(sequence.text.text) is not None
    (sequence,) = answers(engine, [5], replace(number, json_schema={"const": [1]}))
    assert sequence.finish_reason == "stop" and words.eos_id not in sequence.answer
    assert json.loads(sequence.text.text) == [1]
    whole = len(sequence.answer)
    (sequence,) = answers(engine, [5], replace(number, json_schema={"const": [1]}, max_tokens=whole))
    assert sequence.finish_reason == "stop"
    (sequence,) = answers(engine, [5], replace(number, json_schema={"const": [1]}, max_tokens=whole - 1))
    assert sequence.finish_reason == "length"


def test_blanks_come_to_an_end(unrehearsed: None) -> None:
    wish = SamplingParams(json_schema={"maxItems": 0, "type": "array"}, max_tokens=90, n=8, seed=1)
    made = answers(engine_of(), [5], replace(wish, logit_bias=few_blanks(-50)))
    assert {sequence.finish_reason for sequence in made} == {"stop"}
    assert 10 < max(len(sequence.text.text) for sequence in made) <= 44


def test_a_stop_text_still_ends_an_answer(unrehearsed: None) -> None:
    wish = SamplingParams(grammar='start: "abc"', stop="b")
    (sequence,) = answers(engine_of(), [5], wish)
    assert (sequence.text.text, sequence.finish_reason) == ("a", "stop")


def test_control_tokens_only_where_the_grammar_names_them(unrehearsed: None) -> None:
    words = tokenizer()
    begin, end, user = (
        words.special(name) for name in ("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>", "user")
    )
    engine = engine_of(2)
    wish = SamplingParams(
        grammar="start: <｜tool▁calls▁begin｜> %json " + json.dumps(PERSON) + " <｜tool▁calls▁end｜>",
        max_tokens=100, seed=2, logit_bias={user: 50.0, begin: 50.0, **few_blanks(9)},
    )  # fmt: skip
    for sequence in answers(engine, [5], replace(wish, n=3)):
        assert sequence.answer[0] == begin and begin not in sequence.answer[1:]
        assert user not in sequence.answer and words.eos_id not in sequence.answer
        if sequence.finish_reason == "stop":
            assert sequence.answer[-1] == end
            jsonschema.validate(json.loads(sequence.text.text), PERSON)
    assert "stop" in {sequence.finish_reason for sequence in answers(engine, [5], replace(wish, n=3))}


def test_a_dead_end_is_an_error_of_its_own_request(unrehearsed: None) -> None:
    """The vocabulary cannot spell what must follow: no token is made up."""
    net, words = small()
    engine = Engine(net, words, Options(draft_tokens=2, cache_tokens=256))
    (broken,) = engine.requests[engine.add_request([1], SamplingParams(grammar='start: "ab" "z" | "c" "x"'))]
    (good,) = engine.requests[engine.add_request([1], SamplingParams(grammar='start: "ab"'))]
    while engine.busy:
        engine.step()
    assert (good.finish_reason, broken.finish_reason) == ("stop", "error")
    found = "".join(SMALL[token] for token in broken.answer)
    assert found in ("ab", "c", "a")  # "a": of a step that ends in a dead end, an accepted draft "b" goes too
    assert engine.blocks.used == 0


# Masks


def test_masks_beside_trying_every_token(unrehearsed: None) -> None:
    """After tokens and drafts, by a matcher that comes back, as by a new one that went there."""
    grammars, chance = Grammars(tokenizer(), size := tokenizer().vocab_size), random.Random(1)
    wish, known, forced = SamplingParams(json_schema=PERSON), list[int](), 0
    matcher = grammars.start(wish)
    while not matcher.complete and len(known) < 25:
        guessed: list[int] = []
        for _ in range(3):
            fresh = grammars.start(wish)
            assert all(fresh.advance(token) for token in [*known, *guessed])
            if fresh.complete:
                break
            (mask_V,) = forbidden([(matcher, guessed)], size)
            assert torch.equal(mask_V, forbidden([(fresh, [])], size)[0])
            found = (~mask_V).nonzero()[:, 0].tolist()
            fits = [token for token in range(size) if fresh._inner.validate_tokens([token])]
            if found != fits:  # what must follow is spelt as the tokenizer spells it
                assert len(found) == 1 and found[0] in fits
                spelt = tokenizer().token_bytes[found[0]]
                assert all(spelt.startswith(tokenizer().token_bytes[token]) for token in fits)
                forced += 1
            guessed.append(chance.choice(found))
        wrong = [tokenizer().bos_id]
        assert not forbidden([(matcher, wrong)], size).any()  # there is no such place
        known.append(guessed[0])
        assert matcher.advance(guessed[0])
    assert forced


def test_matchers_go_with_their_answers(unrehearsed: None) -> None:
    engine, gone = engine_of(1), []
    for _ in range(3):
        request = engine.add_request([1, 2, 3], SamplingParams(json_schema=OBJECT, n=2, max_tokens=4))
        gone += [weakref.ref(sequence.matcher) for sequence in engine.requests[request]]
        kept = engine.requests[request]
        engine.step()
        engine.abort(request)
    (finished,) = answers(engine, [5], SamplingParams(json_schema=OBJECT, max_tokens=2))
    gc.collect()
    assert all(reference() is None for reference in gone)
    assert finished.matcher is None and [sequence.matcher for sequence in kept] == [None, None]


# Refusals


@pytest.mark.parametrize(
    "wish, message",
    [
        ({"json_schema": {"type": "strng"}}, "json_schema is refused: Invalid type: strng"),
        ({"json_schema": {"not": {}}}, r'json_schema is refused: Unimplemented keys: \["not"\]'),
        ({"json_schema": {"x-guidance": {"lenient": True}, "not": {}}}, r'Unimplemented keys: \["not"\]'),
        ({"json_schema": {"enum": []}}, "json_schema is refused: Unsatisfiable"),
        ({"json_schema": {"$ref": "https://example.com/x"}}, "json_schema is refused"),
        ({"grammar": "start: nothing"}, "grammar is refused: .*unknown name"),
        ({"grammar": "start: <nothing>"}, "grammar is refused: .*unknown special token"),
        ({"grammar": ""}, "grammar is refused"),
    ],
)
def test_refused_before_anything_is_queued(unrehearsed: None, wish: dict[str, Any], message: str) -> None:
    engine = engine_of()
    with pytest.raises(dsv3.UserError, match=message) as caught:
        engine.add_request([1], SamplingParams(**wish))
    assert "\n" not in str(caught.value) and not engine.busy


@pytest.mark.parametrize(
    "wish, message",
    [
        ({"json_schema": OBJECT, "grammar": "start: /a/"}, "json_schema and grammar exclude each other"),
        ({"json_schema": "{}"}, r"json_schema \('\{\}'\) must be a JSON object"),
        ({"json_schema": {"maximum": float("inf")}}, "json_schema must be plain JSON"),
        ({"json_schema": {"const": "\ud800"}}, "json_schema must be plain JSON"),
        ({"json_schema": {"const": "é" * 40_000}}, "json_schema has 80013 bytes, and at most 65536"),
        ({"grammar": 3}, r"grammar \(3\) must be a text"),
    ],
)
def test_refused_by_the_parameters(wish: dict[str, Any], message: str) -> None:
    with pytest.raises(dsv3.UserError, match=message):
        SamplingParams(**wish)


def test_deep_schemas() -> None:
    schema: dict[str, Any] = OBJECT
    for _ in range(300):
        schema = {"items": schema}
    with pytest.raises(dsv3.UserError, match="json_schema is refused: recursion limit exceeded"):
        engine_of().check([1], SamplingParams(json_schema=schema))
    for _ in range(5000):
        schema = {"items": schema}
    with pytest.raises(dsv3.UserError, match="json_schema must be plain JSON"):
        SamplingParams(json_schema=schema)


CHAIN = "\n".join(["start: r0", *(f"r{n}: r{n + 1}" for n in range(3000)), 'r3000: "a"'])
PATTERNS = {"allOf": [{"type": "string", "pattern": f".*a.{{{n}}}"} for n in range(10, 40)]}


@pytest.mark.parametrize(
    "wish", [SamplingParams(grammar=CHAIN), SamplingParams(json_schema=PATTERNS)], ids=["stack", "minutes"]
)
def test_hostile_grammars_cost_a_process(monkeypatch: pytest.MonkeyPatch, wish: SamplingParams) -> None:
    monkeypatch.setattr(grammar_module, "SECONDS", 1)
    with pytest.raises(dsv3.UserError, match=f"{wish.constraint_name} is refused: compiling it takes more"):
        engine_of().check([1], wish)


def test_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled, compile_ = [], Grammars._compile
    monkeypatch.setattr(
        Grammars, "_compile", lambda self, text, name: compiled.append(name) or compile_(self, text, name)
    )
    monkeypatch.setattr(grammar_module, "COMPILED", 2)
    engine = engine_of()
    engine.check([1], SamplingParams(json_schema=OBJECT))  # rehearsed, too
    monkeypatch.setattr(Grammars, "_rehearse", lambda *_: None)
    wishes = [SamplingParams(**wish) for wish in ({"json_schema": OBJECT}, {"grammar": 'start: "a"'})]
    for wish in [*wishes, *wishes]:
        engine.add_request([1], replace(wish, n=3))
    assert compiled == ["json_schema", "grammar"]
    for wish in (wishes[0], SamplingParams(grammar='start: "b"'), wishes[0], wishes[1]):
        engine.check([1], wish)
    assert compiled == ["json_schema", "grammar", "grammar", "grammar"]  # the oldest was forgotten


def test_checks_from_other_threads(unrehearsed: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server checks requests while the engine goes on; grammars come and go."""
    monkeypatch.setattr(grammar_module, "COMPILED", 2)
    engine, made = engine_of(1), list[Sequence]()
    wishes = [SamplingParams(json_schema={"const": f"word {n}"}, seed=n) for n in range(6)]
    with ThreadPoolExecutor(4) as pool:
        checks = [pool.submit(engine.check, [1], wish) for wish in wishes * 10]
        for wish in wishes:
            made += engine.requests[engine.add_request([1], wish)]
            engine.step()
        while engine.busy:
            engine.step()
        assert [check.result() for check in checks] == [None] * 60
    assert [json.loads(sequence.text.text) for sequence in made] == [f"word {n}" for n in range(6)]


def test_without_a_tokenizer() -> None:
    engine = Engine(model(), options=Options(cache_tokens=256))
    with pytest.raises(dsv3.UserError, match="json_schema needs a tokenizer"):
        engine.add_request([1], SamplingParams(json_schema=OBJECT))
