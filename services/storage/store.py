"""All SQL of storage: the catalog of objects, and vectors with pgvector.

Every statement that touches a tenant's rows runs in a transaction of that tenant, where row-level
security hides all others; the tenant in a WHERE clause is for the indexes.
"""

from __future__ import annotations

import json
import struct
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import asyncpg
import numpy as np

from chassis import postgres
from chassis.errors import Conflict, InvalidField, ProviderUnavailable, Violation
from chassis.postgres import Connection, Pool
from services.storage.core import Bucket, Condition, Draft, Entry, Object, Place, missing
from services.storage.vectors import Document, Half, Hit, KeptVector, Query, Space

ROOM = "storage"
MIGRATIONS = Path(__file__).parent / "migrations"


async def prepare(connection: Any) -> None:
    """Teach a new connection pgvector's binary format: dimensions, 0, big-endian halves."""
    await connection.set_type_codec(
        "halfvec",
        schema="public",
        encoder=lambda half: struct.pack(">HH", len(half), 0) + half.astype(">f2").tobytes(),
        decoder=lambda raw: np.frombuffer(raw, ">f2", offset=4).astype(np.float16),
        format="binary",
    )


@asynccontextmanager
async def _transaction(pool: Pool, tenant: str | None) -> AsyncIterator[Connection]:
    """A transaction of the tenant; ProviderUnavailable where the database cannot be had."""
    try:
        async with postgres.transaction(pool, tenant=tenant) as connection:
            yield connection
    except Exception as error:
        if postgres.is_database_away(error):
            raise ProviderUnavailable("the storage database cannot be reached") from None
        raise


# --- objects ---------------------------------------------------------------------------------

_OBJECT = "bucket, name, size_bytes, content_type, sha256, metadata, etag, updated_at"

CREATE_BUCKET = """
INSERT INTO buckets (tenant, provider, name) VALUES ($1, $2, $3) ON CONFLICT DO NOTHING
"""
READ_BUCKET = """
SELECT name, created_at FROM buckets WHERE tenant = $1 AND provider = $2 AND name = $3
"""
LIST_BUCKETS = """
SELECT name, created_at FROM buckets
WHERE tenant = $1 AND provider = $2 AND name > $3 ORDER BY name LIMIT $4
"""
DELETE_BUCKET = "DELETE FROM buckets WHERE tenant = $1 AND provider = $2 AND name = $3"

FIND_OBJECT = f"""
SELECT {_OBJECT}, blob FROM objects
WHERE tenant = $1 AND provider = $2 AND bucket = $3 AND name = $4
"""
LOCK_OBJECT = FIND_OBJECT + "FOR UPDATE"
LIST_OBJECTS = f"""
SELECT {_OBJECT} FROM objects
WHERE tenant = $1 AND provider = $2 AND bucket = $3
    AND name > $4 AND name >= $5 AND ($6::text IS NULL OR name < $6)
ORDER BY name LIMIT $7
"""
INSERT_OBJECT = f"""
INSERT INTO objects (
    tenant, provider, bucket, name, blob, size_bytes, content_type, sha256, metadata, etag
) VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10)
ON CONFLICT DO NOTHING RETURNING {_OBJECT}
"""
UPDATE_OBJECT = f"""
UPDATE objects SET blob = $5, size_bytes = $6, content_type = $7, sha256 = $8, metadata = $9,
    etag = $10, updated_at = now()
WHERE tenant = $1 AND provider = $2 AND bucket = $3 AND name = $4 RETURNING {_OBJECT}
"""
# In order of name, so that two deletions cannot wait for each other.
LOCK_OBJECTS = """
SELECT name, blob FROM objects
WHERE tenant = $1 AND provider = $2 AND bucket = $3 AND name = ANY ($4::text[])
ORDER BY name FOR UPDATE
"""
# A move holds one row and waits for another, which may not be there yet to be locked in order. So
# a tenant's moves go one by one, and not while others hold several rows; writes hold only one.
LOCK_MOVES = "SELECT pg_advisory_xact_lock(hashtextextended($1, 0))"
SHARE_MOVES = "SELECT pg_advisory_xact_lock_shared(hashtextextended($1, 0))"
DELETE_OBJECTS = """
DELETE FROM objects WHERE tenant = $1 AND provider = $2 AND bucket = $3 AND name = ANY ($4::text[])
"""
NAME_BLOB = "INSERT INTO blobs (provider, key) VALUES ($1, $2)"
FORGET_BLOBS = "DELETE FROM blobs WHERE provider = $1 AND key = ANY ($2::text[])"
UNNAMED_BLOBS = """
SELECT key FROM unnest($2::text[]) AS old (key)
WHERE NOT EXISTS (SELECT FROM blobs WHERE blobs.provider = $1 AND blobs.key = old.key)
"""


class PostgresCatalog:
    """Objects of one provider by name, in PostgreSQL."""

    def __init__(self, pool: Pool, provider: str) -> None:
        self._pool = pool
        self._provider = provider

    async def create_bucket(self, tenant: str, name: str) -> Bucket:
        key = (tenant, self._provider, name)
        async with _transaction(self._pool, tenant) as connection:
            await connection.execute(CREATE_BUCKET, *key)
            row = await connection.fetchrow(READ_BUCKET, *key)
        if row is None:  # Created and deleted by others meanwhile.
            raise missing("bucket", name)
        return Bucket(row["name"], row["created_at"])

    async def list_buckets(self, tenant: str, after: str, limit: int) -> list[Bucket]:
        async with _transaction(self._pool, tenant) as connection:
            rows = await connection.fetch(LIST_BUCKETS, tenant, self._provider, after, limit)
        return [Bucket(row["name"], row["created_at"]) for row in rows]

    async def delete_bucket(self, tenant: str, name: str) -> None:
        try:
            async with _transaction(self._pool, tenant) as connection:
                await connection.execute(SHARE_MOVES, self._moves(tenant))
                done = await connection.execute(DELETE_BUCKET, tenant, self._provider, name)
        except asyncpg.ForeignKeyViolationError:
            raise Conflict(
                "the bucket is not empty", violations=[Violation(f"bucket/{name}", "not empty")]
            ) from None
        if done == "DELETE 0":
            raise missing("bucket", name)

    async def find(self, tenant: str, place: Place) -> Entry | None:
        async with _transaction(self._pool, tenant) as connection:
            row = await connection.fetchrow(FIND_OBJECT, *self._key(tenant, place))
            if row is None:
                await self._check_bucket(connection, tenant, place.bucket)
        return None if row is None else Entry(_object(row), row["blob"])

    async def list_objects(
        self, tenant: str, bucket: str, *, after: str, prefix: str, before: str | None, limit: int
    ) -> list[Object]:
        async with _transaction(self._pool, tenant) as connection:
            rows = await connection.fetch(
                LIST_OBJECTS, tenant, self._provider, bucket, after, prefix, before, limit
            )
            if not rows:
                await self._check_bucket(connection, tenant, bucket)
        return [_object(row) for row in rows]

    async def put(
        self, tenant: str, draft: Draft, condition: Condition
    ) -> tuple[Object, str | None]:
        try:
            async with _transaction(self._pool, tenant) as connection:
                return await self._put(connection, tenant, draft, condition)
        except asyncpg.ForeignKeyViolationError:
            raise missing("bucket", draft.place.bucket) from None

    async def move(
        self, tenant: str, source: Place, target: Place, etag: str
    ) -> tuple[Object, str | None]:
        try:
            async with _transaction(self._pool, tenant) as connection:
                await connection.execute(LOCK_MOVES, self._moves(tenant))
                row = await connection.fetchrow(LOCK_OBJECT, *self._key(tenant, source))
                if row is None:
                    await self._check_bucket(connection, tenant, source.bucket)
                    raise missing("object", f"{source.bucket}/{source.name}")
                await connection.execute(
                    DELETE_OBJECTS, tenant, self._provider, source.bucket, [source.name]
                )
                await connection.execute(FORGET_BLOBS, self._provider, [row["blob"]])
                was = _object(row)
                draft = Draft(
                    target,
                    was.size_bytes,
                    was.content_type,
                    was.sha256,
                    was.metadata,
                    row["blob"],
                    etag,
                )
                return await self._put(connection, tenant, draft, Condition())
        except asyncpg.ForeignKeyViolationError:
            raise missing("bucket", target.bucket) from None

    async def remove(self, tenant: str, bucket: str, names: Sequence[str]) -> dict[str, str]:
        async with _transaction(self._pool, tenant) as connection:
            await self._check_bucket(connection, tenant, bucket)
            await connection.execute(SHARE_MOVES, self._moves(tenant))
            rows = await connection.fetch(LOCK_OBJECTS, tenant, self._provider, bucket, list(names))
            removed = {row["name"]: row["blob"] for row in rows}
            await connection.execute(DELETE_OBJECTS, tenant, self._provider, bucket, list(removed))
            await connection.execute(FORGET_BLOBS, self._provider, list(removed.values()))
        return removed

    async def unnamed(self, keys: Sequence[str]) -> list[str]:
        async with _transaction(self._pool, None) as connection:
            rows = await connection.fetch(UNNAMED_BLOBS, self._provider, list(keys))
        return [row["key"] for row in rows]

    async def _put(
        self, connection: Connection, tenant: str, draft: Draft, condition: Condition
    ) -> tuple[Object, str | None]:
        key = self._key(tenant, draft.place)
        values = (
            draft.blob,
            draft.size_bytes,
            draft.content_type,
            draft.sha256,
            dict(draft.metadata),
            draft.etag,
        )
        while True:
            before = await connection.fetchrow(LOCK_OBJECT, *key)
            condition.check(draft.place, before["etag"] if before else None)
            write = UPDATE_OBJECT if before else INSERT_OBJECT
            row = await connection.fetchrow(write, *key, *values)
            if row is not None:
                break
            # Another came first between our look and our insertion; the next look sees it.
        replaced: str | None = before["blob"] if before else None
        if replaced is not None:
            await connection.execute(FORGET_BLOBS, self._provider, [replaced])
        await connection.execute(NAME_BLOB, self._provider, draft.blob)
        return _object(row), replaced

    async def _check_bucket(self, connection: Connection, tenant: str, bucket: str) -> None:
        if await connection.fetchrow(READ_BUCKET, tenant, self._provider, bucket) is None:
            raise missing("bucket", bucket)

    def _moves(self, tenant: str) -> str:
        return f"tollgate.storage.moves/{self._provider}/{tenant}"

    def _key(self, tenant: str, place: Place) -> tuple[str, str, str, str]:
        return tenant, self._provider, place.bucket, place.name


def _object(row: asyncpg.Record) -> Object:
    return Object(
        Place(row["bucket"], row["name"]),
        row["size_bytes"],
        row["content_type"],
        row["sha256"],
        row["metadata"],
        row["etag"],
        row["updated_at"],
    )


# --- vectors ---------------------------------------------------------------------------------

READ_SPACE = "SELECT number, id, dimensions, simulated, provider, model FROM spaces WHERE id = $1"
MAKE_SPACE = "SELECT make_space($1, $2, $3, $4, $5, $6)"

# A session's own table, emptied at every commit; making one for each call would bloat the system
# catalog. Metadata is text on its way in: asyncpg copies in binary only.
INCOMING = """
CREATE TEMPORARY TABLE IF NOT EXISTS incoming_vectors (
    id text, text_sha256 bytea, metadata text, embedding halfvec
) ON COMMIT DELETE ROWS
"""
# Sorted, so that two writers of the same rows cannot wait for each other; a row that would stay
# as it is is left alone, so that repeating a call costs no index entry.
UPSERT = """
INSERT INTO vectors AS kept (
    space, tenant, collection, document, revision, id, text_sha256, metadata, embedding
)
SELECT $1, $2, $3, $4, $5, id, text_sha256, metadata::jsonb, embedding
FROM incoming_vectors ORDER BY id
ON CONFLICT (tenant, collection, document, revision, id, space) DO UPDATE
SET text_sha256 = excluded.text_sha256, metadata = excluded.metadata,
    embedding = excluded.embedding
WHERE (kept.text_sha256, kept.metadata, kept.embedding)
    IS DISTINCT FROM (excluded.text_sha256, excluded.metadata, excluded.embedding)
"""
ACTIVE_REVISION = """
SELECT active FROM revisions
WHERE tenant = $1 AND space = $2 AND collection = $3 AND document = $4 FOR SHARE
"""
ACTIVATE = """
INSERT INTO revisions AS kept (tenant, space, collection, document, active)
VALUES ($1, $2, $3, $4, $5)
ON CONFLICT (tenant, space, collection, document) DO UPDATE SET active = excluded.active
WHERE kept.active <= excluded.active RETURNING active
"""
COUNT_REVISION = """
SELECT count(*) FROM vectors
WHERE tenant = $1 AND space = $2 AND collection = $3 AND document = $4 AND revision = $5
"""
# Space and dimensions stand in these as numbers, not as parameters, so that whatever plan is kept
# is one for the space's own partition and index.
COUNT_SOME = """
SELECT count(*) FROM (
    SELECT FROM vectors WHERE tenant = $1 AND space = {space} AND collection = $2 LIMIT $3
) AS counted
"""
# OFFSET 0 keeps the planner from using the index after all.
SEARCH_EXACTLY = """
SELECT id, document, revision, metadata, distance FROM (
    SELECT v.id, v.document, v.revision, v.metadata, v.embedding <=> $3 AS distance
    FROM vectors AS v
    JOIN revisions AS r ON r.tenant = v.tenant AND r.space = v.space
        AND r.collection = v.collection AND r.document = v.document AND r.active = v.revision
    WHERE v.tenant = $1 AND v.space = {space} AND v.collection = $2 AND v.metadata @> $4
    OFFSET 0
) AS near
ORDER BY distance, document, id LIMIT $5
"""
# The revision is looked up for each candidate, in the order in which the index finds them.
SEARCH_BY_INDEX = """
SELECT v.id, v.document, v.revision, v.metadata,
    v.embedding::halfvec({dimensions}) <=> $3::halfvec({dimensions}) AS distance
FROM vectors AS v
WHERE v.tenant = $1 AND v.space = {space} AND v.collection = $2 AND v.metadata @> $4
    AND v.revision = (
        SELECT active FROM revisions AS r
        WHERE r.tenant = $1 AND r.space = {space} AND r.collection = $2 AND r.document = v.document
    )
ORDER BY distance LIMIT $5
"""
# Without sorting, only the index can give the order.
TUNE_SEARCH = """
SELECT set_config('enable_sort', 'off', true),
    set_config('hnsw.iterative_scan', 'relaxed_order', true),
    set_config('hnsw.ef_search', $1, true), set_config('hnsw.max_scan_tuples', $2, true)
"""
TUNE_BACK = "SELECT set_config('enable_sort', 'on', true)"
LOOKUP = """
SELECT DISTINCT ON (text_sha256) text_sha256, embedding FROM vectors
WHERE tenant = $1 AND space = $2 AND text_sha256 = ANY ($3::bytea[])
"""
DELETE_ACTIVE = "DELETE FROM revisions WHERE tenant = $1 AND collection = $2 AND document = $3"
DELETE_VECTORS = """
DELETE FROM vectors WHERE tenant = $1 AND collection = $2 AND document = $3
    AND ($4::bigint = 0 OR revision = $4)
"""

EF_SEARCH_MIN, EF_SEARCH_MAX = 100, 1_000


class PostgresVectors:
    """Vectors in PostgreSQL with pgvector.

    A collection of at most `exact_components_max` components (vectors times dimensions) is
    searched exactly; a larger one by index, which goes on looking until it has enough hits or has
    seen `scan_vectors_max`, and exactly after all where that was not enough.
    """

    def __init__(
        self, pool: Pool, *, exact_components_max: int, scan_vectors_max: int, spaces_max: int
    ) -> None:
        self._pool = pool
        self._exact_components_max = exact_components_max
        self._scan_vectors_max = scan_vectors_max
        self._spaces_max = spaces_max
        # Spaces never change, and every call needs one.
        self._spaces: dict[str, tuple[int, Space]] = {}

    async def space(self, space_id: str) -> Space | None:
        found = await self._found(space_id)
        return None if found is None else found[1]

    async def ensure_space(self, space: Space) -> Space:
        found = await self._found(space.id)
        if found is None:
            async with _transaction(self._pool, None) as connection:
                await connection.execute(
                    MAKE_SPACE,
                    space.id,
                    space.dimensions,
                    space.simulated,
                    space.provider,
                    space.model,
                    self._spaces_max,
                )
            found = await self._found(space.id)
        if found is None:
            raise InvalidField.of(
                "space.id", f"there are {self._spaces_max} spaces already, which is the most"
            )
        return found[1]

    async def upsert(
        self,
        tenant: str,
        space: Space,
        document: Document,
        revision: int,
        vectors: Sequence[KeptVector],
    ) -> bool:
        number = await self._number(space)
        where = (document.collection, document.id)
        async with _transaction(self._pool, tenant) as connection:
            active = await connection.fetchval(ACTIVE_REVISION, tenant, number, *where)
            if active is not None and active > revision:
                return False
            await connection.execute(INCOMING)
            await connection.copy_records_to_table(
                "incoming_vectors",
                schema_name="pg_temp",
                columns=("id", "text_sha256", "metadata", "embedding"),
                records=[
                    (v.id, v.text_sha256, json.dumps(dict(v.metadata)), v.values) for v in vectors
                ],
            )
            await connection.execute(UPSERT, number, tenant, *where, revision)
        return True

    async def activate(
        self, tenant: str, space: Space, document: Document, revision: int
    ) -> int | None:
        key = (tenant, await self._number(space), document.collection, document.id, revision)
        async with _transaction(self._pool, tenant) as connection:
            if await connection.fetchval(ACTIVATE, *key) is None:
                return None
            count: int = await connection.fetchval(COUNT_REVISION, *key)
        return count

    async def search(self, tenant: str, space: Space, query: Query) -> list[Hit]:
        exact_max = max(1, self._exact_components_max // space.dimensions)
        names = {"space": await self._number(space), "dimensions": space.dimensions}
        async with _transaction(self._pool, tenant) as connection:
            count = await connection.fetchval(
                COUNT_SOME.format(**names), tenant, query.collection, exact_max + 1
            )
            rows: list[asyncpg.Record] = []
            if count > exact_max:
                rows = await self._search_by_index(connection, tenant, query, names)
            if len(rows) < query.limit:
                rows = await _searched(connection, SEARCH_EXACTLY, tenant, query, names)
        return sorted(map(_hit, rows), key=lambda hit: (-hit.score, hit.document_id, hit.id))

    async def lookup(self, tenant: str, space: Space, hashes: Sequence[bytes]) -> dict[bytes, Half]:
        number = await self._number(space)
        async with _transaction(self._pool, tenant) as connection:
            rows = await connection.fetch(LOOKUP, tenant, number, list(hashes))
        return {row["text_sha256"]: row["embedding"] for row in rows}

    async def delete(self, tenant: str, document: Document, revision: int) -> int:
        key = (tenant, document.collection, document.id)
        async with _transaction(self._pool, tenant) as connection:
            if revision == 0:
                await connection.execute(DELETE_ACTIVE, *key)
            done = await connection.execute(DELETE_VECTORS, *key, revision)
        return int(done.removeprefix("DELETE "))

    async def _search_by_index(
        self, connection: Connection, tenant: str, query: Query, names: dict[str, int]
    ) -> list[asyncpg.Record]:
        ef_search = min(EF_SEARCH_MAX, max(EF_SEARCH_MIN, query.limit))
        await connection.execute(TUNE_SEARCH, str(ef_search), str(self._scan_vectors_max))
        rows = await _searched(connection, SEARCH_BY_INDEX, tenant, query, names)
        if len(rows) < query.limit:
            await connection.execute(TUNE_BACK)
        return rows

    async def _number(self, space: Space) -> int:
        found = await self._found(space.id)
        if found is None:
            raise missing("space", space.id)
        return found[0]

    async def _found(self, space_id: str) -> tuple[int, Space] | None:
        found = self._spaces.get(space_id)
        if found is None:
            async with _transaction(self._pool, None) as connection:
                row = await connection.fetchrow(READ_SPACE, space_id)
            if row is None:
                return None
            number, *properties = row
            found = self._spaces[space_id] = (number, Space(*properties))
        return found


async def _searched(
    connection: Connection, sql: str, tenant: str, query: Query, names: dict[str, int]
) -> list[asyncpg.Record]:
    return await connection.fetch(
        sql.format(**names),
        tenant,
        query.collection,
        query.values,
        dict(query.filter),
        query.limit,
    )


def _hit(row: asyncpg.Record) -> Hit:
    # Rounding may put the cosine of a vector with itself a little beyond 1.
    score = max(-1.0, min(1.0, 1.0 - row["distance"]))
    return Hit(row["id"], row["document"], row["revision"], score, row["metadata"])
