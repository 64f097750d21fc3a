"""A ledger on a fresh database, and others beside it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from uuid import uuid4

import pytest_asyncio

from chassis import postgres
from chassis.postgres import Pool
from services.cost.core.holds import Action, Authorization, Decision, Hold, Resolution, Result
from services.cost.core.prices import NOW, Price, Unit
from services.cost.core.usage import Scope, Usage
from services.cost.main import MIGRATIONS
from services.cost.store.accounts import Accounts
from services.cost.store.catalog import CatalogStore
from services.cost.store.ledger import Ledger
from services.cost.store.reports import Reports

SCOPE = Scope("acme", "web", "embedder", "mock", "small", "pkg.Service/Embed", False)
# A nano-dollar a token.
PRICES = [Price("mock", "*", "*", Unit.TOKENS, 1_000_000, NOW, "a test")]


@dataclass
class Replica:
    """One process's worth of ledger."""

    pool: Pool
    catalog: CatalogStore
    ledger: Ledger
    reports: Reports

    async def decide(self, *orders: Authorization | Resolution) -> list[Result]:
        return await self.ledger.decide(list(orders))

    async def held(self, tokens: int = 10, *, scope: Scope = SCOPE, ttl_s: float = 60) -> Hold:
        """A hold that must be admitted."""
        (result,) = await self.decide(authorization(tokens, scope=scope, ttl_s=ttl_s))
        assert isinstance(result, Decision), result
        assert result.hold.denial is None
        return result.hold

    async def adds_up(self) -> None:
        """Counters, rollups and holds all agree with the entries."""
        assert await self.reports.parity(everything=True) == []
        assert await self.reports.faults() == {"rollups": 0, "holds": 0}


def authorization(
    tokens: int, *, hold_id: str = "", scope: Scope = SCOPE, ttl_s: float = 60, request_id: str = ""
) -> Authorization:
    bound = Usage(tokens, 0, 0, 1)
    return Authorization(hold_id or str(uuid4()), scope, bound, int(ttl_s * 1000), request_id)


def settle(hold: Hold, tokens: int) -> Resolution:
    usage = Usage(tokens, 0, 0, 1)
    return Resolution(Action.SETTLE, hold.account.scope.tenant, hold.id, usage)


def release(hold: Hold) -> Resolution:
    return Resolution(Action.RELEASE, hold.account.scope.tenant, hold.id)


@asynccontextmanager
async def replica(
    url: str, *, orders_max: int = 256, batches_max: int = 2
) -> AsyncIterator[Replica]:
    """A ledger with a pool of its own on a migrated database."""
    pool = await postgres.connect_pool(url, role="tollgate_cost", schema="cost", max_size=6)
    catalog, accounts = CatalogStore(pool), Accounts()
    ledger = Ledger(
        pool,
        catalog,
        accounts,
        orders_max=orders_max,
        batches_max=batches_max,
        waiting_max=10_000,
    )
    try:
        yield Replica(pool, catalog, ledger, Reports(pool, catalog, accounts))
    finally:
        await ledger.close()
        pool.terminate()


@pytest_asyncio.fixture
async def ledger_url(database_url: str) -> str:
    """A migrated database with a price."""
    await postgres.migrate(database_url, room="cost", directory=MIGRATIONS)
    async with replica(database_url) as first:
        await first.catalog.add_prices(PRICES)
        await first.ledger.make_partitions()
    return database_url


@pytest_asyncio.fixture
async def ledger(ledger_url: str) -> AsyncIterator[Replica]:
    """A ledger with the default limits."""
    async with replica(ledger_url) as one:
        yield one
