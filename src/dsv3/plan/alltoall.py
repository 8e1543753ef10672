"""How many copies of a token leave its node, and the time that takes (report 2.1.2 and 3.2.2).

A token is sent once to each node (or GPU) that holds one of its experts, and its results come back once. The
way on, over NVLink to the experts' GPUs of a node, is taken as hidden behind the network (report 3.2.2).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import comb

from dsv3.config.model import ModelConfig
from dsv3.plan.hardware import Hardware

LINK_SHARE = 0.9  # of a link's rate; DeepEP publishes 43 to 51 GB/s over links of 50
TILE = 128  # channels that share a scale of 4 bytes, in a dispatch in FP8


@dataclass(frozen=True)
class Route:
    """Where a token's copies go: ``copies`` to others than its own place, over links of ``rate`` bytes/s."""

    copies: float
    rate: float


def route(
    config: ModelConfig,
    expert: int,
    machine: Hardware,
    deduplicated: bool = True,
    link_share: float = LINK_SHARE,
) -> Route:
    """Copies a token and a layer, with ``expert`` GPUs that share the experts, loads even.

    Within an NVLink domain the places are GPUs, else nodes. Where the places divide the routing groups, a
    token reaches those that hold one of its topk_group groups; else its K experts count as drawn
    independently, a little too many. Not ``deduplicated`` (small decoding batches): one copy an expert.
    """
    inside = expert <= machine.domain
    places = expert if inside else expert // machine.domain
    rate = (machine.nvlink if inside else machine.network) * link_share
    chosen, groups, kept = config.num_experts_per_tok, config.n_group, config.topk_group
    if places <= 1:
        return Route(0.0, rate)
    if not deduplicated:
        return Route(chosen * (places - 1) / places, rate)
    if groups % places == 0:
        missed = comb(groups - groups // places, kept) / comb(groups, kept)
    else:
        missed = (1 - 1 / places) ** chosen
    return Route((places - 1) * (1 - missed), rate)


def seconds(config: ModelConfig, layers: int, way: Route, fp8_dispatch: bool = True) -> float:
    """Of one token's dispatch (FP8 with its scales, or BF16) and combine (BF16) in ``layers`` MoE layers."""
    if not way.copies:
        return 0.0
    width = config.hidden_size
    dispatch = width + 4 * -(-width // TILE) if fp8_dispatch else 2 * width
    return layers * way.copies * (dispatch + 2 * width) / way.rate


def moe_layers(config: ModelConfig, mtp: bool) -> int:
    """Layers with routed experts, those of the MTP modules counted with ``mtp``."""
    last = config.num_hidden_layers + (config.num_nextn_predict_layers if mtp else 0)
    return sum(config.is_moe(layer) for layer in range(last))
