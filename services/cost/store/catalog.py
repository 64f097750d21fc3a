"""The limits and prices that decisions are made by, remembered until their version moves."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from datetime import datetime
from typing import Any, Final, TypeAlias

import asyncpg

from chassis.errors import AlreadyExists, Conflict, Violation
from chassis.postgres import Connection, Pool
from services.cost.core import windows
from services.cost.core.catalog import Catalog
from services.cost.core.limits import (
    Dimension,
    Enforcement,
    Limit,
    LimitSet,
    Match,
    checked,
    checked_change,
    limit_not_found,
)
from services.cost.core.prices import NOW, Origin, Price, PriceList, Unit
from services.cost.core.usage import Metric
from services.cost.core.windows import Window
from services.cost.store.measure import measure
from services.cost.store.reach import reach

# Held shared by every batch, exclusively by whoever changes limits or prices: so a batch decides by
# one state of them, and a new limit is filled while nothing moves. It is "tollgate" in ASCII.
LOCK: Final = 0x746F6C6C67617465

_SHARED: Final = f"SELECT pg_advisory_xact_lock_shared({LOCK})"
_EXCLUSIVE: Final = f"SELECT pg_advisory_xact_lock({LOCK})"
_VERSION: Final = "SELECT version, price_version, now() FROM state"
_LIMITS: Final = "SELECT * FROM limits ORDER BY id"
_LIMIT: Final = "SELECT * FROM limits WHERE id = $1"
_PRICES: Final = "SELECT * FROM prices"
_CHANGED: Final = "UPDATE state SET version = version + 1"
_PRICED: Final = """
UPDATE state SET version = version + 1, price_version = price_version + 1 RETURNING price_version
"""
_CREATE_LIMIT: Final = """
INSERT INTO limits (id, display_name, matches, match_values, metric, time_window, time_zone,
    maximum, enforcement, alert_percents, counts_from)
VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11) RETURNING *
"""
_UPDATE_LIMIT: Final = """
UPDATE limits SET display_name = $2, maximum = $3, enforcement = $4, alert_percents = $5,
    revision = revision + 1, update_time = now()
WHERE id = $1 RETURNING *
"""
_DELETE_LIMIT: Final = "DELETE FROM limits WHERE id = $1"
_DELETE_COUNTERS: Final = "DELETE FROM counters WHERE limit_number = $1"
_ADD_PRICES: Final = """
INSERT INTO prices (provider, model, operation, unit, effective_time, origin,
    nanos_usd_per_million, source, version)
SELECT ask.*, $9 FROM unnest($1::text[], $2::text[], $3::text[], $4::smallint[],
    $5::timestamptz[], $6::smallint[], $7::bigint[], $8::text[]) AS ask
"""
_NOW: Final = "SELECT now()"
_FILL: Final = """
INSERT INTO counters (limit_number, window_start, name, held, settled)
SELECT $1, $2, * FROM unnest($3::text[], $4::bigint[], $5::bigint[])
"""


class CatalogStore:
    """Reads and changes limits and prices."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._catalog: Catalog | None = None
        self._is_stale = False

    async def get(self) -> Catalog:
        """The catalog as last read."""
        if self._catalog is None or self._is_stale:
            return await self.reload()
        return self._catalog

    def forget(self) -> None:
        """Read anew what changed, the next time it is asked for."""
        self._is_stale = True

    async def reload(self) -> Catalog:
        """Read what changed."""
        async with reach(self._pool) as connection:
            await connection.execute(_SHARED)
            version, price_version, now = await _fetch_one(connection, _VERSION)
            known = self._catalog
            if known is None or known.version != version:
                limits = LimitSet(map(to_limit, await connection.fetch(_LIMITS)))
                if known is not None and known.price_version == price_version:
                    prices = known.prices
                else:
                    prices = PriceList(map(to_price, await connection.fetch(_PRICES)))
            else:
                limits, prices = known.limits, known.prices
            self._is_stale = False
        since, until = prices.steady(now)
        self._catalog = Catalog(version, price_version, limits, prices, since, until)
        return self._catalog

    async def create_limit(self, limit: Limit) -> Limit:
        """Make a limit and fill its current window; the same again returns what is there.

        Raises InvalidField, AlreadyExists.
        """
        limit = checked(limit)
        async with reach(self._pool) as connection:
            await connection.execute(_EXCLUSIVE)
            now: datetime = await connection.fetchval(_NOW)
            if row := await connection.fetchrow(_LIMIT, limit.id):
                return _repeated(to_limit(row), limit)
            start = windows.span(limit.window, limit.time_zone, now).start
            row = await _fetch_one(
                connection,
                _CREATE_LIMIT,
                limit.id,
                limit.display_name,
                [dimension.match for dimension in limit.scope],
                [dimension.value for dimension in limit.scope],
                limit.metric,
                limit.window,
                limit.time_zone,
                limit.maximum,
                limit.enforcement,
                limit.alert_percents,
                start,
            )
            created = to_limit(row)
            found = await measure(connection, created, windows.span(*_window(created), now))
            await connection.execute(
                _FILL, created.number, start, list(found), *_columns(found.values(), 2)
            )
            await connection.execute(_CHANGED)
        return created

    async def update_limit(self, limit_id: str, etag: str, changes: dict[str, Any]) -> Limit:
        """Change some of CHANGEABLE. Raises InvalidField, NotFound, Conflict."""
        async with reach(self._pool) as connection:
            await connection.execute(_EXCLUSIVE)
            limit = checked_change(replace(await _limit(connection, limit_id, etag), **changes))
            row = await _fetch_one(
                connection,
                _UPDATE_LIMIT,
                limit_id,
                limit.display_name,
                limit.maximum,
                limit.enforcement,
                limit.alert_percents,
            )
            await connection.execute(_CHANGED)
        return to_limit(row)

    async def delete_limit(self, limit_id: str, etag: str) -> None:
        """Delete a limit and its counters. Raises NotFound, Conflict."""
        async with reach(self._pool) as connection:
            await connection.execute(_EXCLUSIVE)
            limit = await _limit(connection, limit_id, etag)
            await connection.execute(_DELETE_LIMIT, limit_id)
            await connection.execute(_DELETE_COUNTERS, limit.number)
            await connection.execute(_CHANGED)

    async def add_prices(self, lines: Sequence[Price]) -> list[Price]:
        """Add price lines as one version; lines that are there already stay as they are.

        A line without an effective time (NOW) takes effect now, unless it says what is in effect
        already. Raises AlreadyExists where another price has the same effective time.
        """
        async with reach(self._pool) as connection:
            await connection.execute(_EXCLUSIVE)
            now: datetime = await connection.fetchval(_NOW)
            there = {_key(line): line for line in map(to_price, await connection.fetch(_PRICES))}
            lines = [_effective(line, there, now) for line in lines]
            new: dict[_Key, Price] = {}
            for line in lines:
                known = there.get(_key(line)) or new.setdefault(_key(line), line)
                if known.nanos_usd_per_million != line.nanos_usd_per_million:
                    raise _other_price(line)
            if new:
                version: int = await connection.fetchval(_PRICED)
                new = {key: replace(line, version=version) for key, line in new.items()}
                await connection.execute(_ADD_PRICES, *_price_columns(new), version)
        return [(there | new)[_key(line)] for line in lines]


_Key: TypeAlias = tuple[str, str, str, Unit, datetime, Origin]


def to_limit(row: asyncpg.Record) -> Limit:
    """A row of `limits`."""
    dimensions = [
        Dimension(Match(match), value)
        for match, value in zip(row["matches"], row["match_values"], strict=True)
    ]
    tenant, project, service, provider, model, simulated = dimensions
    return Limit(
        id=row["id"],
        scope=(tenant, project, service, provider, model, simulated),
        metric=Metric(row["metric"]),
        window=Window(row["time_window"]),
        maximum=row["maximum"],
        enforcement=Enforcement(row["enforcement"]),
        time_zone=row["time_zone"],
        display_name=row["display_name"],
        alert_percents=tuple(row["alert_percents"]),
        number=row["number"],
        revision=row["revision"],
        counts_from=row["counts_from"],
        create_time=row["create_time"],
        update_time=row["update_time"],
    )


def to_price(row: asyncpg.Record) -> Price:
    """A row of `prices`."""
    return Price(
        provider=row["provider"],
        model=row["model"],
        operation=row["operation"],
        unit=Unit(row["unit"]),
        nanos_usd_per_million=row["nanos_usd_per_million"],
        effective_time=row["effective_time"],
        source=row["source"],
        origin=Origin(row["origin"]),
        version=row["version"],
    )


async def _fetch_one(connection: Connection, sql: str, *arguments: object) -> asyncpg.Record:
    row = await connection.fetchrow(sql, *arguments)
    assert row is not None, "the statement answers one row"
    return row


async def _limit(connection: Connection, limit_id: str, etag: str) -> Limit:
    row = await connection.fetchrow(_LIMIT, limit_id)
    if row is None:
        raise limit_not_found(limit_id)
    limit = to_limit(row)
    if etag not in ("", limit.etag):
        raise Conflict(
            f"limit {limit_id} has changed since it was read",
            violations=[Violation(f"limit/{limit_id}", "has another etag: read it again")],
        )
    return limit


def _repeated(there: Limit, asked: Limit) -> Limit:
    if there.content() == asked.content():
        return there
    raise AlreadyExists(
        f"there is another limit {asked.id}",
        violations=[Violation(f"limit/{asked.id}", "is there with other content")],
    )


def _window(limit: Limit) -> tuple[Window, str]:
    return limit.window, limit.time_zone


def _key(line: Price) -> _Key:
    return (
        line.provider,
        line.model,
        line.operation,
        line.unit,
        line.effective_time,
        line.origin,
    )


def _effective(line: Price, there: dict[_Key, Price], now: datetime) -> Price:
    """The line with its time filled in."""
    if line.effective_time != NOW:
        return line
    same = [
        other
        for key, other in there.items()
        if key[:4] == _key(line)[:4] and other.origin is line.origin and key[4] <= now
    ]
    latest = max(same, key=lambda other: other.effective_time, default=None)
    if latest is not None and latest.nanos_usd_per_million == line.nanos_usd_per_million:
        return latest
    return replace(line, effective_time=now)


def _other_price(line: Price) -> AlreadyExists:
    what = f"{line.provider}/{line.model} {line.operation} by {line.unit.name.lower()}"
    return AlreadyExists(
        f"another price of {what} takes effect at {line.effective_time.isoformat()}",
        violations=[Violation(f"price/{what}", "is there with another amount")],
    )


def _price_columns(lines: dict[_Key, Price]) -> list[list[object]]:
    return _columns(
        [(*key, line.nanos_usd_per_million, line.source) for key, line in lines.items()], 8
    )


def _columns(rows: Iterable[Sequence[object]], width: int) -> list[list[object]]:
    """Rows turned into columns, also when there are none."""
    turned = [list(column) for column in zip(*rows, strict=True)]
    return turned or [[] for _ in range(width)]
