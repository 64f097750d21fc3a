"""Logs and traces say what happened and nothing that must not leak; work survives its caller."""

from __future__ import annotations

import asyncio
import io
import json
import logging
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor

from chassis import errors, tasks, telemetry
from chassis.call import Call, calling, current, set_time_left, time_left_s
from chassis.retry import retrying

SECRET = "postgresql://user:sesame@host/database"


def test_a_log_names_the_exception_and_the_place_and_not_its_text() -> None:
    """One JSON line with the request's ids; of an exception its type and where it was raised."""
    out = io.StringIO()
    log = logging.Logger("test")
    sink = logging.StreamHandler(out)
    sink.setFormatter(telemetry.JsonLines("embedder"))
    log.addHandler(sink)
    with calling(Call(tenant="acme", request_id="r-1")):
        try:
            raise ConnectionError(SECRET)
        except ConnectionError:
            log.exception("the database went", extra={"fields": {"table": "holds"}})
    line = json.loads(out.getvalue())
    assert line["message"] == "the database went"
    assert (line["error"], line["tenant"], line["request_id"]) == ("ConnectionError", "acme", "r-1")
    assert (line["table"], line["service"]) == ("holds", "embedder")
    assert line["at"].startswith("test_telemetry.py:")
    assert "sesame" not in out.getvalue()


def test_spans_go_to_a_file_without_an_exceptions_text(tmp_path: Path) -> None:
    """A finished span is a line; a failed one has the exception's type alone."""
    path = tmp_path / "traces" / "corpus.jsonl"
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(telemetry.TraceFile(path, "corpus")))
    span = provider.get_tracer("test").start_span("stage")
    telemetry.fail(span, "ConnectionError")
    span.end()
    (line,) = map(json.loads, path.read_text().splitlines())
    assert (line["name"], line["service"], line["status"]) == ("stage", "corpus", "ConnectionError")
    assert line["start_ns"] <= line["end_ns"]


@given(st.text(max_size=80))
def test_any_traceparent_is_read_or_left(value: str) -> None:
    """What is no W3C trace context is no parent, and never an error."""
    parsed = telemetry.parse_traceparent(value)
    assert parsed is None or parsed.is_valid


def test_a_traceparent_is_what_it_says() -> None:
    """A real one gives its ids and whether it is sampled."""
    parsed = telemetry.parse_traceparent(f"00-{'ab' * 16}-{'cd' * 8}-01")
    assert parsed is not None
    assert (parsed.trace_id, parsed.span_id) == (int("ab" * 16, 16), int("cd" * 8, 16))
    assert parsed.trace_flags.sampled


async def test_finish_survives_its_caller_and_its_deadline() -> None:
    """Work that must not be lost goes on when the caller is cancelled, for the same tenant."""
    done: list[tuple[str, float | None]] = []

    async def settle() -> None:
        await asyncio.sleep(0.05)
        done.append((current().tenant, time_left_s()))

    async def caller() -> None:
        set_time_left(0.01)
        with calling(Call(tenant="acme")):
            await asyncio.shield(tasks.finish(settle()))

    task = asyncio.create_task(caller())
    await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await tasks.drain(5) == 0
    assert done == [("acme", None)]


async def test_drain_says_what_it_leaves() -> None:
    """Work that does not end in time is counted, not waited for."""
    endless = tasks.finish(asyncio.sleep(30))
    assert await tasks.drain(0.01) == 1
    endless.cancel()


async def test_retrying_repeats_what_may_be_repeated_and_nothing_else() -> None:
    """UNAVAILABLE is tried again, as often as was said; another error is raised at once."""
    tried: list[type[Exception]] = []

    async def fail(error: Exception) -> None:
        async for attempt in retrying(3):
            with attempt:
                tried.append(type(error))
                raise error

    with pytest.raises(errors.Overloaded):
        await fail(errors.Overloaded("busy", retry_after_s=0.0))
    with pytest.raises(errors.OutcomeUnknown):
        await fail(errors.OutcomeUnknown("gone"))
    assert tried == [errors.Overloaded] * 3 + [errors.OutcomeUnknown]
