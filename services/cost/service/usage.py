"""UsageService: reports of what was used and charged."""

from __future__ import annotations

from datetime import datetime

from tollgate.cost.v1 import usage_pb2 as pb
from tollgate.cost.v1.usage_pb2_grpc import UsageServiceServicer

from chassis.errors import InvalidField
from services.cost.core.keepers import ReportKeeper
from services.cost.core.pages import last_of, page_size, page_token
from services.cost.core.reports import Bucket, Group, UsageQuery, UsageRow, widened
from services.cost.core.windows import Window, checked_zone, span
from services.cost.service.ledger import Context
from services.cost.service.wire import scope_message, set_time, to_time, usage_message


class UsageService(UsageServiceServicer):
    """Usage on the wire."""

    def __init__(self, reports: ReportKeeper) -> None:
        self._reports = reports

    async def QueryUsage(
        self, request: pb.QueryUsageRequest, context: Context
    ) -> pb.QueryUsageResponse:
        size = page_size(request.page_size)
        groups, bucket = _groups(request), _bucket(request)
        time_zone = checked_zone("time_zone", request.time_zone)
        question = (
            "usage",
            request.start_time.SerializeToString() if request.HasField("start_time") else None,
            request.end_time.SerializeToString() if request.HasField("end_time") else None,
            groups,
            bucket,
            time_zone,
            request.tenant,
        )
        # A page goes on in the range of the first one, whose end may have been that moment.
        last = last_of(question, request.page_token, 3 + len(groups))
        start, end = _range(last) if last else await self._asked_range(request, time_zone)
        query = UsageQuery(start, end, groups, bucket, time_zone, request.tenant)
        after = (datetime.fromisoformat(last[2]), last[3:]) if last else None
        rows = await self._reports.usage(query, after, size + 1)
        answer = pb.QueryUsageResponse(rows=[_row(row) for row in rows[:size]])
        if len(rows) > size:
            answer.next_page_token = page_token(question, _last(query, rows[size - 1]))
        return answer

    async def _asked_range(
        self, request: pb.QueryUsageRequest, time_zone: str
    ) -> tuple[datetime, datetime]:
        now = await self._reports.now()
        end = to_time("end_time", request.end_time) if request.HasField("end_time") else now
        if request.HasField("start_time"):
            start = to_time("start_time", request.start_time)
        else:
            start = span(Window.DAY, time_zone, now).start
        return widened(start, end)


def _groups(request: pb.QueryUsageRequest) -> tuple[Group, ...]:
    try:
        return tuple(sorted({Group(group) for group in request.group_by}))
    except ValueError:
        raise InvalidField.of("group_by", "must be dimensions of usage") from None


def _bucket(request: pb.QueryUsageRequest) -> Bucket:
    try:
        return Bucket(request.bucket)
    except ValueError:
        raise InvalidField.of("bucket", "must be a width of buckets") from None


def _range(last: list[str]) -> tuple[datetime, datetime]:
    return datetime.fromisoformat(last[0]), datetime.fromisoformat(last[1])


def _last(query: UsageQuery, row: UsageRow) -> list[str]:
    return [
        query.start.isoformat(),
        query.end.isoformat(),
        row.bucket_time.isoformat(),
        *(_value(row, group) for group in query.group_by),
    ]


def _value(row: UsageRow, group: Group) -> str:
    if group is Group.SIMULATED:
        return "true" if row.scope.simulated else "false"
    return str(getattr(row.scope, group.name.lower()))


def _row(row: UsageRow) -> pb.UsageRow:
    message = pb.UsageRow(
        scope=scope_message(row.scope),
        operation=row.scope.operation,
        usage=usage_message(row.usage),
        charged_nanos_usd=row.charged_nanos_usd,
        unconfirmed_nanos_usd=row.unconfirmed_nanos_usd,
        charges=row.charges,
    )
    set_time(message.bucket_time, row.bucket_time)
    return message
