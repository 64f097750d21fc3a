"""What happens around every call that a daemon serves: `LAYERS`, the outermost first.

A layer is `async (serving, proceed) -> answer`. One gRPC interceptor runs them all, since each one
that gRPC itself chains costs as much as a layer's whole work.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import time
from collections.abc import Awaitable, Callable
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import grpc
from opentelemetry.trace import SpanKind, get_current_span, use_span

from chassis import call as calls
from chassis import telemetry
from chassis.call import Call
from chassis.errors import DeadlineExceeded, Internal, Overloaded, TollgateError
from chassis.identity import verify
from chassis.status import to_grpc

log = logging.getLogger(__name__)

LINGER_S = 0.5
GONE_S = 0.02
LINGER_MESSAGES_MAX = 64

Metadata = dict[str, str | bytes]
Context = grpc.aio.ServicerContext[Any, Any]
Proceed = Callable[[], Awaitable[Any]]
Authenticate = Callable[[Metadata], Call]
Refused = Callable[[Metadata], tuple[tuple[str, str | bytes], ...]]


@dataclass(slots=True)
class Serving:
    """A call while it is served."""

    method: str
    context: Context
    metadata: Metadata
    guard: Guard


@dataclass(slots=True)
class Guard:
    """What the layers of one daemon share."""

    authenticate: Authenticate
    calls_max: int
    refused: Refused | None = None
    """What else goes out with an error that the handler had no part in."""
    in_flight: int = 0
    seconds: Any = field(
        default_factory=lambda: telemetry.meter().create_histogram(
            "rpc.server.call.duration", unit="s", description="How long calls took."
        )
    )


Layer = Callable[[Serving, Proceed], Awaitable[Any]]


async def tracing(serving: Serving, proceed: Proceed) -> Any:
    """A server span named by the method, continuing the caller's trace, and its duration."""
    parent = telemetry.parse_traceparent(str(serving.metadata.get(calls.TRACEPARENT, "")))
    span = telemetry.start_remote_child(serving.method, parent, SpanKind.SERVER)
    if span.is_recording():
        span.set_attributes({"rpc.system.name": "grpc", "rpc.method": serving.method})
    started, outcome = time.perf_counter(), "OK"
    with use_span(span, end_on_exit=True, record_exception=False, set_status_on_exception=False):
        try:
            return await proceed()
        except TollgateError as error:
            outcome = error.code
            telemetry.fail(span, error.reason)
            raise
        except asyncio.CancelledError:
            outcome = "CANCELLED"
            telemetry.fail(span, outcome)
            raise
        finally:
            span.set_attribute("rpc.response.status_code", outcome)
            serving.guard.seconds.record(
                time.perf_counter() - started,
                {"rpc.method": serving.method, "rpc.response.status_code": outcome},
            )


async def errors(serving: Serving, proceed: Proceed) -> Any:
    """One family of errors goes out; what is unexpected is logged here and says nothing."""
    try:
        return await proceed()
    except (TollgateError, asyncio.CancelledError, grpc.aio.AbortError):
        raise
    except Exception:
        log.exception("call failed unexpectedly", extra={"fields": {"method": serving.method}})
        raise Internal() from None


async def overload(serving: Serving, proceed: Proceed) -> Any:
    """Refuse early and with a reason, rather than queue without limit."""
    guard = serving.guard
    if guard.in_flight >= guard.calls_max:
        raise Overloaded("too many calls are under way")
    guard.in_flight += 1
    try:
        return await proceed()
    finally:
        guard.in_flight -= 1


async def identity(serving: Serving, proceed: Proceed) -> Any:
    """Establish the tenant and the request id."""
    call = serving.guard.authenticate(serving.metadata)
    calls.enter(call)
    span = get_current_span()
    if span.is_recording():
        span.set_attribute("tollgate.tenant", call.tenant)
        span.set_attribute("tollgate.request_id", call.request_id)
    return await proceed()


async def deadline(serving: Serving, proceed: Proceed) -> Any:
    """Remember the caller's deadline, for the calls made on its behalf."""
    left_s = serving.context.time_remaining()
    if left_s is not None:
        if left_s <= 0:
            raise DeadlineExceeded("the deadline passed before the call was served")
        calls.set_time_left(left_s)
    return await proceed()


LAYERS: tuple[Layer, ...] = (tracing, errors, overload, identity, deadline)


def mesh_identity(secret: bytes) -> Authenticate:
    """The authentication of daemons behind the router: the signed identity, and nothing else."""

    def authenticate(metadata: Metadata) -> Call:
        call = verify(str(metadata.get(calls.IDENTITY, "")), secret)
        return Call(
            tenant=call.tenant,
            project=call.project,
            request_id=call.request_id,
            call_id=str(metadata.get(calls.CALL_ID, "")),
            hold_id=call.hold_id,
            mode=str(metadata.get(calls.MODE, "")),
            provider=str(metadata.get(calls.PROVIDER, "")),
            internal=True,
            operator=True,
        )

    return authenticate


class Interceptor(grpc.aio.ServerInterceptor):
    """Runs the layers around every call but those of gRPC's own services."""

    def __init__(self, guard: Guard) -> None:
        self._guard = guard
        self._wrapped: dict[str, grpc.RpcMethodHandler[Any, Any]] = {}

    async def intercept_service(
        self,
        continuation: Callable[
            [grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]
        ],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        method = handler_call_details.method
        wrapped = self._wrapped.get(method)
        if wrapped is None:
            handler = await continuation(handler_call_details)
            if handler is None or method.startswith("/grpc."):
                return handler
            wrapped = self._wrapped[method] = self._wrap(method.lstrip("/"), handler)
        return wrapped

    def _wrap(
        self, method: str, handler: grpc.RpcMethodHandler[Any, Any]
    ) -> grpc.RpcMethodHandler[Any, Any]:
        kind = (
            f"{'stream' if handler.request_streaming else 'unary'}_"
            f"{'stream' if handler.response_streaming else 'unary'}"
        )
        make = getattr(grpc, f"{kind}_rpc_method_handler")
        behaviour = getattr(handler, kind)
        if handler.response_streaming and inspect.isasyncgenfunction(behaviour):
            behaviour = partial(_write_all, behaviour)

        async def serve(request: Any, context: Context) -> Any:
            metadata: Metadata = dict(context.invocation_metadata() or ())
            serving = Serving(method, context, metadata, self._guard)
            if handler.request_streaming:
                request = _received(request)
            try:
                return await _descend(serving, lambda: behaviour(request, context), 0)
            except TollgateError as error:
                if handler.request_streaming:
                    await _linger(context)
                status = to_grpc(error)
                # What the call has set already, its receipt for one, goes out with the error.
                said = tuple(context.trailing_metadata())
                if not said and self._guard.refused is not None:
                    said = self._guard.refused(metadata)
                trailers = tuple(status.trailing_metadata) + said
                await context.abort(status.code, status.details, trailers)

        handled: grpc.RpcMethodHandler[Any, Any] = make(
            serve, handler.request_deserializer, handler.response_serializer
        )
        return handled


def _descend(serving: Serving, proceed: Proceed, depth: int) -> Awaitable[Any]:
    if depth == len(LAYERS):
        return proceed()
    return LAYERS[depth](serving, lambda: _descend(serving, proceed, depth + 1))


async def _received(requests: Any) -> Any:
    """The messages of a caller that has ended, and not of one that has gone away.

    gRPC tells the end of both in the same way, and the cancellation of the second a moment later:
    half an upload must not pass for a whole one.
    """
    async for message in requests:
        yield message
    await asyncio.sleep(GONE_S)


async def _linger(context: Context) -> None:
    """Read on for a moment after an upload was refused, so that its sender can read why.

    A sender whose write meets a closed stream may see that instead of the status: in gRPC's own
    Python client the write wins, and the reason is lost.
    """
    with suppress(Exception):
        async with asyncio.timeout(LINGER_S):
            for _ in range(LINGER_MESSAGES_MAX):
                if await context.read() is grpc.aio.EOF:
                    return


async def _write_all(behaviour: Any, request: Any, context: Context) -> None:
    async with aclosing(behaviour(request, context)) as messages:
        async for message in messages:
            await context.write(message)
