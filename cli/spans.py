"""Spans in the trace files of a state directory: one JSON object a line, one file a daemon."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Span:
    """A finished span. Times are nanoseconds of the epoch."""

    trace_id: str
    span_id: str
    parent_id: str
    service: str
    name: str
    start_ns: int
    end_ns: int
    kind: str = "internal"
    status: str = ""
    request_id: str = ""

    @property
    def duration_ns(self) -> int:
        """How long it took."""
        return max(0, self.end_ns - self.start_ns)


def read_spans(state_dir: Path) -> Iterator[Span]:
    """Every span of every daemon. A line that is none, such as a torn last one, is passed over."""
    for file in sorted((state_dir / "traces").glob("*.jsonl")):
        with file.open(encoding="utf-8", errors="replace") as lines:
            for line in lines:
                if span := _span(line):
                    yield span


def _span(line: str) -> Span | None:
    try:
        found = json.loads(line)
        return Span(
            trace_id=found["trace_id"],
            span_id=found["span_id"],
            parent_id=found.get("parent_id") or "",
            service=found["service"],
            name=found["name"],
            start_ns=int(found["start_ns"]),
            end_ns=int(found["end_ns"]),
            kind=found.get("kind") or "internal",
            status=found.get("status") or "",
            request_id=str(found.get("attributes", {}).get("tollgate.request_id", "")),
        )
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def of_request(spans: Iterable[Span], request_id: str) -> list[Span]:
    """The spans of every trace that has a span of this request or this trace id."""
    found = list(spans)
    wanted = {s.trace_id for s in found if request_id in (s.request_id, s.trace_id)}
    return [span for span in found if span.trace_id in wanted]


def newest(spans: Iterable[Span]) -> list[Span]:
    """The spans of the trace that began last, of those that the router began and others joined.

    Looking at the ledger, or work that a daemon does by itself, has traces too: they are taken only
    where there are no others, those of the router first. Empty without any.
    """
    traces: dict[str, list[Span]] = {}
    for span in spans:
        traces.setdefault(span.trace_id, []).append(span)
    return max(traces.values(), key=_telling, default=[])


def _telling(spans: list[Span]) -> tuple[bool, bool, int]:
    """How likely a trace is the one that somebody wants to see: greater is likelier."""
    ids = {span.span_id for span in spans}
    first = min(spans, key=lambda span: (span.parent_id in ids, span.start_ns))
    is_asked = first.service == "router" and first.kind == "server"
    return is_asked, len({span.service for span in spans}) > 1, first.start_ns
