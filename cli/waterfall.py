"""One trace as a waterfall: which span stands where, and how its bar is drawn. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from cli.spans import Span

# A cell of a bar is drawn in eighths: block elements U+2588 to U+258F.
_EIGHTHS = " ▏▎▍▌▋▊▉█"


@dataclass(frozen=True, slots=True)
class Row:
    """A line of the waterfall: a span, how deep it stands, and when it began in the trace.

    `count` spans are drawn as this one where more than one brother looked the same; `total_ns` is
    the sum of their durations.
    """

    span: Span
    depth: int
    offset_ns: int
    total_ns: int
    count: int = 1


def rows(spans: Sequence[Span]) -> list[Row]:
    """Every span, parents above their children, brothers in order of their start.

    A span whose parent is not known (it was not kept, or is a caller's own) stands at the top. A
    cycle, which no tracer writes, is broken where it is met.
    """
    known = {span.span_id: span for span in spans}
    children: dict[str, list[Span]] = {}
    for span in known.values():
        parent = (
            span.parent_id if span.parent_id in known and span.parent_id != span.span_id else ""
        )
        children.setdefault(parent, []).append(span)
    for brothers in children.values():
        brothers.sort(key=lambda span: (span.start_ns, span.span_id))
    begin = min((span.start_ns for span in known.values()), default=0)
    drawn: list[Row] = []
    seen: set[str] = set()
    waiting = [(span, 0) for span in reversed(children.get("", []))]
    while waiting or len(seen) < len(known):
        if not waiting:
            waiting = [(next(s for s in known.values() if s.span_id not in seen), 0)]
        span, depth = waiting.pop()
        if span.span_id in seen:
            continue
        seen.add(span.span_id)
        drawn.append(Row(span, depth, span.start_ns - begin, span.duration_ns))
        waiting += [(child, depth + 1) for child in reversed(children.get(span.span_id, []))]
    return drawn


def folded(drawn: Sequence[Row]) -> list[Row]:
    """The rows with a call's two ends as one, and runs of leaves that look the same as one.

    A call has a span in the caller and one in the daemon, both named by the method: the caller's
    is left out where the daemon's is there.
    """
    return _runs(_calls(list(drawn)))


def _calls(drawn: list[Row]) -> list[Row]:
    out: list[Row] = []
    lifted: dict[str, int] = {}  # how many levels a span's descendants move up
    parents = {row.span.span_id: row.span.parent_id for row in drawn}
    names = {row.span.span_id: row.span.name for row in drawn}
    served = {
        row.span.parent_id
        for row in drawn
        if row.span.kind == "server" and names.get(row.span.parent_id) == row.span.name
    }
    for row in drawn:
        lift = lifted.get(parents[row.span.span_id], 0)
        if row.span.kind == "client" and row.span.span_id in served:
            lifted[row.span.span_id] = lift + 1
            continue
        lifted[row.span.span_id] = lift
        out.append(replace(row, depth=row.depth - lift))
    return out


def _runs(drawn: list[Row]) -> list[Row]:
    out: list[Row] = []
    for index, row in enumerate(drawn):
        is_leaf = index + 1 == len(drawn) or drawn[index + 1].depth <= row.depth
        last = out[-1] if out else None
        if is_leaf and last is not None and _alike(last, row):
            end_ns = max(last.span.end_ns, row.span.end_ns)
            out[-1] = replace(
                last,
                span=replace(last.span, end_ns=end_ns),
                total_ns=last.total_ns + row.span.duration_ns,
                count=last.count + 1,
            )
        else:
            out.append(row)
    return out


def _alike(last: Row, row: Row) -> bool:
    return (
        last.depth == row.depth
        and last.span.name == row.span.name
        and last.span.service == row.span.service
        and last.span.status == row.span.status
        and last.span.parent_id == row.span.parent_id
    )


def bar(offset_ns: int, duration_ns: int, total_ns: int, width: int) -> str:
    """A span's bar in `width` cells that stand for `total_ns`; never wider, never invisible."""
    total_ns = max(1, total_ns)
    start = min(max(0, offset_ns) * width * 8 // total_ns, width * 8 - 1)
    end = min(max(0, offset_ns + duration_ns) * width * 8 // total_ns, width * 8)
    # A bar begins on a whole cell: block elements can be cut on their right side only.
    cell = start // 8
    whole, eighths = divmod(min(max(1, end - start), (width - cell) * 8), 8)
    return (" " * cell + "█" * whole + (_EIGHTHS[eighths] if eighths else "")).ljust(width)


def duration(nanos: int) -> str:
    """`1_500_000` as `1.5 ms`, in at most seven characters under a quarter of an hour."""
    if nanos < 1_000_000:
        return f"{nanos / 1e6:.2f} ms"
    if nanos < 100_000_000:
        return f"{nanos / 1e6:.1f} ms"
    if nanos < 1_000_000_000:
        return f"{nanos / 1e6:.0f} ms"
    return f"{nanos / 1e9:.2f} s"
