"""A peer on the wire: identity, trace and deadline go in, typed errors come out."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

import grpc
from opentelemetry.trace import Span, SpanKind

from chassis import call as calls
from chassis import telemetry
from chassis.errors import DeadlineExceeded, TollgateError
from chassis.identity import sign
from chassis.settings import MeshSettings
from chassis.status import from_rpc_error

Q = TypeVar("Q")
R = TypeVar("R")

# What a hop keeps for itself of the time that its caller gave.
MARGIN_S = 0.02


def channel(address: str, mesh: MeshSettings) -> grpc.aio.Channel:
    """A channel with the manners of the platform: keepalive, quick reconnection, large messages."""
    return grpc.aio.insecure_channel(
        address,
        options=[
            ("grpc.keepalive_time_ms", int(mesh.keepalive_s * 1000)),
            ("grpc.keepalive_timeout_ms", 10_000),
            ("grpc.http2.max_pings_without_data", 0),
            ("grpc.initial_reconnect_backoff_ms", 100),
            ("grpc.max_reconnect_backoff_ms", 2_000),
            ("grpc.max_receive_message_length", mesh.message_bytes_max),
            ("grpc.max_send_message_length", mesh.message_bytes_max),
            # Each peer has connections of its own, so that one's trouble stays its own.
            ("grpc.use_local_subchannel_pool", 1),
        ],
    )


class Peer:
    """One daemon as seen from another. Calls are made on behalf of `call.current()`."""

    def __init__(self, address: str, mesh: MeshSettings) -> None:
        self.address = address
        self.channel = channel(address, mesh)
        self._secret = mesh.secret

    async def unary(
        self,
        method: grpc.aio.UnaryUnaryMultiCallable[Q, R],
        request: Q,
        *,
        timeout_s: float,
        call_id: str = "",
        mode: str = "",
        provider: str = "",
    ) -> R:
        """One request, one answer. Raises the TollgateError that the peer meant."""
        with self._client_span(method) as span:
            metadata = self.metadata(span, call_id, mode, provider)
            try:
                return await method(request, timeout=shrunk(timeout_s), metadata=metadata)
            except grpc.aio.AioRpcError as error:
                raise from_rpc_error(error) from None

    async def upload(
        self,
        method: grpc.aio.StreamUnaryMultiCallable[Q, R],
        requests: AsyncIterator[Q],
        *,
        timeout_s: float,
        call_id: str = "",
        mode: str = "",
        provider: str = "",
    ) -> R:
        """Many requests, one answer. Raises the TollgateError that the peer meant."""
        with self._client_span(method) as span:
            metadata = self.metadata(span, call_id, mode, provider)
            try:
                return await method(requests, timeout=shrunk(timeout_s), metadata=metadata)
            except grpc.aio.AioRpcError as error:
                raise from_rpc_error(error) from None

    def stream(
        self,
        method: grpc.aio.UnaryStreamMultiCallable[Q, R],
        request: Q,
        *,
        timeout_s: float,
        call_id: str = "",
        mode: str = "",
        provider: str = "",
    ) -> Stream[R]:
        """One request, many answers, as an iterator that raises the TollgateError meant."""
        return Stream(self, method, request, timeout_s, (call_id, mode, provider))

    async def close(self) -> None:
        """Close the connection; calls under way end."""
        await self.channel.close()

    @contextmanager
    def _client_span(self, method: Any) -> Iterator[Span]:
        span = self.start_span(method)
        try:
            yield span
        except TollgateError as error:
            telemetry.fail(span, error.reason)
            raise
        finally:
            span.end()

    def start_span(self, method: Any) -> Span:
        """The client span of a call, which its maker ends."""
        # The stub knows its method's name; gRPC has no public word for it.
        name = method._method
        name = (name.decode() if isinstance(name, bytes) else name).lstrip("/")
        return telemetry.tracer().start_span(
            name,
            kind=SpanKind.CLIENT,
            attributes={
                "rpc.system.name": "grpc",
                "rpc.method": name,
                "server.address": self.address,
            },
        )

    def metadata(
        self, span: Span, call_id: str, mode: str, provider: str
    ) -> tuple[tuple[str, str], ...]:
        """What goes with a call: who it is for, the trace, and what was chosen for it."""
        pairs = (
            (calls.IDENTITY, sign(calls.current(), self._secret)),
            (calls.TRACEPARENT, telemetry.traceparent(span)),
            (calls.CALL_ID, call_id),
            (calls.MODE, mode),
            (calls.PROVIDER, provider),
        )
        return tuple(pair for pair in pairs if pair[1])


class Stream(Generic[R]):
    """The answers of a peer, once. `trailers` are there when it has ended, well or not."""

    def __init__(
        self,
        peer: Peer,
        method: grpc.aio.UnaryStreamMultiCallable[Any, R],
        request: Any,
        timeout_s: float,
        chosen: tuple[str, str, str],
    ) -> None:
        self.trailers: Mapping[str, str | bytes] = {}
        self._peer, self._method, self._request = peer, method, request
        self._timeout_s, self._chosen = timeout_s, chosen

    async def __aiter__(self) -> AsyncIterator[R]:
        # The span is not made the current one: between two answers the consumer's is.
        span = self._peer.start_span(self._method)
        streamed = self._method(
            self._request,
            timeout=shrunk(self._timeout_s),
            metadata=self._peer.metadata(span, *self._chosen),
        )
        try:
            async for message in streamed:
                yield message
            self.trailers = dict(await streamed.trailing_metadata() or ())
        except grpc.aio.AioRpcError as error:
            self.trailers = dict(error.trailing_metadata() or ())
            meant = from_rpc_error(error)
            telemetry.fail(span, meant.reason)
            raise meant from None
        finally:
            streamed.cancel()  # Where the consumer left early; nothing once it has ended.
            span.end()


def shrunk(timeout_s: float) -> float:
    """A timeout that ends before the deadline of the call being served.

    Raises DeadlineExceeded where too little is left to begin with.
    """
    left_s = calls.time_left_s()
    if left_s is None:
        return timeout_s
    if left_s <= MARGIN_S:
        raise DeadlineExceeded("too little time is left to ask a peer")
    return min(timeout_s, left_s - MARGIN_S)
