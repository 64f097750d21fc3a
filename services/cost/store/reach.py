"""Reaching the database, or saying that the ledger cannot be had."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import asyncpg

from chassis.errors import LedgerUnavailable
from chassis.postgres import Connection, Pool, is_database_away, transaction


def is_away(error: BaseException) -> bool:
    """Whether the database cannot answer now; waiting too long for it is the same."""
    if isinstance(error, asyncpg.InterfaceError) and "released back to the pool" in str(error):
        return True  # It died between two statements, and the pool took it away.
    return is_database_away(error) or isinstance(
        error,
        # A connection that died at an awkward moment leaves the driver in a state of no use.
        asyncpg.InternalClientError
        | asyncpg.QueryCanceledError
        | asyncpg.LockNotAvailableError
        | asyncpg.IdleInTransactionSessionTimeoutError,
    )


def unavailable() -> LedgerUnavailable:
    """The error of a ledger without its database."""
    return LedgerUnavailable("the ledger cannot reach its database")


@asynccontextmanager
async def reach(pool: Pool) -> AsyncIterator[Connection]:
    """A connection in a transaction. Raises LedgerUnavailable where the database is away."""
    try:
        async with transaction(pool) as connection:
            yield connection
    except Exception as error:
        if is_away(error):
            raise unavailable() from error
        raise
