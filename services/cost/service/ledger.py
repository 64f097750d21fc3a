"""CostService: authorizations, settlements and releases, alone and in batches."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime
from typing import Any, Final, TypeAlias, TypeVar
from uuid import UUID

import grpc
from opentelemetry.trace import (
    Link,
    NonRecordingSpan,
    get_current_span,
    set_span_in_context,
)
from tollgate.cost.v1 import cost_pb2 as pb
from tollgate.cost.v1.cost_pb2_grpc import CostServiceServicer

from chassis import call as calls
from chassis import telemetry
from chassis.errors import InvalidField, TollgateError
from chassis.tasks import finish
from services.cost.core.holds import (
    Action,
    Authorization,
    Decision,
    Hold,
    Order,
    Resolution,
    State,
)
from services.cost.core.keepers import LedgerKeeper, ReportKeeper
from services.cost.core.pages import last_of, page_size, page_token
from services.cost.service.wire import (
    HoldWriter,
    Scopes,
    checked_id,
    checked_request_id,
    checked_tenant,
    to_ttl_ms,
    to_usage,
    write_denial,
)

ITEMS_MAX: Final = 1_000

Context: TypeAlias = grpc.aio.ServicerContext[Any, Any]
Asked = TypeVar("Asked")


class CostService(CostServiceServicer):
    """Turns requests into orders and their results into answers."""

    def __init__(self, ledger: LedgerKeeper, reports: ReportKeeper, *, ttl_ms: int) -> None:
        self._ledger, self._reports, self._ttl_ms = ledger, reports, ttl_ms
        self._scopes, self._holds = Scopes(), HoldWriter()

    async def Authorize(
        self, request: pb.AuthorizeRequest, context: Context
    ) -> pb.AuthorizeResponse:
        order = self._authorization(request)
        if (left := calls.time_left_s()) is not None:
            order.ends = time.monotonic() + left
        (result,) = await self._ledger.decide([order])
        answer = pb.AuthorizeResponse()
        self._write_decision(answer, result)
        return answer

    async def Settle(self, request: pb.SettleRequest, context: Context) -> pb.SettleResponse:
        answer = pb.SettleResponse()
        self._holds.write(answer.hold, await self._resolve(_settlement(request)))
        return answer

    async def Release(self, request: pb.ReleaseRequest, context: Context) -> pb.ReleaseResponse:
        answer = pb.ReleaseResponse()
        self._holds.write(answer.hold, await self._resolve(_release(request)))
        return answer

    async def ExtendHold(
        self, request: pb.ExtendHoldRequest, context: Context
    ) -> pb.ExtendHoldResponse:
        order = Resolution(
            Action.EXTEND,
            checked_tenant(request.tenant),
            checked_id("hold_id", request.hold_id),
            ttl_ms=to_ttl_ms(request.ttl),
        )
        answer = pb.ExtendHoldResponse()
        self._holds.write(answer.hold, await self._resolve(order))
        return answer

    async def BatchAuthorize(
        self, request: pb.BatchAuthorizeRequest, context: Context
    ) -> pb.BatchAuthorizeResponse:
        start_ns = time.time_ns()
        orders, faults = _orders(request.items, self._batch_authorization)
        results = iter(await self._ledger.decide(orders) if orders else ())
        answer = pb.BatchAuthorizeResponse()
        add = answer.results.add
        for place in range(len(request.items)):
            result = faults.get(place) or next(results)
            if isinstance(result, TollgateError):
                error = add().error
                error.reason, error.message = result.reason, result.message
            else:
                self._write_decision(add().response, result)
        _trace("ledger.authorize", start_ns, request.items)
        return answer

    async def BatchSettle(
        self, request: pb.BatchSettleRequest, context: Context
    ) -> pb.BatchSettleResponse:
        start_ns = time.time_ns()
        orders, faults = _orders(request.items, _batch_resolution)
        # Money that was spent must be written down, whether or not its caller still waits.
        results = iter(await finish(self._decide(orders)) if orders else ())
        answer = pb.BatchSettleResponse()
        add, write = answer.results.add, self._holds.write
        for place in range(len(request.items)):
            result = faults.get(place) or next(results)
            if isinstance(result, Hold):
                write(add().hold, result)
            else:
                error = add().error
                error.reason, error.message = _told(result)
        _trace("ledger.settle", start_ns, request.items)
        return answer

    async def GetHold(self, request: pb.GetHoldRequest, context: Context) -> pb.GetHoldResponse:
        tenant, hold_id = checked_tenant(request.tenant), checked_id("hold_id", request.hold_id)
        answer = pb.GetHoldResponse()
        self._holds.write(answer.hold, await self._reports.hold(tenant, hold_id))
        return answer

    async def ListHolds(
        self, request: pb.ListHoldsRequest, context: Context
    ) -> pb.ListHoldsResponse:
        tenant, size = checked_tenant(request.tenant), page_size(request.page_size)
        request_id = checked_request_id(request.request_id)
        if request.state not in pb.HoldState.values():
            raise InvalidField.of("state", "must be a state of a hold")
        state = State(request.state) if request.state else None
        question = ("holds", tenant, request_id, state)
        last = last_of(question, request.page_token, 2)
        holds = await self._reports.holds(
            tenant, request_id, state, _newest(last) if last else None, size + 1
        )
        answer = pb.ListHoldsResponse()
        for hold in holds[:size]:
            self._holds.write(answer.holds.add(), hold)
        if len(holds) > size:
            end = holds[size - 1]
            answer.next_page_token = page_token(question, [end.create_time.isoformat(), end.id])
        return answer

    async def _decide(self, orders: list[Order]) -> Sequence[object]:
        return await self._ledger.decide(orders)

    async def _resolve(self, order: Order) -> Hold:
        (result,) = await finish(self._decide([order]))
        if isinstance(result, TollgateError):
            raise result
        assert isinstance(result, Hold), "a resolution's outcome is a hold"
        return result

    def _authorization(self, request: pb.AuthorizeRequest) -> Authorization:
        hold_id = checked_id("hold_id", request.hold_id)
        if not request.HasField("bound"):
            raise InvalidField.of("bound", "must be given")
        return Authorization(
            hold_id,
            self._scopes.of(request),
            to_usage("bound", request.bound),
            to_ttl_ms(request.ttl) if request.HasField("ttl") else self._ttl_ms,
            checked_request_id(request.request_id),
        )

    def _batch_authorization(self, item: pb.BatchAuthorizeItem) -> Authorization:
        order = self._authorization(item.request)
        if item.HasField("timeout"):
            order.ends = time.monotonic() + item.timeout.seconds + item.timeout.nanos / 1e9
        return order

    def _write_decision(self, message: pb.AuthorizeResponse, result: object) -> None:
        if isinstance(result, TollgateError):
            raise result
        assert isinstance(result, Decision), "an authorization's outcome is a decision"
        hold = result.hold
        if hold.denial is None:
            self._holds.write(message.hold, hold)
        else:
            write_denial(message.denial, hold.denial)
        if result.replayed:
            message.replayed = True


def _orders(
    items: Sequence[Asked], order_of: Callable[[Asked], Order]
) -> tuple[list[Order], dict[int, TollgateError]]:
    """The orders of a batch, and by place what is wrong with the items that are none."""
    if len(items) > ITEMS_MAX:
        raise InvalidField.of("items", f"must be at most {ITEMS_MAX}")
    orders: list[Order] = []
    faults: dict[int, TollgateError] = {}
    for place, item in enumerate(items):
        try:
            orders.append(order_of(item))
        except TollgateError as error:
            faults[place] = error
    return orders, faults


def _settlement(request: pb.SettleRequest) -> Resolution:
    if not request.HasField("usage"):
        raise InvalidField.of("usage", "must be given")
    return Resolution(
        Action.SETTLE,
        checked_tenant(request.tenant),
        checked_id("hold_id", request.hold_id),
        to_usage("usage", request.usage),
    )


def _release(request: pb.ReleaseRequest) -> Resolution:
    return Resolution(
        Action.RELEASE, checked_tenant(request.tenant), checked_id("hold_id", request.hold_id)
    )


def _batch_resolution(item: pb.BatchSettleItem) -> Resolution:
    action = item.WhichOneof("action")
    if action == "settle":
        return _settlement(item.settle)
    if action == "release":
        return _release(item.release)
    raise InvalidField.of("action", "must be settle or release")


def _told(result: object) -> tuple[str, str]:
    assert isinstance(result, TollgateError), "a resolution's outcome is a hold or an error"
    return result.reason, result.message


def _newest(last: list[str]) -> tuple[datetime, UUID]:
    return datetime.fromisoformat(last[0]), UUID(last[1])


def _trace(
    name: str, start_ns: int, items: Iterable[pb.BatchAuthorizeItem | pb.BatchSettleItem]
) -> None:
    """A span in the trace of each item whose trace is kept; the others cost nothing."""
    links: list[Link] | None = None
    for item in items:
        # The last digit of a traceparent has the flag that says so.
        if item.traceparent[-1:] not in ("1", "3", "5", "7", "9", "b", "d", "f"):
            continue
        parent = telemetry.parse_traceparent(item.traceparent)
        if parent is None:
            continue
        if links is None:
            links = [Link(get_current_span().get_span_context())]
        span = telemetry.tracer().start_span(
            name,
            context=set_span_in_context(NonRecordingSpan(parent)),
            links=links,
            start_time=start_ns,
            attributes={"tollgate.hold_id": _hold_id(item)},
        )
        span.end()


def _hold_id(item: pb.BatchAuthorizeItem | pb.BatchSettleItem) -> str:
    if isinstance(item, pb.BatchAuthorizeItem):
        return item.request.hold_id
    return item.settle.hold_id or item.release.hold_id
