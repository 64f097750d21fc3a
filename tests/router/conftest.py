"""A gate before real daemons: ledger, embedder mock, and a stand-in that fails as it is told."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import pytest

from chassis.settings import MeshSettings
from services.cost import main as cost
from services.embedder import main as embedder
from services.router import main as router
from tests.router.router_standing import TOKEN_NANOS, Standing, stand_in


@pytest.fixture
async def standing(mesh: MeshSettings) -> AsyncIterator[Standing]:
    """Router, ledger, the embedder's mock (kind MOCK) and a stand-in (provider `fickle`, REAL)."""
    async with started(mesh) as found:
        yield found


@asynccontextmanager
async def started(
    mesh: MeshSettings, *, priced: bool = True, **settings: object
) -> AsyncIterator[Standing]:
    """The same with other settings of the router, or without a price of the stand-in's."""
    async with AsyncExitStack() as stack:
        ledger = await stack.enter_async_context(
            cost.wire(mesh, cost.Settings(listen="127.0.0.1:0"))
        )
        mesh = mesh.model_copy(update={"cost_address": ledger.address})
        mock = await stack.enter_async_context(
            embedder.wire(mesh, embedder.Settings(listen="127.0.0.1:0", providers="mock"))
        )
        fickle, address = await stack.enter_async_context(stand_in(mesh))
        service = "tollgate.embedder.v1.EmbedderService"
        backends = [
            {"service": service, "provider": "fickle", "kind": "REAL", "address": address},
            {"service": service, "provider": "mock", "kind": "MOCK", "address": mock.address},
        ]
        own = router.Settings.model_validate(
            {"listen": "127.0.0.1:0", "backends": backends} | settings
        )
        gate = await stack.enter_async_context(router.wire(mesh, own))
        standing = Standing(mesh, gate.address, fickle)
        stack.push_async_callback(standing.close)
        await standing.ready()
        if priced:
            await standing.price("fickle", TOKEN_NANOS * 1_000_000)
        yield standing
