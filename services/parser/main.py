"""The parser's settings, wiring and start."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager

from pydantic import Field
from tollgate.parser.v1 import parser_pb2, parser_pb2_grpc

from chassis.client import Peer
from chassis.server import Daemon, StartError, launch
from chassis.settings import Address, MeshSettings, RoomSettings, room_config
from services.parser import providers
from services.parser.clients import Documents
from services.parser.core import Memory, Provider
from services.parser.service import ParserService

SERVICE = parser_pb2.DESCRIPTOR.services_by_name["ParserService"].full_name
HEALTH_EVERY_S = 2.0
MIB = 1024 * 1024


class ParserSettings(RoomSettings):
    """The parser's own settings; those of each provider are in its file."""

    model_config = room_config("parser")

    listen: Address = Field("127.0.0.1:50052", description="Where the parser listens.")
    default_provider: str = Field("local", description="The provider of calls that name none.")
    document_bytes_max: int = Field(
        256 * MIB, ge=1024, description="The largest document that is read."
    )
    documents_held_bytes_max: int = Field(
        1024 * MIB, ge=1024, description="All documents being parsed together, in bytes."
    )
    storage_timeout_s: float = Field(
        120.0, gt=0, le=3600, description="How long reading a stored document may take."
    )


Settings = providers.settings(ParserSettings)


@asynccontextmanager
async def wire(mesh: MeshSettings, settings: ParserSettings) -> AsyncIterator[Daemon]:
    """Start the parser; it serves until the context ends."""
    async with AsyncExitStack() as stack:
        offered = await _started(stack, settings)
        storage = Peer(mesh.router_address, mesh)
        stack.push_async_callback(storage.close)
        documents = Documents(
            storage,
            Memory(settings.documents_held_bytes_max),
            settings.document_bytes_max,
            settings.storage_timeout_s,
        )
        daemon = Daemon("parser", mesh, listen=settings.listen)
        parser_pb2_grpc.add_ParserServiceServicer_to_server(
            ParserService(offered, documents.fetch), daemon.server
        )
        daemon.serves(SERVICE, providers=offered)
        async with daemon.serving():
            watch = asyncio.create_task(_tell_health(daemon, offered))
            stack.callback(watch.cancel)
            yield daemon


async def _started(stack: AsyncExitStack, settings: ParserSettings) -> Mapping[str, Provider]:
    try:
        offered = providers.create(settings, settings.default_provider)
    except ValueError as error:
        raise StartError(f"parser: {error}") from None
    for provider in offered.values():
        stack.push_async_callback(provider.stop)
        await provider.start()
    return offered


async def _tell_health(daemon: Daemon, offered: Mapping[str, Provider]) -> None:
    """Keep each provider's health on the wire."""
    while True:
        for name, provider in offered.items():
            await daemon.set_health(f"{SERVICE}/{name}", serving=provider.healthy)
        await asyncio.sleep(HEALTH_EVERY_S)


if __name__ == "__main__":
    launch(wire, Settings)
