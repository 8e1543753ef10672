"""The modules with matrices: dtype rules, and expert projections swapped from outside."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv3.model.linear import MLP, Embedding, Experts, GroupedLinear, Linear, RMSNorm


def filled(module: torch.nn.Module) -> torch.nn.Module:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0, 0.3)
    return module


def test_everything_computes_in_the_dtype_of_its_input() -> None:
    counts = torch.tensor([2, 0, 3])
    for module, inputs in (
        (Linear(6, 4), (torch.randn(5, 6),)),
        (MLP(6, 4), (torch.randn(5, 6),)),
        (RMSNorm(6), (torch.randn(5, 6),)),
        (GroupedLinear(3, 6, 4), (torch.randn(5, 6), counts)),
        (Experts(3, 6, 4), (torch.randn(5, 6), counts)),
    ):
        filled(module)
        wanted = module(*inputs)
        got = module(inputs[0].bfloat16(), *inputs[1:])
        assert wanted.dtype == torch.float32 and got.dtype == torch.bfloat16
        assert float((got - wanted).detach().norm() / wanted.detach().norm()) < 0.02
        got.float().sum().backward()
        assert all(parameter.grad.dtype == torch.float32 for parameter in module.parameters())


def test_embedding_sets_the_dtype() -> None:
    embedding = filled(Embedding(7, 4))
    tokens = torch.tensor([[1, 6]])
    assert torch.equal(embedding(tokens)[0, 1], embedding.weight[6])
    embedding.compute_dtype = torch.bfloat16
    assert embedding(tokens).dtype == torch.bfloat16


class Counting(GroupedLinear):
    """A projection such as ``quant.apply`` would put in."""

    calls = 0

    def forward(self, x_MI: Tensor, counts_E: Tensor) -> Tensor:
        type(self).calls += 1
        return super().forward(x_MI, counts_E)


def test_a_swapped_projection_is_called_and_gives_the_same() -> None:
    experts = filled(Experts(3, 6, 4))
    x, counts = torch.randn(7, 6), torch.tensor([4, 0, 3])
    wanted = experts(x, counts)
    swapped = Counting(3, 4, 6)
    swapped.weight = experts.down_proj.weight
    experts.down_proj = swapped
    assert torch.allclose(experts(x, counts), wanted, atol=1e-6)
    assert Counting.calls == 1
