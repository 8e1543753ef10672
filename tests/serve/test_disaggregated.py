"""Two processes answer as one does, and neither takes the other with it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

import dsv3
from dsv3.common.errors import Failure, UserError
from dsv3.data.tokenizer import train
from dsv3.serve.disaggregated import Disaggregated
from tests.model.build import tiny_model

GREEDY = dsv3.SamplingParams(max_tokens=20, temperature=0, ignore_eos=True)
OPTIONS = dict(draft_tokens=1, cache_tokens=4096, max_length=2048)
LONG = [7, 9] * 900  # its cache rows are more than a socket's buffer holds


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = train(["def add(a, b):\n    return a + b\n\nsome words 日本語 🙂\n"] * 20, 340)
    folder = tmp_path_factory.mktemp("disaggregated") / "model"
    dsv3.save(tiny_model(vocab_size=tokenizer.vocab_size, num_nextn_predict_layers=1), folder)
    tokenizer.save(folder)
    return folder


@pytest.fixture(scope="module")
def llm(folder: Path) -> dsv3.LLM:
    return dsv3.LLM(folder, **OPTIONS)


@pytest.fixture(scope="module")
def started(folder: Path) -> Iterator[Disaggregated]:
    with Disaggregated(folder, timeout=30, **OPTIONS) as front:
        yield front
        pids = [pid(front, role) for role in ("prefill", "decode")]
    for number in pids:  # nobody is left behind
        with pytest.raises(ProcessLookupError):
            os.kill(number, 0)
    with pytest.raises(UserError, match="is closed"):
        front.generate([[1]])


@pytest.fixture
def front(started: Disaggregated) -> Iterator[Disaggregated]:
    """Alive before the test; soon after it (what was given up may still travel), nobody holds anything."""
    started.timeout = 30
    yield started
    names, until = ("blocks_used", "requests", "moving", "bytes_pending"), time.monotonic() + 20
    while any(held := [started.state(role)[name] for role in ("prefill", "decode") for name in names]):
        assert time.monotonic() < until, held


def pid(front: Disaggregated, role: str) -> int:
    return int(front.state(role)["pid"])


def until(seen: Callable[[], object]) -> None:
    for _ in range(300):
        if seen():
            return
        time.sleep(0.1)
    raise AssertionError("it never came")


def runs(number: int) -> bool:
    """Whether there is such a process; one that has ended and was not asked how by its heir is none."""
    try:
        return psutil.Process(number).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_the_answers_are_those_of_one_process(front: Disaggregated, llm: dsv3.LLM) -> None:
    prompts = ["def add(", [5, 6, 7], LONG, "some words", "", [40] * 33, [6, 7, 8], "def"]
    wishes = [
        GREEDY,
        replace(GREEDY, temperature=0.9, seed=5, n=3, logprobs=2),
        replace(GREEDY, max_tokens=4),
        replace(GREEDY, temperature=1.2, top_p=0.9, seed=6, repetition_penalty=1.1, logit_bias={5: 1.5}),
        replace(GREEDY, max_tokens=1, n=2, seed=1),
        replace(GREEDY, max_tokens=60, stop=["é", "a", "🙂"], ignore_eos=False),
        replace(GREEDY, max_tokens=0, prompt_logprobs=1),
        replace(GREEDY, max_tokens=40, json_schema={"enum": ["some", "words", "return a"]}),
    ]
    found, expected = front.generate(prompts, wishes), llm.generate(prompts, wishes)
    for one, other in zip(found, expected):
        assert one.prompt_token_ids == other.prompt_token_ids
        for mine, theirs in zip(one.completions, other.completions, strict=True):
            assert (mine.text, mine.token_ids) == (theirs.text, theirs.token_ids)
            assert mine.finish_reason == theirs.finish_reason
            assert [x.token_id for x in mine.logprobs] == [x.token_id for x in theirs.logprobs]
            for x, y in zip(mine.logprobs, theirs.logprobs):
                assert x.logprob == pytest.approx(y.logprob, abs=1e-4) and len(x.top) == len(y.top)
        assert (one.usage.prompt_tokens, one.usage.completion_tokens) == (
            other.usage.prompt_tokens,
            other.usage.completion_tokens,
        )
        assert one.usage.drafted >= one.usage.accepted
        assert len(one.prompt_logprobs) == len(other.prompt_logprobs)
    assert found[-1].text in ('"some"', '"words"', '"return a"')
    assert found[1].completions[2].logprobs and len(found[-2].prompt_logprobs) == 3
    assert front.generate([]) == []
    assert front.generate("some words", replace(GREEDY, seed=6))[0].text


def test_streams(front: Disaggregated, llm: dsv3.LLM) -> None:
    (whole,) = llm.generate(["def add("], GREEDY)
    updates = list(front.stream("def add(", GREEDY))
    assert "".join(update.text for update in updates) == whole.text
    assert [token for update in updates for token in update.token_ids] == whole.token_ids
    assert [update.finish_reason for update in updates[:-1]] == [None] * (len(updates) - 1)
    assert updates[-1].finish_reason == "length" and updates[-1].usage is not None
    left = front.stream(LONG, replace(GREEDY, max_tokens=100))
    next(left)
    beside = front.stream([5, 6, 7], GREEDY)
    assert next(beside).token_ids and next(left).token_ids
    left.close()  # given up: the fixture sees that its blocks are free
    rest = [token for update in beside for token in update.token_ids]
    assert len(rest) < GREEDY.max_tokens
    for number in range(8):
        front._drop(front._ask([number, *LONG], GREEDY))
    assert front.state("prefill")["requests"] == 0  # long before they could have been read


def test_mistakes_are_refused_and_harm_nobody(front: Disaggregated) -> None:
    for prompts, words in (
        ([[]], "the prompt is empty"),
        ([[5], [3] * 3000], "the prompt has 3000 tokens and max_length is 2048"),
        ([[10**6]], "the prompt holds token 1000000"),
    ):
        with pytest.raises(UserError, match=words) as caught:
            front.generate(prompts, GREEDY)
        assert caught.value.exit_code == 2
    with pytest.raises(UserError, match=r"params \(2\)"):
        front.generate([[1]], [GREEDY, GREEDY])


def test_a_model_that_cannot_be_read_is_said_in_one_line(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="option 'draft_token' is unknown"):
        Disaggregated(folder, draft_token=1)
    with pytest.raises(UserError, match="timeout"):
        Disaggregated(folder, timeout=0)


def test_decode_killed_while_it_answers(front: Disaggregated, llm: dsv3.LLM) -> None:
    killed = pid(front, "decode")
    stream = front.stream([5, 6, 7], replace(GREEDY, max_tokens=1500))
    next(stream)
    os.kill(killed, signal.SIGKILL)
    with pytest.raises(Failure, match=rf"the decode process \(pid {killed}\) was killed by SIGKILL; ask"):
        list(stream)
    assert front.generate([[5, 6, 7]], GREEDY)[0].token_ids == llm.generate([[5, 6, 7]], GREEDY)[0].token_ids
    assert pid(front, "decode") != killed


def test_prefill_killed_spares_what_is_being_answered(front: Disaggregated, llm: dsv3.LLM) -> None:
    killed = pid(front, "prefill")
    wish = replace(GREEDY, max_tokens=300)
    stream = front.stream([5, 6, 7], wish)
    tokens = list(next(stream).token_ids)
    os.kill(killed, signal.SIGKILL)
    tokens += [token for update in stream for token in update.token_ids]
    assert tokens == llm.generate([[5, 6, 7]], wish)[0].token_ids
    assert front.generate([LONG], GREEDY)[0].token_ids == llm.generate([LONG], GREEDY)[0].token_ids
    assert pid(front, "prefill") != killed


@pytest.mark.parametrize("victim", ["prefill", "decode"])
def test_killed_in_the_middle_of_a_transfer(front: Disaggregated, llm: dsv3.LLM, victim: str) -> None:
    killed, decode = pid(front, victim), pid(front, "decode")
    os.kill(decode, signal.SIGSTOP)
    request = front._ask(LONG, GREEDY)
    until(lambda: front.state("prefill")["bytes_pending"] > 0)  # part of it is with the system, part not
    assert request.places == ["prefill"]
    os.kill(killed, signal.SIGKILL)
    until(lambda: front._turn() or request.trouble)
    assert isinstance(request.trouble, Failure)
    # Prefill may be the first to say so: it finds nobody at the other end.
    found = str(request.trouble)
    assert re.search(
        rf"the {victim} process \(pid {killed}\) was killed by SIGKILL|the decode process", found
    )
    if victim == "prefill":
        os.kill(decode, signal.SIGCONT)
    assert front.generate([LONG], GREEDY)[0].token_ids == llm.generate([LONG], GREEDY)[0].token_ids


def test_a_process_that_falls_silent_is_ended(front: Disaggregated, llm: dsv3.LLM) -> None:
    silent = pid(front, "decode")
    stream = front.stream([5, 6, 7], replace(GREEDY, max_tokens=1500))
    next(stream)
    front.timeout = 1.5
    os.kill(silent, signal.SIGSTOP)
    begun = time.monotonic()
    with pytest.raises(Failure, match=rf"the decode process \(pid {silent}\) has said nothing for 1.5 s"):
        list(stream)
    assert time.monotonic() - begun < 20
    front.timeout = 30
    assert front.generate([[5, 6, 7]], GREEDY)[0].token_ids == llm.generate([[5, 6, 7]], GREEDY)[0].token_ids


def test_the_processes_end_with_their_front(folder: Path) -> None:
    """Even when it is killed and can say nothing."""
    program = """
import sys, time
from dsv3.serve.disaggregated import Disaggregated
front = Disaggregated(sys.argv[1])
print(*(front.state(role)["pid"] for role in ("prefill", "decode")), flush=True)
time.sleep(600)
"""
    with subprocess.Popen([sys.executable, "-c", program, str(folder)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        pids = [int(number) for number in process.stdout.readline().split()]
        process.kill()
    assert len(pids) == 2
    until(lambda: not any(map(runs, pids)))
