"""`tollgate limits|prices|usage|holds`: what may be spent, at what price, and what was."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Annotated, Any

import typer
from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.timestamp_pb2 import Timestamp
from rich.text import Text
from tollgate.cost.v1 import (
    cost_pb2,
    cost_pb2_grpc,
    limit_pb2,
    limit_pb2_grpc,
    price_pb2,
    price_pb2_grpc,
    usage_pb2,
    usage_pb2_grpc,
)

from cli.caller import Caller
from cli.command import Misused, Session, command, group
from cli.money import parse_usd, usd, usd_column
from cli.terminal import as_dict, local_time, lower, size, table

app = typer.Typer()
limits = group("What may be spent: budgets, quotas and rate limits.")
app.add_typer(limits, name="limits")

PAGE = 1_000
_WIDE = 110
_BAR_CELLS = 10
_DIMENSIONS = ("tenant", "project", "service", "provider", "model", "simulated")


class Metric(StrEnum):
    """What a limit counts."""

    COST = "cost"
    TOKENS = "tokens"
    REQUESTS = "requests"
    PAGES = "pages"
    BYTES = "bytes"


class Window(StrEnum):
    """The window in which a limit counts."""

    MINUTE = "minute"
    HOUR = "hour"
    DAY = "day"
    MONTH = "month"
    LIFETIME = "lifetime"


class Enforcement(StrEnum):
    """What a limit does when a call does not fit."""

    HARD = "hard"
    SOFT = "soft"
    SHADOW = "shadow"


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


class State(StrEnum):
    """Where a hold stands."""

    HELD = "held"
    SETTLED = "settled"
    RELEASED = "released"
    EXPIRED = "expired"


# --- limits ----------------------------------------------------------------------------------

LimitId = Annotated[str, typer.Argument(metavar="ID", help="The limit's id.")]
MaxUsd = Annotated[
    str | None, typer.Option(metavar="USD", help="The maximum of a limit on cost, such as 20.")
]
Max = Annotated[
    int | None,
    typer.Option("--max", min=0, help="The maximum of any other: tokens, requests, pages, bytes."),
]
DisplayName = Annotated[str | None, typer.Option("--name", help="The name for people.")]
Alert = Annotated[
    list[int] | None,
    typer.Option(min=1, max=100, help="Alert at this percentage; may be repeated."),
]


@command(limits, "list")
async def list_limits(session: Session) -> None:
    """List the limits, with what is held and charged in their current windows.

    With --tenant, only those that apply to that tenant, and only its counters.
    """
    found = limit_pb2.ListLimitsResponse()
    async with session.ledger() as ledger:
        stub = limit_pb2_grpc.LimitServiceStub(ledger.channel)
        token = ""
        while True:
            page = await ledger.unary(
                stub.ListLimits,
                limit_pb2.ListLimitsRequest(
                    page_size=PAGE, page_token=token, tenant=session.tenant_given
                ),
            )
            found.limits.extend(page.limits)
            found.consumption.extend(page.consumption)
            token = page.next_page_token
            if not token:
                break
    session.terminal.answer(found)
    wide = session.terminal.width >= _WIDE
    rows = [r for lim in found.limits for r in _limit_rows(lim, found.consumption, wide=wide)]
    session.terminal.show(
        _limit_table(rows, wide=wide)
        if rows
        else "no limits: `tollgate limits add ID --max-usd 20 --window day` makes one"
    )


def _limit_rows(
    limit: limit_pb2.Limit, consumption: Iterable[limit_pb2.LimitConsumption], *, wide: bool
) -> list[list[Any]]:
    maximum = amount(limit.maximum, limit.metric)
    window = lower(limit_pb2.Window.Name(limit.window), "WINDOW_")
    kind = lower(limit_pb2.Enforcement.Name(limit.enforcement), "ENFORCEMENT_")
    scope = _scope(limit.scope)
    counters = [c for c in consumption if c.limit_id == limit.id]
    if not counters:
        bar = consumption_bar(0, 0, limit.maximum)
        return [[limit.id, scope, "", "", maximum, bar, f"{window}, {kind}"]]
    rows = []
    for number, c in enumerate(counters):
        first = number == 0
        used = amount(c.held + c.settled, limit.metric)
        bar = consumption_bar(c.settled, c.held, limit.maximum)
        until = _until(c.window_end_time) if wide else ""
        rows.append(
            [
                limit.id if first else "",
                scope if first else "",
                c.counter,
                used,
                maximum,
                bar,
                f"{window}, {kind}{until}" if first else "",
            ]
        )
    return rows


def _limit_table(rows: list[list[Any]], *, wide: bool) -> Any:
    columns = ["=limit", "applies to", "~counter", ">used", ">of", "=", "=window"]
    if not wide:
        # The counter says it again, but for the limits that have none yet.
        rows = [[r[0], r[2] or r[1], *r[3:]] for r in rows]
        columns.pop(1)
    return table(*columns, rows=rows)


def _until(end: Timestamp) -> str:
    return f", until {local_time(end)[11:16]}" if end.seconds else ""


def _scope(scope: limit_pb2.LimitScope) -> str:
    """`each tenant, service=embedder`; `all calls` where nothing is told apart."""
    words = []
    for name in _DIMENSIONS:
        dimension: limit_pb2.Dimension = getattr(scope, name)
        if (name, dimension.value) == ("simulated", "false"):
            continue  # Genuine calls only, as everybody takes for granted.
        if dimension.match == limit_pb2.MATCH_EACH:
            words.append(f"each {name}")
        elif dimension.match == limit_pb2.MATCH_EXACT:
            words.append(f"{name}={dimension.value}")
    return ", ".join(words) or "all calls"


def amount(value: int, metric: limit_pb2.Metric.ValueType) -> str:
    """A value of a limit in its metric's unit."""
    if metric == limit_pb2.METRIC_COST:
        return usd(value)
    return f"{value:,} {lower(limit_pb2.Metric.Name(metric), 'METRIC_')}"


def consumption_bar(settled: int, held: int, maximum: int) -> Text:
    """What is charged (full), held (shaded) and free (dotted) of a maximum, in ten cells."""
    whole = max(1, maximum)
    charged = min(_BAR_CELLS, -(-settled * _BAR_CELLS // whole)) if settled > 0 else 0
    both = min(_BAR_CELLS, -(-(settled + held) * _BAR_CELLS // whole)) if settled + held > 0 else 0
    share = (settled + held) * 100 // whole
    colour = "red" if share >= 100 else "yellow" if share >= 80 else "green"
    return Text.assemble(
        ("█" * charged, colour),
        ("▒" * max(0, both - charged), colour),
        ("·" * (_BAR_CELLS - max(both, charged)), "dim"),
        f" {share}%",
    )


@command(limits, "show")
async def show_limit(session: Session, limit_id: LimitId) -> None:
    """Show one limit."""
    async with session.ledger() as ledger:
        stub = limit_pb2_grpc.LimitServiceStub(ledger.channel)
        found = await ledger.unary(stub.GetLimit, limit_pb2.GetLimitRequest(limit_id=limit_id))
    session.terminal.answer(found)
    rows = _limit_rows(found.limit, found.consumption, wide=session.terminal.width >= _WIDE)
    session.terminal.show(_limit_table(rows, wide=session.terminal.width >= _WIDE))


@command(limits, "add")
async def add_limit(
    session: Session,
    limit_id: LimitId,
    window: Annotated[Window, typer.Option(help="The window in which it counts.")] = Window.DAY,
    metric: Annotated[Metric, typer.Option(help="What it counts.")] = Metric.COST,
    max_usd: MaxUsd = None,
    maximum: Max = None,
    exact: Annotated[
        list[str] | None,
        typer.Option("--for", metavar="DIMENSION=VALUE", help="Only calls with this value."),
    ] = None,
    each: Annotated[
        list[str] | None,
        typer.Option(metavar="DIMENSION", help="A counter of its own for each value."),
    ] = None,
    enforcement: Annotated[
        Enforcement, typer.Option(help="What it does when a call does not fit.")
    ] = Enforcement.HARD,
    time_zone: Annotated[str, typer.Option(help="The IANA zone of days and months.")] = "",
    name: DisplayName = None,
    alert: Alert = None,
) -> None:
    """Create a limit, for example: limits add acme-day --max-usd 20 --for tenant=acme

    Dimensions are tenant, project, service, provider, model and simulated. Those that are not
    named are shared: all values count together.
    """
    limit = limit_pb2.Limit(
        id=limit_id,
        display_name=name or limit_id,
        scope=_scope_asked(exact or [], each or []),
        metric=limit_pb2.Metric.Value(f"METRIC_{metric.name}"),
        window=limit_pb2.Window.Value(f"WINDOW_{window.name}"),
        enforcement=limit_pb2.Enforcement.Value(f"ENFORCEMENT_{enforcement.name}"),
        time_zone=time_zone,
        alert_percents=sorted(alert or []),
    )
    limit.maximum = _maximum(limit.metric, max_usd, maximum, required=True)
    async with session.ledger() as ledger:
        stub = limit_pb2_grpc.LimitServiceStub(ledger.channel)
        made = await ledger.unary(stub.CreateLimit, limit_pb2.CreateLimitRequest(limit=limit))
    session.terminal.answer(made)
    session.terminal.say(f"{made.limit.id}: {_told(made.limit)}")


def _scope_asked(exact: list[str], each: list[str]) -> limit_pb2.LimitScope:
    scope = limit_pb2.LimitScope()
    shared = limit_pb2.Dimension(match=limit_pb2.MATCH_SHARED)
    for name in _DIMENSIONS[:-1]:
        getattr(scope, name).CopyFrom(shared)
    for pair in exact:
        name, equals, value = pair.partition("=")
        if not equals:
            raise Misused(f"--for {pair}: must be DIMENSION=VALUE, such as tenant=acme")
        dimension = limit_pb2.Dimension(match=limit_pb2.MATCH_EXACT, value=value)
        getattr(scope, _dimension(name)).CopyFrom(dimension)
    for name in each:
        dimension = limit_pb2.Dimension(match=limit_pb2.MATCH_EACH)
        getattr(scope, _dimension(name)).CopyFrom(dimension)
    return scope


def _dimension(name: str) -> str:
    if name not in _DIMENSIONS:
        raise Misused(f"{name!r} is no dimension: there are {', '.join(_DIMENSIONS)}")
    return name


def _maximum(
    metric: limit_pb2.Metric.ValueType, max_usd: str | None, maximum: int | None, *, required: bool
) -> int:
    """The maximum asked for in the metric's unit; -1 where none was. Raises Misused."""
    is_cost = metric == limit_pb2.METRIC_COST
    if max_usd is not None and not is_cost:
        raise Misused("--max-usd is for limits on cost: give --max")
    if maximum is not None and is_cost:
        raise Misused("a limit on cost has its maximum in USD: give --max-usd")
    if max_usd is not None:
        try:
            return parse_usd(max_usd)
        except ValueError as error:
            raise Misused(f"--max-usd: {error}") from None
    if maximum is not None:
        return maximum
    if required:
        raise Misused("give the maximum with " + ("--max-usd" if is_cost else "--max"))
    return -1


def _told(limit: limit_pb2.Limit) -> str:
    window = lower(limit_pb2.Window.Name(limit.window), "WINDOW_")
    kind = lower(limit_pb2.Enforcement.Name(limit.enforcement), "ENFORCEMENT_")
    per = "ever" if limit.window == limit_pb2.WINDOW_LIFETIME else f"a {window}"
    return f"{amount(limit.maximum, limit.metric)} {per}, {kind}, for {_scope(limit.scope)}"


@command(limits, "set")
async def set_limit(
    session: Session,
    limit_id: LimitId,
    max_usd: MaxUsd = None,
    maximum: Max = None,
    enforcement: Annotated[
        Enforcement | None, typer.Option(help="What it does when a call does not fit.")
    ] = None,
    name: DisplayName = None,
    alert: Alert = None,
) -> None:
    """Change a limit's maximum, enforcement, name or alerts: limits set tenant-day --max-usd 20"""
    async with session.ledger() as ledger:
        stub = limit_pb2_grpc.LimitServiceStub(ledger.channel)
        read = await ledger.unary(stub.GetLimit, limit_pb2.GetLimitRequest(limit_id=limit_id))
        limit, paths = read.limit, []
        value = _maximum(limit.metric, max_usd, maximum, required=False)
        if value >= 0:
            limit.maximum = value
            paths.append("maximum")
        if enforcement is not None:
            limit.enforcement = limit_pb2.Enforcement.Value(f"ENFORCEMENT_{enforcement.name}")
            paths.append("enforcement")
        if name is not None:
            limit.display_name = name
            paths.append("display_name")
        if alert is not None:
            limit.alert_percents[:] = sorted(alert)
            paths.append("alert_percents")
        if not paths:
            raise Misused("say what to change: --max-usd, --max, --enforcement, --name or --alert")
        request = limit_pb2.UpdateLimitRequest(limit=limit, update_mask=FieldMask(paths=paths))
        changed = await ledger.unary(stub.UpdateLimit, request)
    session.terminal.answer(changed)
    session.terminal.say(f"{changed.limit.id}: {_told(changed.limit)}")


@command(limits, "delete")
async def delete_limit(session: Session, limit_id: LimitId) -> None:
    """Delete a limit."""
    async with session.ledger() as ledger:
        stub = limit_pb2_grpc.LimitServiceStub(ledger.channel)
        request = limit_pb2.DeleteLimitRequest(limit_id=limit_id)
        deleted = await ledger.unary(stub.DeleteLimit, request)
    session.terminal.answer(deleted)
    session.terminal.say(f"{limit_id} is deleted")


# --- prices ----------------------------------------------------------------------------------


@command(app)
async def prices(
    session: Session,
    provider: Annotated[str, typer.Option(help="Only this provider's.")] = "",
) -> None:
    """List the prices that calls are held and charged at."""
    found = price_pb2.ListPricesResponse()
    async with session.ledger() as ledger:
        stub = price_pb2_grpc.PriceServiceStub(ledger.channel)
        token = ""
        while True:
            request = price_pb2.ListPricesRequest(
                provider=provider, page_size=PAGE, page_token=token
            )
            page = await ledger.unary(stub.ListPrices, request)
            found.prices.extend(page.prices)
            token = page.next_page_token
            if not token:
                break
    session.terminal.answer(found)
    amounts = usd_column([p.unit_price.nanos_usd_per_million for p in found.prices])
    rows = [
        [
            p.provider,
            p.model,
            _operation(p.operation),
            "free" if p.unit_price.nanos_usd_per_million == 0 else price,
            lower(price_pb2.Unit.Name(p.unit_price.unit), "UNIT_"),
            local_time(p.effective_time)[:10],
            p.source,
        ]
        for p, price in zip(found.prices, amounts, strict=True)
    ]
    columns = ["=provider", "model", "=operation", ">USD a million", "=unit", "=since", "~source"]
    if session.terminal.width < _WIDE:
        # Where a price is from is the longest and the least; --json has it.
        columns, rows = columns[:-1], [row[:-1] for row in rows]
    session.terminal.show(table(*columns, rows=rows) if rows else "no prices")


def _operation(name: str) -> str:
    """`tollgate.embedder.v1.EmbedderService/Embed` as `Embed`."""
    return name.rpartition("/")[2]


# --- usage -----------------------------------------------------------------------------------


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
        page_size=PAGE,
    )
    if bucket is not None:
        request.bucket = usage_pb2.UsageBucket.Value(f"USAGE_BUCKET_{bucket.name}")
    if since is not None:
        request.start_time.FromDatetime(moment(since))
    found = usage_pb2.QueryUsageResponse()
    async with session.ledger() as ledger:
        stub = usage_pb2_grpc.UsageServiceStub(ledger.channel)
        while True:
            page = await ledger.unary(stub.QueryUsage, request)
            found.rows.extend(page.rows)
            if not page.next_page_token:
                break
            request.page_token = page.next_page_token
    session.terminal.answer(found)
    wide = session.terminal.width >= _WIDE
    session.terminal.show(_usage_table(found, groups, is_cut=bucket is not None, wide=wide))


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
        rows.append([*when, *(_dimension_of(row, g) for g in groups), *units(row.usage), money])
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
        return _operation(row.operation)
    if group_by is By.SIMULATED:
        return "simulated" if row.scope.simulated else "genuine"
    return str(getattr(row.scope, group_by.value))


def units(used: usage_pb2.Usage) -> list[str]:
    """Tokens, pages and bytes; empty where there are none."""
    return [f"{n:,}" if n else "" for n in (used.tokens, used.pages, used.bytes)]


def moment(text: str) -> datetime:
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


# --- holds -----------------------------------------------------------------------------------


@command(app)
async def holds(
    session: Session,
    request_id: Annotated[str, typer.Option(help="Only holds of this request.")] = "",
    state: Annotated[State | None, typer.Option(help="Only holds in this state.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=100_000, help="How many at the most.")] = 50,
) -> None:
    """List what was held for a tenant's calls, and what each was charged: the newest first."""
    found = cost_pb2.ListHoldsResponse()
    async with session.ledger() as ledger:
        async for hold in each_hold(ledger, session.tenant, request_id, state):
            found.holds.append(hold)
            if len(found.holds) >= limit:
                break
    session.terminal.answer(found)
    session.terminal.show(
        hold_table({"": found.holds}, with_time=session.terminal.width >= _WIDE)
        if found.holds
        else "no holds"
    )


async def each_hold(
    ledger: Caller, tenant: str, request_id: str = "", state: State | None = None
) -> AsyncIterator[cost_pb2.Hold]:
    """Every hold of a tenant, or of one request of its, the newest first."""
    request = cost_pb2.ListHoldsRequest(tenant=tenant, request_id=request_id, page_size=PAGE)
    if state is not None:
        request.state = cost_pb2.HoldState.Value(f"HOLD_STATE_{state.name}")
    stub = cost_pb2_grpc.CostServiceStub(ledger.channel)
    while True:
        page = await ledger.unary(stub.ListHolds, request)
        for hold in page.holds:
            yield hold
        if not page.next_page_token:
            return
        request.page_token = page.next_page_token


def hold_table(groups: Mapping[str, Sequence[cost_pb2.Hold]], *, with_time: bool) -> Any:
    """Holds for people: what was asked of whom, the units, what was held and what was charged.

    Each group stands under its title, where it has one.
    """
    listed = [hold for holds_ in groups.values() for hold in holds_]
    held = iter(_amounts([hold.held_nanos_usd for hold in listed]))
    charged = iter(_amounts([hold.charged_nanos_usd for hold in listed]))
    rows: list[list[Any]] = []
    for title, holds_ in groups.items():
        if title:
            rows.append([*([""] if with_time else []), Text(title, style="bold"), *[""] * 5])
        for hold in holds_:
            is_open = hold.state == cost_pb2.HOLD_STATE_HELD
            was_held, was_charged = next(held), next(charged)
            rows.append(
                [
                    *([local_time(hold.create_time)[5:]] if with_time else []),
                    f"{hold.scope.service} {_operation(hold.operation)}",
                    provider_of(hold),
                    used(hold),
                    was_held,
                    "" if is_open else was_charged,
                    hold_state(hold),
                ]
            )
    columns = ("=step", "~provider", ">used", ">held", ">charged", "=state")
    return table(*(["=at"] if with_time else []), *columns, rows=rows)


def _amounts(nanos: list[int]) -> list[str]:
    """A column of amounts in which nothing is a plain 0, so that something stands out."""
    return [text if n else "0" for n, text in zip(nanos, usd_column(nanos), strict=True)]


def provider_of(hold: cost_pb2.Hold) -> str:
    """The provider and, where it has one, its model."""
    model = f" {hold.scope.model}" if hold.scope.model else ""
    return f"{hold.scope.provider}{model}" + (" (simulated)" if hold.scope.simulated else "")


def used(hold: cost_pb2.Hold) -> str:
    """What a hold's call used, or may use while it is open: `412 tokens`."""
    usage_ = hold.usage if hold.state == cost_pb2.HOLD_STATE_SETTLED else hold.bound
    # In the order in which they tell; every call is a request and moves some bytes.
    for name in ("tokens", "pages", "bytes", "requests"):
        if value := getattr(usage_, name):
            if name == "bytes":
                return size(value)
            noun = "calls" if name == "requests" else name
            return f"{value:,} {noun if value != 1 else noun[:-1]}"
    return ""


def hold_state(hold: cost_pb2.Hold) -> str:
    """Where a hold stands, and what is unusual about it."""
    state = lower(cost_pb2.HoldState.Name(hold.state), "HOLD_STATE_")
    unusual = [word for word, is_so in (("unconfirmed", hold.unconfirmed),) if is_so]
    if hold.overrun_nanos_usd:
        unusual.append(f"overrun {usd(hold.overrun_nanos_usd)}")
    return f"{state} ({', '.join(unusual)})" if unusual else state


def hold_dicts(found: Iterable[cost_pb2.Hold]) -> list[dict[str, Any]]:
    """Holds for programs."""
    return [as_dict(hold) for hold in found]
