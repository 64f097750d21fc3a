"""Traces, metrics and logs of a daemon.

With a collector's address set, traces and metrics go there over OTLP; else spans go to
`<state dir>/traces/<service>.jsonl`, which `tollgate trace` draws. Logs are one JSON line an event
on standard error, with the ids of the trace and the request. A log never has an exception's
message or stack, which may hold what must not leak: it names the exception and the place.
"""

from __future__ import annotations

import json
import logging
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from opentelemetry import context as otel_context
from opentelemetry import metrics, trace
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import (
    BatchSpanProcessor,
    SpanExporter,
    SpanExportResult,
)
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
from opentelemetry.trace import (
    NonRecordingSpan,
    Span,
    SpanContext,
    SpanKind,
    Status,
    StatusCode,
    TraceFlags,
)
from opentelemetry.util.types import AttributeValue

from chassis.call import current_or_none
from chassis.settings import MeshSettings

TRACE_FILE_BYTES_MAX = 32 << 20
_FLUSH_MS = 2_000

_NAME = "tollgate"


# Looking a tracer up costs as much as a span. This one works from `start` on, too.
_tracer = trace.get_tracer(_NAME)


def tracer() -> trace.Tracer:
    """The tracer of this process; does nothing until `start`."""
    return _tracer


def meter() -> metrics.Meter:
    """The meter of this process; does nothing until `start` with a collector."""
    return metrics.get_meter(_NAME)


@contextmanager
def span(
    name: str, *, kind: SpanKind = SpanKind.INTERNAL, **attributes: AttributeValue
) -> Iterator[Span]:
    """A span around the work within; an exception marks it failed, by its type alone."""
    with tracer().start_as_current_span(
        name,
        kind=kind,
        attributes=attributes,
        record_exception=False,
        set_status_on_exception=False,
    ) as current:
        try:
            yield current
        except BaseException as error:
            fail(current, type(error).__name__)
            raise


def fail(span: Span, error_type: str) -> None:
    """Mark a span as failed, by a reason or the name of an exception."""
    span.set_status(Status(StatusCode.ERROR, error_type))
    span.set_attribute("error.type", error_type)


def traceparent(span: Span | None = None) -> str:
    """The W3C trace context of a span, or of the current one; empty where there is none."""
    context = (span or trace.get_current_span()).get_span_context()
    if not context.is_valid:
        return ""
    return f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"


def parse_traceparent(value: str) -> SpanContext | None:
    """The remote span that a traceparent names; None where it names none (W3C trace context)."""
    parts = value.split("-")
    if len(parts) < 4 or [len(p) for p in parts[:4]] != [2, 32, 16, 2] or parts[0] == "ff":
        return None
    try:
        context = SpanContext(
            int(parts[1], 16), int(parts[2], 16), True, TraceFlags(int(parts[3], 16))
        )
    except ValueError:
        return None
    return context if context.is_valid else None


@contextmanager
def remote_parent(value: str) -> Iterator[None]:
    """Let spans within continue the trace of this traceparent, or start one where it is empty."""
    parent = parse_traceparent(value)
    if parent is None:
        yield
        return
    token = otel_context.attach(trace.set_span_in_context(NonRecordingSpan(parent)))
    try:
        yield
    finally:
        otel_context.detach(token)


def start_remote_child(name: str, parent: SpanContext | None, kind: SpanKind) -> Span:
    """A span that continues a remote trace; where that one is not sampled, nothing but its name."""
    if parent is None:
        return _tracer.start_span(name, kind=kind)
    remote = NonRecordingSpan(parent)
    if not parent.trace_flags.sampled:
        return remote
    return _tracer.start_span(name, context=trace.set_span_in_context(remote), kind=kind)


class TraceFile(SpanExporter):
    """Appends finished spans to a file, one JSON object a line; keeps one older file beside it."""

    def __init__(self, path: Path, service: str) -> None:
        self._path, self._service = path, service
        path.parent.mkdir(parents=True, exist_ok=True)

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        try:
            if self._path.exists() and self._path.stat().st_size > TRACE_FILE_BYTES_MAX:
                self._path.replace(self._path.with_suffix(".1.jsonl"))
            with self._path.open("a") as file:
                file.write("".join(self._line(span) for span in spans))
        except OSError:
            return SpanExportResult.FAILURE  # Traces are worth less than the work they describe.
        return SpanExportResult.SUCCESS

    def _line(self, span: ReadableSpan) -> str:
        context = span.get_span_context()
        line = {
            "trace_id": f"{context.trace_id:032x}" if context else "",
            "span_id": f"{context.span_id:016x}" if context else "",
            "parent_id": f"{span.parent.span_id:016x}" if span.parent else "",
            "service": self._service,
            "name": span.name,
            "kind": span.kind.name.lower(),
            "start_ns": span.start_time,
            "end_ns": span.end_time,
            "status": span.status.description if not span.status.is_ok else "",
            "attributes": dict(span.attributes or {}),
        }
        return json.dumps(line, default=str) + "\n"


class JsonLines(logging.Formatter):
    """One JSON object an event."""

    def __init__(self, service: str) -> None:
        super().__init__()
        self._service = service

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S") + f".{int(record.msecs):03d}",
            "level": record.levelname.lower(),
            "service": self._service,
            "logger": record.name,
            "message": record.getMessage(),
        }
        span_context = trace.get_current_span().get_span_context()
        if span_context.is_valid:
            line["trace_id"] = f"{span_context.trace_id:032x}"
        if call := current_or_none():
            line["request_id"] = call.request_id
            line["tenant"] = call.tenant
        line |= getattr(record, "fields", {})
        if record.exc_info and record.exc_info[1] is not None:
            line |= place_of(record.exc_info[1])
        return json.dumps(line, default=str)


def place_of(error: BaseException) -> dict[str, str]:
    """What a log may say of an exception: its type and where it was raised."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
    ours = [f for f in frames if {"chassis", "services", "cli"} & set(Path(f.filename).parts)]
    called = f"{Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else ""
    return {"error": type(error).__name__, "at": place, "from": called}


def start(service: str, mesh: MeshSettings) -> Callable[[], None]:
    """Start telemetry for this process. Returns what flushes and stops it, in bounded time."""
    _start_logs(service, mesh.log_level)
    resource = Resource.create({"service.name": f"tollgate-{service}"})
    provider = TracerProvider(
        resource=resource, sampler=ParentBased(TraceIdRatioBased(mesh.trace_sample_ratio))
    )
    exporter: SpanExporter
    if mesh.otlp_endpoint:
        exporter = _start_otlp(mesh.otlp_endpoint, resource)
    else:
        exporter = TraceFile(mesh.state_dir / "traces" / f"{service}.jsonl", service)
    provider.add_span_processor(BatchSpanProcessor(exporter, schedule_delay_millis=500))
    trace.set_tracer_provider(provider)

    def stop() -> None:
        # With its collector down an exporter would retry for longer than anybody waits.
        provider.force_flush(_FLUSH_MS)
        measured = metrics.get_meter_provider()
        if isinstance(measured, MeterProvider):
            measured.force_flush(_FLUSH_MS)
        if not mesh.otlp_endpoint:
            provider.shutdown()

    return stop


def _start_otlp(endpoint: str, resource: Resource) -> SpanExporter:
    from opentelemetry.exporter.otlp.proto.grpc.metric_exporter import OTLPMetricExporter
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter

    insecure = not endpoint.startswith("https://")
    reader = PeriodicExportingMetricReader(OTLPMetricExporter(endpoint, insecure, timeout=2))
    metrics.set_meter_provider(MeterProvider([reader], resource=resource))
    return OTLPSpanExporter(endpoint, insecure, timeout=2)


def _start_logs(service: str, level: str) -> None:
    out = logging.StreamHandler(sys.stderr)
    out.setFormatter(JsonLines(service))
    logging.basicConfig(level=level, handlers=[out], force=True)
    for noisy in ("httpx", "httpcore", "pgqueuer", "asyncio", "opentelemetry"):
        logging.getLogger(noisy).setLevel(max(logging.WARNING, logging.getLogger().level))
