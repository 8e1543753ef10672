"""Linears and experts that multiply in FP8 and keep little for the backward (report 3.3).

Shapes: M rows (flattened tokens, sorted by expert where there are experts), D hidden, F expert hidden, E
experts. Weights stay FP32, as do their gradients; they are quantised where they are used, so that nothing has
to be told when an optimizer changes them. torch.compile leaves these modules alone: their pieces are kernels
already, and tracing the experts of one layer takes minutes.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsv3.config.fp8 import FP8Section
from dsv3.model.layer import DecoderLayer
from dsv3.model.linear import MLP, Experts, Linear
from dsv3.ops import fp8
from dsv3.ops.blocks import COLUMN, ROW, TILES, Quantised, Tile, dequantise, quantise, quantise_swiglu
from dsv3.ops.formats import E4M3, FORMATS, Format
from dsv3.ops.weight_gradients import WeightGradients


class Kept:
    """Something a forward pass keeps for its backward: a tensor as it is, or quantised.

    The tensors themselves go through ``save_for_backward``, so that recomputation may drop them.
    """

    def __init__(self, kept: Tensor | Quantised):
        self.how: tuple[torch.Size, Tile, Format] | None = None
        self.tensors: tuple[Tensor, ...]
        if isinstance(kept, Quantised):
            self.how, self.tensors = (kept.shape, kept.tile, kept.kind), (kept.values, kept.scales)
        else:
            self.tensors = (kept,)

    def rebuild(self, tensors: list[Tensor], counts_E: Tensor | None) -> Tensor | Quantised:
        """What was kept, from the tensors autograd gives back."""
        if self.how is None:
            return tensors[0]
        return Quantised(tensors[0], tensors[1], *self.how, counts_E)


class Recipe:
    """The choices of :class:`FP8Section` as the operations they mean."""

    def __init__(self, section: FP8Section):
        self.section = section
        self.activation = TILES[section.activation_tile]
        self.weight = TILES[section.weight_tile]
        self.gradient = TILES[section.gradient_tile]

    def rows(self, x: Tensor, counts_E: Tensor | None, power_of_two: bool = False) -> Quantised:
        """Activations for a product that sums over their columns."""
        return quantise(x, self.activation, power_of_two_scales=power_of_two, counts_E=counts_E)

    def columns(
        self, x: Tensor | Quantised, counts_E: Tensor | None, power_of_two: bool = False
    ) -> Quantised:
        """Activations for a product that sums over their rows, tokens: a weight's gradient.

        Square tiles and whole tensors serve both ways; 1x128 is quantised again as 128x1.
        """
        if isinstance(x, Quantised):
            if x.tile == self.activation != ROW and x.kind == E4M3:
                return x
            x = dequantise(x)
        tile = COLUMN if self.activation == ROW else self.activation
        return quantise(x, tile, power_of_two_scales=power_of_two, counts_E=counts_E)

    def gradient_pair(
        self, grad: Tensor, counts_E: Tensor | None, power_of_two: bool = False
    ) -> tuple[Quantised, Quantised]:
        """A gradient for dgrad and for wgrad, each from the numbers themselves.

        Without a floor under the maxima: a mean over many tokens makes them smaller than any activation.
        """
        options: dict[str, Any] = dict(power_of_two_scales=power_of_two, smallest_amax=0.0, counts_E=counts_E)
        rows = quantise(grad, self.gradient, **options)
        return rows, quantise(grad, COLUMN, **options) if self.gradient == ROW else rows

    def linear(self, x: Quantised, w: Tensor, counts_E: Tensor | None, dtype: torch.dtype) -> Tensor:
        """Forward product with a weight."""
        return fp8.linear(x, self._weight(w), counts_E, dtype, self.section.accumulation)

    def dgrad(self, g: Quantised, w: Tensor, counts_E: Tensor | None, dtype: torch.dtype) -> Tensor:
        """Gradient of the rows."""
        return fp8.dgrad(g, self._weight(w), counts_E, dtype, self.section.accumulation)

    def wgrad(self, g: Quantised, x: Quantised, counts_E: Tensor | None) -> Tensor:
        """Gradient of the weight, FP32."""
        return fp8.wgrad(g, x, counts_E, self.section.accumulation)

    def _weight(self, w: Tensor) -> Quantised:
        return quantise(w, self.weight, smallest_amax=0.0)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_MD: Tensor,
        weight: Tensor,
        recipe: Recipe,
        after_attention: bool,
        gradients: WeightGradients,
    ) -> Tensor:
        section = recipe.section
        power = after_attention and section.power_of_two_scales
        rows = recipe.rows(x_MD, None, power)
        how = section.attention_output if after_attention else section.cache
        if how == "full":
            ctx.kept = Kept(x_MD)
        elif how in FORMATS and FORMATS[how] != E4M3:
            ctx.kept = Kept(quantise(x_MD, ROW, FORMATS[how], power))
        else:
            ctx.kept = Kept(rows)
        ctx.save_for_backward(*ctx.kept.tensors)
        ctx.weight, ctx.gradients = weight, gradients
        ctx.recipe, ctx.power, ctx.dtype = recipe, power, x_MD.dtype
        return recipe.linear(rows, weight, None, x_MD.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        tensors = list(ctx.saved_tensors)
        recipe: Recipe = ctx.recipe
        weight, kept, power = ctx.weight, ctx.kept, ctx.power
        g_rows, g_columns = recipe.gradient_pair(grad, None)
        grad_x = grad_w = None
        if ctx.needs_input_grad[0]:
            grad_x = recipe.dgrad(g_rows, weight, None, ctx.dtype)

        def weight_gradient() -> tuple[Tensor]:
            x_columns = recipe.columns(kept.rebuild(tensors, None), None, power)
            return (recipe.wgrad(g_columns, x_columns, None).to(weight.dtype),)

        if ctx.needs_input_grad[1]:
            (grad_w,) = ctx.gradients.of((weight,), weight_gradient)
        return grad_x, grad_w, None, None, None


class FP8Linear(Linear):
    """A Linear in FP8 with the same parameter."""

    def __init__(self, linear: Linear, recipe: Recipe, after_attention: bool = False):
        nn.Module.__init__(self)
        self.weight = linear.weight
        self.recipe, self.after_attention = recipe, after_attention
        self.gradients = WeightGradients()

    @torch.compiler.disable
    def forward(self, x: Tensor) -> Tensor:
        """``[..., inputs] -> [..., outputs]`` in x's dtype."""
        x_MD = x.flatten(0, -2)
        out = _Linear.apply(x_MD, self.weight, self.recipe, self.after_attention, self.gradients)
        return out.unflatten(0, x.shape[:-1])


class _SwiGLU(torch.autograd.Function):
    """``down(silu(gate x) * up x)``; with counts, every expert's on its rows."""

    @staticmethod
    def forward(
        ctx: Any,
        x_MD: Tensor,
        gate: Tensor,
        up: Tensor,
        down: Tensor,
        counts_E: Tensor | None,
        recipe: Recipe,
        gradients: WeightGradients,
    ) -> Tensor:
        section, dtype = recipe.section, x_MD.dtype
        travelled = counts_E is not None and section.power_of_two_scales
        x_rows = recipe.rows(x_MD, counts_E, travelled)
        gate_MF = recipe.linear(x_rows, gate, counts_E, dtype)
        up_MF = recipe.linear(x_rows, up, counts_E, dtype)
        hidden = quantise_swiglu(gate_MF, up_MF, recipe.activation, counts_E)
        if section.swiglu == "fp8":
            kept = [Kept(quantise(x, ROW)) for x in (gate_MF, up_MF)]
        else:
            kept = [Kept(gate_MF), Kept(up_MF)]
        ctx.kept = (Kept(x_rows if section.cache == "fp8" else x_MD), *kept)
        ctx.save_for_backward(counts_E, *(t for k in ctx.kept for t in k.tensors))
        ctx.weights, ctx.gradients = (gate, up, down), gradients
        ctx.recipe, ctx.travelled, ctx.dtype = recipe, travelled, dtype
        return recipe.linear(hidden, down, counts_E, dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        counts_E, *tensors = ctx.saved_tensors
        gate, up, down = weights = ctx.weights
        recipe: Recipe = ctx.recipe
        travelled = ctx.travelled
        found: list[Any] = []
        for kept in ctx.kept:
            count = len(kept.tensors)
            found.append(kept.rebuild(tensors[:count], counts_E))
            del tensors[:count]
        x, gate_MF, up_MF = found
        gate_MF, up_MF = (dequantise(y) if isinstance(y, Quantised) else y for y in (gate_MF, up_MF))

        activated = F.silu(gate_MF)
        g_rows, g_columns = recipe.gradient_pair(grad, counts_E, travelled)
        hidden = recipe.columns(activated * up_MF, counts_E)
        grad_hidden = recipe.dgrad(g_rows, down, counts_E, gate_MF.dtype)

        gate_grad = torch.ops.aten.silu_backward(grad_hidden * up_MF, gate_MF)
        gate_rows, gate_columns = recipe.gradient_pair(gate_grad, counts_E)
        up_rows, up_columns = recipe.gradient_pair(activated.mul_(grad_hidden), counts_E)
        grad_x = recipe.dgrad(gate_rows, gate, counts_E, ctx.dtype)
        grad_x += recipe.dgrad(up_rows, up, counts_E, ctx.dtype)

        def weight_gradients() -> tuple[Tensor, ...]:
            x_columns = recipe.columns(x, counts_E, travelled)
            pairs = ((gate_columns, x_columns), (up_columns, x_columns), (g_columns, hidden))
            return tuple(
                recipe.wgrad(g, inputs, counts_E).to(weight.dtype)
                for (g, inputs), weight in zip(pairs, weights)
            )

        return grad_x, *ctx.gradients.of(weights, weight_gradients), None, None, None


class FP8MLP(MLP):
    """A dense MLP (or the shared experts) in FP8 with the same parameters."""

    def __init__(self, mlp: MLP, recipe: Recipe):
        nn.Module.__init__(self)
        self.gate_proj, self.up_proj, self.down_proj = mlp.gate_proj, mlp.up_proj, mlp.down_proj
        self.recipe, self.gradients = recipe, WeightGradients()

    @torch.compiler.disable
    def forward(self, x: Tensor) -> Tensor:
        """``[..., D] -> [..., D]``."""
        weights = (self.gate_proj.weight, self.up_proj.weight, self.down_proj.weight)
        return _SwiGLU.apply(x.flatten(0, -2), *weights, None, self.recipe, self.gradients).view_as(x)


class FP8Experts(Experts):
    """The routed experts of a layer in FP8 with the same parameters."""

    def __init__(self, experts: Experts, recipe: Recipe):
        nn.Module.__init__(self)
        self.gate_proj, self.up_proj, self.down_proj = experts.gate_proj, experts.up_proj, experts.down_proj
        self.recipe, self.gradients = recipe, WeightGradients()

    @torch.compiler.disable
    def forward(self, x_MD: Tensor, counts_E: Tensor) -> Tensor:
        """Rows sorted by expert: ``[M, D] -> [M, D]``."""
        weights = (self.gate_proj.weight, self.up_proj.weight, self.down_proj.weight)
        return _SwiGLU.apply(x_MD, *weights, counts_E, self.recipe, self.gradients)


def apply(model: nn.Module, section: FP8Section) -> None:
    """Turn the Linears and experts of every decoder layer to FP8, in place; parameters stay the same objects.

    What report 3.3 keeps in higher precision stays: embedding, output head, gate, norms, attention itself,
    and the MTP modules' ``eh_proj``, which the released files hold in BF16.
    """
    recipe = Recipe(section)
    for layer in model.modules():
        if not isinstance(layer, DecoderLayer):
            continue
        for name, module in list(layer.self_attn.named_children()):
            if isinstance(module, Linear):
                setattr(layer.self_attn, name, FP8Linear(module, recipe, after_attention=name == "o_proj"))
        if isinstance(layer.mlp, MLP):
            layer.mlp = FP8MLP(layer.mlp, recipe)
            continue
        layer.mlp.experts = FP8Experts(layer.mlp.experts, recipe)
        if hasattr(layer.mlp, "shared_experts"):
            layer.mlp.shared_experts = FP8MLP(layer.mlp.shared_experts, recipe)
