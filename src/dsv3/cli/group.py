"""A group of verbs whose help says each verb's whole first sentence; typer's own cuts it off."""

from __future__ import annotations

from typing import Any

import typer.core

LONGEST = 200  # characters of a sentence; it is wrapped


class Verbs(typer.core.TyperGroup):
    """Use as ``typer.Typer(cls=Verbs)``."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write the list of verbs; called when help is shown."""
        found = [(name, self.get_command(ctx, name)) for name in self.list_commands(ctx)]
        rows = [(name, verb.get_short_help_str(LONGEST)) for name, verb in found if verb and not verb.hidden]
        with formatter.section("Commands"):
            formatter.write_dl(rows)
