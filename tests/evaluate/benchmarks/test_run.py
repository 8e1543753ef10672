"""Runs of benchmarks: records, means, going on after a kill, and other models kept apart."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from dsv3.common.errors import UserError
from dsv3.evaluate.benchmarks.base import Benchmark, Question
from dsv3.evaluate.benchmarks.generated import generated
from dsv3.evaluate.benchmarks.likelihood import Likelihood, Pair, likelihoods, pair
from dsv3.evaluate.benchmarks.run import _ranked, describe, read_records, run
from dsv3.serve.llm import LLM
from dsv3.serve.params import SamplingParams

CHOICES = Benchmark(
    "ranked", "acc",
    [
        Question(str(n), choices=tuple((f"Question: which {n}?", f" {word}") for word in words), gold=n % 2)
        for n, words in enumerate([("the first", "right one"), ("x", "def f"), ("of them", "is")] * 4)
    ],
)  # fmt: skip


def test_choices_are_ranked_by_their_likelihood(llm: LLM, tmp_path: Path) -> None:
    results = run(llm, [CHOICES], tmp_path, {"name": "a"})
    _, records = read_records(tmp_path / "ranked.jsonl")
    model, tokenizer = llm.engine.model, llm.tokenizer
    assert tokenizer is not None
    right = []
    for question, record in zip(CHOICES.questions, records):
        sums = []
        for context, text in question.choices:
            ids, start = tokenizer.encode(context + text), len(tokenizer.encode(context))
            with torch.no_grad():
                logits = model(torch.tensor([ids])).logits_BTV[0, :, : tokenizer.vocab_size]
            table = logits.double().log_softmax(-1)
            sums.append(sum(float(table[place - 1, ids[place]]) for place in range(start, len(ids))))
        assert record["logprobs"] == pytest.approx(sums, abs=1e-4)
        right.append(sums.index(max(sums)) == question.gold)
        lengths = [len(text.lstrip()) for _, text in question.choices]
        norm = [one / length for one, length in zip(sums, lengths)]
        assert record["scores"]["acc_norm"] == (norm.index(max(norm)) == question.gold)
        bits = -sums[question.gold] / 0.6931471805599453 / len(question.choices[question.gold][1].encode())
        assert record["scores"]["bits_per_byte"] == pytest.approx(bits, rel=1e-4)
    share = sum(right) / len(right)
    found = results["tasks"]["ranked"]
    assert 0 < share < 1 and found["acc"] == share
    assert found["acc_stderr"] == pytest.approx((share * (1 - share) / (len(right) - 1)) ** 0.5)
    assert results == json.loads((tmp_path / "results.json").read_text())


def test_a_single_choice_is_right_where_it_would_be_written(llm: LLM, tmp_path: Path) -> None:
    tokenizer = llm.tokenizer
    assert tokenizer is not None
    starts = [f"Question: which is {n}?" for n in range(40)]
    outs = llm.generate(starts, SamplingParams(max_tokens=1, temperature=0))
    for start, out in zip(starts, outs):
        said = tokenizer.decode(out.token_ids)
        if tokenizer.encode(start + said) == tokenizer.encode(start) + out.token_ids:
            break
    else:
        raise AssertionError("no first token comes back from its text")
    asked = [Question(text, choices=((start, text),)) for text in (said, "\n")]
    run(llm, [Benchmark("one", "acc", asked)], tmp_path, {})
    _, records = read_records(tmp_path / "one.jsonl")
    assert [record["scores"]["acc"] for record in records] == [1.0, 0.0]


def test_prompts_too_long_lose_their_beginning_and_are_counted(folder: Path, tmp_path: Path) -> None:
    short = LLM(folder, max_length=32, cache_tokens=1024)
    text = "which of them is right? " * 20
    ranked = Benchmark("r", "acc", [Question("0", choices=((text, " one"), (text, " first")))])
    free = Benchmark(
        "f", "exact", [Question("0", text)],
        judge=lambda asked, answers: [{"exact": 0.0} for _ in asked], max_tokens=8,
    )  # fmt: skip
    found = run(short, [ranked, free], tmp_path, {})["tasks"]
    assert found["r"]["truncated"] == found["f"]["truncated"] == 1
    _, (record,) = read_records(tmp_path / "f.jsonl")
    assert record["tokens"] <= 8 and record["prompt"] == text


def test_what_is_left_of_a_long_context_counts_as_context(folder: Path) -> None:
    short = LLM(folder, max_length=32, cache_tokens=1024)
    assert short.tokenizer is not None
    whole = pair(short.tokenizer, "which of them is right? " * 20, " one of them")
    size = len(whole.ids) - whole.start
    (found,) = likelihoods(short, [whole])
    (same,) = likelihoods(short, [Pair(whole.ids[-32:], 32 - size)])
    assert found.truncated and not same.truncated and found.logprob == pytest.approx(same.logprob, abs=1e-4)
    (all_of_it,) = likelihoods(short, [Pair(whole.ids[-32:], 1)])
    assert all_of_it.logprob < found.logprob < 0


def test_characters_are_those_of_the_choice_without_its_space() -> None:
    question = Question("0", choices=(("Q", " a"), ("Q", " bbb")), gold=1)
    found = [Likelihood(-1.0, False, False), Likelihood(-2.9, False, False)]
    assert _ranked(question, found)["scores"] == {
        "acc": 0.0,
        "acc_norm": 1.0,
        "bits_per_byte": pytest.approx(2.9 / 4 / 0.6931471805599453),
    }


def test_only_what_is_missing_is_asked(llm: LLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = run(llm, [CHOICES], tmp_path, {"name": "a"})
    path = tmp_path / "ranked.jsonl"
    lines = path.read_bytes().split(b"\n")
    path.write_bytes(b"\n".join(lines[:6]) + b"\n" + lines[6][:40])  # killed while writing
    asked: list[int] = []
    whole = llm.generate
    monkeypatch.setattr(
        llm, "generate", lambda prompts, params: asked.append(len(prompts)) or whole(prompts, params)
    )
    assert run(llm, [CHOICES], tmp_path, {"name": "a"}) == first
    assert asked[-1] == 2 * (len(CHOICES.questions) - 5)
    assert sorted(path.read_bytes().split(b"\n")) == sorted(lines)
    asked.clear()
    assert run(llm, [CHOICES], tmp_path, {"name": "a"}) == first and not asked
    with pytest.raises(UserError, match="another model or setting"):
        run(llm, [CHOICES], tmp_path, {"name": "b"})


def test_another_model_in_the_same_folder_is_told_apart(folder: Path, tmp_path: Path) -> None:
    import dsv3
    from tests.model.build import tiny_model

    for seed in (1, 2):
        dsv3.save(tiny_model(seed, num_hidden_layers=1), tmp_path / str(seed))
    one, two = (describe(tmp_path / str(seed))["fingerprint"] for seed in (1, 2))
    assert one != two and one == describe(tmp_path / "1")["fingerprint"]
    with pytest.raises(UserError, match="does not exist"):
        describe(tmp_path)
    with pytest.raises(UserError, match="int2"):
        describe(folder, "int2")


def test_killed_and_taken_up_again_ends_the_same(folder: Path, tmp_path: Path) -> None:
    command = [
        sys.executable, "-m", "dsv3", "eval", str(folder), "--tasks", "sums:3,letters:2", "--samples", "70",
        "--max-tokens", "4", "--out",
    ]  # fmt: skip
    whole = subprocess.run([*command, str(tmp_path / "whole")], capture_output=True, text=True)
    assert whole.returncode == 0, whole.stderr
    broken = tmp_path / "broken"
    process = subprocess.Popen([*command, str(broken)], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    first = broken / "sums-3.jsonl"
    while not (first.exists() and first.read_bytes().count(b"\n") > 1):
        time.sleep(0.002)
        assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (broken / "results.json").exists()
    again = subprocess.run([*command, str(broken), "--json"], capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout) == json.loads((tmp_path / "whole" / "results.json").read_text())
    for name in ("sums-3.jsonl", "letters-2.jsonl"):
        assert (broken / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_what_generated_tasks_leave(llm: LLM, tmp_path: Path) -> None:
    results = run(llm, [generated("gcd", 5, max_tokens=6)], tmp_path, {})
    head, records = read_records(tmp_path / "gcd.jsonl")
    assert head["task"] == "gcd" and len(records) == 5
    assert all(record["answer"] is not None and record["reference"]["task"] == "gcd" for record in records)
    assert results["tasks"]["gcd"]["accuracy"] == 0 and results["tasks"]["gcd"]["n"] == 5


def test_what_prompts_share_is_read_once(folder: Path) -> None:
    llm = LLM(folder, cache_tokens=4096)
    assert llm.tokenizer is not None
    head = "Question: which of them is right? Answer: the first one, " * 4
    pairs = [
        pair(llm.tokenizer, f"{head} {n} def f(x): return x What is {n} + 4?", f" {word}")
        for n in range(20) for word in ("one", "is", "right")
    ]  # fmt: skip
    plain = [likelihoods(llm, [one])[0] for one in pairs[:4]]
    llm.engine.forget()
    before = llm.engine.stats.cached_tokens
    found = likelihoods(llm, pairs)
    for one, other in zip(plain, found):
        assert one.logprob == pytest.approx(other.logprob, abs=1e-4) and one.greedy == other.greedy
    cached = llm.engine.stats.cached_tokens - before
    assert cached > 0.8 * sum(len(one.ids) for one in pairs)
