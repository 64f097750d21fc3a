"""The waterfall: every span once, under its parent, with a bar that fits."""

from __future__ import annotations

import io
import json
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from cli.spans import Span, newest, of_request, read_spans
from cli.trace import drawing
from cli.waterfall import bar, duration, folded, rows

MS = 1_000_000


def span(
    id_: str,
    parent: str = "",
    *,
    start: int = 0,
    end: int = 10,
    name: str = "",
    service: str = "router",
    kind: str = "internal",
    request_id: str = "",
) -> Span:
    return Span("t1", id_, parent, service, name or id_, start * MS, end * MS, kind, "", request_id)


def test_children_stand_under_their_parents_in_order_of_their_start() -> None:
    """Depth is the number of ancestors, and offsets count from the first span of the trace."""
    drawn = rows([span("c", "a", start=7), span("b", "a", start=3), span("d", "b"), span("a")])
    assert [(row.span.span_id, row.depth) for row in drawn] == [
        ("a", 0),
        ("b", 1),
        ("d", 2),
        ("c", 1),
    ]
    assert [row.offset_ns for row in drawn] == [0, 3 * MS, 0, 7 * MS]


def test_a_span_whose_parent_was_not_kept_stands_at_the_top() -> None:
    """A trace that lacks spans is drawn all the same."""
    assert [(r.span.span_id, r.depth) for r in rows([span("x", "gone"), span("y", "x")])] == [
        ("x", 0),
        ("y", 1),
    ]


@given(
    st.lists(
        st.tuples(st.integers(0, 9), st.integers(0, 9), st.integers(0, 50), st.integers(0, 50)),
        unique_by=lambda s: s[0],
    )
)
def test_every_span_is_drawn_once_whatever_the_parents_say(
    made: list[tuple[int, int, int, int]],
) -> None:
    """Missing parents, spans that are their own parent and cycles lose nothing and end."""
    spans = [span(str(i), str(p), start=s, end=e) for i, p, s, e in made]
    assert sorted(row.span.span_id for row in rows(spans)) == sorted(s.span_id for s in spans)


@given(st.integers(0, 10**12), st.integers(0, 10**12), st.integers(0, 10**12), st.integers(1, 200))
def test_a_bar_is_as_wide_as_its_column_and_always_visible(
    offset: int, length: int, total: int, width: int
) -> None:
    """However short a span, and however wrong a clock, the bar is there and nothing spills."""
    drawn = bar(offset, length, total, width)
    assert len(drawn) == width
    assert drawn.strip()


def test_a_bar_covers_its_share_of_the_whole() -> None:
    """A span from the half to the three quarters is drawn there."""
    assert bar(50, 25, 100, 8) == "    ██  "


def test_the_two_ends_of_a_call_are_drawn_as_one() -> None:
    """The caller's span of a call is left out where the daemon's own is there."""
    drawn = folded(
        rows(
            [
                span("root", service="corpus", end=30),
                span("out", "root", name="a.B/C", kind="client", service="corpus"),
                span("in", "out", name="a.B/C", kind="server", service="cost"),
                span("work", "in", service="cost"),
                span("lost", "root", name="a.B/D", kind="client", service="corpus", start=20),
            ]
        )
    )
    assert [(row.span.span_id, row.depth) for row in drawn] == [
        ("root", 0),
        ("in", 1),
        ("work", 2),
        ("lost", 1),
    ]


def test_a_run_of_equal_leaves_is_one_row_with_their_sum() -> None:
    """Fifty pages are one line that says fifty."""
    leaves = [span(f"p{i}", "a", start=i, end=i + 1, name="page") for i in range(50)]
    drawn = folded(rows([span("a", end=60), *leaves]))
    assert [(row.span.name, row.count, row.total_ns) for row in drawn] == [
        ("a", 1, 60 * MS),
        ("page", 50, 50 * MS),
    ]


def test_durations_have_three_digits_that_tell() -> None:
    """Short and long ones are both readable in a narrow column."""
    assert [duration(n) for n in (40_000, 1_500_000, 250 * MS, 12_340 * MS)] == [
        "0.04 ms",
        "1.5 ms",
        "250 ms",
        "12.34 s",
    ]


def test_the_drawing_fits_terminals_of_80_and_120_columns() -> None:
    """No line is wider than the terminal, deep trees and long names included."""
    spans = [span("0", name="tollgate.corpus.v1.CorpusService/AddDocument", end=9_000)]
    spans += [
        span(str(i), str(i - 1), name="very." * 20 + f"long/Name{i}", start=i, end=i + 5_000)
        for i in range(1, 40)
    ]
    for width in (80, 120):
        console = Console(width=width, file=open("/dev/null", "w"))  # noqa: SIM115  # never read
        with console.capture() as captured:
            console.print(drawing(spans, width))
        lines = captured.get().splitlines()
        assert len(lines) >= 40
        assert max(map(len, lines)) <= width


def test_a_thousand_different_spans_are_cut_to_the_longest_and_it_is_said() -> None:
    """A huge trace stays readable; what is left out is counted."""
    spans = [span("0", name="root", end=2_000)]
    spans += [span(str(i), "0", name=f"n{i}", start=i, end=2 * i) for i in range(1, 1_000)]
    console = Console(width=100, file=open("/dev/null", "w"))  # noqa: SIM115  # never read
    with console.capture() as captured:
        console.print(drawing(spans, 100))
    assert "n999" in captured.get()
    assert "880 short ones left out" in captured.get()


def _write(directory: Path, spans: list[Span], *, torn: str = "") -> None:
    (directory / "traces").mkdir(exist_ok=True)
    for one in spans:
        line = {
            "trace_id": one.trace_id,
            "span_id": one.span_id,
            "parent_id": one.parent_id,
            "service": one.service,
            "name": one.name,
            "kind": one.kind,
            "start_ns": one.start_ns,
            "end_ns": one.end_ns,
            "status": "",
            "attributes": {"tollgate.request_id": one.request_id} if one.request_id else {},
        }
        with (directory / "traces" / f"{one.service}.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n" + torn)


def test_a_request_has_its_whole_trace_from_the_files_of_all_daemons(tmp_path: Path) -> None:
    """Spans without the request's id belong to it by their trace; torn lines harm nothing."""
    mine = [span("a", request_id="r1"), span("b", "a", service="cost")]
    _write(tmp_path, mine, torn='{"trace_id": "t1", "spa\n')
    other = Span("t2", "c", "", "cost", "x", 5 * MS, 6 * MS, "internal", "", "r2")
    _write(tmp_path, [other])
    found = of_request(read_spans(tmp_path), "r1")
    assert {s.span_id for s in found} == {"a", "b"}


def test_the_newest_trace_is_one_that_somebody_asked_for(tmp_path: Path) -> None:
    """What daemons do by themselves later, and reading the ledger, do not hide the last request."""
    own = Span("t9", "z", "", "corpus", "looks for jobs", 99 * MS, 100 * MS)
    asks = Span("t9", "y", "z", "storage", "answers", 99 * MS, 100 * MS)
    read = Span("t8", "x", "", "cost", "ListLimits", 99 * MS, 100 * MS, "server")
    mine = [span("a", kind="server", request_id="r1"), span("b", "a", service="cost")]
    _write(tmp_path, [*mine, own, asks, read])
    assert {s.span_id for s in newest(read_spans(tmp_path))} == {"a", "b"}


def test_one_span_is_not_told_as_many() -> None:
    """The summary counts as people do."""
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(drawing([span("a")], 100))
    assert "1 span in" in console.export_text()
