"""``dsv3.LLM``: the public face, beside transformers and the plain generator."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import dsv3
from dsv3.common.errors import UserError
from dsv3.data.tokenizer import Tokenizer, train
from dsv3.evaluate.sample import complete, generate
from dsv3.model import DeepSeekV3
from dsv3.serve.engine import Engine
from dsv3.serve.options import Options
from dsv3.serve.updates import Update
from tests.model.build import tiny_model
from tests.model.transformers_twin import twin_of

GREEDY = dsv3.SamplingParams(max_tokens=12, temperature=0)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    text = "def add(a, b):\n    return a + b\n\n日本語 é 🙂 some words and some more words\n"
    return train([text] * 20, 340)


@pytest.fixture(scope="module")
def model(tokenizer: Tokenizer) -> DeepSeekV3:
    return tiny_model(vocab_size=tokenizer.vocab_size + 5, num_nextn_predict_layers=1)


@pytest.fixture(scope="module")
def llm(model: DeepSeekV3, tokenizer: Tokenizer) -> dsv3.LLM:
    return dsv3.LLM(model, tokenizer=tokenizer, draft_tokens=1, cache_tokens=2048, max_length=256)


def test_from_a_folder(model: DeepSeekV3, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """The lines of the design."""
    dsv3.save(model, tmp_path / "model")
    tokenizer.save(tmp_path / "model")
    llm = dsv3.LLM(tmp_path / "model", draft_tokens=1, cache_tokens=512)
    (out,) = llm.generate(["def add(a, b):"], dsv3.SamplingParams(max_tokens=16, temperature=0))
    assert out.text == complete(model, tokenizer, "def add(a, b):", max_tokens=16)
    assert out.text == tokenizer.decode(out.token_ids, skip_special=True)
    assert out.finish_reason in ("stop", "length")
    assert out.usage.prompt_tokens == len(tokenizer.encode("def add(a, b):")) == len(out.prompt_token_ids)
    assert out.usage.completion_tokens == len(out.token_ids) <= 16
    assert out.usage.drafted >= out.usage.accepted >= 0


def test_greedy_is_transformers_greedy(llm: dsv3.LLM, model: DeepSeekV3) -> None:
    twin = twin_of(model)
    prompts = [[5, 6, 7, 8], [9] * 33, [40, 3, 77]]
    outs = llm.generate(prompts, replace(GREEDY, max_tokens=24, ignore_eos=True))
    vocab = llm.engine.vocab_size
    for prompt, out in zip(prompts, outs):
        found = twin.generate(
            torch.tensor([prompt]), max_new_tokens=24, min_new_tokens=24, do_sample=False,
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long), pad_token_id=0, eos_token_id=None,
            suppress_tokens=list(range(vocab, model.config.vocab_size)),
        )  # fmt: skip
        assert out.token_ids == found[0, len(prompt) :].tolist()


def test_many_prompts_and_a_wish_each(llm: dsv3.LLM, model: DeepSeekV3) -> None:
    prompts = [[3, 4, 5], "some words", [7] * 40]
    wishes = [replace(GREEDY, max_tokens=n, ignore_eos=True) for n in (3, 9, 6)]
    outs = llm.generate(prompts, wishes)
    vocab = llm.engine.vocab_size
    for prompt, wish, out in zip(prompts, wishes, outs):
        assert out.token_ids == generate(model, llm.encode(prompt), wish.max_tokens, vocab_size=vocab)
    assert llm.generate("some words", wishes[1])[0].token_ids == outs[1].token_ids
    assert llm.generate([7] * 40, wishes[2])[0].usage.cached_tokens == 32
    assert llm.generate([]) == []


def test_seeds(llm: dsv3.LLM) -> None:
    wish = dsv3.SamplingParams(max_tokens=20, temperature=1.5, seed=7, n=3, ignore_eos=True)
    (first,), (again,) = llm.generate([[4, 5]], wish), llm.generate([[4, 5]], wish)
    assert first.completions == again.completions
    assert len({tuple(c.token_ids) for c in first.completions}) == 3
    assert llm.generate([[4, 5]], replace(wish, n=1))[0].token_ids == first.token_ids
    free = replace(wish, seed=None, n=1)
    assert llm.generate([[4, 5]], free)[0].token_ids != llm.generate([[4, 5]], free)[0].token_ids
    assert first.usage.completion_tokens == 60 and first.usage.prompt_tokens == 2


def test_stops(llm: dsv3.LLM, tokenizer: Tokenizer) -> None:
    wish = replace(GREEDY, max_tokens=40, ignore_eos=True)
    (whole,) = llm.generate([[3, 4, 5]], wish)
    stop = whole.text[6:9]
    (cut,) = llm.generate([[3, 4, 5]], replace(wish, stop=[stop]))
    assert cut.text == whole.text[: whole.text.index(stop)] and cut.finish_reason == "stop"
    assert cut.token_ids == whole.token_ids[: len(cut.token_ids)]
    ended = whole.token_ids[5]
    (out,) = llm.generate([[3, 4, 5]], replace(wish, stop_token_ids=[ended]))
    assert (
        out.token_ids == whole.token_ids[: whole.token_ids.index(ended) + 1] and out.finish_reason == "stop"
    )
    assert out.text == tokenizer.decode(out.token_ids[:-1], skip_special=True)
    (eos,) = llm.generate([[3, 4, 5]], replace(wish, ignore_eos=False, logit_bias={tokenizer.eos_id: 100}))
    assert eos.token_ids == [tokenizer.eos_id] and eos.text == "" and eos.finish_reason == "stop"


def test_logprobs(llm: dsv3.LLM, model: DeepSeekV3) -> None:
    (out,) = llm.generate([[3, 4, 5]], replace(GREEDY, logprobs=3, ignore_eos=True))
    assert [found.token_id for found in out.logprobs] == out.token_ids
    text = torch.tensor([[3, 4, 5, *out.token_ids]])
    with torch.no_grad():
        logits = model(text, mtp=False).logits_BTV[0, 2:-1, : llm.engine.vocab_size]
    wanted = logits.log_softmax(-1)
    for row, found in zip(wanted, out.logprobs):
        assert abs(float(row[found.token_id]) - found.logprob) < 1e-3
        assert found.top[0] == (found.token_id, found.logprob) and len(found.top) == 3
    (none,) = llm.generate([[3, 4, 5]], GREEDY)
    assert none.logprobs == []


def test_stream_and_leaving_it(llm: dsv3.LLM) -> None:
    wish = replace(GREEDY, max_tokens=30, ignore_eos=True)
    (whole,) = llm.generate(["some words"], wish)
    updates = list(llm.stream("some words", wish))
    assert "".join(update.text for update in updates) == whole.text
    assert [token for update in updates for token in update.token_ids] == whole.token_ids
    assert updates[-1].finish_reason == "length" and updates[-1].usage is not None
    assert all(update.finish_reason is None for update in updates[:-1])
    for _ in llm.stream("some words", wish):
        break
    assert not llm.engine.busy and llm.engine.blocks.used == 0


def test_ctrl_c_leaves_nothing_behind(llm: dsv3.LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    run, calls = llm.engine.runner.run, []

    def interrupted(chunks: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return run(chunks)

    monkeypatch.setattr(llm.engine.runner, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        llm.generate([[1, 2, 3], [4] * 50], GREEDY)
    assert not llm.engine.busy and llm.engine.blocks.used == 0


@pytest.mark.parametrize("kind, share", [("bfloat16", 0.9), ("fp8", 0.5)])
def test_smaller_caches_give_nearly_the_same(model: DeepSeekV3, kind: str, share: float) -> None:
    """Tokens of a random model are close calls; most stay, and cut or cached prompts change none."""
    prompts = [[5, 6, 7] * 12, [9] * 33, [40, 3, 77]]
    wish = replace(GREEDY, max_tokens=8, ignore_eos=True)
    exact = dsv3.LLM(model, cache_tokens=1024).generate(prompts, wish)
    small = dsv3.LLM(model, cache_tokens=1024, cache_dtype=kind)
    first = small.generate(prompts, wish)
    same = [a == b for x, y in zip(exact, first) for a, b in zip(x.token_ids, y.token_ids)]
    assert sum(same) / len(same) >= share
    again = small.generate(prompts, wish)
    assert [o.token_ids for o in again] == [o.token_ids for o in first]
    assert again[0].usage.cached_tokens == 32
    cut = dsv3.LLM(model, cache_tokens=1024, cache_dtype=kind, max_batch=2, max_batch_tokens=5)
    assert [o.token_ids for o in cut.generate(prompts, wish)] == [o.token_ids for o in first]


def test_bfloat16_model_generates(model: DeepSeekV3) -> None:
    import copy

    half = copy.deepcopy(model).bfloat16()
    llm = dsv3.LLM(half, cache_tokens=512, draft_tokens=2)
    embedding = half.model.embed_tokens
    assert embedding.weight.dtype == torch.bfloat16
    assert llm.engine.cache.rows.dtype == (embedding.compute_dtype or torch.bfloat16)
    assert dsv3.LLM(half, cache_tokens=64, cache_dtype="bfloat16").engine.cache.rows.dtype == torch.bfloat16
    (out,) = llm.generate([[3, 4, 5] * 9], replace(GREEDY, ignore_eos=True))
    assert len(out.token_ids) == 12


@pytest.mark.parametrize(
    "options, message",
    [
        ({"draft_token": 1}, r"option 'draft_token' is unknown \(did you mean draft_tokens\?\)"),
        ({"draft_tokens": -1}, r"draft_tokens \(-1\) must be a whole number, at least 0"),
        ({"max_batch": 0}, r"max_batch \(0\)"),
        ({"max_batch": 8, "max_batch_tokens": 7}, r"max_batch_tokens \(7\) must be at least 8"),
        ({"cache_tokens": 100, "max_length": 200}, r"max_length \(200\) does not fit cache_tokens \(100\)"),
        ({"max_length": 5000}, r"max_length \(5000\) exceeds the model's max_position_embeddings \(4096\)"),
        ({"cache_dtype": "int4"}, r"cache_dtype \('int4'\) must be one of auto, float32, bfloat16, fp8"),
        ({"dtype": "bfloat16"}, "dtype and quantize are for a folder"),
    ],
)
def test_options_refused(model: DeepSeekV3, options: dict[str, Any], message: str) -> None:
    with pytest.raises(dsv3.UserError, match=message):
        dsv3.LLM(model, **options)


def test_requests_refused(llm: dsv3.LLM, model: DeepSeekV3) -> None:
    engine = llm.engine
    for prompt, message in (
        ([], "the prompt is empty"),
        ([1] * 256, r"the prompt has 256 tokens and max_length is 256"),
        ([1, 10**6], "the prompt holds token 1000000"),
    ):
        with pytest.raises(dsv3.UserError, match=message):
            llm.generate([[1, 2], prompt])
        assert not engine.busy  # the good one was not queued either
    with pytest.raises(dsv3.UserError, match=r"params \(1\) must be one, or as many as prompts \(2\)"):
        llm.generate([[1], [2]], [GREEDY])
    bare = Engine(model, options=Options(cache_tokens=256))
    with pytest.raises(dsv3.UserError, match="needs a tokenizer; give stop_token_ids"):
        bare.add_request([1], dsv3.SamplingParams(stop="a"))
    bare.add_request([1], GREEDY, "mine")
    with pytest.raises(dsv3.UserError, match=r"request_id \('mine'\) is in use"):
        bare.add_request([1], GREEDY, "mine")
    with pytest.raises(dsv3.UserError, match="a text prompt needs a tokenizer"):
        dsv3.LLM(model, cache_tokens=256).generate("text")


def test_weights_that_change(tokenizer: Tokenizer) -> None:
    """A trainer's model: after a step of training the cache is forgotten."""
    model = tiny_model(vocab_size=tokenizer.vocab_size)
    llm, wish = dsv3.LLM(model, cache_tokens=256), replace(GREEDY, ignore_eos=True)
    prompt = [*range(3, 40)]
    llm.engine.add_request(prompt, wish, "open")
    with pytest.raises(dsv3.UserError, match="1 requests are unfinished"):
        llm.engine.forget()
    llm.engine.abort("open")
    before = llm.generate([prompt], wish)
    with torch.no_grad():
        for layer in model.main_layers:
            layer.self_attn.o_proj.weight.neg_()
    llm.engine.forget()
    (after,) = llm.generate([prompt], wish)
    assert after.usage.cached_tokens == 0 and after.token_ids != before[0].token_ids
    assert after.token_ids == generate(model, prompt, 12)


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_a_broken_row_ends_its_own_request(tokenizer: Tokenizer, temperature: float) -> None:
    """One embedding is not a number: prompts with it end in an error, the others do not notice."""
    model = tiny_model(vocab_size=tokenizer.vocab_size, num_nextn_predict_layers=1)
    with torch.no_grad():
        model.model.embed_tokens.weight[7] = float("nan")
    llm = dsv3.LLM(model, cache_tokens=512, draft_tokens=2)
    wish = replace(GREEDY, temperature=temperature, seed=1, ignore_eos=True, logit_bias={7: -100})
    prompts = [[3, 4, 5] * 7, [3, 7, 5], [9] * 20, [7]]
    outs = llm.generate(prompts, wish)
    assert [out.finish_reason for out in outs] == ["length", "error", "length", "error"]
    assert outs[1].token_ids == [] and outs[1].usage.completion_tokens == 0
    assert llm.engine.blocks.used == 0
    llm.engine.forget()
    assert [llm.generate([prompts[n]], wish)[0].token_ids for n in (0, 2)] == [
        outs[n].token_ids for n in (0, 2)
    ]


def test_an_answer_ends_where_the_cache_does(model: DeepSeekV3) -> None:
    llm = dsv3.LLM(model, cache_tokens=32, draft_tokens=1)
    (out,) = llm.generate([[1, 2, 3]], replace(GREEDY, max_tokens=100, ignore_eos=True))
    assert out.finish_reason == "length" and len(out.token_ids) + 3 == llm.engine.max_length == 30


def test_streams_read_in_turns_lose_nothing(llm: dsv3.LLM) -> None:
    """A step computes every open request: what it made for another call waits for that call."""
    prompts = ([5, 6, 7], [9, 10], [40, 3, 77])
    alone = [out.token_ids for out in llm.generate(prompts, replace(GREEDY, ignore_eos=True))]
    streams = [llm.stream(prompt, replace(GREEDY, ignore_eos=True)) for prompt in prompts[:2]]
    found: list[list[int]] = [[], []]
    for turn in range(12):
        if turn == 2:
            assert llm.generate([prompts[2]], replace(GREEDY, ignore_eos=True))[0].token_ids == alone[2]
        for answer, stream in zip(found, streams):
            answer += [token for update in [next(stream, None)] if update for token in update.token_ids]
    assert found == alone[:2]
    assert [list(stream) for stream in streams] == [[], []]
    assert not llm.engine.busy and not llm._boxes


def test_threads_share_an_engine(llm: dsv3.LLM) -> None:
    """Two of them in a step at once would be a segmentation fault, now and then."""
    prompts = [[5 + i, 6, 7] for i in range(6)]
    params = replace(GREEDY, ignore_eos=True, max_tokens=24)
    alone = [out.token_ids for out in llm.generate(prompts, params)]
    inside, entered = threading.Lock(), list[bool]()
    step = llm.engine.step

    def alone_in_here() -> list[Update]:
        mine = inside.acquire(blocking=False)
        entered.append(mine)
        try:
            return step()
        finally:
            if mine:
                inside.release()

    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(6) as pool:
        patch.setattr(llm.engine, "step", alone_in_here)
        found = list(pool.map(lambda prompt: llm.generate([prompt], params)[0].token_ids, prompts))
    assert all(entered), "two threads were in a step at once"
    assert found == alone


def test_a_stream_forgotten_within_a_step(llm: dsv3.LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """The garbage collector may close it anywhere: it waits for nobody, and goes before the next step."""
    (expected,) = llm.generate([[5, 6, 7]], GREEDY)
    stream = llm.stream([9, 10], replace(GREEDY, ignore_eos=True))
    next(stream)
    step, open_within = llm.engine.step, list[int]()

    def collecting() -> list[Update]:
        stream.close()  # type: ignore[attr-defined]
        open_within.append(len(llm.engine.requests))
        return step()

    monkeypatch.setattr(llm.engine, "step", collecting)
    (found,) = llm.generate([[5, 6, 7]], GREEDY)
    assert found.token_ids == expected.token_ids
    assert open_within[0] == 2 and set(open_within[1:]) == {1}
    assert not llm.engine.busy and not llm._boxes


@pytest.mark.parametrize(
    "prompts", [None, 5, b"abc", {"prompt": "x"}, [[1.5]], [None], ["fine", ["a"]]], ids=repr
)
def test_what_is_no_prompt_is_refused(llm: dsv3.LLM, prompts: Any) -> None:
    with pytest.raises(UserError, match="must be a text or a list of token ids"):
        llm.generate(prompts, GREEDY)
    assert not llm.engine.busy


def test_a_bias_for_no_token_is_refused(llm: dsv3.LLM) -> None:
    known = llm.engine.vocab_size
    with pytest.raises(UserError, match=f"logit_bias names token {known}; there are {known}"):
        llm.generate([[5]], replace(GREEDY, logit_bias={known: 1.0}))
    assert llm.generate([[5]], replace(GREEDY, logit_bias={known - 1: 1.0}))


def test_prompts_from_a_generator_and_tensors(llm: dsv3.LLM) -> None:
    (expected,) = llm.generate([[5, 6, 7]], GREEDY)
    (found,) = llm.generate((ids for ids in [torch.tensor([5, 6, 7])]), GREEDY)
    assert found.token_ids == expected.token_ids
    with pytest.raises(UserError, match=r"must be dsv3.SamplingParams"):
        llm.generate("x", {"max_tokens": 3})  # type: ignore[arg-type]
