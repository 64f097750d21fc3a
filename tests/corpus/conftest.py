"""The corpus's own database: migrated, and used as the role that the daemon has."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from tempfile import TemporaryDirectory

import asyncpg
import pytest
import pytest_asyncio

from chassis.database import room_pool
from chassis.postgres import Pool
from chassis.server import Daemon
from chassis.settings import MeshSettings
from services.corpus.core import Changes
from services.corpus.jobs import JobQueue, install
from services.corpus.store import MIGRATIONS, ROLE, ROOM, Store, prepare
from services.cost import main as cost
from services.embedder import main as embedder
from services.parser import main as parser
from services.router import main as router
from services.storage import main as storage


@pytest_asyncio.fixture
async def pool(mesh: MeshSettings, database_url: str) -> AsyncIterator[Pool]:
    """Connections to a fresh corpus, as its role."""
    async with room_pool(mesh, ROOM, MIGRATIONS, prepare=prepare) as pool:
        await install(database_url, role=ROLE)
        yield pool


@pytest.fixture
def store(pool: Pool) -> Store:
    """The corpus's tables, empty."""
    return Store(pool, JobQueue(), Changes())


@pytest.fixture
def cut_all(database_url: str) -> Callable[[], Awaitable[None]]:
    """Ends every connection of the corpus to its database, as a server does that goes down."""

    async def cut() -> None:
        connection = await asyncpg.connect(database_url)
        try:
            await connection.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                "WHERE datname = current_database() AND application_name LIKE 'tollgate-corpus%'"
            )
        finally:
            await connection.close()

    return cut


@dataclass
class Rooms:
    """Every room but the corpus, served by this process on unix sockets; the corpus has its own."""

    mesh: MeshSettings
    daemons: dict[str, Daemon]


@pytest_asyncio.fixture
async def rooms(mesh: MeshSettings) -> AsyncIterator[Rooms]:
    """The other rooms, on this test's own database."""
    with TemporaryDirectory(prefix="tg-") as directory:
        at = {
            room: f"unix:{directory}/{room}"
            for room in ("router", "cost", "parser", "embedder", "storage", "corpus")
        }
        placed = mesh.model_copy(update={f"{room}_address": at[room] for room in at})
        daemons: dict[str, Daemon] = {}
        async with AsyncExitStack() as stack:
            for room in (cost, storage, embedder, parser, router):
                name = room.__name__.split(".")[1]
                settings = room.Settings(listen=at[name])
                daemons[name] = await stack.enter_async_context(room.wire(placed, settings))
            yield Rooms(placed, daemons)


@pytest.fixture
def whole_mesh(rooms: Rooms) -> MeshSettings:
    """Where the rooms are."""
    return rooms.mesh
