"""The ledger's actor: whatever arrives while a batch is being decided is the next batch."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Final, TypeAlias

import asyncpg

from chassis.batching import Batcher
from chassis.errors import Internal, InvalidField, LedgerUnavailable
from chassis.postgres import Pool
from services.cost.core.holds import Action, Order, Resolution, Result
from services.cost.store.accounts import Accounts
from services.cost.store.batch import (
    Batch,
    BatchStore,
    CommitUnknownError,
    ItemFaultError,
    StaleCatalogError,
)
from services.cost.store.catalog import CatalogStore
from services.cost.store.reach import is_away, reach, unavailable

log = logging.getLogger(__name__)

_TRIES_MAX: Final = 6
_LOST_TRIES_MAX: Final = 2
_PAUSE_S: Final = 0.05
_DUE: Final = """
SELECT id::text, tenant FROM holds WHERE state = 1 AND expire_time <= now()
ORDER BY expire_time LIMIT $1
"""
_PARTITIONS: Final = "SELECT make_entry_partitions($1)"
_DAYS_AHEAD: Final = 7

# The same batch may succeed when it is tried again: nothing of it was kept, or nobody knows.
_PASSING: Final = (
    StaleCatalogError,
    asyncpg.DeadlockDetectedError,
    asyncpg.SerializationError,
)

Work: TypeAlias = list[Order]


class Ledger:
    """Decides authorizations, settlements and releases, many at a time.

    A list of orders is one unit: it is decided in one batch, with whatever else waits. At most
    `orders_max` orders make a batch (a longer list travels alone), at most `batches_max` batches
    are under way, and at most `waiting_max` lists wait.
    """

    def __init__(
        self,
        pool: Pool,
        catalog: CatalogStore,
        accounts: Accounts,
        *,
        orders_max: int,
        batches_max: int,
        waiting_max: int,
        on_commit: Callable[[Batch], None] = lambda _: None,
    ) -> None:
        self._pool = pool
        self._catalog = catalog
        self._store = BatchStore(pool, accounts)
        self._on_commit = on_commit
        self._batcher: Batcher[Work, list[Result]] = Batcher(
            self._run,
            items_max=orders_max,
            waiting_max=waiting_max,
            weight=len,
            weight_max=orders_max,
            in_flight=batches_max,
        )

    async def decide(self, orders: Work) -> list[Result]:
        """The outcome of each order, or the error that it alone failed with.

        Raises Overloaded where too many wait. With the database away every order's result is
        LedgerUnavailable.
        """
        return await self._batcher.submit(orders)

    async def expire(self, count_max: int) -> int:
        """Charge open holds whose time has passed. Returns how many there were.

        Any number of processes may do this at once. Raises LedgerUnavailable.
        """
        async with reach(self._pool) as connection:
            due = await connection.fetch(_DUE, count_max)
        if due:
            await self.decide(
                [Resolution(Action.EXPIRE, tenant, hold_id) for hold_id, tenant in due]
            )
        return len(due)

    async def make_partitions(self) -> int:
        """Make the tables for the entries of the days ahead. Raises LedgerUnavailable."""
        async with reach(self._pool) as connection:
            made: int = await connection.fetchval(_PARTITIONS, _DAYS_AHEAD)
        return made

    async def close(self) -> None:
        """Refuse further orders, and return when those that wait have been decided."""
        await self._batcher.close()

    async def _run(self, works: list[Work]) -> list[list[Result] | Exception]:
        orders = works[0] if len(works) == 1 else [order for work in works for order in work]
        results = await self._decide(orders)
        answers: list[list[Result] | Exception] = []
        start = 0
        for work in works:
            answers.append(results[start : start + len(work)])
            start += len(work)
        return answers

    async def _decide(self, orders: Sequence[Order]) -> list[Result]:
        """Decide what can be decided: what the database refuses is halved until it stands alone."""
        try:
            return await self._try(orders)
        except Exception as error:
            if _is_lost(error):
                log.warning("the database is away", exc_info=error)
                return [unavailable() for _ in orders]
            if len(orders) == 1:
                return [_fault(error)]
            log.warning(
                "a batch failed and is halved",
                exc_info=error,
                extra={"fields": {"orders": len(orders)}},
            )
        half = len(orders) // 2
        return [*await self._decide(orders[:half]), *await self._decide(orders[half:])]

    async def _try(self, orders: Sequence[Order]) -> list[Result]:
        """Decide one batch. Raises what still fails when limits were read anew, and so on."""
        commits: set[datetime] = set()
        for tries in range(1, _TRIES_MAX + 1):
            try:
                batch = await self._store.run(orders, await self._catalog.get(), commits)
            except ItemFaultError as fault:
                place = fault.place
                others = await self._decide([*orders[:place], *orders[place + 1 :]])
                return [*others[:place], fault.error, *others[place:]]
            except Exception as error:
                if isinstance(error, CommitUnknownError):
                    commits.add(error.at)
                # Refuse soon, unless it matters what became of a commit.
                tries_max = _TRIES_MAX if commits or not _is_lost(error) else _LOST_TRIES_MAX
                if tries == tries_max or not (_is_lost(error) or isinstance(error, _PASSING)):
                    raise
                if isinstance(error, StaleCatalogError):
                    self._catalog.forget()
                else:
                    await asyncio.sleep(_PAUSE_S * (1 << (tries - 1)))
            else:
                self._on_commit(batch)
                return [result for result in batch.results if result is not None]
        raise AssertionError("the last try returns or raises")


def _is_lost(error: Exception) -> bool:
    """Whether the database went away."""
    return is_away(error) or isinstance(error, CommitUnknownError | LedgerUnavailable)


def _fault(error: Exception) -> InvalidField | Internal:
    """What an order is answered that the database refuses."""
    if isinstance(error, asyncpg.NumericValueOutOfRangeError):
        return InvalidField.of("usage", "is more than the ledger can count")
    if isinstance(error, asyncpg.DataError):
        return InvalidField("the database cannot store this")
    log.error("an order failed", exc_info=error)
    return Internal()
