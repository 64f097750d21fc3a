"""The gate's peers on the wire: the ledger, and the backends with their health and models."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from secrets import token_hex
from typing import Any

import grpc
from google.protobuf.duration_pb2 import Duration
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tollgate.cost.v1 import cost_pb2 as pb
from tollgate.cost.v1 import cost_pb2_grpc, limit_pb2, price_pb2, usage_pb2
from tollgate.embedder.v1 import embedder_pb2, embedder_pb2_grpc

from chassis import telemetry
from chassis.batching import Batcher
from chassis.call import Call, calling
from chassis.client import Peer
from chassis.errors import (
    BY_REASON,
    Billed,
    IdReused,
    Internal,
    LedgerUnavailable,
    Overloaded,
    PriceUnknown,
    ProviderUnavailable,
    TollgateError,
    Unavailable,
    Violation,
)
from chassis.retry import retrying
from chassis.settings import MeshSettings
from chassis.status import rebuilt
from services.router.core.holds import Ask, Hold, PriceLine, Refusal, Units, refused
from services.router.core.routes import Backend, Health, Model

log = logging.getLogger(__name__)

# The router asks on its own behalf; the tenant that spends is in what it asks.
_ROUTER = Call(tenant="tollgate", request_id="router")

# A batch belongs to no trace: each of its items names its own.
_NO_TRACE = f"00-{token_hex(16)}-{token_hex(8)}-00"

# A breath between two batches makes them fewer and larger. A call alone never waits for it: it
# takes longer than that to be forwarded. Settling is on nobody's path.
_AUTHORIZE_BREATH_S = 0.002
_SETTLE_BREATH_S = 0.02

_BATCH_MAX = 500
_LEDGER_TIMEOUT_S = 10.0


# --- the ledger ------------------------------------------------------------------------------


@dataclass(slots=True, eq=False)
class _Asking:
    ask: Ask
    gone: bool = False
    """Whether the asker was cancelled while the ledger was deciding."""


@dataclass(frozen=True, slots=True)
class _Ending:
    """What becomes of a hold: settled with its usage, or released."""

    hold_id: str
    tenant: str
    traceparent: str
    usage: Units | None


class LedgerPeer:
    """The cost daemon. Concurrent authorizations travel together, and so do settlements."""

    def __init__(
        self, address: str, mesh: MeshSettings, *, waiting_max: int, settle_for_s: float
    ) -> None:
        self._peer = Peer(address, mesh)
        self._stub = cost_pb2_grpc.CostServiceStub(self._peer.channel)
        self._settle_for_s = settle_for_s
        sizes = telemetry.meter().create_histogram(
            "tollgate.router.ledger_batch_size", unit="{item}", description="Items of a batch."
        )
        self._lost = telemetry.meter().create_counter(
            "tollgate.router.endings_lost",
            unit="{hold}",
            description="Holds whose settlement or release was given up; they expire, charged.",
        )
        with calling(_ROUTER), telemetry.remote_parent(_NO_TRACE):
            self._asking: Batcher[_Asking, Hold] = Batcher(
                self._authorize,
                items_max=_BATCH_MAX,
                waiting_max=waiting_max,
                breath_s=_AUTHORIZE_BREATH_S,
                on_batch=lambda size: sizes.record(size, {"tollgate.batch": "authorize"}),
            )
            self._ending: Batcher[_Ending, None] = Batcher(
                self._end,
                items_max=_BATCH_MAX,
                waiting_max=100 * waiting_max,
                breath_s=_SETTLE_BREATH_S,
                on_batch=lambda size: sizes.record(size, {"tollgate.batch": "settle"}),
            )

    async def authorize(self, ask: Ask) -> Hold:
        """A hold for the call; see `core.holds.Ledger`."""
        asking = _Asking(ask)
        decision = self._asking.submit(asking)
        try:
            return await decision
        except asyncio.CancelledError:
            asking.gone = True
            if decision.done() and not decision.cancelled() and decision.exception() is None:
                self.release(decision.result())
            raise

    def settle(self, hold: Hold, usage: Units) -> None:
        """Charge what was used, soon."""
        self._end_soon(_Ending(hold.id, hold.tenant, hold.traceparent, usage))

    def release(self, hold: Hold) -> None:
        """Give the hold back, soon."""
        self._end_soon(_Ending(hold.id, hold.tenant, hold.traceparent, None))

    async def close(self, timeout_s: float) -> None:
        """Send what is pending, for so long at the most, then disconnect."""
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._asking.close()
                await self._ending.close()
        await self._peer.close()

    def _end_soon(self, ending: _Ending) -> None:
        try:
            self._ending.submit(ending)
        except Overloaded:
            self._give_up([ending])

    def _give_up(self, endings: Sequence[_Ending]) -> None:
        log.error(
            "settlements were given up: their holds expire, charged",
            extra={"fields": {"holds": len(endings), "first": endings[0].hold_id}},
        )
        self._lost.add(len(endings))

    async def _authorize(self, batch: list[_Asking]) -> Sequence[Hold | Exception]:
        request = pb.BatchAuthorizeRequest(items=[_item(asking.ask) for asking in batch])
        try:
            answer = await self._peer.unary(
                self._stub.BatchAuthorize, request, timeout_s=_LEDGER_TIMEOUT_S
            )
        except TollgateError as error:
            if not isinstance(error, ProviderUnavailable):
                # It may have decided all the same; nothing will be spent on these holds.
                for asking in batch:
                    self._end_soon(_release_of(asking.ask))
            raise LedgerUnavailable("the ledger cannot be asked now") from None
        now = datetime.now(UTC)
        decided = [
            _decided(asking.ask, result, now)
            for asking, result in zip(batch, answer.results, strict=True)
        ]
        for asking, outcome in zip(batch, decided, strict=True):
            if asking.gone and isinstance(outcome, Hold) and not outcome.replayed:
                self.release(outcome)
        return decided

    async def _end(self, batch: list[_Ending]) -> Sequence[None]:
        """Settle and release, again and again until the ledger has answered for every one."""
        left = batch
        try:
            async for attempt in retrying(1_000, for_s=self._settle_for_s):
                with attempt:
                    left = await self._ended(left)
                    if left:
                        raise LedgerUnavailable("some holds could not be settled yet")
        except TollgateError:
            self._give_up(left)
        return [None] * len(batch)

    async def _ended(self, batch: list[_Ending]) -> list[_Ending]:
        """Send a batch; answers those that must be sent again."""
        request = pb.BatchSettleRequest(items=[_settle_item(ending) for ending in batch])
        try:
            answer = await self._peer.unary(
                self._stub.BatchSettle, request, timeout_s=_LEDGER_TIMEOUT_S
            )
        except TollgateError as error:
            # Settling is idempotent: what may have happened may happen again.
            raise LedgerUnavailable("the ledger cannot be asked now") from error
        again: list[_Ending] = []
        for ending, result in zip(batch, answer.results, strict=True):
            if result.WhichOneof("outcome") != "error":
                continue
            reason = result.error.reason
            if issubclass(BY_REASON.get(reason, Internal), Unavailable):
                again.append(ending)
            elif ending.usage is not None or reason != "NOT_FOUND":
                log.error(
                    "the ledger refused a settlement",
                    extra={"fields": {"hold_id": ending.hold_id, "reason": reason}},
                )
        return again


def _release_of(ask: Ask) -> _Ending:
    return _Ending(ask.hold_id, ask.tenant, ask.traceparent, None)


def _item(ask: Ask) -> pb.BatchAuthorizeItem:
    item = pb.BatchAuthorizeItem(
        request=pb.AuthorizeRequest(
            hold_id=ask.hold_id,
            scope=usage_pb2.Scope(
                tenant=ask.tenant,
                project=ask.project,
                service=ask.service,
                provider=ask.provider,
                model=ask.model,
                simulated=ask.simulated,
            ),
            operation=ask.operation,
            bound=_usage(ask.bound),
            request_id=ask.request_id,
        ),
        traceparent=ask.traceparent,
    )
    if ask.ttl_s is not None:
        item.request.ttl.CopyFrom(_duration(ask.ttl_s))
    if ask.timeout_s is not None:
        item.timeout.CopyFrom(_duration(ask.timeout_s))
    return item


def _settle_item(ending: _Ending) -> pb.BatchSettleItem:
    tenant, hold_id, usage = ending.tenant, ending.hold_id, ending.usage
    if usage is None:
        release = pb.ReleaseRequest(tenant=tenant, hold_id=hold_id)
        return pb.BatchSettleItem(release=release, traceparent=ending.traceparent)
    settle = pb.SettleRequest(tenant=tenant, hold_id=hold_id, usage=_usage(usage))
    return pb.BatchSettleItem(settle=settle, traceparent=ending.traceparent)


def _usage(units: Units) -> usage_pb2.Usage:
    return usage_pb2.Usage(
        tokens=units.tokens, pages=units.pages, bytes=units.bytes, requests=units.requests
    )


def _duration(seconds: float) -> Duration:
    whole = int(seconds)
    return Duration(seconds=whole, nanos=int((seconds - whole) * 1e9))


_UNITS = {
    price_pb2.UNIT_TOKENS: "tokens",
    price_pb2.UNIT_PAGES: "pages",
    price_pb2.UNIT_BYTES: "bytes",
    price_pb2.UNIT_REQUESTS: "requests",
}


def _decided(ask: Ask, result: pb.BatchAuthorizeResult, now: datetime) -> Hold | Exception:
    """What the ledger decided on one call: a hold, or the error that its asker gets."""
    if result.WhichOneof("outcome") == "error":
        kind = BY_REASON.get(result.error.reason, Internal)
        retry_after_s = 1.0 if issubclass(kind, Unavailable) else None
        violations = _violations(kind, ask, result.error.message)
        return rebuilt(kind, result.error.message, violations, retry_after_s, {}, Billed.NO)
    response = result.response
    if response.WhichOneof("outcome") == "denial":
        return _denied(response.denial, now)
    hold = response.hold
    return Hold(
        id=ask.hold_id,
        tenant=ask.tenant,
        held_nanos_usd=hold.held_nanos_usd,
        price_version=hold.price_version,
        prices=tuple(
            PriceLine(_UNITS[line.unit], line.nanos_usd_per_million) for line in hold.unit_prices
        ),
        state=pb.HoldState.Name(hold.state).removeprefix("HOLD_STATE_"),
        replayed=response.replayed,
        traceparent=ask.traceparent,
    )


def _violations(kind: type[TollgateError], ask: Ask, message: str) -> list[Violation]:
    """The details of a refusal, which a batch leaves out: the ask says what it was about."""
    if kind is IdReused:
        return [Violation(f"hold/{ask.hold_id}", "was made for another call")]
    return [Violation("price", message)] if kind is PriceUnknown else []


def _denied(denial: pb.Denial, now: datetime) -> TollgateError:
    retry_at = denial.retry_time.ToDatetime(UTC) if denial.HasField("retry_time") else None
    return refused([_refusal(refusal) for refusal in denial.refusals], retry_at, now)


def _refusal(refusal: pb.Refusal) -> Refusal:
    return Refusal(
        limit_id=refusal.limit_id,
        display_name=refusal.display_name,
        metric=limit_pb2.Metric.Name(refusal.metric).removeprefix("METRIC_"),
        window=limit_pb2.Window.Name(refusal.window).removeprefix("WINDOW_"),
        maximum=refusal.maximum,
        consumed=refusal.consumed,
        requested=refusal.requested,
        over=refusal.over,
    )


# --- the backends ----------------------------------------------------------------------------

_BACKOFF_S, _BACKOFF_MAX_S = 0.1, 1.0
_MODELS_TIMEOUT_S = 5.0

_HEALTH = {
    health_pb2.HealthCheckResponse.SERVING: Health.SERVING,
    health_pb2.HealthCheckResponse.NOT_SERVING: Health.NOT_SERVING,
}


class BackendPeers:
    """The backends on the wire: one connection an address, one multicallable an operation."""

    def __init__(
        self,
        backends: Sequence[Backend],
        mesh: MeshSettings,
        on_change: Callable[[Backend], None],
    ) -> None:
        self._on_change = on_change
        self._peers = {
            address: Peer(address, mesh)
            for address in {backend.route.address for backend in backends}
        }
        self._backends = backends
        self._lines: dict[tuple[str, str], Any] = {}
        self._watches: list[asyncio.Task[None]] = []

    def unary(self, backend: Backend, operation: str) -> Any:
        """The multicallable of one request and one answer, in bytes."""
        return self._line(backend, operation, "unary_unary")

    def streamed(self, backend: Backend, operation: str) -> Any:
        """The multicallable of one request and many answers, in bytes."""
        return self._line(backend, operation, "unary_stream")

    def upload(self, backend: Backend, operation: str) -> Any:
        """The multicallable of many requests and one answer, in bytes."""
        return self._line(backend, operation, "stream_unary")

    def _line(self, backend: Backend, operation: str, kind: str) -> Any:
        key = (backend.route.address, operation)
        line = self._lines.get(key)
        if line is None:
            channel = self._peers[backend.route.address].channel
            line = self._lines[key] = getattr(channel, kind)(f"/{operation}")
        return line

    def watch(self) -> None:
        """Begin to watch every backend's health."""
        self._watches = [asyncio.create_task(self._watch(backend)) for backend in self._backends]

    async def close(self) -> None:
        """Stop watching, and disconnect."""
        for watch in self._watches:
            watch.cancel()
        await asyncio.gather(*self._watches, return_exceptions=True)
        for peer in self._peers.values():
            await peer.close()

    async def _watch(self, backend: Backend) -> None:
        """Follow one backend's health, reconnecting for ever.

        A stream that told something before it broke is taken up again before the backend is given
        up: daemons close connections now and then.
        """
        backoff_s = _BACKOFF_S
        while True:
            told = False
            try:
                async for health in self._healths(backend):
                    if health is Health.SERVING and backend.needs_models:
                        backend.models = await self._models(backend)
                    told = True
                    if health is Health.SERVING:
                        backend.rests_until = 0.0
                    self._is(backend, health)
            except (grpc.aio.AioRpcError, TollgateError):
                pass
            except Exception:
                log.exception("watching a backend failed")
            if told:
                backoff_s = _BACKOFF_S
                continue
            self._is(backend, Health.UNREACHABLE)
            await asyncio.sleep(backoff_s)
            backoff_s = min(backoff_s * 2, _BACKOFF_MAX_S)

    async def _healths(self, backend: Backend) -> Any:
        channel = self._peers[backend.route.address].channel
        stub: Any = health_pb2_grpc.HealthStub(channel)  # Its types know no methods.
        watching = stub.Watch(health_pb2.HealthCheckRequest(service=backend.route.health_name))
        async for answer in watching:
            yield _HEALTH.get(answer.status, Health.NOT_SERVING)

    def _is(self, backend: Backend, health: Health) -> None:
        if backend.health is not health:
            log.info(
                "backend changed",
                extra={
                    "fields": {
                        "backend": backend.route.health_name,
                        "kind": backend.route.kind.value,
                        "health": health.value,
                    }
                },
            )
            backend.health = health
            self._on_change(backend)

    async def _models(self, backend: Backend) -> dict[str, Model]:
        """The backend's models, from itself. Raises TollgateError."""
        peer = self._peers[backend.route.address]
        stub = embedder_pb2_grpc.EmbedderServiceStub(peer.channel)
        with calling(_ROUTER):
            answer = await peer.unary(
                stub.ListModels,
                embedder_pb2.ListModelsRequest(),
                timeout_s=_MODELS_TIMEOUT_S,
                provider=backend.provider,
            )
        return {
            model.name: Model(
                name=model.name,
                tokenizer=model.tokenizer,
                tokens_max=model.tokens_max,
                dimensions=model.dimensions,
                space_id=model.space_id,
            )
            for model in answer.models
            if model.provider in ("", backend.provider)
        }
