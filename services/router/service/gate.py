"""A call's way through the gate: meter, choose, hold, forward, settle.

Bytes pass through: a request is decoded once, by its meter, and an answer never. What the gate has
to say of an answer is appended to it (a serialized field after a serialized message is a merge) and
sent in its trailers.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import count
from secrets import token_hex
from typing import Any, Protocol, TypeVar

import grpc
from google.protobuf.message import DecodeError, Message
from opentelemetry.trace import Span, SpanKind, get_current_span
from tollgate.cost.v1 import cost_pb2, usage_pb2
from tollgate.router.v1 import answer_pb2

from chassis import call as calls
from chassis import telemetry
from chassis.call import Call
from chassis.client import MARGIN_S
from chassis.errors import (
    Billed,
    CallReplayed,
    DeadlineExceeded,
    InvalidField,
    NoBackend,
    OutcomeUnknown,
    ProviderUnavailable,
    TollgateError,
    Unavailable,
)
from chassis.identity import sign
from chassis.status import from_rpc_error, not_sent, rebuilt
from chassis.varint import varint
from services.router.core.holds import Ask, Hold, Ledger, Units, expected_nanos_usd, hold_id
from services.router.core.routes import (
    Attempts,
    Backend,
    Choice,
    Modes,
    choose,
    wished,
)
from services.router.service.meters import Bound, Metered, data_bytes, in_range

Context = grpc.aio.ServicerContext[bytes, bytes]
Answer = TypeVar("Answer")
Asked = TypeVar("Asked", bound=Message)

# Tags of the fields 14 (provenance) and 15 (receipt) of every unary answer.
_PROVENANCE_TAG, _RECEIPT_TAG = b"\x72", b"\x7a"

# How much longer than the call itself its hold stays open, so that settling finds it open. A call
# without a deadline has the ledger's default: its worst case would tie a budget up long after its
# caller has gone, and should it last longer, settling corrects what expiry has charged.
_SETTLING_S = 60.0

# How long a backend may take over a question of the gate's own.
_ASK_S = 30.0

# How an attempt can end that speaks against its backend.
_BACKEND_FAULTS = frozenset(
    ("unknown", "provider_unavailable", "outcome_unknown", "internal", "deadline_exceeded")
)


class Pairs(grpc.aio.Metadata):
    """Metadata to send, as it is: gRPC's own class sorts every pair into lists first."""

    def __init__(self, pairs: Sequence[tuple[str, str]]) -> None:
        self._pairs = pairs

    def __len__(self) -> int:
        return len(self._pairs)

    def __iter__(self) -> Iterator[tuple[str, str]]:
        return iter(self._pairs)


class Lines(Protocol):
    """The backends on the wire: one call of raw bytes each, by kind."""

    def unary(self, backend: Backend, operation: str) -> Any:
        """The `grpc.aio` multicallable of one request and one answer."""
        ...

    def streamed(self, backend: Backend, operation: str) -> Any:
        """The multicallable of one request and many answers."""
        ...

    def upload(self, backend: Backend, operation: str) -> Any:
        """The multicallable of many requests and one answer."""
        ...


class ModesNow(Protocol):
    """The modes that hold now."""

    @property
    def current(self) -> Modes: ...


@dataclass(frozen=True, slots=True)
class Rules:
    """The gate's settings. `callers_may_choose` grants everyone any mode and provider."""

    callers_may_choose: bool
    attempts_max: int


class Meters(Protocol):
    """Where the gate counts what it does."""

    def attempted(self, backend: Backend, outcome: str) -> None: ...

    def fell_back(self, service: str) -> None: ...


@dataclass(slots=True)
class Passage:
    """One call while it passes."""

    call: Call
    metered: Metered
    data: bytes
    call_id: str
    ends: float | None
    """By when it must end, on the monotonic clock; None where it may take its own time."""
    traceparent: str
    span: Span | None
    """The span of the call, where it is recorded."""
    hold: Hold | None = None
    state: cost_pb2.HoldState.ValueType = cost_pb2.HOLD_STATE_UNSPECIFIED
    expected_nanos_usd: int = 0
    provenance: bytes = b""
    number: int = 0
    passed_on: bool = False
    """Whether something of an answer, or of an upload, is gone: then nothing is tried again."""

    def time_left_s(self) -> float:
        """How long the call may still take. Raises DeadlineExceeded where that is too little."""
        if self.ends is None:
            return self.metered.meter.timeout_s
        left_s = self.ends - time.monotonic() - MARGIN_S
        if left_s <= 0:
            raise DeadlineExceeded("the deadline passed at the gate", billed=Billed.NO)
        return min(left_s, self.metered.meter.timeout_s)

    def receipt(self) -> bytes:
        """The receipt as it stands, serialized."""
        hold = self.hold
        if hold is None:
            receipt = answer_pb2.Receipt(request_id=self.call.request_id)
        else:
            receipt = answer_pb2.Receipt(
                hold_id=hold.id,
                held_nanos_usd=hold.held_nanos_usd,
                expected_nanos_usd=self.expected_nanos_usd,
                price_version=hold.price_version,
                state=self.state,
                request_id=self.call.request_id,
            )
        return receipt.SerializeToString()


Forward = Callable[["Passage", Backend, Bound, float, Any], Awaitable[tuple[Answer, Any]]]
"""Sends the call to a backend within so many seconds, with this metadata: answer and trailers."""


class Gate:
    """Serves every metered RPC of the services that it fronts."""

    def __init__(
        self,
        backends: Sequence[Backend],
        lines: Lines,
        ledger: Ledger,
        modes: ModesNow,
        rules: Rules,
        meters: Meters,
        secret: bytes,
    ) -> None:
        self._by_service: dict[str, list[Backend]] = {}
        for backend in sorted(backends, key=lambda backend: backend.route.priority):
            self._by_service.setdefault(backend.route.grpc_service, []).append(backend)
        self._lines, self._ledger, self._modes = lines, ledger, modes
        self._rules, self._meters, self._secret = rules, meters, secret
        # Ids of calls that come without one: unguessable, so that no caller can name them.
        self._own_calls, self._numbers = f"{token_hex(16)}-", count()

    # --- the four kinds ------------------------------------------------------------------------

    async def unary(self, metered: Metered, data: bytes, context: Context) -> bytes:
        """One request, one answer, with provenance and receipt appended."""
        passage = self._enter(metered, data)
        try:
            body = await self._pass(passage, self._forward_unary)
        finally:
            receipt = passage.receipt()
            _say(context, passage, receipt)
        return labelled(body, passage.provenance, receipt)

    async def streamed(self, metered: Metered, data: bytes, context: Context) -> None:
        """One request, many answers, each passed on as it comes."""
        passage = self._enter(metered, data)

        async def forward(
            passage: Passage, backend: Backend, bound: Bound, timeout_s: float, metadata: Any
        ) -> tuple[None, Any]:
            line = self._lines.streamed(backend, metered.operation)
            streaming = line(data + bound.appended, timeout=timeout_s, metadata=metadata)
            try:
                async for message in streaming:
                    passage.passed_on = True
                    await context.write(message)
                return None, await streaming.trailing_metadata()
            finally:
                if not streaming.done():
                    streaming.cancel()

        try:
            await self._pass(passage, forward)
        finally:
            _say(context, passage, passage.receipt())

    async def upload(
        self, metered: Metered, requests: AsyncIterator[bytes], context: Context
    ) -> bytes:
        """Many requests, one answer. The first is metered and declares how many bytes follow."""
        first = await anext(aiter(requests), b"")
        passage = self._enter(metered, first)

        async def forward(
            passage: Passage, backend: Backend, bound: Bound, timeout_s: float, metadata: Any
        ) -> tuple[bytes, Any]:
            line = self._lines.upload(backend, metered.operation)
            uploading = line(timeout=timeout_s, metadata=metadata)
            try:
                await self._send(passage, uploading, requests, bound.units.bytes)
                return await uploading, await uploading.trailing_metadata()
            finally:
                if not uploading.done():
                    uploading.cancel()

        try:
            body = await self._pass(passage, forward)
        finally:
            receipt = passage.receipt()
            _say(context, passage, receipt)
        return labelled(body, passage.provenance, receipt)

    async def _send(
        self, passage: Passage, uploading: Any, requests: AsyncIterator[bytes], bytes_max: int
    ) -> None:
        """Relay the upload, and not a byte more than it declared."""
        sent = 0
        try:
            await uploading.write(passage.data)
            async for data in requests:
                passage.passed_on = True
                sent += data_bytes(passage.metered.decode(data))
                if sent > bytes_max:
                    raise InvalidField.of(
                        "header.max_bytes", f"more than the {bytes_max:,} declared came"
                    )
                await uploading.write(data)
            await uploading.done_writing()
        except asyncio.InvalidStateError:
            return  # The backend has answered already: awaiting the call says what.

    async def _forward_unary(
        self, passage: Passage, backend: Backend, bound: Bound, timeout_s: float, metadata: Any
    ) -> tuple[bytes, Any]:
        data = passage.data + bound.appended if bound.appended else passage.data
        line = self._lines.unary(backend, passage.metered.operation)
        answering = line(data, timeout=timeout_s, metadata=metadata)
        return await answering, await answering.trailing_metadata()

    # --- the way -------------------------------------------------------------------------------

    def _enter(self, metered: Metered, data: bytes) -> Passage:
        call = calls.current()
        span = get_current_span()
        left_s = calls.time_left_s()
        return Passage(
            call=call,
            metered=metered,
            data=data,
            call_id=call.call_id or f"{self._own_calls}{next(self._numbers)}",
            ends=None if left_s is None else time.monotonic() + left_s,
            traceparent=telemetry.traceparent(),
            span=span if span.is_recording() else None,
        )

    async def _pass(self, passage: Passage, forward: Forward[Answer]) -> Answer:
        """Attempt the call until it is answered, or until nobody is left to ask."""
        metered = passage.metered
        request = metered.decode(passage.data)
        choice = self._choose(passage, request)
        attempts = Attempts(choice, self._rules.attempts_max)
        failure: TollgateError = NoBackend("no backend can serve this call now")
        while backend := attempts.next():
            try:
                bound = await metered.meter.bound(request, backend, self._ask)
            except Unavailable as error:
                failure = error
                attempts.failed(backend)
                continue
            hold = await self._hold(passage, backend, bound, attempts)
            if hold is None:
                continue
            try:
                return await self._attempt(passage, backend, bound, attempts, forward)
            except Unavailable as error:
                if passage.passed_on:
                    raise
                failure = error
                attempts.failed(backend)
        raise failure

    def _choose(self, passage: Passage, request: Message) -> Choice:
        """The backends to try, in order."""
        metered, call = passage.metered, passage.call
        may_choose = call.internal or self._rules.callers_may_choose
        wish = wished(
            metered.service,
            self._modes.current,
            mode=call.mode,
            provider=call.provider,
            may_choose=may_choose,
        )
        return choose(
            self._by_service.get(metered.grpc_service, ()),
            wish,
            metered.meter.need(request),
            may_choose=may_choose,
            now=time.monotonic(),
        )

    async def _hold(
        self, passage: Passage, backend: Backend, bound: Bound, attempts: Attempts
    ) -> Hold | None:
        """A fresh hold for the attempt; None where an earlier call has made it in vain.

        Raises CallReplayed where the attempt was forwarded before, and what the ledger raises.
        """
        if not in_range(bound.units):
            raise InvalidField.of("request", "asks for more than can be counted")
        call, left_s = passage.call, passage.time_left_s()
        ask = Ask(
            hold_id=hold_id(call.tenant, passage.call_id, backend.provider, attempts.number),
            tenant=call.tenant,
            project=call.project,
            service=backend.route.service,
            provider=backend.provider,
            model=bound.model,
            simulated=backend.simulated,
            operation=passage.metered.operation,
            bound=bound.units,
            ttl_s=left_s + _SETTLING_S if passage.ends is not None else None,
            request_id=call.request_id,
            traceparent=telemetry.traceparent() if passage.span else passage.traceparent,
            timeout_s=left_s if passage.ends is not None else None,
        )
        with telemetry.span("authorize") if passage.span else nullcontext():
            hold = await self._ledger.authorize(ask)
        if not hold.replayed:
            passage.hold, passage.state = hold, cost_pb2.HOLD_STATE_HELD
            return hold
        if hold.state == "RELEASED" and attempts.skipped():
            return None
        passage.hold = hold
        passage.state = cost_pb2.HoldState.Value(f"HOLD_STATE_{hold.state}")
        raise CallReplayed(
            "this call id was forwarded before", metadata={"hold_id": hold.id, "state": hold.state}
        )

    async def _attempt(
        self,
        passage: Passage,
        backend: Backend,
        bound: Bound,
        attempts: Attempts,
        forward: Forward[Answer],
    ) -> Answer:
        """Forward the call under its hold, and settle or release it by what comes back."""
        hold = passage.hold
        assert hold is not None
        passage.provenance = _provenance(backend, attempts).SerializeToString()
        started = time.perf_counter()
        backend.began()
        outcome = "unknown"
        try:
            with self._forwarding(passage, backend):
                metadata = self._metadata(passage, backend, hold.id)
                answer, trailers = await forward(
                    passage, backend, bound, passage.time_left_s(), metadata
                )
            usage = self._measure(passage, backend, trailers)
            outcome = "ok"
        except grpc.aio.AioRpcError as error:
            if not_sent(error):
                backend.rest(time.monotonic())
            failure = from_rpc_error(error)
            outcome = failure.reason.lower()
            raise self._failed(passage, hold, bound, failure) from None
        except TollgateError as error:
            outcome = error.reason.lower()
            raise self._failed(passage, hold, bound, error) from None
        except asyncio.CancelledError:
            outcome = "cancelled"
            self._left(hold, bound)
            raise
        finally:
            backend.ended(time.perf_counter() - started, failed=outcome in _BACKEND_FAULTS)
            self._meters.attempted(backend, outcome)
        self._ledger.settle(hold, usage)
        passage.expected_nanos_usd = expected_nanos_usd(usage, hold.prices)
        if attempts.fell_back_from:
            self._meters.fell_back(backend.route.service)
        if passage.span:
            _describe(passage.span, passage, backend, hold, attempts)
        return answer

    def _failed(
        self, passage: Passage, hold: Hold, bound: Bound, error: TollgateError
    ) -> TollgateError:
        """What to tell the caller of a failed attempt, once its hold is seen to."""
        if error.billed is Billed.NO:
            self._ledger.release(hold)
            passage.state = cost_pb2.HOLD_STATE_RELEASED
            return error
        metadata = error.metadata | {"hold_id": hold.id}
        if isinstance(error, DeadlineExceeded):
            self._left(hold, bound)
            return rebuilt(DeadlineExceeded, error.message, [], None, metadata, Billed.UNKNOWN)
        # The hold is left to expire, which charges it: nobody knows what the backend did.
        passage.expected_nanos_usd = hold.held_nanos_usd
        return OutcomeUnknown("the backend may have done the work", metadata=metadata)

    def _left(self, hold: Hold, bound: Bound) -> None:
        """Nobody waits for the answer any more. What was free at worst needs no confirmation."""
        if not hold.held_nanos_usd:
            self._ledger.settle(hold, bound.units)

    def _measure(self, passage: Passage, backend: Backend, trailers: Iterable[Any]) -> Units:
        """What the backend says that it used. An answer that does not say is garbage."""
        usage: bytes | None = None
        provenance: bytes | None = None
        for key, value in trailers:
            if key == calls.USAGE:
                usage = value
            elif key == calls.PROVENANCE:
                provenance = value
        if usage is None or provenance is None:
            raise OutcomeUnknown("the answer does not say what was used")
        try:
            used = usage_pb2.Usage.FromString(usage)
            origin = answer_pb2.Provenance.FromString(provenance)
        except DecodeError:
            raise OutcomeUnknown("the answer does not say what was used") from None
        units = Units(used.tokens, used.pages, used.bytes, used.requests)
        if origin.provider not in ("", backend.provider) or not in_range(units):
            raise OutcomeUnknown("the answer is not what was asked for")
        # What the gate knows comes last, so that it wins: a merge of serialized messages. False is
        # not written down, so an answer that either of them calls simulated is.
        passage.provenance = origin.SerializeToString() + passage.provenance
        return units

    # --- words to a backend --------------------------------------------------------------------

    def _metadata(self, passage: Passage, backend: Backend, hold: str) -> Pairs:
        call = passage.call
        signed = Call(call.tenant, call.project, call.request_id, hold_id=hold)
        traceparent = telemetry.traceparent() if passage.span else passage.traceparent
        return Pairs(
            (
                (calls.IDENTITY, sign(signed, self._secret)),
                (calls.PROVIDER, backend.provider),
                (calls.TRACEPARENT, traceparent),
            )
        )

    async def _ask(
        self, backend: Backend, method: str, request: Message, answer: type[Asked]
    ) -> Asked:
        """Ask a backend itself, free. Raises what it raises, as certainly not billed."""
        call = calls.current()
        left_s = calls.time_left_s()
        line = self._lines.unary(backend, f"{backend.route.grpc_service}/{method}")
        identity = sign(Call(call.tenant, call.project, call.request_id), self._secret)
        metadata = Pairs(
            (
                (calls.IDENTITY, identity),
                (calls.PROVIDER, backend.provider),
                (calls.TRACEPARENT, telemetry.traceparent()),
            )
        )
        timeout_s = _ASK_S if left_s is None else min(_ASK_S, max(left_s - MARGIN_S, 0.0))
        try:
            body = await line(request.SerializeToString(), timeout=timeout_s, metadata=metadata)
        except grpc.aio.AioRpcError as error:
            if not_sent(error):
                backend.rest(time.monotonic())
            raise _unbilled(from_rpc_error(error)) from None
        return answer.FromString(body)

    def _forwarding(self, passage: Passage, backend: Backend) -> Any:
        if passage.span is None:
            return nullcontext()
        operation = passage.metered.operation
        return telemetry.span(
            operation,
            kind=SpanKind.CLIENT,
            **{
                "rpc.system.name": "grpc",
                "rpc.method": operation,
                "server.address": backend.route.address,
                "tollgate.backend": backend.provider,
            },
        )


def labelled(body: bytes, provenance: bytes, receipt: bytes) -> bytes:
    """A serialized answer with its fields 14 and 15 set, without decoding it."""
    return b"".join(
        (
            body,
            _PROVENANCE_TAG,
            varint(len(provenance)),
            provenance,
            _RECEIPT_TAG,
            varint(len(receipt)),
            receipt,
        )
    )


def handlers(gate: Gate, table: Iterable[Metered]) -> list[grpc.GenericRpcHandler]:
    """The gate's RPCs as gRPC takes them, by service. Bidirectional ones are not served."""
    by_service: dict[str, dict[str, grpc.RpcMethodHandler[bytes, bytes]]] = {}
    for metered in table:
        if not (metered.client_streaming and metered.server_streaming):
            by_service.setdefault(metered.grpc_service, {})[metered.name] = _handler(gate, metered)
    return [
        grpc.method_handlers_generic_handler(service, of_service)
        for service, of_service in by_service.items()
    ]


def _handler(gate: Gate, metered: Metered) -> grpc.RpcMethodHandler[bytes, bytes]:
    # Without (de)serializers gRPC hands over bytes, and takes them.
    handler: grpc.RpcMethodHandler[bytes, bytes]
    if metered.client_streaming:
        handler = grpc.stream_unary_rpc_method_handler(partial(gate.upload, metered))
    elif metered.server_streaming:
        handler = grpc.unary_stream_rpc_method_handler(partial(gate.streamed, metered))
    else:
        handler = grpc.unary_unary_rpc_method_handler(partial(gate.unary, metered))
    return handler


def _say(context: Context, passage: Passage, receipt: bytes) -> None:
    """Send receipt and provenance in the trailers, of errors too."""
    context.set_trailing_metadata(
        ((calls.RECEIPT, receipt), (calls.PROVENANCE, passage.provenance))
    )


def _provenance(backend: Backend, attempts: Attempts) -> answer_pb2.Provenance:
    """What the gate itself knows of where an answer comes from."""
    return answer_pb2.Provenance(
        provider=backend.provider,
        simulated=backend.simulated,
        attempt=attempts.number,
        fell_back_from=attempts.fell_back_from,
    )


def _describe(
    span: Span, passage: Passage, backend: Backend, hold: Hold, attempts: Attempts
) -> None:
    span.set_attributes(
        {
            "tollgate.backend": backend.provider,
            "tollgate.simulated": backend.simulated,
            "tollgate.attempt": attempts.number,
            "tollgate.hold_id": hold.id,
            "tollgate.held_nanos_usd": hold.held_nanos_usd,
            "tollgate.expected_nanos_usd": passage.expected_nanos_usd,
        }
    )


def _unbilled(error: TollgateError) -> TollgateError:
    """The same of a question that was free."""
    if isinstance(error, OutcomeUnknown):
        return ProviderUnavailable("the backend was lost while it looked at the call")
    error.billed = Billed.NO
    return error
