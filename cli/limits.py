"""`tollgate limits`: what may be spent."""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum
from typing import Annotated, Any

import typer
from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.timestamp_pb2 import Timestamp
from rich.text import Text
from tollgate.cost.v1 import limit_pb2, limit_pb2_grpc

from cli.caller import PAGE_SIZE
from cli.command import Misused, Session, command, group
from cli.money import parse_usd, usd
from cli.terminal import local_time, lower, table

app = typer.Typer()
limits = group("What may be spent: budgets, quotas and rate limits.")
app.add_typer(limits, name="limits")

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
        request = limit_pb2.ListLimitsRequest(page_size=PAGE_SIZE, tenant=session.tenant_given)
        async for page in ledger.pages(stub.ListLimits, request):
            found.limits.extend(page.limits)
            found.consumption.extend(page.consumption)
    session.terminal.answer(found)
    wide = session.terminal.width >= _WIDE
    rows = [r for lim in found.limits for r in _limit_rows(lim, found.consumption, wide=wide)]
    session.terminal.show(
        _limit_table(rows, wide=wide)
        if rows
        else "no limits: `tollgate limits add ID --max-usd 20 --window day` makes one"
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
    """Change a limit's maximum, enforcement, name or alerts: limits set default-day --max-usd 20"""
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


def _limit_rows(
    limit: limit_pb2.Limit, consumption: Iterable[limit_pb2.LimitConsumption], *, wide: bool
) -> list[list[Any]]:
    maximum = _amount(limit.maximum, limit.metric)
    window = lower(limit_pb2.Window.Name(limit.window), "WINDOW_")
    kind = lower(limit_pb2.Enforcement.Name(limit.enforcement), "ENFORCEMENT_")
    scope = _scope(limit.scope)
    counters = [c for c in consumption if c.limit_id == limit.id]
    if not counters:
        bar = _bar(0, 0, limit.maximum)
        return [[limit.id, scope, "", "", maximum, bar, f"{window}, {kind}"]]
    rows = []
    for number, c in enumerate(counters):
        first = number == 0
        used = _amount(c.held + c.settled, limit.metric)
        bar = _bar(c.settled, c.held, limit.maximum)
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


def _told(limit: limit_pb2.Limit) -> str:
    window = lower(limit_pb2.Window.Name(limit.window), "WINDOW_")
    kind = lower(limit_pb2.Enforcement.Name(limit.enforcement), "ENFORCEMENT_")
    per = "ever" if limit.window == limit_pb2.WINDOW_LIFETIME else f"a {window}"
    return f"{_amount(limit.maximum, limit.metric)} {per}, {kind}, for {_scope(limit.scope)}"


def _amount(value: int, metric: limit_pb2.Metric.ValueType) -> str:
    """A value of a limit in its metric's unit."""
    if metric == limit_pb2.METRIC_COST:
        return usd(value)
    return f"{value:,} {lower(limit_pb2.Metric.Name(metric), 'METRIC_')}"


def _bar(settled: int, held: int, maximum: int) -> Text:
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
