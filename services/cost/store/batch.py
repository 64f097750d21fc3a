"""One batch, one transaction, always in this order and everything sorted, so that no two batches
can wait for each other: the shared lock against changes of limits and prices; ids claimed; rows of
older holds locked; counters locked; decided by `core.ledger`; written; committed.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from datetime import datetime, timedelta
from typing import Any, Final, NamedTuple

import asyncpg

from chassis.errors import Billed, DeadlineExceeded, InvalidField, TollgateError
from chassis.postgres import Connection, Pool, transaction
from services.cost.core.catalog import Catalog
from services.cost.core.holds import (
    Authorization,
    Decision,
    Hold,
    Order,
    Resolution,
    Result,
    State,
)
from services.cost.core.ledger import Book, CounterKey, EntryKind, hold_not_found, same_call
from services.cost.core.prices import Rate, cost
from services.cost.core.usage import INT64_MAX, Account
from services.cost.core.windows import EPOCH, quarter_hour
from services.cost.store.accounts import Accounts
from services.cost.store.catalog import LOCK
from services.cost.store.reach import is_away
from services.cost.store.rows import HOLD_COLUMNS, HoldReader, from_denial

ACQUIRE_TIMEOUT_S: Final = 5.0
_COUNTERS_KNOWN_MAX: Final = 100_000

# Plans by index, made once a connection: the tables are large or will be, whatever statistics say
# of a fresh one. What waits for longer than this waits for something broken.
_BEGIN: Final = f"""
BEGIN ISOLATION LEVEL READ COMMITTED;
SET LOCAL plan_cache_mode = force_generic_plan;
SET LOCAL enable_hashjoin = off;
SET LOCAL enable_mergejoin = off;
SET LOCAL enable_seqscan = off;
SET LOCAL lock_timeout = '8s';
SET LOCAL statement_timeout = '10s';
SET LOCAL idle_in_transaction_session_timeout = '15s';
SELECT pg_advisory_xact_lock_shared({LOCK});
"""
# Its snapshot is taken after the lock, so the version is that under which the batch decides.
_CLAIM: Final = """
WITH claimed AS (
    INSERT INTO holds (id, tenant, account, tokens, pages, bytes, requests, held_nanos_usd,
        price_version, request_id, create_time, expire_time, state)
    SELECT id, tenant, account, tokens, pages, bytes, requests, held_nanos_usd, $11,
        coalesce(request_id, ''), now(), now() + ttl_ms * interval '1 millisecond', 1
    FROM unnest($1::text::uuid[], string_to_array($2, E'\\x1f'), $3::text::bigint[],
        $4::text::bigint[], $5::text::bigint[], $6::text::bigint[], $7::text::bigint[],
        $8::text::bigint[], string_to_array($9, E'\\x1f'), $10::text::bigint[])
        AS ask (id, tenant, account, tokens, pages, bytes, requests, held_nanos_usd, request_id,
            ttl_ms)
    ON CONFLICT DO NOTHING
    RETURNING id, tenant
)
SELECT now(), version,
    CASE WHEN (SELECT count(*) FROM claimed) < cardinality($1::text::uuid[])
        THEN ARRAY(SELECT id::text || tenant FROM claimed) END
FROM state
"""
# The first row has what the claim answers, for a batch that claims nothing and begins with this.
_LOCK_HOLDS: Final = f"""
SELECT place, {HOLD_COLUMNS}, CASE WHEN place = 1 THEN now() END, (SELECT version FROM state)
FROM unnest($1::text::uuid[], string_to_array($2, E'\\x1f'))
    WITH ORDINALITY AS ask (id, tenant, place)
JOIN holds USING (id, tenant)
ORDER BY id, tenant FOR UPDATE OF holds
"""
_ADD_COUNTERS: Final = """
INSERT INTO counters (limit_number, window_start, name)
SELECT * FROM unnest($1::bigint[], $2::timestamptz[], $3::text[]) ON CONFLICT DO NOTHING
"""
_LOCK_COUNTERS: Final = """
SELECT place, held, settled
FROM unnest($1::bigint[], $2::timestamptz[], $3::text[])
    WITH ORDINALITY AS ask (limit_number, window_start, name, place)
JOIN counters USING (limit_number, window_start, name)
ORDER BY limit_number, window_start, name FOR UPDATE OF counters
"""
_WRITE_COUNTERS: Final = """
WITH counted AS (
    UPDATE counters SET held = counters.held + ask.held, settled = counters.settled + ask.settled
    FROM unnest($1::bigint[], $2::timestamptz[], $3::text[], $4::bigint[], $5::bigint[],
        $6::bigint[]) AS ask (limit_number, window_start, name, held, settled, maximum)
    WHERE counters.limit_number = ask.limit_number AND counters.window_start = ask.window_start
        AND counters.name = ask.name
        AND counters.held + counters.settled + ask.held + ask.settled <= ask.maximum
    RETURNING 1
)
SELECT 0, count(*) FROM counted
"""
# Each hold with its line of the ledger. A hold that was settled for the first time is its own line
# (is_line); the lines of expiry and of corrections come beside it. Then the rollups and counters.
_WRITE_HOLDS: Final = """
WITH resolved AS (
    UPDATE holds SET state = ask.state, used_tokens = nullif(ask.tokens, -1),
        used_pages = nullif(ask.pages, -1), used_bytes = nullif(ask.bytes, -1),
        used_requests = nullif(ask.requests, -1),
        charged_nanos_usd = ask.charged_nanos_usd, overrun_nanos_usd = ask.overrun_nanos_usd,
        unconfirmed = ask.unconfirmed
    FROM unnest($1::text::uuid[], string_to_array($2, E'\\x1f'), $3::text::smallint[],
        $4::text::bigint[], $5::text::bigint[], $6::text::bigint[], $7::text::bigint[],
        $8::text::bigint[], $9::text::bigint[], $10::text::boolean[], $11::text::boolean[])
        AS ask (id, tenant, state, tokens, pages, bytes, requests, charged_nanos_usd,
            overrun_nanos_usd, unconfirmed, is_line)
    WHERE holds.id = ask.id AND holds.tenant = ask.tenant
    RETURNING holds.id, account, create_time, is_line, used_tokens, used_pages, used_bytes,
        used_requests, holds.charged_nanos_usd, holds.overrun_nanos_usd
), written AS (
    INSERT INTO entries (hold_id, account, hold_time, kind, tokens, pages, bytes, requests,
        charged_nanos_usd, unconfirmed_nanos_usd, overrun_nanos_usd, charges)
    SELECT id, account, create_time, 1, used_tokens, used_pages, used_bytes, used_requests,
        charged_nanos_usd, 0, overrun_nanos_usd, 1
    FROM resolved WHERE is_line
    UNION ALL
    SELECT * FROM unnest($12::uuid[], $13::bigint[], $14::timestamptz[], $15::smallint[],
        $16::bigint[], $17::bigint[], $18::bigint[], $19::bigint[], $20::bigint[], $21::bigint[],
        $22::bigint[], $23::smallint[])
), summed AS (
    INSERT INTO rollups (bucket, account, tokens, pages, bytes, requests, charged_nanos_usd,
        unconfirmed_nanos_usd, charges)
    SELECT * FROM unnest($24::timestamptz[], $25::bigint[], $26::bigint[], $27::bigint[],
        $28::bigint[], $29::bigint[], $30::bigint[], $31::bigint[], $32::bigint[])
    ON CONFLICT (bucket, account) DO UPDATE SET tokens = rollups.tokens + excluded.tokens,
        pages = rollups.pages + excluded.pages, bytes = rollups.bytes + excluded.bytes,
        requests = rollups.requests + excluded.requests,
        charged_nanos_usd = rollups.charged_nanos_usd + excluded.charged_nanos_usd,
        unconfirmed_nanos_usd = rollups.unconfirmed_nanos_usd + excluded.unconfirmed_nanos_usd,
        charges = rollups.charges + excluded.charges
), counted AS (
    UPDATE counters SET held = counters.held + ask.held, settled = counters.settled + ask.settled
    FROM unnest($33::bigint[], $34::timestamptz[], $35::text[], $36::bigint[], $37::bigint[],
        $38::bigint[]) AS ask (limit_number, window_start, name, held, settled, maximum)
    WHERE counters.limit_number = ask.limit_number AND counters.window_start = ask.window_start
        AND counters.name = ask.name
        AND counters.held + counters.settled + ask.held + ask.settled <= ask.maximum
    RETURNING 1
)
SELECT (SELECT count(*) FROM resolved), (SELECT count(*) FROM counted)
"""
_WRITE_EXTENSIONS: Final = """
UPDATE holds SET expire_time = ask.expire_time
FROM unnest($1::uuid[], $2::text[], $3::timestamptz[]) AS ask (id, tenant, expire_time)
WHERE holds.id = ask.id AND holds.tenant = ask.tenant
"""
_WRITE_DENIALS: Final = """
UPDATE holds SET state = 5, denial = ask.denial::jsonb
FROM unnest($1::uuid[], $2::text[], $3::text[]) AS ask (id, tenant, denial)
WHERE holds.id = ask.id AND holds.tenant = ask.tenant
"""


class StaleCatalogError(Exception):
    """Limits or prices changed: read them again and decide anew. Nothing was written."""


class CommitUnknownError(Exception):
    """The connection was lost while committing; `at` is the time of the transaction."""

    def __init__(self, at: datetime) -> None:
        super().__init__("commit unknown")
        self.at = at


class ItemFaultError(Exception):
    """One order cannot be decided: leave it out and decide the others. Nothing was written."""

    def __init__(self, place: int, error: TollgateError) -> None:
        super().__init__(error.message)
        self.place, self.error = place, error


class BrokenPromiseError(Exception):
    """A write did not find what was locked: a fault of ours. Nothing was written."""


class Priced(NamedTuple):
    """An authorization with its account and what its worst case costs."""

    order: Authorization
    account: Account
    rate: Rate
    nanos_usd: int


class Batch:
    """Orders, and what became of them. `results` has one for each order, in order."""

    def __init__(self, orders: Sequence[Order], catalog: Catalog) -> None:
        self.orders = orders
        self.catalog = catalog
        self.book = Book(catalog.limits, EPOCH)
        self.results: list[Result | None] = [None] * len(orders)
        self.priced: dict[int, Priced] = {}
        """Authorizations that can be decided, by their place among the orders."""
        self.claims: dict[str, Priced] = {}
        """The first authorization for each hold, by the hold's key."""
        self.fresh: set[str] = set()
        """The keys whose ids this batch claimed."""
        self.holds: dict[str, Hold] = {}
        self.expire_times: dict[int, datetime] = {}
        """When holds of this batch expire, by their time to live in milliseconds."""
        self.denied: list[Hold] = []
        self.admitted: list[Hold] = []

    @property
    def has_resolutions(self) -> bool:
        """Whether some order is about a hold that is there."""
        return any(isinstance(order, Resolution) for order in self.orders)

    @property
    def has_begun(self) -> bool:
        """Whether the time and the version are known."""
        return self.book.now is not EPOCH

    def begin(self, now: datetime, version: int) -> None:
        """Take the transaction's time. Raises StaleCatalogError where limits or prices changed."""
        if not self.catalog.is_current(version, now):
            raise StaleCatalogError
        self.book.now = now


def hold_key(hold_id: str, tenant: str) -> str:
    """One string for a hold: ids all have the same length."""
    return hold_id + tenant


class BatchStore:
    """Runs batches."""

    def __init__(self, pool: Pool, accounts: Accounts) -> None:
        self._pool = pool
        self._accounts = accounts
        self._counters_known: set[CounterKey] = set()

    async def run(
        self, orders: Sequence[Order], catalog: Catalog, commits: Collection[datetime] = ()
    ) -> Batch:
        """Decide, write and commit. Holds of the times `commits` are this batch's own.

        Raises the errors above, and what asyncpg raises; then nothing was written, or nobody knows.
        """
        batch = Batch(orders, catalog)
        await self._price(batch)
        async with self._pool.acquire(timeout=ACQUIRE_TIMEOUT_S) as connection:
            await connection.execute(_begin(connection))
            try:
                if batch.claims or not batch.has_resolutions:
                    await self._claim(connection, batch)
                await self._lock_holds(connection, batch)
                await self._lock_counters(connection, batch)
                _decide(batch, commits)
                await _write(connection, batch)
            except BaseException:
                await _roll_back(connection)
                raise
            await _commit(connection, batch)
        if len(self._counters_known) > _COUNTERS_KNOWN_MAX:
            self._counters_known.clear()
        self._counters_known.update(batch.book.counters)
        return batch

    async def _price(self, batch: Batch) -> None:
        """Find what each authorization costs; those that cannot be priced have their result."""
        scopes = {order.scope for order in batch.orders if isinstance(order, Authorization)}
        if not self._accounts.by_scope.keys() >= scopes:
            async with transaction(self._pool) as connection:
                await self._accounts.know(connection, scopes)
        by_scope, rate_of, now = self._accounts.by_scope, batch.catalog.rate, time.monotonic()
        for place, order in enumerate(batch.orders):
            if not isinstance(order, Authorization):
                continue
            try:
                if order.ends is not None and order.ends <= now:
                    raise DeadlineExceeded("the call had no time left", billed=Billed.NO)
                account = by_scope[order.scope]
                rate = rate_of(account)
                priced = Priced(order, account, rate, cost(rate, order.bound))
            except TollgateError as error:
                batch.results[place] = error
            else:
                batch.priced[place] = priced
                batch.claims.setdefault(hold_key(order.hold_id, order.scope.tenant), priced)

    async def _claim(self, connection: Connection, batch: Batch) -> None:
        rows = [
            (
                order.hold_id,
                order.scope.tenant,
                account.number,
                *order.bound,
                nanos_usd,
                order.request_id,
                order.ttl_ms,
            )
            for _, (order, account, _, nanos_usd) in sorted(batch.claims.items())
        ]
        ids, tenants, *numbers, requests, ttls = _columns(rows, 10)
        row = await connection.fetchrow(
            _CLAIM,
            _plain(ids),
            _joined(tenants),
            *map(_numbers, numbers),
            _joined(requests),
            _numbers(ttls),
            batch.catalog.price_version,
        )
        assert row is not None, "there is one state"
        now, version, claimed = row
        batch.begin(now, version)
        batch.fresh = set(batch.claims if claimed is None else claimed)

    async def _lock_holds(self, connection: Connection, batch: Batch) -> None:
        """Lock and read the holds that are there already."""
        keys = {
            hold_key(order.hold_id, order.tenant): (order.hold_id, order.tenant)
            for order in batch.orders
            if isinstance(order, Resolution)
        }
        for key in batch.claims.keys() - batch.fresh:
            order = batch.claims[key].order
            keys[key] = (order.hold_id, order.scope.tenant)
        if not keys:
            return
        ids, tenants = _columns(keys.values(), 2)
        rows = await connection.fetch(_LOCK_HOLDS, _plain(ids), _joined(tenants))
        if not batch.has_begun:
            await self._begin_late(connection, batch, rows)
        await self._accounts.know_numbers(connection, [row[1] for row in rows])
        names, read = list(keys.items()), HoldReader(self._accounts, batch.catalog)
        for row in rows:
            key, (hold_id, _) = names[row[0] - 1]
            batch.holds[key] = read.hold(hold_id, row)

    async def _begin_late(
        self, connection: Connection, batch: Batch, rows: Sequence[asyncpg.Record]
    ) -> None:
        """Learn the time and the version from the holds that were read, or ask where none was."""
        first = next((row for row in rows if row[0] == 1), None)
        if first is not None:
            batch.begin(*first[-2:])
        else:
            await self._claim(connection, batch)

    async def _lock_counters(self, connection: Connection, batch: Batch) -> None:
        """Lock and read every counter that an order may touch, making those that are missing."""
        book = batch.book
        for account in {batch.claims[key].account for key in batch.fresh}:
            book.places(account, book.now)
        for account, at in {(hold.account, hold.create_time) for hold in batch.holds.values()}:
            book.places(account, at)
        keys = sorted(book.counters)
        if not keys:
            return
        # All that is missing before anything is locked: see the order at the top.
        if missing := [key for key in keys if key not in self._counters_known]:
            await connection.execute(_ADD_COUNTERS, *_columns(missing, 3))
        rows = await connection.fetch(_LOCK_COUNTERS, *_columns(keys, 3))
        if len(rows) < len(keys):
            self._counters_known.clear()
            raise StaleCatalogError
        for place, held, settled in rows:
            book.counters[keys[place - 1]].load(held, settled)


def _decide(batch: Batch, commits: Collection[datetime]) -> None:
    """Resolutions first, so that freed money is usable at once; else in order of arrival."""
    book, holds, results = batch.book, batch.holds, batch.results
    for place, order in enumerate(batch.orders):
        if isinstance(order, Resolution):
            hold = holds.get(hold_key(order.hold_id, order.tenant))
            try:
                if hold is None:
                    raise hold_not_found(order.hold_id)
                book.resolve(hold, order)
                results[place] = hold
            except TollgateError as error:
                results[place] = error
    for place, priced in batch.priced.items():
        key = hold_key(priced.order.hold_id, priced.order.scope.tenant)
        known = holds.get(key)
        if known is None:
            holds[key] = hold = _admit(batch, place, priced)
            results[place] = Decision(hold, replayed=False)
            continue
        try:
            hold = same_call(known, priced.order, priced.account)
            results[place] = Decision(hold, replayed=hold.create_time not in commits)
        except TollgateError as error:
            results[place] = error


def _admit(batch: Batch, place: int, priced: Priced) -> Hold:
    """Open the hold, or make it one that is denied."""
    order, account, rate, nanos_usd = priced
    book = batch.book
    try:
        denial = book.admit(account, nanos_usd, order.bound)
    except InvalidField as error:
        raise ItemFaultError(place, error) from None
    expire_time = batch.expire_times.get(order.ttl_ms)
    if expire_time is None:
        expire_time = book.now + timedelta(milliseconds=order.ttl_ms)
        batch.expire_times[order.ttl_ms] = expire_time
    hold = Hold(
        order.hold_id,
        account,
        order.request_id,
        order.bound,
        nanos_usd,
        batch.catalog.price_version,
        rate,
        State.HELD if denial is None else State.DENIED,
        book.now,
        expire_time,
        denial=denial,
    )
    (batch.admitted if denial is None else batch.denied).append(hold)
    return hold


async def _write(connection: Connection, batch: Batch) -> None:
    book = batch.book
    if batch.denied:
        rows = [
            (hold.id, hold.account.scope.tenant, from_denial(hold.denial))
            for hold in batch.denied
            if hold.denial is not None
        ]
        _expect(len(rows), await connection.execute(_WRITE_DENIALS, *_columns(rows, 3)))
    if book.extended:
        moved = [
            (hold.id, hold.account.scope.tenant, hold.expire_time)
            for hold in book.extended.values()
        ]
        _expect(len(moved), await connection.execute(_WRITE_EXTENSIONS, *_columns(moved, 3)))
    counters = _counter_columns(book)
    if book.resolved:
        resolved = _resolved_columns(book)
        written = await connection.fetchrow(_WRITE_HOLDS, *resolved, *counters)
    else:
        written = await connection.fetchrow(_WRITE_COUNTERS, *counters)
    assert written is not None, "counts are one row"
    if tuple(written) != (len(book.resolved), len(counters[0])):
        raise BrokenPromiseError(f"wrote {tuple(written)} of what was locked")


def _resolved_columns(book: Book) -> list[object]:
    """What _WRITE_HOLDS takes but the counters."""
    rows = [
        (
            hold.id,
            hold.account.scope.tenant,
            _NUMBER_OF[hold.state],
            *(hold.usage or _NOT_USED),
            hold.charged_nanos_usd,
            hold.overrun_nanos_usd,
            hold.unconfirmed,
            entry is not None and entry.kind is EntryKind.SETTLED,
        )
        for hold, entry in book.resolved.values()
    ]
    lines = [
        (entry.hold_id, entry.account.number, entry.hold_time, entry.kind, *entry.usage, *entry[5:])
        for _, entry in book.resolved.values()
        if entry is not None and entry.kind is not EntryKind.SETTLED
    ]
    ids, tenants, *numbers = _columns(rows, 11)
    return [
        _plain(ids),
        _joined(tenants),
        *map(_numbers, numbers),
        *_columns(lines, 12),
        *_columns(_rollups(book), 9),
    ]


def _rollups(book: Book) -> list[Sequence[object]]:
    """The sums of a batch by quarter of an hour and account, sorted."""
    groups: dict[tuple[Account, datetime], list[Sequence[int]]] = defaultdict(list)
    for _, entry in book.resolved.values():
        if entry is not None:
            _, account, _, at, usage, charged, unconfirmed, _, charges = entry
            groups[account, at].append((*usage, charged, unconfirmed, charges))
    sums: dict[tuple[datetime, int], list[int]] = {}
    for (account, at), rows in groups.items():
        key = (quarter_hour(at), account.number)
        sums[key] = list(map(sum, zip(*rows, sums.get(key, _NO_SUM), strict=True)))
    return [(*key, *sums[key]) for key in sorted(sums)]


def _counter_columns(book: Book) -> list[Sequence[object]]:
    """What changed on counters; one that a limit guards must stay within the maximum."""
    rows = [
        (
            *key,
            counter.held - counter.held_before,
            counter.settled - counter.settled_before,
            counter.limit.maximum if counter.guarded else INT64_MAX,
        )
        for key, counter in sorted(book.counters.items())
        if (counter.held, counter.settled) != (counter.held_before, counter.settled_before)
    ]
    return _columns(rows, 6)


_NOT_USED: Final = (-1, -1, -1, -1)
_NUMBER_OF: Final = {state: int(state) for state in State}
_NO_SUM: Final = (0, 0, 0, 0, 0, 0, 0)


def _begin(connection: Connection) -> str:
    """What opens the transaction; through a pooler it must also say who we are."""
    local: tuple[str, str] | None = getattr(connection, "local_settings", None)
    if local is None:
        return _BEGIN
    role, search_path = local
    return f"{_BEGIN} SET LOCAL search_path = {search_path}; SET LOCAL ROLE {role};"


async def _commit(connection: Connection, batch: Batch) -> None:
    try:
        status = await connection.execute("COMMIT")
    except Exception as error:
        if is_away(error):
            raise CommitUnknownError(batch.book.now) from error
        raise
    if status != "COMMIT":
        raise BrokenPromiseError(status)


async def _roll_back(connection: Connection) -> None:
    """Leave the transaction; a connection that cannot is not used again."""
    try:
        await connection.execute("ROLLBACK")
    except Exception:
        # The pool takes a connection that died away from us by itself.
        with suppress(asyncpg.InterfaceError):
            connection.terminate()


def _expect(rows: int, status: str) -> None:
    if not status.endswith(f" {rows}"):
        raise BrokenPromiseError(f"{status} where {rows} rows were locked")


def _columns(rows: Iterable[Sequence[object]], width: int) -> list[Sequence[object]]:
    """Rows turned into columns, also when there are none."""
    return list(zip(*rows, strict=True)) or [()] * width


# Long columns travel as text: the driver looks at each element of an array with three checks of
# abstract types, which costs several times what the database needs to read the number.


def _plain(column: Sequence[Any]) -> str:
    """Ids as the text of an array."""
    return "{" + ",".join(column) + "}"


def _numbers(column: Sequence[Any]) -> str:
    """Numbers or truths as the text of an array."""
    return "{" + str([*column])[1:-1] + "}"


def _joined(column: Sequence[Any]) -> str:
    """Names, which have no control characters, for string_to_array."""
    return "\x1f".join(column)
