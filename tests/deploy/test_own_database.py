"""The statements of the page for operators are all that a PostgreSQL of one's own needs."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from importlib import import_module
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

import asyncpg
import pytest_asyncio
from pydantic import SecretStr

from chassis.embedded import EmbeddedPostgres
from chassis.settings import MeshSettings
from tests.deploy.variables import ROOT, settings_of

PREPARED = re.search(r"```sql\n(.*?)```", (ROOT / "docs" / "operations.md").read_text(), re.DOTALL)


@pytest_asyncio.fixture
async def prepared_url(tmp_path: Path) -> AsyncIterator[str]:
    """The url, as its plain owner, of a database that an administrator made as the page says.

    On a server of its own: roles belong to a server, and no other test may have made them.
    """
    assert PREPARED is not None
    statements = re.sub(r"\btollgate\b", "prepared", PREPARED[1]).replace("choose one", "chosen")
    on_server, on_database = re.split(r"^--.*$", statements, flags=re.MULTILINE)
    with EmbeddedPostgres.start(tmp_path / "postgres", settings={"fsync": "off"}) as server:
        url = urlsplit(server.url)
        administrator = await asyncpg.connect(server.url)
        for statement in filter(str.strip, on_server.split(";")):
            await administrator.execute(statement)
        await administrator.close()
        administrator = await asyncpg.connect(urlunsplit(url._replace(path="/prepared")))
        await administrator.execute(on_database)
        await administrator.close()
        place = url.netloc.rpartition("@")[2]
        yield urlunsplit(url._replace(netloc=f"prepared:chosen@{place}", path="/prepared"))


async def test_every_room_starts_on_a_database_prepared_as_the_page_says(
    mesh_without_database: MeshSettings, prepared_url: str
) -> None:
    """A plain user, made and given a database by the page's statements, runs all four rooms."""
    mesh = mesh_without_database.model_copy(update={"database_url": SecretStr(prepared_url)})
    async with AsyncExitStack() as stack:
        for room in ("cost", "storage", "router", "corpus"):
            own = settings_of(room)(listen="127.0.0.1:0")
            await stack.enter_async_context(import_module(f"services.{room}.main").wire(mesh, own))
        connection = await asyncpg.connect(prepared_url)
        rows = await connection.fetch("SELECT nspname FROM pg_namespace")
        await connection.close()
    assert {"cost", "storage", "router", "corpus"} <= {row["nspname"] for row in rows}
