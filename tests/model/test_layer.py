"""The decoder layer's five steps compose to its forward, and can be interleaved between micro-batches."""

from __future__ import annotations

import torch

from tests.model.build import ids, tiny_model


def test_steps_of_two_micro_batches_interleaved_equal_forward() -> None:
    model = tiny_model()
    layer = model.main_layers[1]
    context = model.context(torch.arange(6))
    a, b = (model.model.embed_tokens(ids(2, 6, seed=seed)) for seed in (1, 2))
    step_a = layer.attend_and_route(a, context)
    step_a = layer.dispatch(step_a)
    step_b = layer.attend_and_route(b, context)
    step_a, step_b = layer.experts(step_a), layer.dispatch(step_b)
    step_a, step_b = layer.combine(step_a), layer.experts(step_b)
    out_a, step_b = layer.aggregate(step_a), layer.combine(step_b)
    assert torch.equal(out_a, layer(a, context)[0])
    assert torch.equal(layer.aggregate(step_b), layer(b, context)[0])
    assert torch.equal(step_b.stats.load_E, layer(b, context)[1].load_E)


def test_dense_layer_passes_through_the_middle_steps() -> None:
    model = tiny_model()
    layer = model.main_layers[0]
    x = model.model.embed_tokens(ids(1, 4))
    step = layer.attend_and_route(x, model.context(torch.arange(4)))
    assert layer.combine(layer.experts(layer.dispatch(step))) is step
    assert step.routing is None and step.stats is None
    out, stats = layer(x, model.context(torch.arange(4)))
    assert stats is None and torch.equal(out, step.residual_BTD + layer.mlp(step.u_BTD))


def test_residual_enters_once() -> None:
    """With o_proj and all down projections zero a layer is the identity."""
    model = tiny_model()
    context = model.context(torch.arange(4))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "o_proj" in name or "down_proj" in name:
                parameter.zero_()
    x = torch.randn(2, 4, 40)
    for layer in model.main_layers:
        assert torch.equal(layer(x, context)[0], x)
