"""A real PostgreSQL for every test that asks: one server a session, one fresh database a test."""

from __future__ import annotations

import shutil
import signal
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit
from uuid import uuid4

import asyncpg
import pytest
import pytest_asyncio
from pydantic import SecretStr

from chassis.call import Call, calling
from chassis.embedded import EmbeddedPostgres
from chassis.settings import MeshSettings

# A shell that runs the tests in the background has SIGINT ignored, and every process that a test
# starts would inherit that: Ctrl-C could not be tried.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Its data is thrown away with the session, so nothing waits for the disk.
_THROWAWAY = {"fsync": "off", "synchronous_commit": "off", "full_page_writes": "off"}


@pytest.fixture(scope="session")
def postgres_url() -> Iterator[str]:
    """The url, as superuser, of this session's own embedded server."""
    directory = Path(tempfile.mkdtemp(prefix="tollgate-tests-"))
    try:
        with EmbeddedPostgres.start(directory, settings=_THROWAWAY) as server:
            yield server.url
    finally:
        shutil.rmtree(directory, ignore_errors=True)


@pytest_asyncio.fixture
async def database_url(postgres_url: str) -> AsyncIterator[str]:
    """The url, as superuser, of a fresh empty database that is dropped after the test.

    Roles belong to the whole server: those that a migration made stay for the next test.
    """
    name = f"test_{uuid4().hex}"
    connection = await asyncpg.connect(postgres_url)
    try:
        await connection.execute(f"CREATE DATABASE {name} STRATEGY FILE_COPY")
        yield urlunsplit(urlsplit(postgres_url)._replace(path=f"/{name}"))
        await connection.execute(f"DROP DATABASE {name} WITH (FORCE)")
    finally:
        await connection.close()


@pytest.fixture
def mesh_without_database(tmp_path: Path) -> MeshSettings:
    """Settings of a mesh of this test's own, for rooms that keep nothing."""
    return MeshSettings(
        state_dir=tmp_path / "state",
        mesh_secret=SecretStr("a secret of this test"),
        grace_s=2.0,
    )


@pytest.fixture
def mesh(mesh_without_database: MeshSettings, database_url: str) -> MeshSettings:
    """Settings of a mesh of this test's own, on a fresh database."""
    return mesh_without_database.model_copy(update={"database_url": SecretStr(database_url)})


@pytest.fixture
def as_tenant() -> Iterator[Call]:
    """Make the test's own calls on behalf of the tenant `acme`."""
    with calling(Call(tenant="acme", request_id=f"test-{uuid4().hex}")) as call:
        yield call
