"""The whole DeepSeek-V3 system, small enough to read.

The names below are the public face. They are imported when first used, so that ``import dsv3`` is quick and
``dsv3 --help`` does not wait for PyTorch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dsv3.checkpoint.hf import load, save
    from dsv3.common.errors import UserError
    from dsv3.config.model import ModelConfig
    from dsv3.model import DeepSeekV3
    from dsv3.serve.llm import LLM
    from dsv3.serve.params import SamplingParams

__version__ = "0.1.0"
__all__ = [
    "LLM", "DeepSeekV3", "ModelConfig", "SamplingParams", "UserError", "__version__", "load", "save",
]  # fmt: skip

_HOME = {
    "DeepSeekV3": "dsv3.model",
    "LLM": "dsv3.serve.llm",
    "ModelConfig": "dsv3.config.model",
    "SamplingParams": "dsv3.serve.params",
    "UserError": "dsv3.common.errors",
    "load": "dsv3.checkpoint.hf",
    "save": "dsv3.checkpoint.hf",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'dsv3' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value  # asked once
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
