"""`tollgate backends|mode`: which backends there are, and which may serve."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer
from tollgate.router.v1 import router_pb2, router_pb2_grpc

from cli.command import Session, command
from cli.health import coloured
from cli.terminal import local_time, lower, table

app = typer.Typer()


class Mode(StrEnum):
    """Which backends of a service may serve."""

    MOCK = "mock"
    REAL = "real"
    HYBRID = "hybrid"


class Service(StrEnum):
    """A service that has a mode of its own."""

    PARSER = "parser"
    EMBEDDER = "embedder"
    STORAGE = "storage"


@command(app)
async def backends(
    session: Session,
    service: Annotated[str, typer.Option(help="Only this service's.")] = "",
) -> None:
    """List every backend that the router knows, with its health."""
    async with session.router() as router:
        stub = router_pb2_grpc.RouterServiceStub(router.channel)
        request = router_pb2.ListBackendsRequest(service=service)
        found = await router.unary(stub.ListBackends, request)
    session.terminal.answer(found)
    rows = [
        [
            b.service,
            b.provider,
            lower(router_pb2.BackendKind.Name(b.kind), "BACKEND_KIND_"),
            coloured(router_pb2.BackendHealth.Name(b.health).removeprefix("BACKEND_HEALTH_")),
            b.address,
            f"{b.in_flight:,}",
            f"{b.calls:,}",
            f"{b.failures:,}",
            f"{b.latency_ms:.1f} ms" if b.calls else "",
        ]
        for b in found.backends
    ]
    columns = ("=service", "~provider", "=kind", "=health", "=address")
    numbers = (">now", ">calls", ">failed", ">median")
    session.terminal.show(table(*columns, *numbers, rows=rows) if rows else "no backends")


@command(app)
async def mode(
    session: Session,
    wanted: Annotated[
        Mode | None,
        typer.Argument(
            metavar="[mock|real|hybrid]", help="The mode to switch to.", show_default=False
        ),
    ] = None,
    service: Annotated[
        Service | None, typer.Option(help="Only this service; all of them when absent.")
    ] = None,
) -> None:
    """Show which backends may serve, or switch.

    mock: simulated backends only. real: genuine ones only; a call fails when none can serve.
    hybrid: genuine ones, then simulated ones; every answer says which.
    """
    async with session.router() as router:
        stub = router_pb2_grpc.RouterServiceStub(router.channel)
        found: router_pb2.GetModeResponse | router_pb2.SetModeResponse
        if wanted is None:
            found = await router.unary(stub.GetMode, router_pb2.GetModeRequest())
        else:
            request = router_pb2.SetModeRequest(
                service=service.value if service else "",
                mode=router_pb2.Mode.Value(f"MODE_{wanted.name}"),
            )
            found = await router.unary(stub.SetMode, request)
    session.terminal.answer(found)
    rows = [
        [
            m.service,
            lower(router_pb2.Mode.Name(m.mode), "MODE_"),
            local_time(m.set_time) or "from the settings",
            m.set_by,
        ]
        for m in found.modes
        if wanted is not None or service is None or m.service == service.value
    ]
    session.terminal.show(table("service", "mode", "set", "by", rows=rows))
