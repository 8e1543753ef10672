"""How an engine runs, and how much its cache holds."""

from __future__ import annotations

from dataclasses import dataclass

import psutil
import torch

from dsv3.common.errors import UserError
from dsv3.config.model import ModelConfig
from dsv3.serve.cache import FORMATS, row_bytes

BLOCK_SIZE = 16  # tokens a cache block
GPU_BLOCK_SIZE = 64  # on a GPU: the only size FlashMLA knows
MEMORY_SHARE = 0.25  # of the free memory, for the cache, unless told how many tokens


@dataclass(frozen=True)
class Room:
    """What a cache holds: ``blocks`` of ``block`` tokens in ``layers``, as ``kind``.

    ``max_length``: tokens of prompt and answer of the longest request there is room for.
    """

    layers: int
    blocks: int
    block: int
    kind: str
    max_length: int


@dataclass(frozen=True)
class Options:
    """How an engine runs; what a request asks for is in :class:`SamplingParams`.

    ``draft_tokens``: drafts a step by the MTP module, 0 for none. ``max_batch``: sequences at once.
    ``max_batch_tokens``: tokens a step at most; prompts are cut to fit. ``max_length``: tokens of prompt and
    answer together; None: what the model was made for, or fewer if the cache is smaller. ``cache_tokens``:
    tokens the cache holds; None: ``max_batch`` of the greatest length, within a quarter of the free memory.
    ``cache_dtype``: float32, bfloat16, fp8 or auto, what the model computes in.
    """

    draft_tokens: int = 0
    max_batch: int = 16
    max_batch_tokens: int = 512
    max_length: int | None = None
    cache_tokens: int | None = None
    cache_dtype: str = "auto"

    def __post_init__(self) -> None:
        for name, least in (("draft_tokens", 0), ("max_batch", 1), ("max_batch_tokens", 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise UserError(f"{name} ({value!r}) must be a whole number, at least {least}")
        for name, least in (("max_length", 2), ("cache_tokens", BLOCK_SIZE)):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < least):
                raise UserError(f"{name} ({value!r}) must be a whole number, at least {least}, or None")
        if self.cache_dtype not in ("auto", *FORMATS):
            raise UserError(f"cache_dtype ({self.cache_dtype!r}) must be one of auto, {', '.join(FORMATS)}")
        least = self.max_batch * (1 + self.draft_tokens)
        if self.max_batch_tokens < least:
            raise UserError(
                f"max_batch_tokens ({self.max_batch_tokens}) must be at least {least}, a token and its drafts"
                f" for each of max_batch ({self.max_batch}) sequences"
            )

    def room(self, config: ModelConfig, dtype: torch.dtype, device: torch.device) -> Room:
        """For a model that computes in ``dtype``; :class:`UserError` where ``max_length`` does not fit."""
        kind = self.cache_dtype
        if kind == "auto":
            kind = "bfloat16" if dtype == torch.bfloat16 else "float32"
        longest = self.max_length or config.max_position_embeddings
        if longest > config.max_position_embeddings:
            raise UserError(
                f"max_length ({longest}) exceeds the model's max_position_embeddings"
                f" ({config.max_position_embeddings})"
            )
        layers = config.num_hidden_layers + bool(self.draft_tokens)
        spare = 2 * self.draft_tokens  # rows of drafts that may turn out to be wrong
        tokens = self.cache_tokens
        block = GPU_BLOCK_SIZE if device.type == "cuda" else BLOCK_SIZE
        if tokens is None:
            row = layers * row_bytes(config.kv_lora_rank, config.qk_rope_head_dim, kind)
            fits = int(MEMORY_SHARE * _free_memory(device)) // row
            tokens = max(block * 4, min(self.max_batch * (longest + spare), fits))
        blocks = -(-tokens // block)
        fitting = min(longest, blocks * block - spare)
        if self.max_length is not None and fitting < self.max_length:
            raise UserError(
                f"max_length ({self.max_length}) does not fit cache_tokens ({tokens}): raise it to"
                f" {self.max_length + spare} or lower max_length to {fitting}"
            )
        return Room(layers, blocks, block, kind, fitting)


def _free_memory(device: torch.device) -> int:
    """Bytes."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available
