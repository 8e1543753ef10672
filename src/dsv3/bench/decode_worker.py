"""One side of ``dsv3 bench decode`` in one round: a job as JSON in, a line of JSON out.

Sides answer ``{"batches": {"4": {"prefill": tokens/s, "decode": tokens/s}}}``: prompt tokens up to the first
token of every answer; tokens from there to the last.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

Times = tuple[float, float]  # seconds to the first token of every answer, and from there to the last
Answer = Callable[[list[list[int]], int], Times]  # prompts, tokens an answer
WARM_UP = 4  # tokens of an answer nobody times: memory is mapped, kernels are compiled


def ours(job: dict[str, Any]) -> tuple[Answer, dict[str, Any]]:
    """``dsv3.LLM`` as it comes, with room for all prompts in its first step."""
    import dsv3
    from dsv3.serve.options import BLOCK_SIZE
    from dsv3.serve.params import SamplingParams

    largest, length = max(job["batches"]), job["prompt_tokens"] + job["tokens"]
    llm = dsv3.LLM(
        job["model"],
        max_batch=largest,
        max_batch_tokens=largest * job["prompt_tokens"],
        max_length=length,
        cache_tokens=largest * (length + 2 * BLOCK_SIZE),  # a block begun and one to spare each
    )

    def answer(prompts: list[list[int]], tokens: int) -> Times:
        params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
        started = time.perf_counter()
        for prompt in prompts:
            llm.engine.add_request(prompt, params)
        if len(llm.engine.step()) != len(prompts):
            raise RuntimeError("the first step did not end every prompt")
        first = time.perf_counter()
        while llm.engine.busy:
            llm.engine.step()
        return first - started, time.perf_counter() - first

    return answer, {"weight_bytes_per_token": weight_bytes(llm.engine.model)}


def weight_bytes(model: torch.nn.Module) -> int:
    """Bytes of the main model's weights that one token reads: K of the E experts, no embedding."""
    config: Any = model.config
    later = tuple(
        f"model.layers.{config.num_hidden_layers + k}." for k in range(config.num_nextn_predict_layers)
    )
    total = 0
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if "embed_tokens" in name or (later and name.startswith(later)):
            continue
        size = tensor.numel() * tensor.element_size()
        if ".experts." in name:
            size = size * config.num_experts_per_tok // config.n_routed_experts
        total += size
    return total


def transformers(job: dict[str, Any]) -> tuple[Answer, dict[str, Any]]:
    """``generate`` in BF16, eager, SDPA attention, a dynamic cache; experts by what follows the colon."""
    from transformers import DeepseekV3ForCausalLM, StoppingCriteria, StoppingCriteriaList, __version__
    from transformers.utils.logging import set_verbosity_error

    set_verbosity_error()

    class Clock(StoppingCriteria):
        """Called after every token."""

        def __init__(self) -> None:
            self.times: list[float] = []

        def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
            self.times.append(time.perf_counter())
            return torch.zeros(len(input_ids), dtype=torch.bool)

    _, _, experts = job["do"].partition(":")
    options = {"experts_implementation": experts} if experts else {}
    model = DeepseekV3ForCausalLM.from_pretrained(job["model"], dtype=torch.bfloat16, **options).eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0

    @torch.inference_mode()
    def answer(prompts: list[list[int]], tokens: int) -> Times:
        ids, clock = torch.tensor(prompts), Clock()
        started = time.perf_counter()
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=tokens,
            stopping_criteria=StoppingCriteriaList([clock]),
        )
        return clock.times[0] - started, clock.times[-1] - clock.times[0]

    config = model.config
    return answer, {
        "version": __version__,
        "experts": config._experts_implementation,
        "attention": config._attn_implementation,
    }


def bandwidth(side: int = 2**14, times: int = 8) -> float:
    """Bytes a second at which memory is read: the best of a few products of a 1 GiB matrix and a vector."""
    matrix, vector = torch.ones(side, side), torch.ones(side)
    best = float("inf")
    for _ in range(times):
        started = time.perf_counter()
        torch.mv(matrix, vector)
        best = min(best, time.perf_counter() - started)
    return matrix.numel() * matrix.element_size() / best


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """A round of one side."""
    from dsv3.config.model import ModelConfig

    answer, facts = (ours if job["do"] == "ours" else transformers)(job)
    vocab = ModelConfig.from_pretrained(job["model"]).vocab_size
    generator = torch.Generator().manual_seed(job["seed"])

    def prompts(batch: int) -> list[list[int]]:
        return torch.randint(vocab, (batch, job["prompt_tokens"]), generator=generator).tolist()

    batches = {}
    for batch in job["batches"]:
        answer(prompts(batch), WARM_UP)
        before, after = answer(prompts(batch), job["tokens"])
        batches[str(batch)] = {
            "prefill": batch * job["prompt_tokens"] / before,
            "decode": batch * (job["tokens"] - 1) / after,
        }
    return {"batches": batches, **facts}


def main() -> None:
    """Do the job of standard input."""
    from dsv3.common.errors import UserError

    job = json.load(sys.stdin)
    torch.set_num_threads(job["threads"])
    try:
        found = {"bytes_per_second": bandwidth()} if job["do"] == "bandwidth" else measure(job)
    except UserError as error:
        sys.exit(str(error))
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
