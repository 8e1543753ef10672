"""``dsv3``: the verbs, gathered from one module a group, and the one place where errors become exit codes.

Exit codes: 0 success, 1 failure, 2 bad input (one clear line, never a traceback).
"""

from __future__ import annotations

import errno
import itertools
import logging
import os
import re
import sys
from typing import Any

import typer

from dsv3 import __version__
from dsv3.cli import (
    bench,
    chat,
    convert,
    data,
    distill,
    doctor,
    evaluate,
    extend,
    generate,
    grpo,
    init,
    niah,
    plan,
    pretrain,
    reward,
    serve,
    sft,
    tasks,
    tokenizer,
)
from dsv3.cli.group import Verbs
from dsv3.common.errors import Failure, UserError
from dsv3.common.progress import say

app = typer.Typer(
    name="dsv3",
    cls=Verbs,
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(pretrain.app)
app.add_typer(extend.app)
app.add_typer(sft.app)
app.add_typer(distill.app)
app.add_typer(reward.app)
app.add_typer(grpo.app)
app.add_typer(generate.app)
app.add_typer(chat.app)
app.add_typer(serve.app)
app.add_typer(evaluate.app)
app.add_typer(niah.app)
app.add_typer(convert.app)
app.add_typer(init.app)
app.add_typer(plan.app, name="plan")
app.add_typer(bench.app, name="bench")
app.add_typer(tokenizer.app, name="tokenizer")
app.add_typer(data.app, name="data")
app.add_typer(tasks.app, name="tasks")
app.add_typer(doctor.app)


def say_version(wanted: bool) -> None:
    """What --version does."""
    if wanted:
        typer.echo(f"dsv3 {__version__}")
        raise typer.Exit


@app.callback()
def dsv3(
    version: bool = typer.Option(
        False, "--version", is_eager=True, callback=say_version, help="Print the version and exit."
    ),
) -> None:
    """A DeepSeek-V3 model through its whole life."""


# What the system says of a path that somebody named; any other error of its kind is ours.
UNWRITABLE = {
    errno.EACCES, errno.EISDIR, errno.ENOENT, errno.ENOSPC, errno.ENOTDIR, errno.EPERM, errno.EROFS
}  # fmt: skip

UsageError: Any = typer.BadParameter.__base__  # click's; its module is not typer's public face


def usage(error: Any, words: list[str]) -> str:
    """One line for words that a verb does not take: what was given, what is wrong with it, where to look.

    ``words``: the command line. An option's value is named as a recipe's is: ``--max-tokens (-3): ...``.
    """
    given = dict(itertools.pairwise(part for word in words for part in word.split("=", 1)))
    names = error.param.opts if type(error) is typer.BadParameter and error.param else ()
    named = [f"{name} ({given[name]}): {error.message}" for name in names if name in given]
    return f"{(named or [error.format_message()])[0]} (see {error.ctx.command_path} --help)"


def run() -> None:
    """Run the verb that the command line names; what a person did wrong becomes a :class:`UserError`."""
    try:
        sys.exit(app(standalone_mode=False, prog_name="dsv3"))
    except UsageError as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            error.show()
            sys.exit(error.exit_code)
        raise UserError(usage(error, sys.argv)) from None
    except (MemoryError, RuntimeError) as error:  # torch has a type of its own for a GPU's memory alone
        wanted = re.search(r"allocate ([\d.]+ (?:bytes|\w?iB))", str(error))
        if not isinstance(error, MemoryError) and not (wanted and "memory" in str(error)):
            raise
        size = f" ({wanted[1]} more were wanted)" if wanted else ""
        raise Failure(
            f"out of memory{size}: a smaller model, batch or length takes less; see dsv3 doctor"
        ) from None
    except OSError as error:
        if error.errno not in UNWRITABLE:
            raise
        where = f"{error.filename}: " if error.filename else ""
        raise Failure(f"{where}{error.strerror}; choose a path that you may write to") from None


class Lines(logging.Handler):
    """The house's log as plain lines: which kernels are used and why not others, once each."""

    def emit(self, record: logging.LogRecord) -> None:
        say(self.format(record))


def main() -> None:
    """Run the command line and turn errors into exit codes; the console script's entry point."""
    rank = os.environ.get("RANK")  # of several processes that torchrun started
    log = logging.getLogger("dsv3")
    log.handlers = [Lines()]
    log.setLevel(logging.INFO if rank in (None, "0") else logging.WARNING)
    try:
        run()
    except UserError as error:
        if rank in (None, "0") or not error.shared:
            print(f"dsv3: {error}", file=sys.stderr, flush=True)
        if rank is not None:  # not waiting for threads whose peers are gone
            os._exit(error.exit_code)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("dsv3: interrupted", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
