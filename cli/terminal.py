"""What a command says: tables for people on standard output, one JSON value for programs."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

OK, FAILED, USAGE, UNREACHABLE, INTERRUPTED = 0, 1, 2, 3, 130

# Where output is not a terminal there is no width to fit: lines stay whole, for grep.
_WIDTH_PIPED = 160


def _console(*, stderr: bool) -> Console:
    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() or "COLUMNS" in os.environ else _WIDTH_PIPED
    return Console(stderr=stderr, width=width, highlight=False, soft_wrap=False)


@dataclass
class Terminal:
    """Where a command's words go. With `as_json`, people's words go nowhere."""

    as_json: bool = False
    console: Console = field(default_factory=lambda: _console(stderr=False))
    errors: Console = field(default_factory=lambda: _console(stderr=True))

    def say(self, text: str = "", *, style: str = "") -> None:
        """A line for people; `text` may have rich markup."""
        if not self.as_json:
            self.console.print(text, style=style or None)

    def show(self, renderable: Any) -> None:
        """A table or the like for people."""
        if not self.as_json:
            self.console.print(renderable)

    @property
    def width(self) -> int:
        """How many columns there are."""
        return self.console.width

    def json(self, value: Any, *, in_one_line: bool = False) -> None:
        """The answer for programs; does nothing for people."""
        if self.as_json:
            text = json.dumps(value, indent=None if in_one_line else 2, ensure_ascii=False)
            print(text, flush=True)

    def answer(self, message: Message) -> None:
        """An answer of the mesh for programs: the standard JSON of protobuf, its names."""
        self.json(as_dict(message))

    def error(self, text: str, *, reason: str = "", hint: str = "") -> None:
        """What went wrong, in one line on standard error; with `--json`, as an object."""
        if self.as_json:
            name = reason.upper().replace(" ", "_") or "FAILED"
            value = {"error": {"reason": name, "message": text}}
            print(json.dumps(value, ensure_ascii=False), file=sys.stderr, flush=True)
            return
        name = f"[red bold]{reason or 'error'}[/]"
        self.errors.print(f"{name}: {escape(text)}", soft_wrap=True)
        if hint:
            self.errors.print(f"[dim]{escape(hint)}[/]", soft_wrap=True)


def as_dict(message: Message) -> dict[str, Any]:
    """A message as the standard JSON of protobuf, zero values included."""
    return MessageToDict(
        message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )


def table(*columns: str, rows: Iterable[Sequence[Any]] = ()) -> Table:
    """A plain table, each column as wide as its widest cell where there is room.

    Where there is none, a column whose name begins with `~` is cut with an ellipsis and the others
    fold; one that begins with `>` is set flush right and does neither, nor does one with `=`.
    """
    listed = [[cell if isinstance(cell, Text) else Text(str(cell)) for cell in r] for r in rows]
    made = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for place, name in enumerate(columns):
        header, is_cut = name.lstrip(">~="), name.startswith("~")
        is_whole = name.startswith((">", "="))
        widest = max((row[place].cell_len for row in listed), default=0)
        made.add_column(
            header,
            justify="right" if name.startswith(">") else "left",
            overflow="ellipsis" if is_cut else "fold",
            no_wrap=is_whole,
            min_width=max(len(header), widest) if is_whole else None,
        )
    for row in listed:
        for name, cell in zip(columns, row, strict=True):
            if name.startswith("~"):
                # Of the cell and not of the column: rich takes room only from those that may wrap.
                cell.no_wrap = True
        made.add_row(*row)
    return made


def local_time(stamp: Timestamp) -> str:
    """An instant in the reader's own time zone; empty where it is unset."""
    if not stamp.seconds:
        return ""
    moment = datetime.fromtimestamp(stamp.seconds).astimezone()
    return moment.strftime("%Y-%m-%d %H:%M:%S")


def lower(name: str, prefix: str) -> str:
    """`HOLD_STATE_SETTLED` as `settled`."""
    return name.removeprefix(prefix).lower().replace("_", " ")


def operation(name: str) -> str:
    """`tollgate.embedder.v1.EmbedderService/Embed` as `Embed`."""
    return name.rpartition("/")[2]


def size(size_bytes: int) -> str:
    """`1_536` as `1.5 KiB`."""
    if size_bytes < 1024:
        return f"{size_bytes} B"
    power = min((size_bytes.bit_length() - 1) // 10, 4)
    return f"{size_bytes / (1 << 10 * power):.1f} {'KMGT'[power - 1]}iB"
