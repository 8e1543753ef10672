"""What the verbs of ``dsv3 plan`` share."""

from __future__ import annotations

import typer

from dsv3.cli.group import Verbs

app = typer.Typer(
    cls=Verbs, help="Count before you start: parameters, memory, cost, fleets.", no_args_is_help=True
)


@app.callback()
def group() -> None:
    """Count before you start: parameters, memory, cost, fleets."""


MODEL = typer.Option(None, "--preset", help="tiny, small, 16b, v3-671b or a checkpoint folder")
JSON = typer.Option(False, "--json", help="Print JSON; the keys name their units.")


def figure(value: float) -> str:
    """``180,000``, ``54.2``, ``0.00102``."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}" if abs(value) >= 1 else f"{value:.3g}"


def human(count: float) -> str:
    """``260G``, ``15.2M``: the counts of the tables."""
    from dsv3.common.progress import human

    return human(count)
