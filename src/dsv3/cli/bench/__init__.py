"""``dsv3 bench``: measured beside named peers in the same run. One module a verb, registered by import."""

from dsv3.cli.bench import (  # noqa: I001 (help order)
    train,
    fp8,
    mla,
    moe,
    pipeline,
    convert,
    decode,
    serve,
    deployment,
    evaluate,
    length,
    claims,
    end_to_end,
    rcp,
    interop,
)
from dsv3.cli.bench.group import app

__all__ = [
    "app",
    "claims",
    "convert",
    "decode",
    "deployment",
    "end_to_end",
    "evaluate",
    "fp8",
    "interop",
    "length",
    "mla",
    "moe",
    "pipeline",
    "rcp",
    "serve",
    "train",
]
