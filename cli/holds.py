"""`tollgate holds`: what was held for each call, and what it was charged."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from enum import StrEnum
from typing import Annotated, Any

import typer
from rich.text import Text
from tollgate.cost.v1 import cost_pb2, cost_pb2_grpc

from cli.caller import PAGE_SIZE, Caller
from cli.command import Session, command
from cli.money import usd, usd_column
from cli.terminal import local_time, lower, operation, size, table

app = typer.Typer()

_WIDE = 110


class State(StrEnum):
    """Where a hold stands."""

    HELD = "held"
    SETTLED = "settled"
    RELEASED = "released"
    EXPIRED = "expired"


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
    ledger: Caller, tenant: str, request_id: str, state: State | None = None
) -> AsyncIterator[cost_pb2.Hold]:
    """Every hold of a tenant, of one request of its where that is named, the newest first."""
    request = cost_pb2.ListHoldsRequest(tenant=tenant, request_id=request_id, page_size=PAGE_SIZE)
    if state is not None:
        request.state = cost_pb2.HoldState.Value(f"HOLD_STATE_{state.name}")
    stub = cost_pb2_grpc.CostServiceStub(ledger.channel)
    async for page in ledger.pages(stub.ListHolds, request):
        for hold in page.holds:
            yield hold


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
                    f"{hold.scope.service} {operation(hold.operation)}",
                    _provider_of(hold),
                    _used(hold),
                    was_held,
                    "" if is_open else was_charged,
                    _state_of(hold),
                ]
            )
    columns = ("=step", "~provider", ">used", ">held", ">charged", "=state")
    return table(*(["=at"] if with_time else []), *columns, rows=rows)


def _amounts(nanos: list[int]) -> list[str]:
    """A column of amounts in which nothing is a plain 0, so that something stands out."""
    return [text if n else "0" for n, text in zip(nanos, usd_column(nanos), strict=True)]


def _provider_of(hold: cost_pb2.Hold) -> str:
    """The provider and, where it has one, its model."""
    model = f" {hold.scope.model}" if hold.scope.model else ""
    return f"{hold.scope.provider}{model}" + (" (simulated)" if hold.scope.simulated else "")


def _used(hold: cost_pb2.Hold) -> str:
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


def _state_of(hold: cost_pb2.Hold) -> str:
    """Where a hold stands, and what is unusual about it."""
    state = lower(cost_pb2.HoldState.Name(hold.state), "HOLD_STATE_")
    unusual = ["unconfirmed"] if hold.unconfirmed else []
    if hold.overrun_nanos_usd:
        unusual.append(f"overrun {usd(hold.overrun_nanos_usd)}")
    return f"{state} ({', '.join(unusual)})" if unusual else state
