"""A real storage daemon for every test that asks, on a fresh database and directory."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from chassis.server import Daemon
from chassis.settings import MeshSettings
from services.storage.main import Settings, wire
from tests.storage.storage_caller import Caller, calling_as


@pytest_asyncio.fixture
async def storage(mesh: MeshSettings) -> AsyncIterator[Daemon]:
    """The daemon, with limits that a test can reach."""
    settings = Settings(listen="127.0.0.1:0", object_bytes_max=64 << 20, mock_bytes_max=32 << 20)
    async with wire(mesh, settings) as daemon:
        yield daemon


@pytest_asyncio.fixture(params=["filesystem", "mock"])
async def acme(
    request: pytest.FixtureRequest, storage: Daemon, mesh: MeshSettings
) -> AsyncIterator[Caller]:
    """The tenant `acme` with a bucket `docs`, once for each provider of objects."""
    async with calling_as(storage.address, mesh, provider=request.param) as caller:
        await caller.bucket()
        yield caller


@pytest_asyncio.fixture(params=["pgvector", "mock"])
async def finder(
    request: pytest.FixtureRequest, storage: Daemon, mesh: MeshSettings
) -> AsyncIterator[Caller]:
    """The tenant `acme` with a genuine space `s` of 3 dimensions, once for each provider."""
    async with calling_as(storage.address, mesh, provider=request.param) as caller:
        await caller.space()
        yield caller
