"""``dsv3 plan``: what a model or a run will take. One module a verb; importing one registers it."""

from dsv3.cli.plan import params, cost, memory, layout, serve, pipeline  # noqa: I001 (the order of the help)
from dsv3.cli.plan.group import app

__all__ = ["app", "cost", "layout", "memory", "params", "pipeline", "serve"]
