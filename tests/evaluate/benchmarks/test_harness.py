"""lm-eval's model of ours: windows over a long text, answers, conversations, its own command line."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("lm_eval", reason="lm-eval (extra [eval]) is not installed")

from lm_eval.api.instance import Instance

from dsv3.data.special import ASSISTANT, BOS, USER
from dsv3.evaluate.benchmarks.harness import Dsv3LM
from dsv3.serve.llm import LLM
from dsv3.serve.params import SamplingParams


def instance(kind: str, *arguments: object) -> Instance:
    return Instance(request_type=kind, doc={}, arguments=arguments, idx=0)


def test_every_token_of_a_long_text_counts_once(folder: Path) -> None:
    short = Dsv3LM(llm=LLM(folder, max_length=24, cache_tokens=1024))
    text = "which of them is right, 3 + 4 or the first one? " * 5
    (found,) = short.loglikelihood_rolling([instance("loglikelihood_rolling", text)])
    ids, size = short.tok_encode(text), short.max_length - 1
    model, total = short.llm.engine.model, 0.0
    for start in range(0, len(ids), size):  # each window begins with the token before it
        stop = min(start + size, len(ids))
        window = [*([short.prefix_token_id] if start == 0 else []), *ids[:stop]][-size - 1 :]
        with torch.no_grad():
            logits = model(torch.tensor([window])).logits_BTV[0, :, : short.tokens.vocab_size]
        table = logits.double().log_softmax(-1)
        for place in range(len(window) - (stop - start), len(window)):
            total += float(table[place - 1, window[place]])
    assert len(ids) > 2 * size and found == pytest.approx(total, abs=1e-3)


def test_answers_stop_where_they_are_told(llm: LLM) -> None:
    ours = Dsv3LM(llm=llm)
    (plain,) = llm.generate(["Question:"], SamplingParams(max_tokens=12, temperature=0))
    stop = plain.text[3]
    asked = [
        instance("generate_until", "Question:", {"until": until, "max_gen_toks": 12, "do_sample": False})
        for until in ([], stop, [stop, "zz"])
    ]
    first, *others = ours.generate_until(asked, disable_tqdm=True)
    assert first == plain.text and others == [plain.text[: plain.text.index(stop)]] * 2


def test_conversations_are_in_our_format(llm: LLM) -> None:
    ours = Dsv3LM(llm=llm)
    turns = [{"role": "user", "content": "3 + 4?"}]
    assert ours.apply_chat_template(turns) == f"{BOS}{USER}3 + 4?{ASSISTANT}"
    begun = [*turns, {"role": "assistant", "content": "It is"}]
    assert ours.apply_chat_template(begun, add_generation_prompt=False).endswith(f"{ASSISTANT}It is")
    assert ours.tok_encode(f"{BOS}{USER}")[:2] == [llm.tokenizer.bos_id, llm.tokenizer.special("user")]


@pytest.mark.slow
def test_the_command_line_knows_it(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text('{"context": "Question:", "choices": ["a", "b"], "gold": 1}\n' * 3)
    (tmp_path / "t.yaml").write_text(
        f"task: t\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path}/t.jsonl}}}}\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: context\ndoc_to_choice: choices\n"
        "doc_to_target: gold\nmetric_list: [{metric: acc}]\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "dsv3.evaluate.benchmarks.harness", "run", "--model", "dsv3", "--model_args",
         f"path={folder}", "--tasks", "t", "--include_path", str(tmp_path)],
        capture_output=True, text=True,
        env={"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path), **os.environ},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "|acc" in done.stdout.replace(" ", "")
