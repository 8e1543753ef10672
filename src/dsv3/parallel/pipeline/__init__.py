"""Pipelines: the model's list cut into stages, run by the schedules of ``torch.distributed.pipelining``."""

from dsv3.parallel.pipeline.pipeline import Pipeline

__all__ = ["Pipeline"]
