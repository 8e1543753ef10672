"""The whole main model against the per-token float64 reference (and the reference's own pieces)."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.model import reference
from tests.model.build import ids, tiny_model
from tests.model.test_parity import YARN, close

CASES: dict[str, dict[str, Any]] = {
    "yarn": dict(rope_scaling=dict(**YARN, mscale=0.7, mscale_all_dim=1.3)),
    "plain_query_two_shared_raw_gates": dict(q_lora_rank=None, n_shared_experts=2, norm_topk_prob=False),
    "eps_and_no_shared": dict(n_shared_experts=0, rms_norm_eps=0.05),
}


@pytest.mark.parametrize("name", CASES)
def test_logits_and_every_gradient(name: str) -> None:
    model = tiny_model(num_attention_heads=2, **CASES[name])
    tokens = ids(2, 6)
    weights = reference.double_weights(model)
    wanted = torch.stack(
        [
            reference.logits(weights, reference.main_states(model.config, weights, row))
            for row in tokens.tolist()
        ]
    )
    ours = model(tokens).logits_BTV
    assert (ours - wanted).abs().max() <= 1e-4
    weight = torch.randn(wanted.shape)
    (ours * weight).sum().backward()
    (wanted * weight).sum().backward()
    for parameter, value in model.named_parameters():
        close(value.grad, weights[parameter].grad, 1e-3, f"gradient of {parameter}")


def test_hidden_is_what_the_head_read() -> None:
    model = tiny_model()
    output = model(ids(2, 5))
    assert torch.equal(model.lm_head(output.hidden_BTD), output.logits_BTV)
