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
from cli.terminal import as_dict, local_time, operation, table

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

    With --tenant of that tenant, else of all. What mocks did is told apart, at the notional price
    that it has for trying limits out; it is never in the total.
    """
    groups = by or [By.SERVICE, By.PROVIDER, By.MODEL, By.OPERATION]
    # Asked always, so that no row mixes genuine and simulated use.
    asked = dict.fromkeys([*groups, By.SIMULATED])
    request = usage_pb2.QueryUsageRequest(
        group_by=[usage_pb2.UsageDimension.Value(f"USAGE_DIMENSION_{g.name}") for g in asked],
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
    session.terminal.json(as_dict(found) | _sums(found))
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


def _sums(found: usage_pb2.QueryUsageResponse) -> dict[str, dict[str, str]]:
    """For programs: the sums of genuine and, apart, of simulated use, in nano-dollars."""
    return {
        name: {
            "charged_nanos_usd": str(sum(row.charged_nanos_usd for row in rows)),
            "unconfirmed_nanos_usd": str(sum(row.unconfirmed_nanos_usd for row in rows)),
        }
        for name, rows in (("total", _of(found, False)), ("simulated", _of(found, True)))
    }


def _of(found: usage_pb2.QueryUsageResponse, simulated: bool) -> list[usage_pb2.UsageRow]:
    return [row for row in found.rows if row.scope.simulated == simulated]


def _usage_table(
    found: usage_pb2.QueryUsageResponse, groups: list[By], *, is_cut: bool, wide: bool
) -> Any:
    if not found.rows:
        return "nothing was used"
    charged = usd_column([row.charged_nanos_usd for row in found.rows])
    genuine, simulated = _of(found, False), _of(found, True)
    rows: list[list[Any]] = []
    for row, amount in zip(found.rows, charged, strict=True):
        when = [local_time(row.bucket_time)[:16]] if is_cut else []
        units = _units(row.usage)
        # Money, tokens and pages tell more than bytes do; --json has all of it.
        units = units if wide else units[:-1]
        dimensions = [_dimension_of(row, g) for g in groups]
        rows.append([*when, *dimensions, *units, f"{row.charges:,}"])
        if row.scope.simulated:
            rows[-1] += ["", amount]
        else:
            rows[-1] += [amount, ""] if simulated else [amount]
    kinds = {By.MODEL: "~", By.OPERATION: "="}
    columns = [*(["=from"] if is_cut else []), *(kinds.get(g, "=") + g.value for g in groups)]
    columns += [">tokens", ">pages", *([">bytes"] if wide else []), ">calls", ">charged"]
    made = table(*columns, *([">simulated"] if simulated else []), rows=rows)
    made.show_footer = True
    made.columns[0].footer = "total"
    made.columns[len(columns) - 1].footer = usd(sum(row.charged_nanos_usd for row in genuine))
    captions = []
    if simulated:
        made.columns[-1].footer = usd(sum(row.charged_nanos_usd for row in simulated))
        captions.append("simulated work has a notional price, and is never counted as spend")
    if unconfirmed := sum(row.unconfirmed_nanos_usd for row in genuine):
        captions.append(f"{usd(unconfirmed)} of it is unconfirmed: the outcome is not known")
    made.caption = "\n".join(reversed(captions)) or None
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
