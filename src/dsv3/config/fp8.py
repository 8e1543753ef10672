"""How a model trains in FP8: each choice of report 3.3 a switch, the report's as default."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from dsv3.config.recipe import Recipe


class FP8Section(Recipe):
    """Used with ``precision: fp8``."""

    activation_tile: Literal["1x128", "128x128", "tensor"] = Field(
        "1x128", description="what shares a scale in activations"
    )
    weight_tile: Literal["128x128", "tensor"] = Field("128x128", description="what shares a scale in weights")
    gradient_tile: Literal["1x128", "128x128", "tensor"] = Field(
        "1x128", description="what shares a scale in gradients of activations (128x128 diverged, report B.2)"
    )
    accumulation: Literal["promoted", "emulated", "emulated-unpromoted"] = Field(
        "promoted",
        description="sums of products: FP32 every 128 terms (on a CPU throughout); or tensor cores' 14 bits"
        " imitated, with and without that (slow, for experiments)",
    )
    cache: Literal["fp8", "full"] = Field("fp8", description="how a Linear keeps its input for the backward")
    attention_output: Literal["e5m6", "e4m3", "full"] = Field(
        "e5m6", description="how the Linear after attention keeps its input"
    )
    swiglu: Literal["fp8", "full"] = Field(
        "fp8", description="how SwiGLU's two inputs are kept; its output is made again in either case"
    )
    power_of_two_scales: bool = Field(
        True,
        description="of attention_output, of what travels to experts, and of its gradient on the way back",
    )
