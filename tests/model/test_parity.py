"""Logits and gradients against transformers' ``DeepseekV3ForCausalLM``, FP32, over many configurations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.model.build import ids, tiny_model
from tests.model.transformers_twin import to_twin, twin_of

YARN = dict(factor=40.0, original_max_position_embeddings=256, beta_fast=32.0, beta_slow=1.0)
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "plain": dict(),
    "one_token": dict(),
    "plain_query": dict(q_lora_rank=None),
    "one_group": dict(n_group=1, topk_group=1),
    "all_groups_kept": dict(n_group=4, topk_group=4),
    "many_groups": dict(n_group=8, topk_group=4, num_experts_per_tok=4),
    "one_group_kept": dict(n_group=4, topk_group=1, num_experts_per_tok=3),
    "whole_groups": dict(n_group=4, topk_group=2, num_experts_per_tok=8),
    "one_expert": dict(num_experts_per_tok=1, n_group=2, topk_group=1, norm_topk_prob=False),
    "yarn_equal": dict(rope_scaling=YARN),
    "yarn_unequal": dict(rope_scaling=dict(**YARN, mscale=0.7, mscale_all_dim=1.3)),
    "yarn_mscale_only": dict(rope_scaling=dict(**YARN, mscale=0.7, mscale_all_dim=0.0)),
    "yarn_all_dim_only": dict(rope_scaling=dict(**YARN, mscale=0.0, mscale_all_dim=0.8)),
    "yarn_no_mscale": dict(rope_scaling=dict(**YARN, mscale=0.0, mscale_all_dim=0.0)),
    "yarn_released": dict(rope_scaling=dict(), qk_rope_head_dim=32),
    "all_dense": dict(first_k_dense_replace=3),
    "all_experts": dict(first_k_dense_replace=0),
    "two_shared": dict(n_shared_experts=2),
    "no_shared": dict(n_shared_experts=0),
    "raw_gates": dict(norm_topk_prob=False, routed_scaling_factor=1.0),
    "other_factor": dict(routed_scaling_factor=0.6),
    "wide_values": dict(v_head_dim=30),
    "narrow_values": dict(v_head_dim=6),
    "equal_values": dict(v_head_dim=18),
    "large_eps_and_theta": dict(rms_norm_eps=0.1, rope_theta=50000.0),
}
LENGTHS = {"plain_query": (1, 33), "one_group": (3, 7), "one_token": (2, 1)}  # batch, time; else (2, 17)


def close(ours: Tensor, theirs: Tensor, tolerance: float, what: str) -> None:
    """The largest difference is at most ``tolerance`` of the largest value, and the values are not zero."""
    largest = theirs.abs().max()
    assert largest > 0, f"{what} is all zero: nothing was compared"
    error = float((ours - theirs).abs().max() / largest)
    assert error <= tolerance, f"{what}: relative error {error:.2g}"


@pytest.mark.filterwarnings("ignore:Initializing zero-element")  # transformers, without shared experts
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_logits_and_every_gradient(name: str) -> None:
    model = tiny_model(**CONFIGURATIONS[name])
    twin = twin_of(model)
    tokens = ids(*LENGTHS.get(name, (2, 17)))
    ours = model(tokens).logits_BTV
    theirs = twin(tokens).logits
    assert theirs.std() > 0.3  # not a degenerate model
    assert (ours - theirs).abs().max() <= 1e-4
    weight = torch.randn_like(theirs)
    (ours * weight).sum().backward()
    (theirs * weight).sum().backward()
    gradients = to_twin({parameter: value.grad for parameter, value in model.named_parameters()})
    wanted = {parameter: value.grad for parameter, value in twin.named_parameters() if value.numel()}
    assert gradients.keys() == wanted.keys()
    for parameter, theirs_grad in wanted.items():
        if tokens.shape[1] == 1 and any(part in parameter for part in ("q_a_", "q_b_")):
            # attention to one token is a copy: queries have no gradient, but for rounding
            assert gradients[parameter].abs().max() < 1e-5
            continue
        close(gradients[parameter], theirs_grad, 1e-4, f"gradient of {parameter}")


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(side: str) -> None:
    """Padding as documents of its own, positions restarted, equals transformers' attention_mask."""
    model = tiny_model(rope_scaling=dict(YARN))
    twin = twin_of(model)
    tokens = ids(3, 11)
    real = torch.ones(3, 11, dtype=torch.long)
    for row, pad in enumerate((0, 4, 9)):
        real[row, : pad if side == "left" else 0] = 0
        if side == "right" and pad:
            real[row, -pad:] = 0
    positions = (real.cumsum(1) - 1).clamp(min=0)
    ours = model(tokens, positions_BT=positions, documents_BT=real).logits_BTV
    theirs = twin(tokens, attention_mask=real, position_ids=positions).logits
    keep = real.bool()
    assert (ours - theirs)[keep].abs().max() <= 1e-4
    unpadded = model(tokens[1:2, keep[1]]).logits_BTV[0]
    assert (ours[1, keep[1]] - unpadded).abs().max() <= 1e-4
    weight = torch.randn_like(theirs) * keep[..., None]
    (ours * weight).sum().backward()
    (theirs * weight).sum().backward()
    gradients = to_twin({name: value.grad for name, value in model.named_parameters()})
    for name, value in twin.named_parameters():
        close(gradients[name], value.grad, 1e-4, f"gradient of {name}")


def test_the_group_limit_bites() -> None:
    """The parity above is of a limit that changes the choice, and of biases that change it."""
    model = tiny_model()
    gate = model.moe_layers()[1].gate
    scores = gate.scores(torch.randn(200, 40))
    limited = gate.choose(scores).sort(dim=-1)[0]
    gate.kept = gate.groups
    unlimited = gate.choose(scores).sort(dim=-1)[0]
    assert (limited != unlimited).any(dim=-1).float().mean() > 0.2
    gate.e_score_correction_bias.zero_()
    unbiased = gate.choose(scores).sort(dim=-1)[0]
    assert (unlimited != unbiased).any(dim=-1).float().mean() > 0.2


def test_tokens_further_than_the_original_length() -> None:
    """YaRN at positions beyond original_max_position_embeddings."""
    model = tiny_model(rope_scaling=dict(**YARN, mscale=0.7, mscale_all_dim=1.3))
    twin = twin_of(model)
    positions = torch.arange(9)[None] * 997
    tokens = ids(1, 9)
    ours = model(tokens, positions_BT=positions).logits_BTV
    assert (ours - twin(tokens, position_ids=positions).logits).abs().max() <= 1e-4
