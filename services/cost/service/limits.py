"""LimitService: limits, for operators."""

from __future__ import annotations

from collections.abc import Iterable
from enum import IntEnum
from typing import Any, TypeVar

from tollgate.cost.v1 import limit_pb2 as pb
from tollgate.cost.v1.limit_pb2_grpc import LimitServiceServicer

from chassis.errors import InvalidField
from services.cost.core.keepers import CatalogKeeper, ReportKeeper
from services.cost.core.limits import (
    ANY,
    CHANGEABLE,
    DIMENSIONS,
    GENUINE,
    Dimension,
    Enforcement,
    Limit,
    Match,
    limit_not_found,
)
from services.cost.core.pages import last_of, page_size, page_token
from services.cost.core.reports import Consumption
from services.cost.core.usage import Metric
from services.cost.core.windows import Window
from services.cost.service.ledger import Context
from services.cost.service.wire import set_time

Number = TypeVar("Number", bound=IntEnum)


class LimitService(LimitServiceServicer):
    """Limits on the wire."""

    def __init__(self, catalog: CatalogKeeper, reports: ReportKeeper) -> None:
        self._catalog, self._reports = catalog, reports

    async def CreateLimit(
        self, request: pb.CreateLimitRequest, context: Context
    ) -> pb.CreateLimitResponse:
        limit = await self._catalog.create_limit(_to_limit(request.limit))
        return pb.CreateLimitResponse(limit=_limit(limit))

    async def GetLimit(self, request: pb.GetLimitRequest, context: Context) -> pb.GetLimitResponse:
        limit = (await self._catalog.reload()).limits.all.get(request.limit_id)
        if limit is None:
            raise limit_not_found(request.limit_id)
        consumption = await self._reports.consumption([limit])
        return pb.GetLimitResponse(limit=_limit(limit), consumption=_consumption(consumption))

    async def ListLimits(
        self, request: pb.ListLimitsRequest, context: Context
    ) -> pb.ListLimitsResponse:
        size, question = page_size(request.page_size), ("limits", request.tenant)
        last = last_of(question, request.page_token, 1)
        limits = (await self._catalog.reload()).limits
        found = limits.for_tenant(request.tenant) if request.tenant else limits.all.values()
        rest = sorted(
            (limit for limit in found if last is None or limit.id > last[0]),
            key=lambda limit: limit.id,
        )
        page = rest[:size]
        consumption = await self._reports.consumption(page, request.tenant)
        return pb.ListLimitsResponse(
            limits=map(_limit, page),
            consumption=_consumption(consumption),
            next_page_token=page_token(question, [page[-1].id]) if len(rest) > size else "",
        )

    async def UpdateLimit(
        self, request: pb.UpdateLimitRequest, context: Context
    ) -> pb.UpdateLimitResponse:
        limit = await self._catalog.update_limit(
            request.limit.id,
            request.limit.etag,
            _changes(request.limit, request.update_mask.paths),
        )
        return pb.UpdateLimitResponse(limit=_limit(limit))

    async def DeleteLimit(
        self, request: pb.DeleteLimitRequest, context: Context
    ) -> pb.DeleteLimitResponse:
        await self._catalog.delete_limit(request.limit_id, request.etag)
        return pb.DeleteLimitResponse()


def _number(field: str, kind: type[Number], value: int) -> Number:
    try:
        return kind(value)
    except ValueError:
        names = ", ".join(member.name for member in kind)
        raise InvalidField.of(field, f"must be one of {names}") from None


def _dimension(name: str, scope: pb.LimitScope) -> Dimension:
    if not scope.HasField(name):  # type: ignore[arg-type]  # one of its fields
        return GENUINE if name == "simulated" else ANY
    asked: pb.Dimension = getattr(scope, name)
    match = _number(f"limit.scope.{name}.match", Match, asked.match or Match.SHARED)
    return Dimension(match, asked.value)


def _to_limit(asked: pb.Limit) -> Limit:
    tenant, project, service, provider, model, simulated = (
        _dimension(name, asked.scope) for name in DIMENSIONS
    )
    return Limit(
        id=asked.id,
        scope=(tenant, project, service, provider, model, simulated),
        metric=_number("limit.metric", Metric, asked.metric),
        window=_number("limit.window", Window, asked.window),
        maximum=asked.maximum,
        enforcement=_number("limit.enforcement", Enforcement, asked.enforcement),
        time_zone=asked.time_zone,
        display_name=asked.display_name,
        alert_percents=tuple(asked.alert_percents),
    )


def _changes(asked: pb.Limit, paths: Iterable[str]) -> dict[str, Any]:
    changes: dict[str, Any] = {}
    for path in paths:
        if path not in CHANGEABLE:
            raise InvalidField.of("update_mask", f"must be of {', '.join(CHANGEABLE)}")
        changes[path] = getattr(asked, path)
    if not changes:
        raise InvalidField.of("update_mask", "must name what to change")
    if "enforcement" in changes:
        changes["enforcement"] = _number("limit.enforcement", Enforcement, asked.enforcement)
    if "alert_percents" in changes:
        changes["alert_percents"] = tuple(asked.alert_percents)
    return changes


def _limit(limit: Limit) -> pb.Limit:
    message = pb.Limit(
        id=limit.id,
        display_name=limit.display_name,
        metric=int(limit.metric),  # type: ignore[arg-type]  # the numbers are the same
        window=int(limit.window),  # type: ignore[arg-type]  # the numbers are the same
        time_zone=limit.time_zone,
        maximum=limit.maximum,
        enforcement=int(limit.enforcement),  # type: ignore[arg-type]  # the numbers are the same
        alert_percents=limit.alert_percents,
        etag=limit.etag,
    )
    for name, dimension in zip(DIMENSIONS, limit.scope, strict=True):
        field: pb.Dimension = getattr(message.scope, name)
        field.match, field.value = int(dimension.match), dimension.value  # type: ignore[assignment]  # the numbers are the same
    set_time(message.create_time, limit.create_time)
    set_time(message.update_time, limit.update_time)
    return message


def _consumption(found: Iterable[Consumption]) -> list[pb.LimitConsumption]:
    messages = []
    for limit, counter, window, held, settled in found:
        message = pb.LimitConsumption(
            limit_id=limit.id, counter=counter, held=held, settled=settled
        )
        set_time(message.window_start_time, window.start)
        if window.end is not None:
            set_time(message.window_end_time, window.end)
        messages.append(message)
    return messages
