"""The pool, the migrations and the tenant transaction, against the real server."""

from __future__ import annotations

import asyncio
import re
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit
from uuid import uuid4

import asyncpg
import pytest

from chassis.postgres import (
    MigrationError,
    Pool,
    connect_pool,
    is_database_away,
    migrate,
    transaction,
)

NOTES = """
CREATE TABLE notes (tenant text NOT NULL, body jsonb NOT NULL);
ALTER TABLE notes ENABLE ROW LEVEL SECURITY;
ALTER TABLE notes FORCE ROW LEVEL SECURITY;
CREATE POLICY by_tenant ON notes USING (tenant = current_setting('tollgate.tenant', true));
GRANT SELECT, INSERT, UPDATE, DELETE ON notes TO tollgate_attic;
"""


@pytest.fixture
def migrations(tmp_path: Path) -> Path:
    """A folder with one migration: a table under row-level security."""
    (tmp_path / "0001_notes.sql").write_text(NOTES)
    return tmp_path


@asynccontextmanager
async def attic(url: str, *, pooled: bool = False, max_size: int = 8) -> AsyncIterator[Pool]:
    """A pool of the room `attic`, as its role."""
    pool = await connect_pool(
        url, role="tollgate_attic", schema="attic", max_size=max_size, pooled=pooled
    )
    try:
        yield pool
    finally:
        await asyncio.wait_for(pool.close(), 10)


async def test_migrations_apply_once_in_order(database_url: str, migrations: Path) -> None:
    """A file is applied once; a new one is applied after it."""
    assert await migrate(database_url, room="attic", directory=migrations) == ["0001_notes.sql"]
    assert await migrate(database_url, room="attic", directory=migrations) == []
    (migrations / "0002_title.sql").write_text("ALTER TABLE notes ADD title text")
    (migrations / "0003_lang.sql").write_text("ALTER TABLE notes ADD lang text")
    applied = await migrate(database_url, room="attic", directory=migrations)
    assert applied == ["0002_title.sql", "0003_lang.sql"]


async def test_many_replicas_migrate_at_once(database_url: str, migrations: Path) -> None:
    """Of many replicas that start at once exactly one applies a file, and none fails."""
    applied = await asyncio.gather(
        *(migrate(database_url, room="attic", directory=migrations) for _ in range(8))
    )
    assert sorted(applied) == [[]] * 7 + [["0001_notes.sql"]]


async def test_a_new_role_is_made_in_many_databases_at_once(postgres_url: str) -> None:
    """Roles are the server's and the lock is a database's: still no caller fails."""
    room = f"r{uuid4().hex[:12]}"
    names = [f"{room}_{number}" for number in range(6)]
    urls = [urlunsplit(urlsplit(postgres_url)._replace(path=f"/{name}")) for name in names]
    connection = await asyncpg.connect(postgres_url)
    try:
        for name in names:
            await connection.execute(f"CREATE DATABASE {name}")
        empty = Path("/nonexistent")
        await asyncio.gather(*(migrate(url, room=room, directory=empty) for url in urls))
    finally:
        for name in names:
            await connection.execute(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")
        await connection.execute(f"DROP ROLE IF EXISTS tollgate_{room}")
        await connection.close()


async def test_a_changed_file_is_refused(database_url: str, migrations: Path) -> None:
    """A file that was applied and then changed is refused by name, and nothing else is applied."""
    await migrate(database_url, room="attic", directory=migrations)
    (migrations / "0001_notes.sql").write_text(NOTES + "-- changed")
    (migrations / "0002_title.sql").write_text("ALTER TABLE notes ADD title text")
    with pytest.raises(MigrationError, match=r"attic/0001_notes\.sql was changed"):
        await migrate(database_url, room="attic", directory=migrations)
    async with attic(database_url) as pool:
        assert await pool.fetchval("SELECT to_regclass('notes')") == "notes"
        with pytest.raises(asyncpg.UndefinedColumnError):
            await pool.fetch("SELECT title FROM notes")


async def test_a_failing_file_leaves_nothing(database_url: str, migrations: Path) -> None:
    """A file that fails half way leaves no half; the ones before it stay; repaired, it applies."""
    broken = migrations / "0002_more.sql"
    broken.write_text("CREATE TABLE more (id int); SELECT 1/0;")
    with pytest.raises(MigrationError, match=r"attic/0002_more\.sql failed: division by zero"):
        await migrate(database_url, room="attic", directory=migrations)
    broken.write_text("CREATE TABLE more (id int)")
    assert await migrate(database_url, room="attic", directory=migrations) == ["0002_more.sql"]


@pytest.mark.parametrize("name", ["1_short.sql", "0001_taken.sql", "0002_With Space.sql"])
async def test_misnumbered_files_are_refused(
    database_url: str, migrations: Path, name: str
) -> None:
    """A file that breaks the numbering is refused by name before anything runs."""
    (migrations / name).write_text("SELECT 1")
    with pytest.raises(MigrationError, match=re.escape(name) + "|0001_notes"):
        await migrate(database_url, room="attic", directory=migrations)


async def test_a_late_number_is_refused(database_url: str, migrations: Path) -> None:
    """A new file may not come before one that is applied: databases would differ by history."""
    (migrations / "0003_late.sql").write_text("SELECT 1")
    await migrate(database_url, room="attic", directory=migrations)
    (migrations / "0002_later.sql").write_text("SELECT 1")
    with pytest.raises(MigrationError, match=r"0002_later\.sql comes before 0003_late\.sql"):
        await migrate(database_url, room="attic", directory=migrations)


async def test_an_older_release_tolerates_a_newer_schema(
    database_url: str, migrations: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """During a rolling restart the release before finds files applied that it does not know."""
    (migrations / "0002_title.sql").write_text("ALTER TABLE notes ADD title text")
    await migrate(database_url, room="attic", directory=migrations)
    older = tmp_path_factory.mktemp("older")
    (older / "0001_notes.sql").write_text(NOTES)
    assert await migrate(database_url, room="attic", directory=older) == []


@pytest.mark.parametrize("pooled", [False, True])
async def test_tenants_see_their_own_rows_only(
    database_url: str, migrations: Path, pooled: bool
) -> None:
    """Row-level security holds under `transaction`, through a pooler too; no tenant, no rows."""
    await migrate(database_url, room="attic", directory=migrations)
    async with attic(database_url, pooled=pooled, max_size=1) as pool:
        for tenant in ("acme", "umbra"):
            async with transaction(pool, tenant=tenant) as connection:
                await connection.execute(
                    "INSERT INTO notes VALUES ($1, $2)", tenant, {"of": tenant}
                )
        async with transaction(pool, tenant="acme") as connection:
            rows = await connection.fetch("SELECT tenant, body FROM notes")
            assert [tuple(row) for row in rows] == [("acme", {"of": "acme"})]
        async with transaction(pool) as connection:
            assert await connection.fetch("SELECT * FROM notes") == []
        with pytest.raises(asyncpg.InsufficientPrivilegeError, match="row-level security"):
            async with transaction(pool, tenant="acme") as connection:
                await connection.execute("INSERT INTO notes VALUES ('umbra', '{}')")


async def test_an_empty_tenant_is_no_tenant(database_url: str, migrations: Path) -> None:
    """The empty name, which the server shows when no tenant is set, cannot be used as one."""
    await migrate(database_url, room="attic", directory=migrations)
    async with attic(database_url) as pool:
        with pytest.raises(ValueError, match="tenant"):
            async with transaction(pool, tenant=""):
                pass


@pytest.mark.parametrize("pooled", [False, True])
async def test_a_room_acts_as_its_role(database_url: str, migrations: Path, pooled: bool) -> None:
    """In a transaction the user is the room's role, which is neither superuser nor bypasses RLS."""
    await migrate(database_url, room="attic", directory=migrations)
    async with attic(database_url, pooled=pooled) as pool, transaction(pool) as connection:
        row = await connection.fetchrow(
            "SELECT current_user::text, rolsuper, rolbypassrls, rolcanlogin, rolcreaterole "
            "FROM pg_roles WHERE rolname = current_user"
        )
        assert row is not None
        assert tuple(row) == ("tollgate_attic", False, False, False, False)
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await connection.execute("CREATE TABLE public.mine (id int)")


async def test_a_role_that_bypasses_security_is_refused(
    database_url: str, postgres_url: str
) -> None:
    """A role that someone gave BYPASSRLS is refused with the statement that mends it."""
    room = f"r{uuid4().hex[:12]}"
    connection = await asyncpg.connect(postgres_url)
    try:
        await connection.execute(f"CREATE ROLE tollgate_{room} BYPASSRLS")
        with pytest.raises(MigrationError, match=f"ALTER ROLE tollgate_{room} NOSUPERUSER"):
            await migrate(database_url, room=room, directory=Path("/nonexistent"))
    finally:
        await connection.execute(f"DROP ROLE tollgate_{room}")
        await connection.close()


async def test_an_ordinary_owner_can_migrate(database_url: str, migrations: Path) -> None:
    """A login that may create roles but is no superuser can migrate, become the role and use it."""
    login, room = f"owner_{uuid4().hex[:12]}", f"r{uuid4().hex[:12]}"
    parts = urlsplit(database_url)
    url = urlunsplit(parts._replace(netloc=f"{login}:secret@{parts.hostname}:{parts.port}"))
    (migrations / "0001_notes.sql").write_text(NOTES.replace("tollgate_attic", f"tollgate_{room}"))
    connection = await asyncpg.connect(database_url)
    try:
        await connection.execute(f"CREATE ROLE {login} LOGIN CREATEROLE PASSWORD 'secret'")
        await connection.execute(f"ALTER DATABASE {parts.path[1:]} OWNER TO {login}")
        assert await migrate(url, room=room, directory=migrations) == ["0001_notes.sql"]
        pool = await connect_pool(url, role=f"tollgate_{room}", schema=room)
        async with transaction(pool, tenant="acme") as room_connection:
            await room_connection.execute("INSERT INTO notes VALUES ('acme', '{}')")
        await pool.close()
    finally:
        await connection.execute(f"REASSIGN OWNED BY {login} TO CURRENT_USER")
        await connection.execute(f"DROP OWNED BY tollgate_{room}, {login}")
        await connection.execute(f"DROP ROLE tollgate_{room}, {login}")
        await connection.close()


async def test_a_failed_transaction_leaves_the_connection_clean(
    database_url: str, migrations: Path
) -> None:
    """After an exception the only connection of a pool is usable, and its tenant forgotten."""
    await migrate(database_url, room="attic", directory=migrations)
    async with attic(database_url, max_size=1) as pool:

        async def stumble() -> None:
            async with transaction(pool, tenant="acme") as connection:
                await connection.execute("INSERT INTO notes VALUES ('acme', '{}')")
                raise RuntimeError

        with pytest.raises(RuntimeError):
            await stumble()
        async with transaction(pool, tenant="acme") as connection:
            assert await connection.fetchval("SELECT count(*) FROM notes") == 0
        async with transaction(pool) as connection:
            assert (
                await connection.fetchval("SELECT current_setting('tollgate.tenant', true)") == ""
            )


async def test_a_cancelled_transaction_leaves_the_connection_clean(
    database_url: str, migrations: Path
) -> None:
    """A statement cancelled under way is rolled back and the pool of one serves the next caller."""
    await migrate(database_url, room="attic", directory=migrations)
    async with attic(database_url, max_size=1) as pool:

        async def dawdle() -> None:
            async with transaction(pool, tenant="acme") as connection:
                await connection.execute("INSERT INTO notes VALUES ('acme', '{}')")
                started.set()
                await connection.execute("SELECT pg_sleep(60)")

        started = asyncio.Event()
        task = asyncio.create_task(dawdle())
        await started.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        async with transaction(pool, tenant="acme") as connection:
            assert await connection.fetchval("SELECT count(*) FROM notes") == 0


async def test_cancellation_survives_a_connection_that_is_gone(database_url: str) -> None:
    """Work that is cancelled while its session dies is cancelled, and not merely failed."""
    pool = await connect_pool(database_url, role=None, schema="attic")
    within = asyncio.Event()

    async def work() -> None:
        async with transaction(pool) as connection:
            connection.terminate()
            within.set()
            await asyncio.sleep(3600)

    working = asyncio.create_task(work())
    await within.wait()
    working.cancel()
    with pytest.raises(asyncio.CancelledError):
        await working
    pool.terminate()


async def test_nobody_listening_is_away() -> None:
    """A refused connection means the database is away."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        with pytest.raises(OSError) as refused:
            await asyncpg.connect(
                f"postgresql://a:b@127.0.0.1:{taken.getsockname()[1]}/c?sslmode=disable"
            )
    assert is_database_away(refused.value)


async def test_a_killed_session_is_away(database_url: str, postgres_url: str) -> None:
    """A session that the server ends under a statement means away; the pool then serves again."""
    pool = await connect_pool(database_url, role=None, schema="public", max_size=1)
    admin = await asyncpg.connect(postgres_url)
    try:
        pid = await pool.fetchval("SELECT pg_backend_pid()")
        sleeping = asyncio.create_task(pool.execute("SELECT pg_sleep(60)"))
        async with asyncio.timeout(30):
            # The server tells nobody when a statement begins: ask until it has.
            while not await admin.fetchval(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                "WHERE pid = $1 AND query LIKE '%pg_sleep%' AND state = 'active'",
                pid,
            ):
                pass
        with pytest.raises(asyncpg.PostgresError) as ended:
            await sleeping
        assert is_database_away(ended.value)
        assert await pool.fetchval("SELECT 1") == 1
    finally:
        await admin.close()
        await pool.close()


async def test_a_closed_pool_is_away_and_a_mistake_is_not(database_url: str) -> None:
    """A closed pool means away; bad SQL, misuse of a connection and other files' faults do not."""
    pool = await connect_pool(database_url, role=None, schema="public")
    with pytest.raises(asyncpg.PostgresError) as mistake:
        await pool.execute("SELECT nonsense")
    async with pool.acquire() as connection:
        pass
    with pytest.raises(asyncpg.InterfaceError) as misuse:
        await connection.execute("SELECT 1")
    await pool.close()
    with pytest.raises(asyncpg.InterfaceError) as closed:
        await pool.execute("SELECT 1")
    assert is_database_away(closed.value)
    assert is_database_away(TimeoutError())
    assert not is_database_away(mistake.value)
    assert not is_database_away(misuse.value)
    assert not is_database_away(FileNotFoundError(2, "No such file or directory"))


async def test_a_wrong_password_is_told_at_once(database_url: str) -> None:
    """What waiting cannot mend is not retried."""
    parts = urlsplit(database_url)
    url = urlunsplit(parts._replace(netloc=f"tollgate:wrong@{parts.hostname}:{parts.port}"))
    with pytest.raises(asyncpg.InvalidPasswordError) as refused:
        await connect_pool(url, role=None, schema="public")
    assert not is_database_away(refused.value)
