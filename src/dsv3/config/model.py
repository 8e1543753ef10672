"""``ModelConfig``: Hugging Face's field names, checked, with presets (report 2 and 4.2)."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

from pydantic import Field, model_validator

from dsv3.common.errors import UserError, nearest
from dsv3.config.recipe import Recipe, validate

Preset = Literal["tiny", "small", "16b", "v3-671b"]


class RopeScaling(Recipe):
    """YaRN (report 4.3), under the names of ``config.json``'s ``rope_scaling``."""

    factor: float = Field(40.0, gt=0, description="context extension factor s")
    original_max_position_embeddings: int = Field(4096, gt=0, description="tokens; length before extension")
    beta_fast: float = Field(32.0, gt=0, description="rotations above which a dimension is left alone")
    beta_slow: float = Field(1.0, gt=0, description="rotations below which a dimension is interpolated")
    mscale: float = Field(1.0, ge=0, description="weight of ln s in the factor on cos and sin")
    mscale_all_dim: float = Field(1.0, ge=0, description="weight of ln s in the softmax scale")


class ModelConfig(Recipe):
    """Shape and rules of a DeepSeek-V3 model. Field names and meanings are those of ``config.json``."""

    shorthand: ClassVar[dict[str, str]] = {
        "preset": "tiny, small, 16b or v3-671b; the other keys change its fields"
    }

    vocab_size: int = Field(129280, gt=0, description="tokens in embedding and head")
    hidden_size: int = Field(7168, gt=0, description="width of the residual stream")
    intermediate_size: int = Field(18432, gt=0, description="width of the dense layers' SwiGLU")
    moe_intermediate_size: int = Field(2048, gt=0, description="width of one expert's SwiGLU")
    num_hidden_layers: int = Field(61, gt=0, description="decoder layers of the main model")
    num_nextn_predict_layers: int = Field(1, ge=0, le=8, description="MTP modules (depth D)")
    first_k_dense_replace: int = Field(3, ge=0, description="leading layers with a dense MLP, no experts")
    num_attention_heads: int = Field(128, gt=0, description="attention heads")
    q_lora_rank: int | None = Field(1536, gt=0, description="query latent; null: one plain q_proj")
    kv_lora_rank: int = Field(512, gt=0, description="latent of keys and values, cached in generation")
    qk_nope_head_dim: int = Field(128, gt=0, description="query/key width a head without positions")
    qk_rope_head_dim: int = Field(64, gt=0, description="query/key width a head with RoPE (key shared)")
    v_head_dim: int = Field(128, gt=0, description="value width a head")
    n_routed_experts: int = Field(256, gt=0, description="routed experts a layer")
    n_shared_experts: int = Field(1, ge=0, description="experts every token visits")
    num_experts_per_tok: int = Field(8, gt=0, description="routed experts a token visits (K)")
    n_group: int = Field(8, gt=0, description="groups of experts (nodes)")
    topk_group: int = Field(4, gt=0, description="groups a token may visit")
    norm_topk_prob: bool = Field(True, description="gate values of the chosen sum to one")
    routed_scaling_factor: float = Field(2.5, gt=0, description="factor on the gate values")
    scoring_func: Literal["sigmoid"] = Field("sigmoid", description="affinity of token and expert")
    topk_method: Literal["noaux_tc"] = Field("noaux_tc", description="choice by affinity plus bias")
    aux_loss_alpha: float = Field(1e-4, ge=0, description="weight of the balance loss")
    seq_aux: bool = Field(True, description="balance each sequence; false: the micro-batch as a whole")
    max_position_embeddings: int = Field(163840, gt=0, description="tokens; longest context")
    rope_theta: float = Field(10000.0, gt=0, description="RoPE base")
    rope_scaling: RopeScaling | None = Field(None, description="YaRN; null: off")
    rms_norm_eps: float = Field(1e-6, gt=0, description="epsilon of the layers' RMSNorm")
    initializer_range: float = Field(0.006, gt=0, description="standard deviation of the initial weights")
    bos_token_id: int = Field(0, ge=0, description="token that begins a sequence")
    eos_token_id: int = Field(1, ge=0, description="token that ends a sequence")
    pad_token_id: int | None = Field(None, ge=0, description="padding token")
    extra: dict[str, Any] = Field(
        default_factory=dict, description="keys of a config.json that dsv3 does not use; written back as read"
    )

    @model_validator(mode="after")
    def _check(self) -> ModelConfig:
        def refuse(message: str) -> None:
            raise ValueError(message)

        if self.qk_rope_head_dim % 2:
            refuse(f"qk_rope_head_dim ({self.qk_rope_head_dim}) must be even: RoPE turns pairs")
        if self.first_k_dense_replace >= self.num_hidden_layers and self.num_nextn_predict_layers == 0:
            return self  # all dense: the routing fields are not used
        experts, groups, kept, chosen = (
            self.n_routed_experts, self.n_group, self.topk_group, self.num_experts_per_tok,
        )  # fmt: skip
        if experts % groups:
            ways = [n for n in range(1, experts + 1) if experts % n == 0 and experts // n >= 2]
            close = sorted(sorted(ways, key=lambda n: abs(n - groups))[:3])
            refuse(
                f"n_group ({groups}) must divide n_routed_experts ({experts}); "
                f"try {', '.join(map(str, close[:-1]))} or {close[-1]}"
                if len(close) > 1
                else f"n_group ({groups}) must divide n_routed_experts ({experts}); try 1"
            )
        if experts // groups < 2:
            refuse(
                f"n_group ({groups}) leaves {experts // groups} expert a group; a group is scored by its "
                f"best two, so use at most {max(1, experts // 2)}"
            )
        if kept > groups:
            refuse(f"topk_group ({kept}) must not exceed n_group ({groups}); use 1 to {groups}")
        if chosen > kept * (experts // groups):
            refuse(
                f"num_experts_per_tok ({chosen}) exceeds the {kept * (experts // groups)} experts in "
                f"topk_group ({kept}) groups; lower it or raise topk_group"
            )
        return self

    @property
    def qk_head_dim(self) -> int:
        """Query/key width a head: nope + rope."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def softmax_scale(self) -> float:
        """Factor on the attention scores: (nope + rope)^-1/2, times YaRN's mscale squared (report 4.3)."""
        scale = self.qk_head_dim**-0.5
        if self.rope_scaling is not None and self.rope_scaling.mscale_all_dim:
            scale *= yarn_mscale(self.rope_scaling.factor, self.rope_scaling.mscale_all_dim) ** 2
        return scale

    def is_moe(self, layer: int) -> bool:
        """Whether the layer with this id (MTP modules follow the main layers) holds experts."""
        return layer >= self.first_k_dense_replace

    @classmethod
    def expand(cls, tree: dict[str, Any]) -> dict[str, Any]:
        """``{"preset": "tiny", "hidden_size": 128}``: the preset's fields, then those given."""
        if "preset" not in tree:
            return tree
        name = tree["preset"]
        if name not in PRESETS:
            hint = nearest(str(name), PRESETS)
            raise UserError(f"model preset {name!r} is unknown{hint}; there are {', '.join(PRESETS)}")
        return {**PRESETS[name], **{key: value for key, value in tree.items() if key != "preset"}}

    @classmethod
    def preset(cls, name: Preset | str, **changes: Any) -> ModelConfig:
        """One of tiny, small, 16b, v3-671b, with fields changed by keyword."""
        return validate(cls, {"preset": name, **changes})

    @classmethod
    def from_dict(cls, tree: dict[str, Any]) -> ModelConfig:
        """From the content of a ``config.json``, old style (``rope_scaling``) or new (``rope_parameters``).

        Raises :class:`UserError` for another architecture or a value this model does not implement.
        """
        tree = dict(tree)
        kind = tree.get("model_type", "deepseek_v3")
        if kind not in ("deepseek_v3", "kimi_k2", "dsv3_packed"):
            raise UserError(f"model_type ({kind!r}) is not deepseek_v3; dsv3 reads that architecture only")
        for field, wanted in _FIXED.items():
            if tree.get(field, wanted) not in (wanted, None):
                raise UserError(f"{field} ({tree[field]!r}) is not implemented; only {wanted!r} is")
        heads = tree.get("num_key_value_heads")
        if heads not in (None, tree.get("num_attention_heads", heads)):
            raise UserError(
                f"num_key_value_heads ({heads}) must equal num_attention_heads: MLA shares one latent"
            )
        tree.update(_read_rope(tree))
        if isinstance(tree.get("eos_token_id"), list) and tree["eos_token_id"]:
            tree["eos_token_id"] = tree["eos_token_id"][0]
        if "num_mtp_layers" in tree and "num_nextn_predict_layers" not in tree:
            tree["num_nextn_predict_layers"] = tree["num_mtp_layers"]
        known = set(cls.model_fields) - {"extra"}
        extra = {
            key: value
            for key, value in tree.items()
            if key not in known and key not in _DERIVED and key not in _FIXED
        }
        named = {key: tree[key] for key in known if key in tree}
        if named.get("n_routed_experts", 0) is None:  # a dense model writes null
            named.pop("n_routed_experts")
        for key in ("n_shared_experts", "num_nextn_predict_layers"):
            if named.get(key, 0) is None:  # null: none of them
                named[key] = 0
        return validate(cls, {**named, "extra": extra})

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> ModelConfig:
        """Read ``config.json`` of a Hugging Face checkpoint folder."""
        path = Path(folder)
        path = path / "config.json" if path.is_dir() else path
        if not path.is_file():
            raise UserError(f"{path} does not exist; give the folder of a Hugging Face checkpoint")
        try:
            tree = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"{path} is not valid JSON: {error}") from None
        if not isinstance(tree, dict):
            raise UserError(f"{path} must hold a JSON object, not a {type(tree).__name__}")
        return cls.from_dict(tree)

    def to_dict(self) -> dict[str, Any]:
        """The content of ``config.json``; tested with transformers 5, llama.cpp's converter took it by hand.

        ``rope_theta`` and ``rope_scaling`` (with ``type`` and ``rope_type``) are written, not
        ``rope_parameters``: the older form is what every reader knows, transformers 5 converts it.
        """
        fields = self.model_dump(exclude={"extra", "rope_scaling"})
        rope = self.rope_scaling.model_dump() if self.rope_scaling else None
        return {
            "architectures": ["DeepseekV3ForCausalLM"],
            "model_type": "deepseek_v3",
            **fields,
            "num_key_value_heads": self.num_attention_heads,
            "rope_scaling": {"type": "yarn", "rope_type": "yarn", **rope} if rope else None,
            **_FIXED,
            "use_cache": True,
            **self.extra,
        }


# What every DeepSeek-V3 config.json says and this model takes for granted.
_FIXED: dict[str, Any] = {
    "hidden_act": "silu",
    "moe_layer_freq": 1,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "tie_word_embeddings": False,
    "rope_interleave": True,
}
# Written from the fields, so never carried along.
_DERIVED = {
    "architectures", "model_type", "num_key_value_heads", "rope_parameters", "rope_scaling", "num_mtp_layers",
    "qk_head_dim", "head_dim", "use_cache",
}  # fmt: skip


def _read_rope(tree: dict[str, Any]) -> dict[str, Any]:
    """``rope_theta`` and ``rope_scaling`` from either style of ``config.json``."""
    for key in ("rope_parameters", "rope_scaling"):
        if not isinstance(tree.get(key) or {}, dict):
            raise UserError(f"{key} ({tree[key]!r}) must be a map or null")
    style = tree.get("rope_parameters") or {}
    found: dict[str, Any] = {}
    if "rope_theta" in style or "rope_theta" in tree:
        found["rope_theta"] = style.get("rope_theta", tree.get("rope_theta"))
    scaling: dict[str, Any] = style or tree.get("rope_scaling") or {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return {**found, "rope_scaling": None}
    if kind != "yarn":
        raise UserError(f"rope_scaling type ({kind!r}) is not implemented; only 'yarn' is, or null for none")
    known = {
        key: scaling[key] for key in RopeScaling.model_fields if scaling and scaling.get(key) is not None
    }
    if "factor" not in known:
        raise UserError("rope_scaling.factor is required for yarn; the released model has 40")
    known.setdefault("original_max_position_embeddings", tree.get("max_position_embeddings", 4096))
    if scaling.get("attention_factor") is not None:
        raise UserError("rope_scaling.attention_factor is not implemented; use mscale and mscale_all_dim")
    if scaling.get("truncate") is False:
        raise UserError("rope_scaling.truncate (False) is not implemented; YaRN's ramp is rounded here")
    for key in ("mscale", "mscale_all_dim"):  # absent means zero, as transformers reads it
        known.setdefault(key, 0.0)
    return {**found, "rope_scaling": known}


def yarn_mscale(factor: float, weight: float) -> float:
    """YaRN's attention factor 0.1 m ln s + 1 (report 4.3); 1 for s <= 1."""
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0


PRESETS: dict[str, dict[str, Any]] = {
    # 16.5M: trains on a laptop in minutes. Many small experts: most of it is not read for any one token.
    "tiny": dict(
        vocab_size=8192, hidden_size=192, intermediate_size=512, moe_intermediate_size=128,
        num_hidden_layers=5, num_nextn_predict_layers=1, first_k_dense_replace=1, num_attention_heads=4,
        q_lora_rank=96, kv_lora_rank=64, qk_nope_head_dim=48, qk_rope_head_dim=16, v_head_dim=64,
        n_routed_experts=32, n_shared_experts=1, num_experts_per_tok=4, n_group=4, topk_group=2,
        max_position_embeddings=2048, initializer_range=0.02, pad_token_id=2,
    ),
    # 105M: a night on a workstation.
    "small": dict(
        vocab_size=16384, hidden_size=512, intermediate_size=1408, moe_intermediate_size=256,
        num_hidden_layers=8, num_nextn_predict_layers=1, first_k_dense_replace=1, num_attention_heads=8,
        q_lora_rank=256, kv_lora_rank=128, qk_nope_head_dim=64, qk_rope_head_dim=32, v_head_dim=64,
        n_routed_experts=24, n_shared_experts=1, num_experts_per_tok=4, n_group=4, topk_group=2,
        max_position_embeddings=4096, initializer_range=0.02, pad_token_id=2,
    ),
    # The shape of DeepSeek-V2-Lite and Moonlight with V3's routing. (llama.cpp takes any 27-layer file of
    # this architecture for V2-Lite; change num_hidden_layers if you need it to read one.)
    "16b": dict(
        vocab_size=129280, hidden_size=2048, intermediate_size=11264, moe_intermediate_size=1408,
        num_hidden_layers=27, num_nextn_predict_layers=0, first_k_dense_replace=1, num_attention_heads=16,
        q_lora_rank=None, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128,
        n_routed_experts=64, n_shared_experts=2, num_experts_per_tok=6, n_group=1, topk_group=1,
        routed_scaling_factor=2.446, max_position_embeddings=8192, rope_theta=50000.0,
        initializer_range=0.02, pad_token_id=2,
    ),
    # The released model, context extended (report 4.2 and 4.3).
    "v3-671b": dict(rope_scaling=dict()),
}  # fmt: skip

assert set(PRESETS) == set(get_args(Preset))
