"""How a run is spread over processes (report 3.2): the ``parallel`` section of any training recipe."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from dsv3.config.recipe import Recipe


class ParallelSection(Recipe):
    """Sizes of the axes. Processes = pipeline * data_replicate * data_shard.

    ``expert`` and ``context`` divide data_shard.

    Launched by ``torchrun``; the defaults are one process, or plain data parallelism over all there are.
    """

    pipeline: int = Field(1, gt=0, description="pipeline ranks (the report: 16)")
    expert: int = Field(1, gt=0, description="ranks that share a layer's experts (the report: 64)")
    context: int = Field(
        1,
        gt=0,
        description="ranks that share each sequence, a part of its tokens each (not in the report)",
    )
    data_shard: int | None = Field(
        None, gt=0, description="data ranks that share what zero says; null: all that the other axes leave"
    )
    data_replicate: int = Field(1, gt=0, description="copies of such a group of data ranks")
    zero: Literal[1, 3] = Field(
        1,
        description="what data_shard ranks share: 1 the optimizer's state (report 3.2); 3 also weights"
        " and gradients (FSDP2)",
    )
    schedule: Literal["1f1b", "interleaved", "zbv", "dualpipev"] = Field(
        "dualpipev", description="order of a pipeline's forward and backward passes"
    )
    timeout_seconds: float = Field(
        600.0,
        gt=0,
        description="a collective that takes longer ends the run and names the ranks it waits for",
    )
