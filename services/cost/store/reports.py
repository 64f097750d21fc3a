"""What is read: holds, usage, what limits have consumed, and whether it all adds up."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import datetime, timedelta
from typing import Final, NamedTuple
from urllib.parse import quote
from uuid import UUID

from chassis.postgres import Connection, Pool
from services.cost.core import windows
from services.cost.core.holds import Hold, State
from services.cost.core.ledger import hold_not_found
from services.cost.core.limits import Limit
from services.cost.core.reports import Consumption, Group, UsageQuery, UsageRow, bucket_starts
from services.cost.core.usage import Scope, Usage
from services.cost.core.windows import EPOCH
from services.cost.store.accounts import Accounts
from services.cost.store.catalog import CatalogStore
from services.cost.store.measure import measure
from services.cost.store.reach import reach
from services.cost.store.rows import HOLD_COLUMNS, HoldReader

COUNTERS_MAX: Final = 100

_HOLD: Final = f"SELECT id, {HOLD_COLUMNS} FROM holds WHERE id = $1 AND tenant = $2 AND state <> 5"
_HOLDS: Final = f"""
SELECT id, {HOLD_COLUMNS} FROM holds
WHERE tenant = $1 AND state <> 5 AND ($2 = '' OR request_id = $2) AND ($3 = 0 OR state = $3)
    AND (create_time, id) < ($4, $5) AND create_time >= $6
ORDER BY create_time DESC, id DESC LIMIT $7
"""
# How far back to look for a page of holds, until it is full: their age is indexed by block ranges.
_LOOK_BACK: Final = (timedelta(minutes=5), timedelta(hours=6), timedelta(days=7))
_NOW: Final = "SELECT now()"
_CONSUMPTION: Final = """
SELECT ask.place, counter.name, counter.held, counter.settled
FROM unnest($1::bigint[], $2::timestamptz[]) WITH ORDINALITY AS ask (number, window_start, place)
CROSS JOIN LATERAL (
    SELECT name, held, settled FROM counters
    WHERE limit_number = ask.number AND counters.window_start = ask.window_start
        AND ($3 = '' OR name = $3 OR starts_with(name, $3 || ',')
            OR NOT starts_with(name, 'tenant='))
    ORDER BY held + settled DESC, name LIMIT $4
) AS counter
ORDER BY ask.place, counter.held + counter.settled DESC, counter.name
"""
# Of each group: its column, as text so that a page can go on after it.
_GROUPS: Final = {
    Group.TENANT: "tenant",
    Group.PROJECT: "project",
    Group.SERVICE: "service",
    Group.PROVIDER: "provider",
    Group.MODEL: "model",
    Group.OPERATION: "operation",
    Group.SIMULATED: "simulated::text",
}
_USAGE: Final = """
SELECT * FROM (
    SELECT width_bucket(bucket, $1::timestamptz[]) AS place, {keys},
        sum(tokens)::bigint, sum(pages)::bigint, sum(bytes)::bigint, sum(requests)::bigint,
        sum(charged_nanos_usd)::bigint, sum(unconfirmed_nanos_usd)::bigint, sum(charges)::bigint
    FROM rollups JOIN accounts ON number = account
    WHERE bucket >= $2 AND bucket < $3 AND ($4 = '' OR tenant = $4)
    GROUP BY place, keys
) AS sums
WHERE (place, keys) > ($5, $6::text[])
ORDER BY place, keys LIMIT $7
"""
_ROLLUP_FAULTS: Final = """
SELECT count(*) FROM (
    SELECT account, date_bin('15 minutes', hold_time, 'epoch') AS bucket,
        sum(tokens) AS tokens, sum(pages) AS pages, sum(bytes) AS bytes,
        sum(requests) AS requests, sum(charged_nanos_usd) AS charged,
        sum(unconfirmed_nanos_usd) AS unconfirmed, sum(charges) AS charges
    FROM entries GROUP BY 1, 2
) AS summed FULL JOIN rollups USING (account, bucket)
WHERE (summed.tokens, summed.pages, summed.bytes, summed.requests, summed.charged,
    summed.unconfirmed, summed.charges)
    IS DISTINCT FROM (rollups.tokens, rollups.pages, rollups.bytes, rollups.requests,
    rollups.charged_nanos_usd, rollups.unconfirmed_nanos_usd, rollups.charges)
"""
_HOLD_FAULTS: Final = """
SELECT count(*) FROM (
    SELECT hold_id AS id, tenant, sum(charged_nanos_usd) AS charged,
        sum(unconfirmed_nanos_usd) AS unconfirmed
    FROM entries JOIN accounts ON number = account GROUP BY 1, 2
) AS summed FULL JOIN (
    SELECT id, tenant, charged_nanos_usd AS charged,
        CASE WHEN unconfirmed THEN charged_nanos_usd ELSE 0 END AS unconfirmed
    FROM holds
) AS hold USING (id, tenant)
WHERE coalesce(summed.charged, 0) <> coalesce(hold.charged, -1)
    OR coalesce(summed.unconfirmed, 0) <> coalesce(hold.unconfirmed, -1)
"""
_WINDOWS: Final = """
SELECT DISTINCT window_start FROM counters WHERE limit_number = $1 ORDER BY window_start
"""
_COUNTERS: Final = """
SELECT name, held, settled FROM counters WHERE limit_number = $1 AND window_start = $2
"""


class Difference(NamedTuple):
    """A counter that is not what charges and open holds add up to; by how much it is above them."""

    limit_id: str
    window_start: datetime
    counter: str
    held: int
    settled: int


class Reports:
    """Reads of the ledger; they change nothing. All raise LedgerUnavailable."""

    def __init__(self, pool: Pool, catalog: CatalogStore, accounts: Accounts) -> None:
        self._pool, self._catalog, self._accounts = pool, catalog, accounts

    async def hold(self, tenant: str, hold_id: str) -> Hold:
        """One hold. Raises NotFound."""
        catalog = await self._catalog.reload()
        async with reach(self._pool) as connection:
            row = await connection.fetchrow(_HOLD, hold_id, tenant)
            if row is None:
                raise hold_not_found(hold_id)
            await self._accounts.know_numbers(connection, [row["account"]])
            return HoldReader(self._accounts, catalog).hold(hold_id, row)

    async def holds(
        self,
        tenant: str,
        request_id: str,
        state: State | None,
        after: tuple[datetime, UUID] | None,
        count_max: int,
    ) -> list[Hold]:
        """A tenant's holds, the newest first, after the one of this time and id."""
        catalog = await self._catalog.reload()
        async with reach(self._pool) as connection:
            now: datetime = await connection.fetchval(_NOW)
            before = after or (now + timedelta(days=1), UUID(int=0))
            since = [EPOCH] if request_id else [*(before[0] - back for back in _LOOK_BACK), EPOCH]
            for start in since:
                rows = await connection.fetch(
                    _HOLDS, tenant, request_id, int(state or 0), *before, start, count_max
                )
                if len(rows) == count_max:
                    break
            await self._accounts.know_numbers(connection, [row["account"] for row in rows])
            read = HoldReader(self._accounts, catalog)
            return [read.hold(str(row["id"]), row) for row in rows]

    async def consumption(self, limits: Sequence[Limit], tenant: str = "") -> list[Consumption]:
        """The counters of limits in their current windows, at most 100 each, the fullest first."""
        async with reach(self._pool) as connection:
            now: datetime = await connection.fetchval(_NOW)
            spans = [windows.span(limit.window, limit.time_zone, now) for limit in limits]
            rows = await connection.fetch(
                _CONSUMPTION,
                [limit.number for limit in limits],
                [span.start for span in spans],
                f"tenant={quote(tenant, safe='')}" if tenant else "",
                COUNTERS_MAX,
            )
        return [
            Consumption(limits[place - 1], name, spans[place - 1], held, settled)
            for place, name, held, settled in rows
        ]

    async def now(self) -> datetime:
        """The time, by the database's clock."""
        async with reach(self._pool) as connection:
            now: datetime = await connection.fetchval(_NOW)
        return now

    async def usage(
        self, query: UsageQuery, after: tuple[datetime, list[str]] | None, count_max: int
    ) -> list[UsageRow]:
        """Rows in order of bucket and dimensions, after the one of this bucket and dimensions.

        Raises InvalidField where the range has too many buckets.
        """
        starts = bucket_starts(query)
        groups = sorted(set(query.group_by))
        keys = ", ".join(_GROUPS[group] for group in groups)
        last: tuple[int, list[str]] = (0, [])
        if after is not None:
            last = (starts.index(after[0]) + 1 if after[0] in starts else 0, after[1])
        async with reach(self._pool) as connection:
            rows = await connection.fetch(
                _USAGE.format(keys=f"ARRAY[{keys}]::text[] AS keys"),
                starts,
                query.start,
                query.end,
                query.tenant,
                *last,
                count_max,
            )
        return [_to_usage_row(starts, groups, *row) for row in rows]

    async def parity(self, *, everything: bool = False, limits_max: int = 200) -> list[Difference]:
        """Where counters are not what charges and open holds add up to; none is as it must be.

        Looks at the current windows of some limits, or at every window of all limits.
        """
        catalog = await self._catalog.reload()
        limits = sorted(catalog.limits.all.values(), key=lambda limit: limit.number)
        async with self._snapshot() as connection:
            now: datetime = await connection.fetchval(_NOW)
            found: list[Difference] = []
            for limit in limits if everything else limits[:limits_max]:
                starts = {windows.span(limit.window, limit.time_zone, now).start}
                if everything:
                    rows = await connection.fetch(_WINDOWS, limit.number)
                    starts |= {row["window_start"] for row in rows}
                for start in sorted(starts):
                    found += await _differences(connection, limit, start)
        return found

    async def faults(self) -> dict[str, int]:
        """How many rollups and holds are not what the entries of all time add up to."""
        async with self._snapshot() as connection:
            return {
                "rollups": await connection.fetchval(_ROLLUP_FAULTS),
                "holds": await connection.fetchval(_HOLD_FAULTS),
            }

    @asynccontextmanager
    async def _snapshot(self) -> AsyncIterator[Connection]:
        """One state of the database for several reads."""
        async with reach(self._pool) as connection:
            if getattr(connection, "local_settings", None) is None:
                await connection.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
            else:
                # The transaction has begun with a query: hold still what the reads are about.
                await connection.execute("LOCK TABLE counters IN SHARE MODE")
            yield connection


async def _differences(connection: Connection, limit: Limit, start: datetime) -> list[Difference]:
    span = windows.span(limit.window, limit.time_zone, start)
    must = await measure(connection, limit, span)
    stands = {
        name: (held, settled)
        for name, held, settled in await connection.fetch(_COUNTERS, limit.number, start)
    }
    none = (0, 0)
    return [
        Difference(limit.id, start, name, held - must_held, settled - must_settled)
        for name in sorted(must.keys() | stands.keys())
        for held, settled in [stands.get(name, none)]
        for must_held, must_settled in [must.get(name, none)]
        if (held, settled) != (must_held, must_settled)
    ]


def _to_usage_row(
    starts: Sequence[datetime], groups: Sequence[Group], place: int, keys: list[str], *sums: int
) -> UsageRow:
    found = dict(zip(groups, keys, strict=True))
    *names, simulated = (found.get(group, "") for group in Group)
    tenant, project, service, provider, model, operation = names
    scope = Scope(tenant, project, service, provider, model, operation, simulated == "true")
    tokens, pages, size, requests, charged, unconfirmed, charges = sums
    return UsageRow(
        starts[place - 1],
        scope,
        Usage(tokens, pages, size, requests),
        charged,
        unconfirmed,
        charges,
    )
