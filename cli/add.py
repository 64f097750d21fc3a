"""`tollgate add`: documents in, each followed on the terminal until it can be searched."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.text import Text

from cli.caller import Caller, Unreachable
from cli.command import Failed, Session, command
from cli.documents import STATE_COLOURS, Collection
from cli.intake import Added, Adding, files_of, is_simulated
from cli.terminal import Terminal, as_dict, local_time, table

app = typer.Typer()

_BARS_MAX = 14
# As wide as `ready (simulated): 9 pages, 9 chunks`.
_STAGE = 36


@command(app)
async def add(
    session: Session,
    paths: Annotated[
        list[Path], typer.Argument(metavar="FILES…", help="Files, and folders of them.")
    ],
    collection: Collection = "",
    watch: Annotated[
        bool, typer.Option(help="Follow every document until it can be searched.")
    ] = True,
) -> None:
    """Add documents, and follow them through their stages.

    The exit code is 1 where one failed. Ctrl-C stops the following only.
    """
    files = files_of(paths)
    terminal = session.terminal
    try:
        async with session.router() as router:
            await followed(router, files, terminal, collection=collection, watch=watch)
    except (Unreachable, asyncio.CancelledError):
        _tell_what_goes_on(files, terminal)
        raise
    terminal.json(summary(files))
    tell_summary(files, terminal)
    if any(file.has_failed for file in files):
        raise Failed


async def followed(
    router: Caller,
    files: Sequence[Added],
    terminal: Terminal,
    *,
    collection: str = "",
    watch: bool = True,
) -> None:
    """Add files with a bar each on a terminal, a line each elsewhere. Raises Unreachable."""
    if terminal.as_json:
        await Adding(router, collection=collection, watch=watch).all(files)
        return
    if not terminal.console.is_terminal:
        lines = Lines(terminal)
        await Adding(router, collection=collection, watch=watch, changed=lines.changed).all(files)
        return
    with _progress(terminal, files) as progress:
        bars = _Bars(progress, files)
        await Adding(router, collection=collection, watch=watch, changed=bars.changed).all(files)


def _progress(terminal: Terminal, files: Sequence[Added]) -> Progress:
    # The names get what the rest leaves: bar, percent, stage, time.
    longest = max(len(file.name) for file in files)
    names = max(12, min(longest, terminal.width - _STAGE - 28, 40))
    return Progress(
        TextColumn(f"{{task.fields[file]:<{names}.{names}}}", style="bold"),
        BarColumn(bar_width=10 if terminal.width < 100 else 24),
        TextColumn("{task.percentage:>3.0f}%"),
        TextColumn("{task.fields[stage]}"),
        TimeElapsedColumn(),
        console=terminal.console,
    )


class Lines:
    """For logs and pipes: a line when a document comes to a stage, begins to wait, or has ended."""

    def __init__(self, terminal: Terminal) -> None:
        self._terminal = terminal
        self._told: dict[str, tuple[str, str, int]] = {}

    def changed(self, file: Added) -> None:
        reason, message = file.why
        now = (file.state, reason, file.document.retry_time.seconds)
        if self._told.get(file.document_id) == now:
            return
        self._told[file.document_id] = now
        parts = [f"{file.name}: {file.stage}", *([message] if message else []), *_until(file)]
        # As one line, however long: for grep.
        self._terminal.console.print(escape("; ".join(parts)), soft_wrap=True)


def _until(file: Added) -> list[str]:
    """When a document that waits is tried again, where that is known."""
    when = local_time(file.document.retry_time) if file.state == "deferred" else ""
    return [f"tried again at {when}"] if when else []


class _Bars:
    """A bar a document; where there are many, one for those under way and one for all."""

    def __init__(self, progress: Progress, files: Sequence[Added]) -> None:
        self._progress = progress
        self._tasks: dict[str, TaskID] = {}
        self._ended: set[str] = set()
        self._are_many = len(files) > _BARS_MAX
        if self._are_many:
            label = f"all {len(files)} documents"
            self._all = progress.add_task("", total=len(files), file=label, stage=_padded("", ""))
        else:
            for file in files:
                self._bar(file, start=False)

    def _bar(self, file: Added, *, start: bool = True) -> TaskID:
        if file.document_id not in self._tasks:
            self._tasks[file.document_id] = self._progress.add_task(
                "", total=100, start=start, file=file.name, stage=_padded(file.state, "")
            )
        return self._tasks[file.document_id]

    def changed(self, file: Added) -> None:
        if file.document_id in self._ended:
            return
        task = self._bar(file)
        self._progress.start_task(task)
        colour = STATE_COLOURS.get(file.state, "")
        self._progress.update(task, completed=file.percent, stage=_padded(file.stage, colour))
        if file.state in STATE_COLOURS:
            self._ended.add(file.document_id)
            self._progress.stop_task(task)
            if self._are_many:
                stage = _padded(file.stage, colour)
                self._progress.console.print(f"{escape(file.name)}: {stage.rstrip()}")
                self._progress.remove_task(task)
                self._progress.update(self._all, advance=1)


def _padded(stage: str, colour: str) -> str:
    """A stage as markup of always the same width, so that nothing moves."""
    words = escape(f"{stage:<{_STAGE}.{_STAGE}}")
    return f"[{colour}]{words}[/]" if colour else words


def summary(files: Sequence[Added]) -> dict[str, Any]:
    """What became of the files, for programs."""
    told = []
    for file in files:
        reason, message = file.why
        told.append(
            {
                "file": str(file.path),
                "document_id": file.document_id,
                "state": file.state,
                "reason": reason,
                "message": message,
                "document": as_dict(file.document),
            }
        )
    states = [file.state for file in files]
    counts = {name: states.count(name) for name in ("ready", "failed", "deferred")}
    return {"documents": told} | counts


def tell_summary(files: Sequence[Added], terminal: Terminal) -> None:
    """What became of the files, for people: counts, then each one that failed or waits, and why."""
    states = [file.state for file in files]
    parts = [
        f"[{colour}]{states.count(name)} {name}[/]"
        for name, colour in STATE_COLOURS.items()
        if states.count(name)
    ]
    if simulated := sum(f.state == "ready" and is_simulated(f.document) for f in files):
        parts.insert(1, f"[yellow]{simulated} of them simulated[/]")
    if going_on := sum(state not in STATE_COLOURS for state in states):
        parts.append(f"{going_on} under way: `tollgate documents` shows them")
    terminal.say(", ".join(parts))
    rows = []
    for file in files:
        if file.state in ("failed", "deferred"):
            reason, message = file.why
            name = Text(file.name, style=STATE_COLOURS[file.state])
            rows.append([name, reason, "; ".join([message, *_until(file)])])
    if rows:
        terminal.show(table("document", "reason", "why", rows=rows))


def _tell_what_goes_on(files: Sequence[Added], terminal: Terminal) -> None:
    taken = sum(bool(f.document.state) and f.state not in STATE_COLOURS for f in files)
    untaken = sum(not f.document.state and not f.reason for f in files)
    if taken:
        terminal.say(
            f"the mesh goes on with {taken} of the documents: `tollgate documents` shows them"
        )
    if untaken:
        terminal.say(f"{untaken} may not have been sent: add them again, which is safe")
