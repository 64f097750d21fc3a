"""`tollgate backends|mode|health`: which backends serve, and whether all is well."""

from __future__ import annotations

import asyncio
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Annotated

import grpc
import typer
from grpc_health.v1 import health_pb2
from rich.text import Text
from tollgate.router.v1 import router_pb2, router_pb2_grpc

from chassis.client import channel
from chassis.errors import TollgateError
from cli.caller import Unreachable
from cli.command import Failed, Session, command
from cli.supervisor import ROOMS, check
from cli.terminal import local_time, lower, table

app = typer.Typer()

_SERVICES = {
    "cost": ("CostService", "LimitService", "PriceService", "UsageService"),
    "storage": ("ObjectService", "VectorService"),
    "parser": ("ParserService",),
    "embedder": ("EmbedderService",),
    "router": ("RouterService",),
    "corpus": ("CorpusService",),
}
_COLOURS = {"SERVING": "green", "NOT_SERVING": "red", "UNREACHABLE": "red"}


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
            _coloured(router_pb2.BackendHealth.Name(b.health).removeprefix("BACKEND_HEALTH_")),
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


@dataclass(frozen=True)
class _Health:
    """What one daemon says of itself, or of one of its services and providers."""

    daemon: str
    address: str
    service: str
    provider: str
    status: str


@command(app)
async def health(session: Session) -> None:
    """Ask every daemon, and each of its services and providers, whether it serves.

    The exit code is 0 where all do, 1 where one does not, 3 where nobody answers.
    """
    providers = await _providers(session)
    found = [
        line
        for lines in await asyncio.gather(*(_asked(session, r, providers) for r in ROOMS))
        for line in lines
    ]
    session.terminal.json([asdict(line) for line in found])
    rows = [
        [
            line.daemon if not line.service else "",
            f"{line.service}/{line.provider}" if line.provider else line.service or line.address,
            _coloured(line.status),
        ]
        for line in found
    ]
    session.terminal.show(table("daemon", "service", "health", rows=rows))
    if all(line.status == "UNREACHABLE" for line in found):
        raise Unreachable("no daemon answers")
    if unwell := [line for line in found if line.status != "SERVING"]:
        names = dict.fromkeys(
            f"{u.daemon}/{u.provider}" if u.provider else u.daemon for u in unwell
        )
        raise Failed(f"not serving: {', '.join(names)}", reason="unhealthy")


async def _providers(session: Session) -> dict[str, list[str]]:
    """The providers of each room, as the router knows them; none where it cannot be asked."""
    found: dict[str, list[str]] = {}
    try:
        async with session.router() as router:
            stub = router_pb2_grpc.RouterServiceStub(router.channel)
            answer = await router.unary(
                stub.ListBackends, router_pb2.ListBackendsRequest(), timeout_s=5
            )
        for backend in answer.backends:
            of_room = found.setdefault(backend.service, [])
            if backend.provider not in of_room:
                of_room.append(backend.provider)
    except (Unreachable, TollgateError):
        pass
    return found


async def _asked(session: Session, room: str, providers: dict[str, list[str]]) -> list[_Health]:
    address: str = getattr(session.mesh, f"{room}_address")
    names = [("", "")]
    for service in _SERVICES[room]:
        names.append((service, ""))
        # Providers stand behind the first service of a room that has them.
        names += [(service, provider) for provider in providers.get(room, [])]
    async with channel(address, session.mesh) as dialled:
        found = []
        for service, provider in names:
            full = f"tollgate.{room}.v1.{service}" if service else ""
            full += f"/{provider}" if provider else ""
            try:
                request = health_pb2.HealthCheckRequest(service=full)
                answer = await check(dialled)(request, timeout=5)
                status = health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)
            except grpc.aio.AioRpcError as error:
                if error.code() is grpc.StatusCode.NOT_FOUND:
                    continue  # The daemon keeps no health of its own for this one.
                status = "UNREACHABLE"
            found.append(_Health(room, address, service, provider, status))
            if status == "UNREACHABLE":
                break
    return found


def _coloured(status: str) -> Text:
    return Text(status.lower().replace("_", " "), style=_COLOURS.get(status, "yellow"))
