"""The two ways to name a parameter: ours and the Hugging Face file's (report, released weights).

They differ in two points, which only this file knows. A layer's routed experts are one stacked tensor here,
``...mlp.experts.gate_proj.weight [E, O, I]``, and E tensors ``...mlp.experts.{e}.gate_proj.weight [O, I]``
in the files. And the files repeat embedding and head inside every MTP layer.

Legend: E experts, O outputs, I inputs.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from torch import Tensor, nn

from dsv3.config.model import ModelConfig
from dsv3.quant.frozen import linears

_STACKED = re.compile(r"(.*\.mlp\.experts)\.((?:gate|up|down)_proj\.weight(?:_scale_inv)?)")
_EXPERT = re.compile(r"(\.mlp\.experts)\.\d+(\.(?:gate|up|down)_proj\.weight(?:_scale_inv)?)$")
_SCALES = "_scale_inv"
_LAYER = re.compile(r"model\.layers\.(\d+)\.")


def hf_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every parameter and buffer under its file name, as a view: writing to it writes to the model.

    MTP repeats are left out; see :func:`mtp_repeats`.
    """
    for name, tensor in model.state_dict().items():
        stacked = _STACKED.fullmatch(name)
        if stacked is None:
            yield name, tensor
        else:
            for expert, weight in enumerate(tensor.unbind()):
                yield f"{stacked[1]}.{expert}.{stacked[2]}", weight


def our_name(name: str) -> str:
    """The parameter that a file's tensor belongs to: an expert's index is dropped."""
    return _EXPERT.sub(r"\1\2", name)


def layer(name: str) -> int | None:
    """The layer a tensor belongs to; None for embedding, last norm and head."""
    found = _LAYER.match(name)
    return int(found[1]) if found else None


def mtp_repeats(config: ModelConfig) -> dict[str, str]:
    """Tensors that the files hold twice: ``{name inside an MTP layer: name in the main model}``."""
    main, depth = config.num_hidden_layers, config.num_nextn_predict_layers
    return {
        f"model.layers.{layer}.{repeat}": original
        for layer in range(main, main + depth)
        for repeat, original in (
            ("embed_tokens.weight", "model.embed_tokens.weight"),
            ("shared_head.head.weight", "lm_head.weight"),
        )
    }


def mtp_depth(config: ModelConfig, names: Iterable[str]) -> int:
    """How many MTP layers a set of file names holds.

    Re-uploads often lack them (transformers drops them when it saves) whatever ``config.json`` says. A layer
    counts as one by its ``eh_proj``; where the names hold other parts of such a layer the configuration
    decides, so that a part that is missing is missed.
    """
    depth, beyond = 0, False
    for name in names:
        index = layer(name)
        if index is not None and index >= config.num_hidden_layers:
            beyond = True
            if name.endswith(".eh_proj.weight"):
                depth = max(depth, index - config.num_hidden_layers + 1)
    return depth or (config.num_nextn_predict_layers if beyond else 0)


def ignored(name: str) -> bool:
    """Tensors of old files that are computed, not learnt."""
    return name.endswith("rotary_emb.inv_freq")


def always_fp32(name: str) -> bool:
    """The experts' selection bias: steps of 0.001 would vanish beside 0.5 in BF16 (report 2.1.2)."""
    return name.endswith("e_score_correction_bias")


def scale_name(name: str) -> str:
    """The block scales of an FP8 weight (report 3.3; value = FP8 number times the scale of its block)."""
    return name + _SCALES


def is_scale(name: str) -> bool:
    """Whether a name is that of block scales."""
    return name.endswith(_SCALES)


def quantised(model: nn.Module) -> set[str]:
    """The weights that FP8 files hold in FP8, by file name; the rest of them is BF16, biases FP32."""
    ours = {f"{path}.weight" for path, _ in linears(model)}
    return {name for name, _ in hf_tensors(model) if our_name(name) in ours}
