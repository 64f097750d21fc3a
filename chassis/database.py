"""A room's database, from the settings: the configured one, or the embedded one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from chassis.embedded import EmbeddedPostgres
from chassis.postgres import Pool, connect_pool, migrate
from chassis.settings import MeshSettings

CLOSE_TIMEOUT_S = 5.0


@asynccontextmanager
async def database(mesh: MeshSettings) -> AsyncIterator[str]:
    """The url of the mesh's database, as its owner.

    Where none is configured, the embedded server of the state directory: started, or attached to
    where another process runs it. Raises EmbeddedPostgresError.
    """
    if mesh.database_url is not None:
        yield mesh.database_url.get_secret_value()
        return
    with EmbeddedPostgres.start(mesh.state_dir / "postgres") as server:
        yield server.url


@asynccontextmanager
async def room_pool(
    mesh: MeshSettings,
    room: str,
    migrations: Path,
    *,
    size_max: int = 8,
    prepare: Callable[[Any], Awaitable[None]] | None = None,
) -> AsyncIterator[Pool]:
    """The migrated database of a room, as a pool of connections that act as `tollgate_<room>`.

    `prepare` is called with each new connection, for codecs.
    """
    async with database(mesh) as url:
        direct = mesh.database_direct_url
        await migrate(direct.get_secret_value() if direct else url, room=room, directory=migrations)
        pool = await connect_pool(
            url,
            role=f"tollgate_{room}",
            schema=room,
            max_size=size_max,
            pooled=mesh.database_pooled,
            prepare=prepare,
        )
        try:
            yield pool
        finally:
            try:
                async with asyncio.timeout(CLOSE_TIMEOUT_S):
                    await pool.close()
            except TimeoutError:
                pool.terminate()
