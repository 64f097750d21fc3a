"""The storage daemon: `python -m services.storage.main`."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress

from pydantic import Field
from tollgate.storage.v1 import object_pb2_grpc, vector_pb2_grpc

from chassis.database import room_pool
from chassis.errors import ProviderUnavailable, TollgateError
from chassis.server import Daemon, StartError, launch
from chassis.settings import Address, MeshSettings, RoomSettings, room_config
from services.storage import providers
from services.storage.core import Blobs, Catalog, Objects
from services.storage.names import PageTokens
from services.storage.provider import Means, Provider
from services.storage.service import ObjectService, VectorService
from services.storage.store import MIGRATIONS, ROOM, PostgresCatalog, PostgresVectors, prepare

OBJECTS = "tollgate.storage.v1.ObjectService"
VECTORS = "tollgate.storage.v1.VectorService"

log = logging.getLogger(__name__)


class Settings(RoomSettings):
    """Settings of storage, under TOLLGATE_STORAGE_."""

    model_config = room_config("storage")

    listen: Address = Field("127.0.0.1:50054", description="Where storage listens.")
    object_bytes_max: int = Field(5 << 30, ge=1, description="The largest object.")
    free_bytes_min: int = Field(
        64 << 20, ge=0, description="The free disk space below which no object is written."
    )
    sweep_s: float = Field(
        3_600.0, gt=0, description="How often bytes that no object names are collected."
    )
    sweep_age_s: float = Field(
        3_600.0, ge=0, description="How old such bytes are before they are collected."
    )
    exact_components_max: int = Field(
        1_000_000,
        ge=1,
        description="Vectors times dimensions up to which a collection is searched exactly.",
    )
    scan_vectors_max: int = Field(
        50_000, ge=1, description="Vectors that a search by index looks at before it gives up."
    )
    spaces_max: int = Field(1_000, ge=1, description="The most spaces.")
    mock_bytes_max: int = Field(
        256 << 20, ge=1, description="The most bytes of objects that the mock keeps."
    )
    mock_vectors_max: int = Field(
        100_000, ge=1, description="The most vectors that the mock keeps."
    )
    pool_max: int = Field(8, ge=1, description="The most connections to the database.")


@asynccontextmanager
async def wire(mesh: MeshSettings, settings: Settings) -> AsyncIterator[Daemon]:
    """Start storage; the daemon serves until the context ends."""
    async with room_pool(
        mesh, ROOM, MIGRATIONS, size_max=settings.pool_max, prepare=prepare
    ) as pool:
        means = Means(
            objects_dir=mesh.state_dir / "objects",
            free_bytes_min=settings.free_bytes_min,
            memory_bytes_max=settings.mock_bytes_max,
            memory_vectors_max=settings.mock_vectors_max,
            catalog=lambda provider: PostgresCatalog(pool, provider),
            vector_store=PostgresVectors(
                pool,
                exact_components_max=settings.exact_components_max,
                scan_vectors_max=settings.scan_vectors_max,
                spaces_max=settings.spaces_max,
            ),
            objects=_rules(mesh.secret, settings.object_bytes_max),
        )
        served = _provided(means)
        daemon = Daemon(ROOM, mesh, listen=settings.listen)
        object_pb2_grpc.add_ObjectServiceServicer_to_server(ObjectService(served), daemon.server)
        vector_pb2_grpc.add_VectorServiceServicer_to_server(VectorService(served), daemon.server)
        daemon.serves(OBJECTS, providers=[p.name for p in served if p.objects])
        daemon.serves(VECTORS, providers=[p.name for p in served if p.vectors])
        sweeping = asyncio.create_task(_sweep(served, settings))
        try:
            async with daemon.serving():
                yield daemon
        finally:
            sweeping.cancel()
            with suppress(asyncio.CancelledError):
                await sweeping


def _provided(means: Means) -> list[Provider]:
    """Every provider that there is; genuine ones first, so that they are what serves by default."""
    try:
        found = [providers.provided(name, means) for name in providers.names()]
    except ProviderUnavailable as error:
        raise StartError(f"{ROOM}: {error}: make {means.objects_dir} writable") from None
    return sorted(found, key=lambda provider: provider.simulated)


def _rules(secret: bytes, object_bytes_max: int) -> Callable[[Catalog, Blobs], Objects]:
    tokens = PageTokens(secret)
    return lambda catalog, blobs: Objects(catalog, blobs, tokens, object_bytes_max=object_bytes_max)


async def _sweep(served: Sequence[Provider], settings: Settings) -> None:
    """Collect, now and again, what crashes left behind."""
    while True:
        for provider in served:
            if provider.objects is None:
                continue
            try:
                swept = await provider.objects.sweep(settings.sweep_age_s)
            except TollgateError as error:
                fields = {"provider": provider.name, "why": error.message}
                log.warning("sweep failed", extra={"fields": fields})
            except Exception:
                log.exception("sweep failed", extra={"fields": {"provider": provider.name}})
            else:
                log.info("swept", extra={"fields": {"provider": provider.name, "blobs": swept}})
        await asyncio.sleep(settings.sweep_s)


if __name__ == "__main__":
    launch(wire, Settings)
