"""``dsv3 bench fp8 --memory``: what a layer keeps for its backward, in bytes a token, by precision.

The layer has the real model's widths (hidden 7168, eight experts a token) and only the eight experts every
token goes to, which changes nothing for what is kept. Every tensor that is still allocated after the forward
pass counts; two lengths are measured and the difference taken, so that what does not grow with tokens
(weights cast to BF16) drops out.
"""

from __future__ import annotations

import gc
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from dsv3.bench.machine import machine
from dsv3.config.fp8 import FP8Section
from dsv3.config.model import ModelConfig
from dsv3.config.recipe import validate
from dsv3.model import DeepSeekV3
from dsv3.quant import fp8
from dsv3.train import recompute

SHORT, LONG = 128, 256  # tokens
WIDTHS: dict[str, Any] = dict(
    vocab_size=128, num_hidden_layers=1, num_nextn_predict_layers=0, first_k_dense_replace=0,
    n_routed_experts=8, num_experts_per_tok=8, n_group=1, topk_group=1, aux_loss_alpha=0.0,
)  # fmt: skip
# Name: compute dtype, FP8 or not, what is made again.
CASES: dict[str, tuple[torch.dtype, bool, Any]] = {
    "FP32": (torch.float32, False, "none"),
    "BF16": (torch.bfloat16, False, "none"),
    "BF16, recompute": (torch.bfloat16, False, "report"),
    "FP8": (torch.bfloat16, True, "none"),
    "FP8, recompute": (torch.bfloat16, True, "report"),
}


def kept_bytes(model: DeepSeekV3, dtype: torch.dtype, tokens: int) -> int:
    """Bytes allocated during a forward pass of the one layer and not freed at its end."""
    config = model.config
    x = torch.randn(1, tokens, config.hidden_size, dtype=dtype).requires_grad_()
    context = model.context(torch.arange(tokens))
    gc.collect()  # recomputation leaves cycles: what an earlier pass kept must not be freed within this one
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        out, _ = model.main_layers[0](x, context)
    assert found.profiler is not None and found.profiler.kineto_results is not None
    events = found.profiler.kineto_results.events()
    allocated = sum(event.nbytes() for event in events if event.name() == "[memory]")
    return allocated - out.nbytes


def bench(widths: dict[str, Any] | None = None) -> dict[str, Any]:
    """Bytes a token a layer of every case; ``widths`` are changes to the real model's configuration."""
    config = validate(ModelConfig, {"preset": "v3-671b", **WIDTHS, **(widths or {})})
    torch.manual_seed(0)
    found = {}
    for name, (dtype, in_fp8, again) in CASES.items():
        model = DeepSeekV3(config)
        if in_fp8:
            fp8.apply(model, FP8Section())
        recompute.apply(model, again)
        kept_bytes(model, dtype, SHORT)  # what is only made once does not count
        difference = kept_bytes(model, dtype, LONG) - kept_bytes(model, dtype, SHORT)
        found[name] = difference / (LONG - SHORT)
    return {
        "hidden_size": config.hidden_size,
        "bytes_per_token_per_layer": found,
        "ratios": {f"{name}:FP32": size / found["FP32"] for name, size in found.items()},
        "machine": machine("cpu"),
    }


def report(result: dict[str, Any]) -> str:
    """The sizes as a table."""
    sizes = result["bytes_per_token_per_layer"]
    lines = [f"kept for the backward, a layer with experts, hidden {result['hidden_size']}:"]
    for name, size in sizes.items():
        share = size / sizes["BF16"]
        lines.append(f"  {name:<18} {size / 1024:>8.1f} KiB a token   {share:.2f} of BF16")
    return "\n".join(lines)
