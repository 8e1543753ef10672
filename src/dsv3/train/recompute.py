"""What the backward pass makes again instead of keeping (report 5, memory), applied from outside."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from dsv3.model import DeepSeekV3
from dsv3.model.layer import DecoderLayer

# Attention itself is kept: its output is one tensor a layer, making it again is the dearest part.
_KEPT = {
    torch.ops.dsv3.causal_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
}


def _keep_attention(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operator in _KEPT else CheckpointPolicy.PREFER_RECOMPUTE


def _recomputed(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    return partial(checkpoint, function, use_reentrant=False, preserve_rng_state=False, **options)


def apply(model: DeepSeekV3, what: Literal["none", "report", "layer"]) -> None:
    """Wrap the parts of each layer whose activations are not kept.

    ``report``: the norm in front of attention with the down-projections, and everything between the
    latents and the attention (norms, up-projections, rotation), attention's own result excepted; the
    experts' SwiGLU product is never kept anyway. ``layer``: everything but each layer's input.
    """
    if what == "none":
        return
    selective = partial(create_selective_checkpoint_contexts, _keep_attention)
    for layer in model.model.layers:
        assert isinstance(layer, DecoderLayer)
        if what == "layer":
            layer.forward = _recomputed(layer.forward)  # type: ignore[method-assign]
            continue
        attention = layer.self_attn
        attention.attend = _recomputed(attention.attend, context_fn=selective)  # type: ignore[method-assign]
        layer.prepare = _recomputed(layer.prepare)  # type: ignore[method-assign]
