"""Rotary positions: complex arithmetic, relativity, YaRN's frequencies against transformers."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st
from transformers import DeepseekV3Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from dsv3.config.model import ModelConfig
from dsv3.ops.rope import inverse_frequencies, rotate, rotations
from tests.ops.compare import agree


def test_rotate_is_a_complex_product_of_neighbours() -> None:
    x = torch.randn(2, 5, 8)
    angle = torch.randn(5, 4)
    rotation = torch.stack((angle.cos(), angle.sin()), dim=-1)
    as_complex = torch.view_as_complex(x.unflatten(-1, (4, 2)))
    wanted = torch.view_as_real(as_complex * torch.polar(torch.ones_like(angle), angle)).flatten(-2)
    assert torch.allclose(rotate(x, rotation), wanted, atol=1e-6)


def test_rotate_turns_neighbouring_pairs() -> None:
    """A quarter turn: (1, 0) becomes (0, 1), pair by pair."""
    quarter = torch.tensor([[[0.0, 1.0], [0.0, 1.0]]])
    assert rotate(torch.tensor([[1.0, 0.0, 2.0, 3.0]]), quarter).tolist() == [[0.0, 1.0, -3.0, 2.0]]


def test_gradient() -> None:
    rotation = torch.randn(3, 2, 2, dtype=torch.float64)
    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: rotate(x, rotation), (x,))
    agree(
        lambda x: rotate(x, rotation.float()[:, None]),
        lambda x: torch.view_as_real(
            torch.view_as_complex(x.unflatten(-1, (2, 2))) * torch.view_as_complex(rotation.float())[:, None]
        ).flatten(-2),
        torch.randn(2, 3, 5, 4),
    )


@given(st.integers(0, 5000), st.integers(0, 5000), st.integers(0, 200))
def test_scores_depend_on_the_distance_only(query: int, key: int, shift: int) -> None:
    frequency, factor = inverse_frequencies(ModelConfig(qk_rope_head_dim=8))
    q, k = torch.randn(8), torch.randn(8)

    def score(at: int, other: int) -> float:
        turned = [rotate(x, rotations(torch.tensor(p), frequency, factor)) for x, p in ((q, at), (k, other))]
        return float(turned[0] @ turned[1])

    assert score(query, key) == pytest.approx(score(query + shift, key + shift), abs=2e-2)


def test_plain_frequencies() -> None:
    frequency, factor = inverse_frequencies(ModelConfig(qk_rope_head_dim=6, rope_theta=100.0))
    wanted = [1.0, 100 ** (-1 / 3), 100 ** (-2 / 3)]
    assert frequency.tolist() == pytest.approx(wanted) and factor == 1.0
    assert frequency.dtype == torch.float32


@given(
    factor=st.floats(1.0, 64.0),
    original=st.integers(64, 8192),
    width=st.sampled_from([8, 16, 32, 64]),
    theta=st.sampled_from([1e4, 5e4, 1e6]),
    beta_fast=st.floats(16, 64),
    beta_slow=st.floats(0.5, 4),
    mscale=st.sampled_from([0.0, 0.7, 1.0]),
    mscale_all_dim=st.sampled_from([0.0, 0.7, 1.0]),
)
@example(40.0, 32768, 8, 1e4, 32.0, 1.0, 1.0, 1.0)  # the ramp ends beyond the last pair
@example(40.0, 64, 8, 1e4, 32.0, 1.0, 1.0, 1.0)  # the ramp begins before the first
def test_yarn_frequencies_are_those_of_transformers(
    factor: float, original: int, width: int, theta: float, beta_fast: float, beta_slow: float,
    mscale: float, mscale_all_dim: float,
) -> None:  # fmt: skip
    yarn = dict(
        factor=factor, original_max_position_embeddings=original, beta_fast=beta_fast, beta_slow=beta_slow,
        mscale=mscale, mscale_all_dim=mscale_all_dim,
    )  # fmt: skip
    config = ModelConfig(qk_rope_head_dim=width, rope_theta=theta, rope_scaling=yarn)
    theirs = DeepseekV3Config(
        qk_rope_head_dim=width, rope_parameters={"rope_type": "yarn", "rope_theta": theta, **yarn}
    )
    wanted, wanted_factor = ROPE_INIT_FUNCTIONS["yarn"](theirs)
    frequency, got_factor = inverse_frequencies(config)
    assert torch.allclose(frequency, wanted, rtol=1e-5)
    assert got_factor == pytest.approx(wanted_factor)


def test_yarn_of_the_released_model() -> None:
    """Fast pairs as before, slow pairs 40 times slower, the cos/sin factor 1, the softmax scale raised."""
    config = ModelConfig.preset("v3-671b")
    frequency, factor = inverse_frequencies(config)
    plain, _ = inverse_frequencies(config.model_copy(update={"rope_scaling": None}))
    ratio = plain / frequency
    assert factor == 1.0
    assert torch.allclose(ratio[:10], torch.ones(10)) and torch.allclose(ratio[-8:], torch.full((8,), 40.0))
    assert (ratio.diff() >= -1e-4).all()
    assert config.softmax_scale == pytest.approx(192**-0.5 * (0.1 * math.log(40) + 1) ** 2)


def test_rotations_shape_and_dtype() -> None:
    frequency, _ = inverse_frequencies(ModelConfig(qk_rope_head_dim=8))
    rotation = rotations(torch.arange(6).view(2, 3), frequency, 2.0)
    assert rotation.shape == (2, 3, 4, 2) and rotation.dtype == torch.float32
    assert torch.allclose(rotation.square().sum(-1), torch.full((2, 3, 4), 4.0))
    assert rotate(torch.ones(2, 3, 8, dtype=torch.bfloat16), rotation).dtype == torch.bfloat16


@given(st.integers(0, 163839))
def test_far_positions_are_exact_enough(position: int) -> None:
    """FP32 angles at 160K positions: the turn is right to about a hundredth of a radian."""
    assume(position > 0)
    frequency, _ = inverse_frequencies(ModelConfig())
    rotation = rotations(torch.tensor(position), frequency, 1.0)
    for pair in (0, 1, 5, 31):
        angle = position * 10000 ** (-2 * pair / 64)
        assert rotation[pair].tolist() == pytest.approx([math.cos(angle), math.sin(angle)], abs=0.03)
