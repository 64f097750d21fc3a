"""The list of commands; `run` is what `tollgate` starts."""

from __future__ import annotations

import os
import sys

import typer

from cli import (
    access,
    add,
    backends,
    documents,
    health,
    holds,
    limits,
    prices,
    search,
    trace,
    up,
    usage,
)
from cli.demo import demo
from cli.terminal import INTERRUPTED

app = typer.Typer(
    help=(
        "Tollgate: parse, embed, store and search documents behind a gate that cannot overspend."
    ),
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode="rich",
)
for part in (
    *(up, demo, add, search, documents),
    *(prices, usage, holds, limits),
    *(backends, health, trace, access),
):
    app.add_typer(part.app)


def run() -> None:
    """Run a command and exit with its code."""
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except BrokenPipeError:
        # The reader has gone, as in `tollgate documents | head`: nothing is wrong.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)


if __name__ == "__main__":
    run()
