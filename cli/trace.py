"""`tollgate trace`: what one request did in every daemon, as a waterfall."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any

import typer
from rich.console import Group
from rich.table import Table
from rich.text import Text

from cli import waterfall
from cli.command import Failed, Session, command
from cli.spans import Span, newest, of_request, read_spans
from cli.waterfall import Row

app = typer.Typer()

_COLOURS = {
    "router": "cyan",
    "cost": "yellow",
    "parser": "magenta",
    "embedder": "green",
    "storage": "blue",
    "corpus": "red",
}
_ROWS_MAX = 120


@command(app)
def trace(
    session: Session,
    request_id: Annotated[
        str | None,
        typer.Argument(help="The request (or trace) id; the newest trace when absent."),
    ] = None,
    every: Annotated[
        bool, typer.Option("--all", help="Draw every span: nothing folded, nothing left out.")
    ] = False,
) -> None:
    """Draw a request's whole trace as a waterfall across all daemons.

    Reads the trace files of the state directory (TOLLGATE_STATE_DIR): the mesh may be stopped. With
    a collector (TOLLGATE_OTLP_ENDPOINT) the traces are there instead.
    """
    spans = list(read_spans(session.mesh.state_dir))
    found = of_request(spans, request_id) if request_id else newest(spans)
    if not found:
        what = f"no trace of {request_id}" if request_id else "no trace yet"
        raise Failed(
            f"{what} in {session.mesh.state_dir / 'traces'}",
            hint="traces come a second after the call; with TOLLGATE_OTLP_ENDPOINT they go there",
        )
    session.terminal.json(as_json(found))
    session.terminal.show(drawing(found, session.terminal.width, every=every))


def as_json(spans: list[Span]) -> list[dict[str, Any]]:
    """The spans for programs, in the order of the waterfall."""
    return [
        asdict(row.span) | {"depth": row.depth, "offset_ns": row.offset_ns}
        for row in waterfall.rows(spans)
    ]


def drawing(spans: list[Span], width: int, *, every: bool = False) -> Group:
    """The waterfall of one or more traces in `width` columns."""
    begin = min(span.start_ns for span in spans)
    total_ns = max(span.end_ns for span in spans) - begin
    drawn = waterfall.rows(spans)
    if not every:
        drawn = waterfall.folded(drawn)
    hidden = 0
    if not every and len(drawn) > _ROWS_MAX:
        shown = _most_telling(drawn)
        hidden, drawn = len(drawn) - len(shown), shown
    services = sorted(
        {span.service for span in spans}, key=[*_COLOURS, *{s.service for s in spans}].index
    )
    made = Table(box=None, padding=(0, 1, 0, 0), show_header=True, header_style="dim")
    name_width = max(30, (width - 32) * 6 // 10)
    bar_width = max(10, width - name_width - 32)
    made.add_column("service", width=8, no_wrap=True)
    made.add_column("span", width=name_width, no_wrap=True, overflow="ellipsis")
    made.add_column("at", width=8, justify="right", no_wrap=True)
    made.add_column("", width=bar_width, no_wrap=True)
    made.add_column("took", width=8, justify="right", no_wrap=True)
    for row in drawn:
        made.add_row(*_cells(row, total_ns, bar_width, "  " if width >= 100 else " "))
    request_ids = sorted({span.request_id for span in spans if span.request_id})
    heading = Text.assemble(
        ("trace ", "dim"),
        spans[0].trace_id,
        (f"  request {request_ids[0]}" if request_ids else "", "dim"),
    )
    summary = Text.assemble(
        f"{len(spans)} span{'s' * (len(spans) != 1)} in {waterfall.duration(total_ns)} across ",
        *[part for name in services for part in ((name, _COLOURS.get(name, "")), " ")],
        (f"({hidden} short ones left out: --all draws every one)" if hidden else "", "dim"),
    )
    return Group(heading, made, summary)


def _cells(row: Row, total_ns: int, bar_width: int, indent: str) -> tuple[Text, ...]:
    span = row.span
    colour = "bold red" if span.status else _COLOURS.get(span.service, "")
    name = Text(indent * min(row.depth, 12) + _short(span.name))
    if row.count > 1:
        name.append(f" \N{MULTIPLICATION SIGN}{row.count}", style="dim")
    if span.status:
        name.append(f" {span.status}", style="red")
    return (
        Text(span.service, style=_COLOURS.get(span.service, "")),
        name,
        Text(waterfall.duration(row.offset_ns), style="dim"),
        Text(waterfall.bar(row.offset_ns, span.duration_ns, total_ns, bar_width), style=colour),
        Text(waterfall.duration(row.total_ns)),
    )


def _short(name: str) -> str:
    """`tollgate.storage.v1.ObjectService/GetObject` as `Object.GetObject`."""
    service, slash, method = name.rpartition("/")
    return f"{service.rpartition('.')[2].removesuffix('Service')}.{method}" if slash else name


def _most_telling(drawn: list[Row]) -> list[Row]:
    """The longest spans, with all that they stand under, in the order of the waterfall."""
    index_of = {row.span.span_id: index for index, row in enumerate(drawn)}
    kept: set[int] = set()
    for index in sorted(range(len(drawn)), key=lambda i: -drawn[i].total_ns):
        line = [index]
        while (parent := index_of.get(drawn[line[-1]].span.parent_id)) is not None:
            if parent in line:
                break
            line.append(parent)
        if len(kept | set(line)) > _ROWS_MAX:
            break
        kept |= set(line)
    return [drawn[index] for index in sorted(kept)]
