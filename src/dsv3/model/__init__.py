"""Floor 2: the model in plain PyTorch: one process, high precision, no rank, no mesh, no number formats."""

from dsv3.model.deepseek_v3 import DeepSeekV3, Output

__all__ = ["DeepSeekV3", "Output"]
