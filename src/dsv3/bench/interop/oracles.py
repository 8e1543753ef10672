"""One function for each piece of other people's software: what it does with the model, beside what we do."""

from __future__ import annotations

import math
import random
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import torch

import dsv3
from dsv3.bench import llama_cpp
from dsv3.bench.evaluate import agree
from dsv3.bench.interop.case import TOKENS, Case, Finding
from dsv3.bench.server import Server
from dsv3.common.errors import Failure
from dsv3.config.model import ModelConfig
from dsv3.evaluate.benchmarks.base import Benchmark, Question

LOGITS = 1e-4  # largest difference that is rounding
QUESTIONS = 12

# llama.cpp's converter knows tokenizers by a hash over their ids. Ours has V3's pre-tokenizer and other ids.
_CONVERT = """
import runpy, sys
llama, *words = sys.argv[1:]
sys.path.insert(0, llama)
from conversion import base
base.TextModel.get_vocab_base_pre = lambda self, tokenizer: "deepseek-v3"
sys.argv = [f"{llama}/convert_hf_to_gguf.py", *words]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def transformers(case: Case) -> list[Finding]:
    """Token ids, logits, greedy answers, and the same with the MTP module as drafter."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(case.folder))
    theirs = AutoModelForCausalLM.from_pretrained(str(case.folder), dtype=torch.float32).eval()
    ids = [case.llm.encode(prompt) for prompt in case.prompts]
    found = [_same("token ids", ids, [tokenizer(prompt).input_ids for prompt in case.prompts])]

    for what, one in (("logits", case), ("logits, with YaRN", case.extended)):
        gap = _largest_gap(one, AutoModelForCausalLM.from_pretrained(str(one.folder), dtype=torch.float32))
        found.append(Finding(what, gap <= LOGITS, f"largest difference {gap:.1e}"))

    # It looks for MTP modules at layer 61 only, where the released model has them.
    config = ModelConfig.from_pretrained(case.folder)
    theirs._keys_to_ignore_on_load_unexpected = [rf"model\.layers\.{config.num_hidden_layers}\..*"]
    wanted = [answer.token_ids for answer in case.answers]
    ways: dict[str, dict[str, Any]] = {"generate": {}}
    if config.num_nextn_predict_layers:
        ways["generate, use_mtp"] = {"use_mtp": True}
    for what, words in ways.items():
        made = []
        for row in ids:
            out = theirs.generate(torch.tensor([row]), do_sample=False, max_new_tokens=TOKENS, **words)
            made.append(out[0, len(row) :].tolist())
        found.append(_same(f"{what}: greedy tokens", wanted, made))
    return found


@torch.no_grad()
def _largest_gap(case: Case, theirs: Any) -> float:
    """Between our logits and theirs, over the prompts."""
    ours = dsv3.load(case.folder, dtype=torch.float32).eval()
    rows = [torch.tensor([case.llm.encode(prompt)]) for prompt in case.prompts]
    return max(float((ours(row).logits_BTV - theirs(row).logits).abs().max()) for row in rows)


def llama(case: Case) -> list[Finding]:
    """Greedy answers, of the model and of the extended one."""
    return [_llama("greedy text", case), _llama("greedy text, with YaRN", case.extended)]


def _llama(what: str, case: Case) -> Finding:
    """Greedy answers of its FP32 file, made by its own converter."""
    assert case.llama is not None
    program = llama_cpp.program(case.llama, "llama-completion")
    file = case.scratch / f"{case.folder.name}-f32.gguf"
    _run([sys.executable, "-c", _CONVERT, str(case.llama), str(case.folder),
          "--outtype", "f32", "--outfile", str(file)])  # fmt: skip
    # Some more tokens than ours: the last piece may be lost when it ends.
    made = [
        _run([str(program), "-m", str(file), "-p", prompt, "-n", str(TOKENS + 8), "--temp", "0", "-no-cnv",
              "--no-display-prompt", "--no-warmup", "--no-escape", "-t", "1"])
        for prompt in case.prompts
    ]  # fmt: skip
    ours = [answer.text for answer in case.answers]
    return _same(what, ours, [text[: len(a)] for a, text in zip(ours, made)])


def lm_eval(case: Case) -> list[Finding]:
    """Scores four ways (``dsv3 bench eval``) on questions cut from held-out text."""
    result = agree(case.folder, [Benchmark("continuation", "acc", questions(case.texts))])
    scores = {way: tasks["continuation"]["acc"] for way, tasks in result["scores"].items()}
    gap = max(result["largest_difference"].values())
    shown = f"accuracy {next(iter(scores.values())):.3f} in {len(scores)} ways, nats within {gap:.1e}"
    return [Finding("log-likelihoods and scores", bool(result["agree"]), shown)]


def questions(texts: tuple[str, ...]) -> list[Question]:
    """What follows in a text, or what follows elsewhere in it: which is likelier?"""
    draw = random.Random(0)
    found = []
    for number in range(QUESTIONS):
        words = texts[number % len(texts)].split()
        at, elsewhere = (draw.randrange(20, len(words) - 4) for _ in range(2))
        context = " ".join(words[max(0, at - 40) : at])
        right, wrong = (" " + " ".join(words[place : place + 4]) for place in (at, elsewhere))
        pair, gold = ([right, wrong], 0) if number % 2 else ([wrong, right], 1)
        found.append(Question(str(number), choices=tuple((context, text) for text in pair), gold=gold))
    return found


def trl(case: Case) -> list[Finding]:
    """One step of its GRPO trainer, and what it saves read back."""
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    def reward(completions: list[str], **_: Any) -> list[float | None]:
        return [float(text.count("the")) for text in completions]

    out = case.scratch / "trl"
    arguments = GRPOConfig(
        output_dir=str(out), per_device_train_batch_size=8, num_generations=8, max_steps=1, use_cpu=True,
        bf16=False, max_completion_length=24, beta=0.04, learning_rate=1e-4, report_to="none", seed=0,
        save_strategy="no", logging_steps=1, disable_tqdm=True,
    )  # fmt: skip
    rows = Dataset.from_list([{"prompt": prompt} for prompt in case.prompts * 4])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = GRPOTrainer(
            model=str(case.folder), args=arguments, reward_funcs=reward, train_dataset=rows,
            processing_class=AutoTokenizer.from_pretrained(str(case.folder), padding_side="left"),
        )  # fmt: skip
        trainer.train()
        trainer.save_model(str(out))
    first = trainer.state.log_history[0]
    before, after = (dsv3.load(folder, dtype=torch.float32) for folder in (case.folder, out))
    start = dict(before.named_parameters())  # with the MTP module, which transformers does not load
    moved = [not torch.equal(start[name], weight) for name, weight in after.named_parameters()]
    return [
        Finding(
            "a GRPO step, saved, read back",
            math.isfinite(first["loss"]) and first["grad_norm"] > 0 and any(moved),
            f"gradient norm {first['grad_norm']:.3f}, {sum(moved)} of {len(moved)} tensors moved",
        )
    ]


def openai(case: Case) -> list[Finding]:
    """Its client against ``dsv3 serve``: completions, streamed and whole, and a conversation."""
    from openai import OpenAI

    with Server(case.folder, ["--model-name", "interop", "--dtype", "float32"]) as server:
        address = f"http://{server.target.host}:{server.target.port}/v1"
        client = OpenAI(base_url=address, api_key="none", max_retries=0)
        words: dict[str, Any] = {"model": "interop", "temperature": 0, "max_tokens": TOKENS}
        whole = [client.completions.create(prompt=p, **words).choices[0].text for p in case.prompts]
        streamed = [
            "".join(
                chunk.choices[0].text
                for chunk in client.completions.create(prompt=prompt, **words, stream=True)
                if chunk.choices
            )
            for prompt in case.prompts
        ]
        said = client.chat.completions.create(messages=[{"role": "user", "content": "Hello"}], **words)
    ours = [answer.text for answer in case.answers]
    usage = said.usage.completion_tokens if said.usage else 0
    return [
        _same("completions: greedy text", ours, whole),
        _same("streamed: greedy text", ours, streamed),
        Finding("a conversation", 0 < usage <= TOKENS, f"{usage} tokens"),
    ]


def _same(what: str, ours: list[Any], theirs: list[Any]) -> Finding:
    equal = sum(a == b for a, b in zip(ours, theirs, strict=True))
    return Finding(what, equal == len(ours), f"{equal} of {len(ours)} prompts the same")


def _run(command: list[str]) -> str:
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines()
        raise Failure(f"{Path(command[0]).name} stopped: {lines[-1] if lines else 'no message'}")
    return done.stdout
