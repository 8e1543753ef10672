"""Tables for people: drawn on a terminal, plain columns (ASCII) into a pipe."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def show(title: str, header: Sequence[str], rows: Sequence[Sequence[str]], ends: Sequence[int] = ()) -> None:
    """Print a table, the first column to the left, others to the right; a line after each row of ``ends``."""
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Table

        table = Table(header[0], title=title, title_justify="left")
        for column in header[1:]:
            table.add_column(column, justify="right")
        for index, row in enumerate(rows):
            table.add_row(*row, end_section=index in ends)
        Console().print(table)
        return
    print(title)
    lines = [header, *rows]
    widths = [max(len(row[i]) for row in lines) for i in range(len(header))]
    for first, *rest in lines:
        cells = [first.ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(rest, widths[1:]))]
        print("  ".join(cells).rstrip())
