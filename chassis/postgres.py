"""PostgreSQL for a room: a pool, numbered migrations, tenant transactions, and what "away" means.

A room owns the schema of its name and works as the NOLOGIN role `tollgate_<room>`, which bypasses
nothing; the user in the url may become that role. Rooms keep no session state: settings and
advisory locks are a transaction's own, so a connection needs no cleaning between two uses.
"""

from __future__ import annotations

import asyncio
import errno
import hashlib
import json
import re
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import asyncpg
from asyncpg.pool import PoolConnectionProxy
from tenacity import (
    AsyncRetrying,
    retry_if_exception,
    retry_if_exception_type,
    stop_after_attempt,
    stop_after_delay,
    wait_random_exponential,
)

FIRST_CONNECTION_TIMEOUT_S = 30.0
CONNECT_TIMEOUT_S = 10.0
ACQUIRE_TIMEOUT_S = 10.0
COMMAND_TIMEOUT_S = 30.0

_NAME = re.compile(r"[a-z][a-z0-9_]{0,50}")
_MIGRATION = re.compile(r"(\d{4})_[a-z0-9_]+\.sql")
_MIGRATIONS_TABLE = (
    "CREATE TABLE IF NOT EXISTS {}.migrations (name text PRIMARY KEY, sha256 text NOT NULL, "
    "applied_at timestamptz NOT NULL DEFAULT now())"
)
_AWAY_ERRNOS = {errno.ENETDOWN, errno.ENETUNREACH, errno.EHOSTDOWN, errno.EHOSTUNREACH}

# Quoted, and twice over: asyncpg's classes are generic only in their stubs.
Pool: TypeAlias = "asyncpg.Pool[asyncpg.Record]"
Connection: TypeAlias = "PoolConnectionProxy[asyncpg.Record]"
if TYPE_CHECKING:
    _Connection = asyncpg.Connection[asyncpg.Record]
else:
    _Connection = asyncpg.Connection
_T = TypeVar("_T")


class MigrationError(Exception):
    """A migration was refused or failed, and nothing of it was kept. For the operator to read."""


# --- the pool --------------------------------------------------------------------------------


class RoomConnection(_Connection):
    """A connection that knows what `transaction` must set on it: (role, search_path) or nothing."""

    local_settings: tuple[str, str] | None = None

    def get_reset_query(self) -> str:
        """Nothing: rooms leave nothing behind (an open transaction is rolled back all the same).

        The usual query would add a round trip to every use of a connection.
        """
        return ""


async def connect_pool(
    url: str,
    *,
    role: str | None,
    schema: str,
    max_size: int = 8,
    pooled: bool = False,
    prepare: Callable[[_Connection], Awaitable[None]] | None = None,
) -> Pool:
    """A pool whose connections act as `role` and find their tables in `schema`, then `public`.

    `pooled` says that the url leads to a pooler in transaction mode. There a session is no one's
    own: nothing is set on it and no statement is prepared under a name, and role and search path
    hold only inside `transaction`, so such a room makes every statement there.

    `prepare` is called with each new connection, for codecs; json and jsonb have theirs already.
    Waits up to 30 s for a database that is away, then raises what `is_database_away` knows.
    """
    search_path = f"{_checked(schema)}, public"
    local = (role or "none", search_path) if pooled else None
    session = {} if pooled else {"search_path": search_path} | ({"role": role} if role else {})

    async def init(connection: _Connection) -> None:
        for kind in ("json", "jsonb"):
            await connection.set_type_codec(
                kind, schema="pg_catalog", encoder=_to_json, decoder=json.loads
            )
        if isinstance(connection, RoomConnection):
            connection.local_settings = local
        if prepare is not None:
            await prepare(connection)

    async def connect() -> Pool:
        return await asyncpg.create_pool(
            url,
            min_size=1,
            max_size=max_size,
            init=init,
            connection_class=RoomConnection,
            timeout=CONNECT_TIMEOUT_S,
            command_timeout=COMMAND_TIMEOUT_S,
            statement_cache_size=0 if pooled else 200,
            server_settings={"application_name": f"tollgate-{schema}", **session},
        )

    return await _once_there(connect)


@asynccontextmanager
async def transaction(pool: Pool, *, tenant: str | None = None) -> AsyncIterator[Connection]:
    """A connection in a transaction: committed at the end, rolled back by any exception.

    With `tenant`, row-level security sees `current_setting('tollgate.tenant', true)` until the
    transaction ends; outside of one it is null or ''. A pool that stays empty for 10 s raises
    TimeoutError, which `is_database_away` knows.
    """
    if tenant == "":
        raise ValueError("a tenant has a name")
    try:
        async with pool.acquire(timeout=ACQUIRE_TIMEOUT_S) as connection, connection.transaction():
            settings = {} if tenant is None else {"tollgate.tenant": tenant}
            local: tuple[str, str] | None = getattr(connection, "local_settings", None)
            if local:
                settings |= {"role": local[0], "search_path": local[1]}
            if settings:
                await connection.execute(
                    "SELECT set_config(name, value, true) "
                    "FROM unnest($1::text[], $2::text[]) AS setting (name, value)",
                    list(settings),
                    list(settings.values()),
                )
            yield connection
    except Exception as error:
        # Rolling back on a connection that is gone fails, and that failure would take the place of
        # the cancellation that asked for it: whoever was cancelled would go on for ever.
        task = asyncio.current_task()
        if task is not None and task.cancelling() and _is_of_the_connection(error):
            raise asyncio.CancelledError from error
        raise


def _is_of_the_connection(error: Exception) -> bool:
    return is_database_away(error) or isinstance(
        error, asyncpg.InterfaceError | asyncpg.InternalClientError
    )


def is_database_away(error: BaseException) -> bool:
    """Whether this failure says that the database cannot be had now, and not that we did wrong.

    Refused, reset and closed connections, a server that starts, stops, fails over or has no room
    for more, and anything that timed out. A COMMIT that was under way may have taken effect: what
    is retried must be idempotent.
    """
    if isinstance(error, asyncpg.InterfaceError):
        # asyncpg has one class for a connection that went away and for misuse of one.
        return any(word in str(error) for word in ("is closed", "is closing", "was closed"))
    if isinstance(error, asyncpg.InternalClientError):
        # The server said goodbye to an idle connection, whose end is not noticed yet.
        return "cannot switch to state" in str(error)
    if isinstance(error, OSError):
        return (
            isinstance(error, ConnectionError | TimeoutError | socket.gaierror)
            or error.errno in _AWAY_ERRNOS
            or (error.errno is None and "Multiple exceptions" in str(error))
        )
    return isinstance(
        error,
        asyncpg.PostgresConnectionError
        | asyncpg.InsufficientResourcesError
        | asyncpg.AdminShutdownError
        | asyncpg.CrashShutdownError
        | asyncpg.CannotConnectNowError
        | asyncpg.IdleSessionTimeoutError
        | asyncpg.ReadOnlySQLTransactionError,
    )


async def _once_there(connect: Callable[[], Awaitable[_T]]) -> _T:
    """Connect for the first time: a database that starts beside us gets half a minute."""
    async for attempt in AsyncRetrying(
        retry=retry_if_exception(is_database_away),
        stop=stop_after_delay(FIRST_CONNECTION_TIMEOUT_S),
        wait=wait_random_exponential(multiplier=0.05, max=2),
        reraise=True,
    ):
        with attempt:
            connected = await connect()
    return connected


def _to_json(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def _checked(name: str) -> str:
    """The name, quoted for SQL."""
    if not _NAME.fullmatch(name):
        raise ValueError(f"{name!r} is no name of a room: lower case, digits and _ only")
    return f'"{name}"'


# --- migrations ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Migration:
    """One numbered file."""

    name: str
    sql: str
    sha256: str


async def migrate(url: str, *, room: str, directory: Path) -> list[str]:
    """Bring the room's schema up to date; returns the names of the files applied now, in order.

    Makes the schema `<room>` and the role `tollgate_<room>` where they are missing, lets the role
    use the schema and the current user become the role. Then each `0001_name.sql` of `directory`
    that `<room>.migrations` does not list runs in one transaction with search_path `<room>,
    public`, written by the file's author to grant the role what it needs. Any number of
    processes may call this at once: one works, the others wait and find it done.

    `url` leads to the database itself, not to a pooler. Raises MigrationError for a file that is
    misnumbered, was changed after it was applied, or fails.
    """
    schema, migrations = _checked(room), _read_migrations(directory)
    connection = await _once_there(
        lambda: asyncpg.connect(
            url,
            timeout=CONNECT_TIMEOUT_S,
            server_settings={"application_name": f"tollgate-{room}-migrations"},
        )
    )
    try:
        await connection.execute(
            "SELECT pg_advisory_lock(hashtextextended($1, 0))", f"tollgate.{room}.migrations"
        )
        await _ensure_role(connection, room)
        await _ensure_schema(connection, room)
        await connection.execute(_MIGRATIONS_TABLE.format(schema))
        rows = await connection.fetch(f"SELECT name, sha256 FROM {schema}.migrations")
        pending = _pending(room, migrations, {row["name"]: row["sha256"] for row in rows})
        for migration in pending:
            await _apply(connection, room, migration)
    finally:
        await connection.close()
    return [migration.name for migration in pending]


def _read_migrations(directory: Path) -> list[Migration]:
    migrations: list[Migration] = []
    for path in sorted(directory.glob("*.sql")):
        if not _MIGRATION.fullmatch(path.name):
            raise MigrationError(f"{path.name}: a migration is named like 0001_name.sql")
        if migrations and migrations[-1].name[:4] == path.name[:4]:
            raise MigrationError(f"{path.name}: number {path.name[:4]} is taken: number it anew")
        body = path.read_bytes()
        migrations.append(Migration(path.name, body.decode(), hashlib.sha256(body).hexdigest()))
    return migrations


def _pending(room: str, migrations: list[Migration], applied: dict[str, str]) -> list[Migration]:
    """Those to apply. Applied ones that we do not know are a newer release's, and its business."""
    for migration in migrations:
        was = applied.get(migration.name, migration.sha256)
        if was != migration.sha256:
            raise MigrationError(
                f"{room}/{migration.name} was changed after it was applied: put the file back as "
                "it was, and make the change in a new one"
            )
    pending = [migration for migration in migrations if migration.name not in applied]
    latest = max((m.name for m in migrations if m.name in applied), default="")
    if pending and pending[0].name < latest:
        raise MigrationError(
            f"{room}/{pending[0].name} comes before {latest}, which is applied: number it after"
        )
    return pending


async def _apply(connection: _Connection, room: str, migration: Migration) -> None:
    schema = _checked(room)
    try:
        async with connection.transaction():
            await connection.execute(f"SET LOCAL search_path = {schema}, public")
            await connection.execute(migration.sql)
            await connection.execute(
                f"INSERT INTO {schema}.migrations (name, sha256) VALUES ($1, $2)",
                migration.name,
                migration.sha256,
            )
    except asyncpg.PostgresError as error:
        if is_database_away(error):
            raise
        raise MigrationError(f"{room}/{migration.name} failed: {error}") from error


async def _ensure_schema(connection: _Connection, room: str) -> None:
    # Looked up first: IF NOT EXISTS wants the right to create even where nothing is to be created.
    if await connection.fetchval("SELECT to_regnamespace($1) IS NULL", room):
        await connection.execute(f"CREATE SCHEMA {_checked(room)}")
    role = f"tollgate_{room}"
    if not await connection.fetchval("SELECT has_schema_privilege($1, $2, 'USAGE')", role, room):
        await connection.execute(f"GRANT USAGE ON SCHEMA {_checked(room)} TO {_checked(role)}")


async def _ensure_role(connection: _Connection, room: str) -> None:
    """Make the role and let us become it.

    Roles belong to the server, advisory locks to a database: two databases may do this at once,
    and then one of them looks again.
    """
    async for attempt in AsyncRetrying(
        retry=retry_if_exception_type(
            (
                asyncpg.DuplicateObjectError,
                asyncpg.UniqueViolationError,
                asyncpg.InternalServerError,
            )
        ),
        stop=stop_after_attempt(10),
        wait=wait_random_exponential(multiplier=0.02, max=0.5),
        reraise=True,
    ):
        with attempt:
            await _make_role(connection, f"tollgate_{room}")


async def _make_role(connection: _Connection, role: str) -> None:
    row = await connection.fetchrow(
        "SELECT rolsuper OR rolbypassrls AS is_unsafe FROM pg_roles WHERE rolname = $1", role
    )
    if row is None:
        await connection.execute(
            f"CREATE ROLE {_checked(role)} NOLOGIN NOSUPERUSER NOBYPASSRLS NOCREATEDB NOCREATEROLE"
        )
    elif row["is_unsafe"]:
        raise MigrationError(
            f"the role {role} may bypass row-level security: ALTER ROLE {role} NOSUPERUSER "
            "NOBYPASSRLS"
        )
    # Before 16 being a member was all it took to become a role.
    kind = "SET" if connection.get_server_version().major >= 16 else "MEMBER"
    if not await connection.fetchval("SELECT pg_has_role(current_user, $1, $2)", role, kind):
        await connection.execute(f"GRANT {_checked(role)} TO CURRENT_USER")
