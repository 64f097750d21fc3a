"""`tollgate health`: whether all is well."""

from __future__ import annotations

import asyncio
from dataclasses import asdict, dataclass

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
from cli.terminal import table

app = typer.Typer()

_OWN = {
    "cost": ("CostService", "LimitService", "PriceService", "UsageService"),
    "storage": ("ObjectService", "VectorService"),
    "parser": ("ParserService",),
    "embedder": ("EmbedderService",),
    "router": ("RouterService",),
    "corpus": ("CorpusService",),
}
_FRONTED = ("parser", "embedder", "storage", "corpus")


def _services(room: str) -> list[str]:
    """The full names of what a daemon has a health of; the router has one of all that it fronts."""
    rooms = [room, *(_FRONTED if room == "router" else ())]
    return [f"tollgate.{of}.v1.{service}" for of in rooms for service in _OWN[of]]


_COLOURS = {"SERVING": "green", "NOT_SERVING": "red", "UNREACHABLE": "red"}


@dataclass(frozen=True)
class _Health:
    """What one daemon says of itself, or of a service (by its full name) or a provider of it."""

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
            coloured(line.status),
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
    for service in _services(room):
        names.append((service, ""))
        # Providers stand behind the first service of a room that has them.
        names += [(service, provider) for provider in providers.get(room, [])]
    async with channel(address, session.mesh) as dialled:
        found = []
        for service, provider in names:
            full = f"{service}/{provider}" if provider else service
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


def coloured(status: str) -> Text:
    """`NOT_SERVING` as a red `not serving`."""
    return Text(status.lower().replace("_", " "), style=_COLOURS.get(status, "yellow"))
