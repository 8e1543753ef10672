"""Report 2 once more, slowly: one token, one head, one expert at a time, in float64 and Python loops.

Written from the report's equations, sharing nothing with ``dsv3.model`` but the names of the weights.
Differentiable, so gradients can be compared too.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dsv3.config.model import ModelConfig

Weights = dict[str, Tensor]


def double_weights(model: torch.nn.Module) -> Weights:
    """A float64 copy of every parameter and buffer, ready to collect gradients."""
    parameters = {name: p.detach().double().requires_grad_() for name, p in model.named_parameters()}
    return {**parameters, **{name: buffer.double() for name, buffer in model.named_buffers()}}


def norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    return x / (x.pow(2).mean() + eps).sqrt() * gain


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def swiglu(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return down @ (silu(gate @ x) * (up @ x))


def mscale(factor: float, weight: float) -> float:
    return 0.1 * weight * math.log(factor) + 1 if factor > 1 else 1.0


def angle_and_length(config: ModelConfig, pair: int, position: int) -> tuple[float, float]:
    """The turn of one pair at one position, and the factor on its length (YaRN, report 4.3)."""
    width, yarn = config.qk_rope_head_dim, config.rope_scaling
    frequency = config.rope_theta ** (-2 * pair / width)
    if yarn is None:
        return position * frequency, 1.0

    def pair_of(turns: float) -> float:
        # pair p turns original / (2 pi theta^(2 p / width)) times; solved for p
        turns_of_pair_0 = yarn.original_max_position_embeddings / (2 * math.pi)
        return width * math.log(turns_of_pair_0 / turns, config.rope_theta) / 2

    low = max(math.floor(pair_of(yarn.beta_fast)), 0)
    high = min(math.ceil(pair_of(yarn.beta_slow)), width - 1)
    if pair <= low:
        slowed = 0.0
    elif pair >= high:
        slowed = 1.0
    else:
        slowed = (pair - low) / (high - low)
    frequency = (1 - slowed) * frequency + slowed * frequency / yarn.factor
    if yarn.mscale and yarn.mscale_all_dim:
        length = mscale(yarn.factor, yarn.mscale) / mscale(yarn.factor, yarn.mscale_all_dim)
    else:
        length = mscale(yarn.factor, 1)
    return position * frequency, length


def rope(config: ModelConfig, x: Tensor, position: int) -> Tensor:
    """Each neighbouring pair as a complex number, turned."""
    turned = []
    for pair in range(len(x) // 2):
        angle, length = angle_and_length(config, pair, position)
        cos, sin = length * math.cos(angle), length * math.sin(angle)
        real, imaginary = x[2 * pair], x[2 * pair + 1]
        turned += [real * cos - imaginary * sin, real * sin + imaginary * cos]
    return torch.stack(turned)


def attention(config: ModelConfig, w: Weights, at: str, xs: list[Tensor]) -> list[Tensor]:
    """MLA (report 2.1.1) of one sequence: the outputs, one a token."""
    heads, nope, value = config.num_attention_heads, config.qk_nope_head_dim, config.v_head_dim
    latent = config.kv_lora_rank
    width = nope + config.qk_rope_head_dim
    scale = 1 / math.sqrt(width)
    if config.rope_scaling is not None and config.rope_scaling.mscale_all_dim:
        scale *= mscale(config.rope_scaling.factor, config.rope_scaling.mscale_all_dim) ** 2

    queries, keys, values = [], [], []  # [token][head]
    for position, x in enumerate(xs):
        if config.q_lora_rank is None:
            q = w[f"{at}.q_proj.weight"] @ x
        else:
            low = norm(w[f"{at}.q_a_proj.weight"] @ x, w[f"{at}.q_a_layernorm.weight"], 1e-6)
            q = w[f"{at}.q_b_proj.weight"] @ low
        compressed = w[f"{at}.kv_a_proj_with_mqa.weight"] @ x
        c = norm(compressed[:latent], w[f"{at}.kv_a_layernorm.weight"], 1e-6)
        k_rope = rope(config, compressed[latent:], position)
        kv = w[f"{at}.kv_b_proj.weight"] @ c
        queries.append([]), keys.append([]), values.append([])
        for h in range(heads):
            q_h = q[h * width : (h + 1) * width]
            kv_h = kv[h * (nope + value) : (h + 1) * (nope + value)]
            queries[-1].append(torch.cat((q_h[:nope], rope(config, q_h[nope:], position))))
            keys[-1].append(torch.cat((kv_h[:nope], k_rope)))
            values[-1].append(kv_h[nope:])

    outputs = []
    for t in range(len(xs)):
        joined = []
        for h in range(heads):
            scores = [scale * (queries[t][h] @ keys[s][h]) for s in range(t + 1)]
            top = max(float(score.detach()) for score in scores)
            powers = [torch.exp(score - top) for score in scores]
            joined.append(sum(p * values[s][h] for s, p in enumerate(powers)) / sum(powers))
        outputs.append(w[f"{at}.o_proj.weight"] @ torch.cat(joined))
    return outputs


def choose(config: ModelConfig, affinity: list[float], bias: list[float]) -> list[int]:
    """Node-limited choice of K experts by s + b (report 2.1.2), with Python's sort."""
    per_group = config.n_routed_experts // config.n_group
    biased = [s + b for s, b in zip(affinity, bias)]
    groups = [range(g * per_group, (g + 1) * per_group) for g in range(config.n_group)]
    groups.sort(key=lambda group: -sum(sorted((biased[e] for e in group), reverse=True)[:2]))
    allowed = [e for group in groups[: config.topk_group] for e in group]
    return sorted(allowed, key=lambda e: -biased[e])[: config.num_experts_per_tok]


def mlp(config: ModelConfig, w: Weights, at: str, layer: int, x: Tensor) -> Tensor:
    """The dense SwiGLU, or DeepSeekMoE, of one token."""
    if layer < config.first_k_dense_replace:
        return swiglu(x, *(w[f"{at}.{p}_proj.weight"] for p in ("gate", "up", "down")))
    affinity = 1 / (1 + torch.exp(-(w[f"{at}.gate.weight"] @ x)))
    chosen = choose(config, affinity.tolist(), w[f"{at}.gate.e_score_correction_bias"].tolist())
    total = sum(affinity[e] for e in chosen) if config.norm_topk_prob else 1.0
    out = torch.zeros_like(x)
    for e in chosen:
        expert = [w[f"{at}.experts.{p}_proj.weight"][e] for p in ("gate", "up", "down")]
        out = out + config.routed_scaling_factor * affinity[e] / total * swiglu(x, *expert)
    if config.n_shared_experts:
        out = out + swiglu(x, *(w[f"{at}.shared_experts.{p}_proj.weight"] for p in ("gate", "up", "down")))
    return out


def layer(config: ModelConfig, w: Weights, index: int, xs: list[Tensor]) -> list[Tensor]:
    """One decoder layer of one sequence."""
    at, eps = f"model.layers.{index}", config.rms_norm_eps
    attended = attention(
        config, w, f"{at}.self_attn", [norm(x, w[f"{at}.input_layernorm.weight"], eps) for x in xs]
    )
    residuals = [x + a for x, a in zip(xs, attended)]
    gain = w[f"{at}.post_attention_layernorm.weight"]
    return [x + mlp(config, w, f"{at}.mlp", index, norm(x, gain, eps)) for x in residuals]


def main_states(config: ModelConfig, w: Weights, tokens: list[int]) -> list[Tensor]:
    """The main model's states after the final norm: h^0 of the MTP equations."""
    xs = [w["model.embed_tokens.weight"][token] for token in tokens]
    for index in range(config.num_hidden_layers):
        xs = layer(config, w, index, xs)
    return [norm(x, w["model.norm.weight"], config.rms_norm_eps) for x in xs]


def mtp_states(
    config: ModelConfig, w: Weights, depth: int, tokens: list[int], previous: list[Tensor]
) -> list[Tensor]:
    """h^k of module k = ``depth`` (report 2.2) from h^{k-1}, for every i whose t_{i+k} is known."""
    index, eps = config.num_hidden_layers + depth - 1, config.rms_norm_eps
    at = f"model.layers.{index}"
    joined = []
    for i, state in enumerate(previous):
        if i + depth >= len(tokens):
            break
        embedding = w["model.embed_tokens.weight"][tokens[i + depth]]
        e = norm(embedding, w[f"{at}.enorm.weight"], eps)
        h = norm(state, w[f"{at}.hnorm.weight"], eps)
        joined.append(w[f"{at}.eh_proj.weight"] @ torch.cat((e, h)))
    return [norm(x, w[f"{at}.shared_head.norm.weight"], eps) for x in layer(config, w, index, joined)]


def all_states(config: ModelConfig, w: Weights, tokens: list[int], future: int = 0) -> list[list[Tensor]]:
    """States the head reads, by depth. The last ``future`` tokens are known to the MTP modules only."""
    seen = tokens[: len(tokens) - future]
    states = [main_states(config, w, seen)]
    for depth in range(1, config.num_nextn_predict_layers + 1):
        states.append(mtp_states(config, w, depth, tokens, states[-1]))
    return states


def logits(w: Weights, states: list[Tensor]) -> Tensor:
    """The shared head on a list of states: ``[T, V]``."""
    return torch.stack([w["lm_head.weight"] @ state for state in states])
