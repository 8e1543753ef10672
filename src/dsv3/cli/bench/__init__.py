"""``dsv3 bench``: measured beside named peers in the same run. One module a verb, registered by import."""

from dsv3.cli.bench import train, fp8, moe, pipeline, convert, decode, serve, deployment, evaluate, length  # noqa: I001 (help order)
from dsv3.cli.bench.group import app

__all__ = [
    "app",
    "convert",
    "decode",
    "deployment",
    "evaluate",
    "fp8",
    "length",
    "moe",
    "pipeline",
    "serve",
    "train",
]
