"""Routing properties, the balance loss against double loops, and the router statistics (report 2.1.2)."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from dsv3.model.layer import DecoderLayer
from dsv3.model.moe import Gate, LocalDispatcher, balance_loss
from tests.model import reference
from tests.model.build import ids, tiny_config, tiny_model


@st.composite
def gates(draw: st.DrawFn) -> tuple[Gate, Tensor]:
    """A random gate (any legal K, groups, kept groups, bias scale) and tokens for it."""
    groups = draw(st.sampled_from([1, 2, 4, 8]))
    per_group = draw(st.integers(2, 6))
    kept = draw(st.integers(1, groups))
    chosen = draw(st.integers(1, kept * per_group))
    config = tiny_config(
        n_routed_experts=groups * per_group,
        n_group=groups,
        topk_group=kept,
        num_experts_per_tok=chosen,
        norm_topk_prob=draw(st.booleans()),
        routed_scaling_factor=draw(st.sampled_from([0.5, 1.0, 2.5])),
    )
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    gate = Gate(config)
    with torch.no_grad():
        gate.weight.copy_(torch.randn(gate.weight.shape, generator=generator) / math.sqrt(40))
        bias = torch.randn(gate.e_score_correction_bias.shape, generator=generator)
        gate.e_score_correction_bias.copy_(bias * draw(st.sampled_from([0.0, 0.1, 5.0])))
    return gate, torch.randn(draw(st.integers(1, 20)), 40, generator=generator)


@given(gates())
def test_choice(drawn: tuple[Gate, Tensor]) -> None:
    """K distinct experts a token, in at most topk_group groups, exactly those Python's sort picks."""
    gate, x = drawn
    routing = gate(x)
    experts = len(gate.weight)
    assert routing.indices_NK.shape == (len(x), gate.chosen)
    for token in range(len(x)):
        picked = routing.indices_NK[token].tolist()
        assert len(set(picked)) == gate.chosen and min(picked) >= 0 and max(picked) < experts
        assert len({e // (experts // gate.groups) for e in picked}) <= gate.kept
        config = tiny_config(
            n_routed_experts=experts,
            n_group=gate.groups,
            topk_group=gate.kept,
            num_experts_per_tok=gate.chosen,
        )
        affinity = routing.scores_NE[token].double().tolist()
        assert sorted(picked) == sorted(
            reference.choose(config, affinity, gate.e_score_correction_bias.double().tolist())
        )


@given(gates())
def test_gate_values(drawn: tuple[Gate, Tensor]) -> None:
    """Gates are the unbiased affinities of the chosen; normalised, they sum to routed_scaling_factor."""
    gate, x = drawn
    routing = gate(x)
    raw = torch.sigmoid(x.double() @ gate.weight.double().T).gather(1, routing.indices_NK)
    if gate.normalise:
        assert torch.allclose(routing.gates_NK.sum(-1), torch.tensor(gate.factor), rtol=1e-5)
        raw = raw / raw.sum(-1, keepdim=True)
    assert torch.allclose(routing.gates_NK.double(), raw * gate.factor, rtol=1e-4)
    assert routing.gates_NK.dtype == routing.scores_NE.dtype == torch.float32


@given(gates(), st.integers(0, 2**31))
def test_bias_changes_the_choice_and_not_the_gates(drawn: tuple[Gate, Tensor], seed: int) -> None:
    gate, x = drawn
    assume(gate.chosen < len(gate.weight))
    before = gate(x)
    favourite = seed % len(gate.weight)
    gate.e_score_correction_bias[favourite] += 100
    after = gate(x)
    assert (after.indices_NK == favourite).any(dim=1).all()  # everyone goes there now
    assert torch.equal(after.scores_NE, before.scores_NE)
    for token in range(len(x)):
        if set(after.indices_NK[token].tolist()) == set(before.indices_NK[token].tolist()):
            assert torch.allclose(after.gates_NK[token].sort()[0], before.gates_NK[token].sort()[0])
    assert not gate.e_score_correction_bias.requires_grad


def test_affinities_are_fp32_in_a_bfloat16_model() -> None:
    """BF16 activations and weights: product, sigmoid and gates in FP32."""
    gate = tiny_model().bfloat16().moe_layers()[1].gate
    x = torch.randn(30, 40).bfloat16()
    routing = gate(x)
    assert gate.weight.dtype == torch.bfloat16
    assert routing.scores_NE.dtype == routing.gates_NK.dtype == torch.float32
    exact = torch.sigmoid(x.double() @ gate.weight.double().T)
    assert (routing.scores_NE - exact).abs().max() < 1e-6


def test_group_score_is_the_sum_of_the_two_best() -> None:
    """Group 0 has the single best expert, group 1 the best pair: with one group kept, group 1 wins."""
    gate = Gate(tiny_config(n_routed_experts=6, n_group=2, topk_group=1, num_experts_per_tok=2))
    gate.e_score_correction_bias.zero_()
    scores = torch.tensor([[0.9, 0.1, 0.1, 0.7, 0.1, 0.6], [0.9, 0.5, 0.1, 0.7, 0.6, 0.6]])
    assert [sorted(row) for row in gate.choose(scores).tolist()] == [[3, 5], [0, 1]]


def test_load_counts_every_token() -> None:
    """No token is dropped: loads sum to N K, and equal a count in Python."""
    model = tiny_model()
    seen = {}
    for layer, moe in model.moe_layers().items():
        moe.gate.register_forward_hook(
            lambda module, inputs, output, layer=layer: seen.__setitem__(layer, output.indices_NK)
        )
    _, router = model.hidden_states(ids(2, 19))
    assert sorted(router) == [1, 2]
    for layer, stats in router.items():
        chosen = seen[layer].flatten().tolist()
        assert stats.load_E.tolist() == [chosen.count(e) for e in range(16)]
        assert int(stats.load_E.sum()) == 2 * 19 * 3
        assert stats.load_E.dtype == torch.int64


@pytest.mark.parametrize("skew", [0.0, 8.0])
def test_every_token_gets_its_experts_even_if_all_want_the_same(skew: float) -> None:
    """Output of the routed experts equals a loop over tokens, for even and for wholly uneven load."""
    model = tiny_model()
    moe = model.moe_layers()[1]
    moe.gate.e_score_correction_bias[:3] += skew
    x = torch.randn(2, 7, 40)
    routing, stats = moe.route(x)
    if skew:
        assert stats.load_E[:3].tolist() == [14, 14, 14]
    dispatcher = LocalDispatcher()
    rows, counts, handle = dispatcher.dispatch(x.flatten(0, 1), routing, stats.load_E)
    out = dispatcher.combine(moe.experts(rows, counts), routing, handle)
    for token, u in enumerate(x.flatten(0, 1).double()):
        wanted = torch.zeros(40, dtype=torch.float64)
        for expert, value in zip(routing.indices_NK[token].tolist(), routing.gates_NK[token].tolist()):
            experts = moe.experts
            weights = [
                p.weight[expert].double() for p in (experts.gate_proj, experts.up_proj, experts.down_proj)
            ]
            wanted += value * reference.swiglu(u, *weights)
        assert torch.allclose(out[token].double(), wanted, atol=1e-5)


def loop_balance_loss(scores: Tensor, chosen: int) -> Tensor:
    """Sum_i f_i P_i by two loops over experts and tokens, for each sequence; the mean of them."""
    total = torch.zeros((), dtype=torch.float64)
    for sequence in scores.double():
        length, experts = sequence.shape
        for i in range(experts):
            hits, share = 0, torch.zeros((), dtype=torch.float64)
            for t in range(length):
                ranked = sorted(range(experts), key=lambda e: -float(sequence[t, e].detach()))
                hits += i in ranked[:chosen]
                share = share + sequence[t, i] / sequence[t].sum()
            total = total + experts / (chosen * length) * hits * share / length
    return total / len(scores)


@given(st.integers(1, 3), st.integers(1, 6), st.integers(2, 7), st.data())
def test_balance_loss_and_gradient(batch: int, length: int, experts: int, data: st.DataObject) -> None:
    chosen = data.draw(st.integers(1, experts))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    ours = torch.rand(batch, length, experts, generator=generator).requires_grad_()
    theirs = ours.detach().clone().requires_grad_()
    loss, wanted = balance_loss(ours, chosen), loop_balance_loss(theirs, chosen)
    assert torch.allclose(loss.double(), wanted, rtol=1e-5)
    loss.backward()
    wanted.backward()
    assert torch.allclose(ours.grad, theirs.grad, rtol=1e-3, atol=1e-6)


def test_balance_loss_of_even_routing_is_one() -> None:
    scores = torch.eye(4).repeat(1, 2, 1) + 0.1  # token t likes expert t mod 4
    assert torch.allclose(balance_loss(scores, 1), torch.tensor(1.0))
    everyone_to_0 = torch.tensor([[[0.9, 0.1, 0.1, 0.1]]]).repeat(1, 8, 1)
    assert torch.allclose(balance_loss(everyone_to_0, 1), torch.tensor(4 * 0.9 / 1.2))


def test_balance_loss_ignores_the_bias_and_respects_sequences() -> None:
    """The loss of a batch is the mean over its sequences; the expert bias does not enter."""
    model = tiny_model(aux_loss_alpha=1e-4)
    moe = model.moe_layers()[1]
    x = torch.randn(3, 9, 40)
    together = moe.route(x)[1].balance_loss
    apart = torch.stack([moe.route(row[None])[1].balance_loss for row in x]).mean()
    assert torch.allclose(together, apart, rtol=1e-5)
    assert not torch.allclose(together, moe.route(x.view(1, 27, 40))[1].balance_loss, rtol=1e-5)
    moe.gate.e_score_correction_bias.normal_()
    assert torch.equal(together, moe.route(x)[1].balance_loss)


def test_batch_wise_balance_loss_takes_the_micro_batch_as_one_sequence() -> None:
    moe = tiny_model(seq_aux=False).moe_layers()[1]
    x = torch.randn(3, 9, 40)
    scores = moe.gate.scores(x).detach()
    found, chosen = moe.route(x)[1].balance_loss, moe.gate.chosen
    assert torch.allclose(found.double(), loop_balance_loss(scores.flatten(0, 1)[None], chosen), rtol=1e-5)
    assert not torch.allclose(found, balance_loss(scores, chosen), rtol=1e-5)


def test_no_balance_loss_without_alpha_or_gradient() -> None:
    assert tiny_model(aux_loss_alpha=0.0).moe_layers()[1].route(torch.randn(1, 3, 40))[1].balance_loss is None
    with torch.no_grad():
        assert tiny_model().moe_layers()[1].route(torch.randn(1, 3, 40))[1].balance_loss is None


def test_router_gradient_of_the_balance_loss_reaches_gate_only() -> None:
    model = tiny_model()
    _, router = model.hidden_states(ids(2, 8))
    router[2].balance_loss.backward()
    assert model.moe_layers()[2].gate.weight.grad.abs().sum() > 0
    assert model.moe_layers()[2].experts.gate_proj.weight.grad is None


class Doubling(LocalDispatcher):
    """A dispatcher that a test can tell from the default one."""

    def combine(self, y_MD, routing, handle):  # type: ignore[no-untyped-def]
        return 2 * super().combine(y_MD, routing, handle)


def test_dispatcher_is_a_seam() -> None:
    """A dispatcher put in from outside is used by the layer, for the routed experts only."""
    layer = DecoderLayer(tiny_config(), 1)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(0, 0.2)
    x = torch.randn(1, 5, 40)
    context = tiny_model().context(torch.arange(5))
    plain, _ = layer(x, context)
    step = layer.attend_and_route(x, context)
    routed = layer.combine(layer.experts(layer.dispatch(step))).rows
    layer.mlp.dispatcher = Doubling()
    assert torch.allclose(layer(x, context)[0], plain + routed.view_as(plain), atol=1e-5)
