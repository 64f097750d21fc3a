"""`tollgate usage`: what was used and charged."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Annotated, Any

import typer
from tollgate.cost.v1 import usage_pb2, usage_pb2_grpc

from cli.caller import PAGE_SIZE
from cli.command import Misused, Session, command
from cli.money import usd, usd_column
from cli.terminal import local_time, operation, table

app = typer.Typer()

_WIDE = 110


class By(StrEnum):
    """What a report is grouped by."""

    TENANT = "tenant"
    PROJECT = "project"
    SERVICE = "service"
    PROVIDER = "provider"
    MODEL = "model"
    OPERATION = "operation"
    SIMULATED = "simulated"


class Bucket(StrEnum):
    """How a report is cut in time."""

    QUARTER_HOUR = "quarter-hour"
    HOUR = "hour"
    DAY = "day"
    MONTH = "month"


@command(app)
async def usage(
    session: Session,
    by: Annotated[
        list[By] | None,
        typer.Option(help="Keep apart by this; may be repeated. Default: service to operation."),
    ] = None,
    bucket: Annotated[Bucket | None, typer.Option(help="Cut the time into these.")] = None,
    since: Annotated[
        str | None,
        typer.Option(help="From when on: 90m, 24h, 7d, or a date or time in ISO 8601."),
    ] = None,
    time_zone: Annotated[str, typer.Option(help="The IANA zone of days and months.")] = "",
) -> None:
    """Report what was used and charged, today when not told otherwise.

    With --tenant of that tenant, else of all.
    """
    groups = by or [By.SERVICE, By.PROVIDER, By.MODEL, By.OPERATION]
    request = usage_pb2.QueryUsageRequest(
        group_by=[usage_pb2.UsageDimension.Value(f"USAGE_DIMENSION_{g.name}") for g in groups],
        time_zone=time_zone,
        tenant=session.tenant_given,
        page_size=PAGE_SIZE,
    )
    if bucket is not None:
        request.bucket = usage_pb2.UsageBucket.Value(f"USAGE_BUCKET_{bucket.name}")
    if since is not None:
        request.start_time.FromDatetime(_moment(since))
    found = usage_pb2.QueryUsageResponse()
    async with session.ledger() as ledger:
        stub = usage_pb2_grpc.UsageServiceStub(ledger.channel)
        async for page in ledger.pages(stub.QueryUsage, request):
            found.rows.extend(page.rows)
    session.terminal.answer(found)
    wide = session.terminal.width >= _WIDE
    session.terminal.show(_usage_table(found, groups, is_cut=bucket is not None, wide=wide))


def _moment(text: str) -> datetime:
    """`90m`, `24h` or `7d` ago, or a date or time in ISO 8601 (local where it has no zone).

    Raises Misused.
    """
    if match := re.fullmatch(r"(\d{1,5})([mhd])", text):
        unit = {"m": "minutes", "h": "hours", "d": "days"}[match[2]]
        return datetime.now(UTC) - timedelta(**{unit: int(match[1])})
    try:
        return datetime.fromisoformat(text).astimezone(UTC)
    except ValueError:
        raise Misused(f"--since {text}: give 90m, 24h, 7d, or a date such as 2026-01-31") from None


def _usage_table(
    found: usage_pb2.QueryUsageResponse, groups: list[By], *, is_cut: bool, wide: bool
) -> Any:
    if not found.rows:
        return "nothing was used"
    charged = usd_column([row.charged_nanos_usd for row in found.rows])
    total = sum(row.charged_nanos_usd for row in found.rows)
    unconfirmed = sum(row.unconfirmed_nanos_usd for row in found.rows)
    rows: list[list[Any]] = []
    for row, money in zip(found.rows, charged, strict=True):
        when = [local_time(row.bucket_time)[:16]] if is_cut else []
        rows.append([*when, *(_dimension_of(row, g) for g in groups), *_units(row.usage), money])
        rows[-1].insert(-1, f"{row.charges:,}")
    kinds = {By.MODEL: "~", By.OPERATION: "="}
    columns = [*(["=from"] if is_cut else []), *(kinds.get(g, "=") + g.value for g in groups)]
    columns += [">tokens", ">pages", ">bytes", ">calls", ">charged"]
    if not wide:
        # Money, tokens and pages tell more than bytes do; --json has all of it.
        del columns[-3]
        for cells in rows:
            del cells[-3]
    made = table(*columns, rows=rows)
    made.show_footer = True
    made.columns[-1].footer = usd(total)
    made.columns[0].footer = "total"
    if unconfirmed:
        made.caption = f"{usd(unconfirmed)} of it is unconfirmed: the outcome is not known"
    return made


def _dimension_of(row: usage_pb2.UsageRow, group_by: By) -> str:
    if group_by is By.OPERATION:
        return operation(row.operation)
    if group_by is By.SIMULATED:
        return "simulated" if row.scope.simulated else "genuine"
    return str(getattr(row.scope, group_by.value))


def _units(used: usage_pb2.Usage) -> list[str]:
    """Tokens, pages and bytes; empty where there are none."""
    return [f"{n:,}" if n else "" for n in (used.tokens, used.pages, used.bytes)]
