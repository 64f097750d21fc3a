"""All SQL of the corpus. Every transaction is one tenant's, and row-level security sees to it.

Whatever a stage writes is written only while the revision still stands at that stage and is the
document's latest, so a job that runs twice, or runs on after its document changed, does no harm.
Where the database is away, every method raises ProviderUnavailable.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol
from uuid import uuid4

import asyncpg

from chassis.errors import ProviderUnavailable
from chassis.postgres import Connection, Pool, is_database_away, transaction
from services.corpus.chunking import Chunk
from services.corpus.core import (
    CLEAN,
    WORKING,
    Added,
    Changes,
    Document,
    Hit,
    Near,
    NewDocument,
    ParsedPage,
    Provenance,
    Remains,
    Source,
    Space,
    Stage,
    State,
    Ticket,
    Work,
)

ROOM = "corpus"
ROLE = "tollgate_corpus"
MIGRATIONS = Path(__file__).parent / "migrations"


class Queue(Protocol):
    """Where jobs are enqueued, inside the transaction of whoever enqueues."""

    async def enqueue(
        self, connection: Connection, job: str, ticket: Ticket, *, after_s: float = 0.0
    ) -> None: ...


_LIVE = """
    r.tenant = $1 AND r.uid = $2 AND r.revision = $3 AND r.stage = $4
    AND r.state NOT IN ('READY', 'FAILED')
    AND EXISTS (SELECT FROM documents d WHERE d.tenant = r.tenant AND d.uid = r.uid
                AND d.revision = r.revision AND NOT d.deleted)
"""
_NOW = "updated_at = clock_timestamp()"
# What is set when a stage gets on.
_WELL = f"reason = '', message = '', faults = 0, waiting_since = NULL, {_NOW}"
_DOCUMENT = """
    SELECT d.collection, d.document_id, d.created_at, r.*
    FROM documents d JOIN revisions r USING (tenant, uid, revision)
    WHERE NOT d.deleted
"""


async def prepare(connection: Any) -> None:
    """Hand jsonb over as text: the queue's library, on the same connections, reads it so."""
    await connection.reset_type_codec("jsonb", schema="pg_catalog")


class Store:
    """The corpus's tables. The pool's connections are made with `prepare`."""

    def __init__(self, pool: Pool, queue: Queue, changes: Changes) -> None:
        self._pool = pool
        self._queue = queue
        self._changes = changes

    @asynccontextmanager
    async def _transaction(self, tenant: str) -> AsyncIterator[Connection]:
        try:
            async with transaction(self._pool, tenant=tenant) as connection:
                yield connection
        except Exception as error:
            if is_database_away(error):
                raise ProviderUnavailable("the corpus cannot reach its database") from None
            raise

    # --- documents -------------------------------------------------------------------------------

    async def get(self, tenant: str, collection: str, document_id: str) -> Document | None:
        """A document by its name."""
        async with self._transaction(tenant) as connection:
            return await _named(connection, tenant, collection, document_id)

    async def newest(
        self,
        tenant: str,
        *,
        collection: str,
        state: State | None,
        after: tuple[datetime, str] | None,
        limit: int,
    ) -> list[Document]:
        """Documents, the newest first; of every collection where it is empty."""
        created_at, uid = after or (None, None)
        async with self._transaction(tenant) as connection:
            rows = await connection.fetch(
                f"""{_DOCUMENT} AND d.tenant = $1
                  AND ($2 = '' OR d.collection = $2)
                  AND ($3::text IS NULL OR r.state = $3)
                  AND ($4::timestamptz IS NULL OR (d.created_at, d.uid) < ($4, $5::uuid))
                ORDER BY d.created_at DESC, d.uid DESC LIMIT $6""",
                tenant,
                collection,
                state,
                created_at,
                uid,
                limit,
            )
        return [_document(row) for row in rows]

    async def add(self, tenant: str, new: NewDocument) -> Added:
        """Add a document or a revision of it, and enqueue its first job, in one transaction.

        The same bytes as its latest revision's change nothing, or start again what had failed.
        """
        async with self._transaction(tenant) as connection:
            await connection.execute(
                "SELECT pg_advisory_xact_lock(hashtextextended($1, 0))",
                f"tollgate.corpus/{tenant}/{new.collection}/{new.document_id}",
            )
            old = await _named(connection, tenant, new.collection, new.document_id)
            unused: tuple[Source, ...] = ()
            if old is None:
                await self._insert(connection, tenant, new)
            elif old.sha256 != new.sha256:
                await self._revise(connection, tenant, old, new)
            elif old.state is State.FAILED:
                unused = await self._revive(connection, tenant, old, new)
            else:
                return Added(old, (new.source,))
            document = await _named(connection, tenant, new.collection, new.document_id)
        if document is None:
            raise RuntimeError("a document that was just written is not there")
        self._changes.tell(document.uid)
        return Added(document, unused)

    async def _insert(self, connection: Connection, tenant: str, new: NewDocument) -> None:
        ticket = Ticket(tenant, new.collection, str(uuid4()), 1)
        await connection.execute(
            "INSERT INTO documents (tenant, uid, collection, document_id, revision) "
            "VALUES ($1, $2, $3, $4, 1)",
            tenant,
            ticket.uid,
            new.collection,
            new.document_id,
        )
        await self._start(connection, ticket, new)

    async def _revise(
        self, connection: Connection, tenant: str, old: Document, new: NewDocument
    ) -> None:
        ticket = Ticket(tenant, old.collection, old.uid, old.revision + 1)
        await connection.execute(
            "UPDATE documents SET revision = $3 WHERE tenant = $1 AND uid = $2",
            tenant,
            ticket.uid,
            ticket.revision,
        )
        await self._start(connection, ticket, new)

    async def _start(self, connection: Connection, ticket: Ticket, new: NewDocument) -> None:
        await connection.execute(
            """INSERT INTO revisions
                 (tenant, uid, revision, file_name, media_type, size_bytes, sha256, metadata,
                  bucket, object_name, object_owned, project, request_id, traceparent,
                  charged_nanos_usd)
               VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15)""",
            ticket.tenant,
            ticket.uid,
            ticket.revision,
            new.file_name,
            new.media_type,
            new.size_bytes,
            new.sha256,
            _json(dict(new.metadata)),
            new.source.bucket,
            new.source.name,
            new.source.owned,
            new.project,
            new.request_id,
            new.traceparent,
            new.charged_nanos_usd,
        )
        await self._queue.enqueue(connection, Stage.PARSE, ticket)

    async def _revive(
        self, connection: Connection, tenant: str, old: Document, new: NewDocument
    ) -> tuple[Source, ...]:
        """Start a failed revision again where it failed. Answers the object it needs no more."""
        ticket = Ticket(tenant, old.collection, old.uid, old.revision)
        row = await connection.fetchrow(
            f"""WITH was AS (
                  SELECT bucket, object_name, object_owned FROM revisions
                  WHERE tenant = $1 AND uid = $2 AND revision = $3 FOR UPDATE
                )
                UPDATE revisions r SET state = 'STORED', reason = '', message = '',
                  retry_at = NULL, tries = tries + 1, faults = 0, waiting_since = NULL,
                  bucket = $4, object_name = $5, object_owned = $6,
                  project = $7, request_id = $8, traceparent = $9,
                  charged_nanos_usd = charged_nanos_usd + $10, {_NOW}
                FROM was WHERE tenant = $1 AND uid = $2 AND revision = $3
                RETURNING was.*, r.stage""",
            tenant,
            ticket.uid,
            ticket.revision,
            new.source.bucket,
            new.source.name,
            new.source.owned,
            new.project,
            new.request_id,
            new.traceparent,
            new.charged_nanos_usd,
        )
        if row is None:
            raise RuntimeError("a revision that was just read is not there")
        await self._queue.enqueue(connection, row["stage"], ticket)
        return (_source(row),)

    # --- the work of stages ----------------------------------------------------------------------

    async def take(self, ticket: Ticket, stage: Stage) -> Work | None:
        """The revision, now at work in this stage; None where this job has nothing to do any more.

        That is so when it was done already, when another revision took its place, and when the
        document was deleted.
        """
        async with self._transaction(ticket.tenant) as connection:
            row = await connection.fetchrow(
                f"SELECT r.* FROM revisions r WHERE {_LIVE}", *_key(ticket, stage)
            )
            if row is None:
                return None
            if row["state"] == WORKING[stage] and row["retry_at"] is None:
                return _work(ticket, row)
            await connection.execute(
                f"UPDATE revisions r SET state = $5, retry_at = NULL, {_NOW} WHERE {_LIVE}",
                *_key(ticket, stage),
                WORKING[stage],
            )
        self._changes.tell(ticket.uid)
        return _work(ticket, row)

    async def progress(
        self, ticket: Ticket, stage: Stage, *, pages_done: int, pages_total: int
    ) -> None:
        """Say how far a parse is."""
        async with self._transaction(ticket.tenant) as connection:
            await connection.execute(
                f"UPDATE revisions r SET pages_done = $5, pages_total = $6, {_NOW} WHERE {_LIVE}",
                *_key(ticket, stage),
                pages_done,
                pages_total,
            )
        self._changes.tell(ticket.uid)

    async def parsed(
        self,
        ticket: Ticket,
        pages: Sequence[ParsedPage],
        *,
        media_type: str,
        provenance: Provenance,
        charged_nanos_usd: int,
    ) -> bool:
        """Keep the pages and go on to chunking. False where the revision is no longer at it."""
        async with self._advancing(ticket, Stage.PARSE, Stage.CHUNK) as connection:
            if connection is None:
                return False
            await _clear(connection, ticket, "pages")
            await connection.executemany(
                "INSERT INTO pages (tenant, uid, revision, number, markdown) "
                "VALUES ($1, $2, $3, $4, $5)",
                [(*_key(ticket), page.number, page.markdown) for page in pages],
            )
            await connection.execute(
                """UPDATE revisions SET media_type = $4, pages_done = $5, pages_total = $5,
                     parsed_by = $6, charged_nanos_usd = charged_nanos_usd + $7
                   WHERE tenant = $1 AND uid = $2 AND revision = $3""",
                *_key(ticket),
                media_type,
                len(pages),
                _json(asdict(provenance)),
                charged_nanos_usd,
            )
        return True

    async def pages(self, ticket: Ticket) -> list[ParsedPage]:
        """The pages of a revision, in order."""
        async with self._transaction(ticket.tenant) as connection:
            rows = await connection.fetch(
                "SELECT number, markdown FROM pages "
                "WHERE tenant = $1 AND uid = $2 AND revision = $3 ORDER BY number",
                *_key(ticket),
            )
        return [ParsedPage(row["number"], row["markdown"]) for row in rows]

    async def chunked(self, ticket: Ticket, chunks: Sequence[Chunk]) -> bool:
        """Keep the chunks and go on to embedding. False where the revision is no longer at it."""
        async with self._advancing(ticket, Stage.CHUNK, Stage.EMBED) as connection:
            if connection is None:
                return False
            await _clear(connection, ticket, "chunks")
            await _clear(connection, ticket, "batches")
            await connection.executemany(
                """INSERT INTO chunks (tenant, uid, revision, ordinal, page, page_end, starts, ends,
                     headings, context, body)
                   VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11)""",
                [
                    (
                        *_key(ticket),
                        chunk.ordinal,
                        chunk.page,
                        chunk.page_end,
                        chunk.start,
                        chunk.end,
                        list(chunk.headings),
                        chunk.context,
                        chunk.text,
                    )
                    for chunk in chunks
                ],
            )
            await connection.execute(
                "UPDATE revisions SET chunks_done = 0, chunks_total = $4 "
                "WHERE tenant = $1 AND uid = $2 AND revision = $3",
                *_key(ticket),
                len(chunks),
            )
        return True

    async def chunks(self, ticket: Ticket) -> tuple[list[Chunk], frozenset[int]]:
        """The chunks of a revision, in order, and the batches of them that are done."""
        async with self._transaction(ticket.tenant) as connection:
            rows = await connection.fetch(
                """SELECT ordinal, page, page_end, starts, ends, headings, context, body
                   FROM chunks WHERE tenant = $1 AND uid = $2 AND revision = $3
                   ORDER BY ordinal""",
                *_key(ticket),
            )
            done = await connection.fetch(
                "SELECT batch FROM batches WHERE tenant = $1 AND uid = $2 AND revision = $3",
                *_key(ticket),
            )
        chunks = [
            Chunk(
                row["ordinal"],
                row["page"],
                row["page_end"],
                row["starts"],
                row["ends"],
                tuple(row["headings"]),
                row["context"],
                row["body"],
            )
            for row in rows
        ]
        return chunks, frozenset(row["batch"] for row in done)

    async def pin(self, ticket: Ticket, space: Space) -> None:
        """Keep the space that every vector of this revision is in."""
        async with self._transaction(ticket.tenant) as connection:
            await connection.execute(
                f"UPDATE revisions r SET space = $5, {_NOW} WHERE {_LIVE}",
                *_key(ticket, Stage.EMBED),
                _json(asdict(space)),
            )

    async def batch_done(
        self,
        ticket: Ticket,
        batch: int,
        *,
        chunks: int,
        provenance: Provenance,
        charged_nanos_usd: int,
    ) -> None:
        """Mark a batch whose vectors are written."""
        async with self._transaction(ticket.tenant) as connection:
            marked = await connection.fetchval(
                """INSERT INTO batches (tenant, uid, revision, batch) VALUES ($1, $2, $3, $4)
                   ON CONFLICT DO NOTHING RETURNING true""",
                *_key(ticket),
                batch,
            )
            await connection.execute(
                f"""UPDATE revisions r SET chunks_done = chunks_done + $5, embedded_by = $6,
                      charged_nanos_usd = charged_nanos_usd + $7, {_WELL}
                    WHERE {_LIVE}""",
                *_key(ticket, Stage.EMBED),
                chunks if marked else 0,
                _json(asdict(provenance)),
                charged_nanos_usd,
            )
        self._changes.tell(ticket.uid)

    async def embedded(
        self, ticket: Ticket, *, provenance: Provenance | None, charged_nanos_usd: int
    ) -> bool:
        """Every batch is done: go on to indexing. False where the revision is no longer at it."""
        async with self._advancing(ticket, Stage.EMBED, Stage.INDEX) as connection:
            if connection is None:
                return False
            await connection.execute(
                """UPDATE revisions SET chunks_done = chunks_total,
                     charged_nanos_usd = charged_nanos_usd + $4,
                     embedded_by = coalesce($5, embedded_by)
                   WHERE tenant = $1 AND uid = $2 AND revision = $3""",
                *_key(ticket),
                charged_nanos_usd,
                _json(asdict(provenance)) if provenance else None,
            )
        return True

    async def ready(self, ticket: Ticket, *, charged_nanos_usd: int) -> bool:
        """The revision serves: say so, and have what was before it removed."""
        async with self._transaction(ticket.tenant) as connection:
            ready = await connection.fetchval(
                f"""UPDATE revisions r SET state = 'READY',
                      charged_nanos_usd = charged_nanos_usd + $5, {_WELL}
                    WHERE {_LIVE} RETURNING true""",
                *_key(ticket, Stage.INDEX),
                charged_nanos_usd,
            )
            if ready and ticket.revision > 1:
                await self._queue.enqueue(connection, CLEAN, ticket)
        self._changes.tell(ticket.uid)
        return bool(ready)

    @asynccontextmanager
    async def _advancing(
        self, ticket: Ticket, stage: Stage, to: Stage
    ) -> AsyncIterator[Connection | None]:
        """A transaction that ends one stage and enqueues the next; None where it is not to be."""
        async with self._transaction(ticket.tenant) as connection:
            moved = await connection.fetchval(
                f"""UPDATE revisions r SET stage = $5, state = $6, {_WELL}
                    WHERE {_LIVE} RETURNING true""",
                *_key(ticket, stage),
                to,
                WORKING[to],
            )
            if not moved:
                yield None
                return
            yield connection
            await self._queue.enqueue(connection, to, ticket)
        self._changes.tell(ticket.uid)

    # --- when a stage met an error ---------------------------------------------------------------

    async def fail(
        self, ticket: Ticket, stage: Stage, reason: str, message: str, charged_nanos_usd: int
    ) -> None:
        """It cannot be made searchable as it is."""
        await self._note(ticket, stage, State.FAILED, reason, message, charged_nanos_usd)

    async def defer(
        self,
        ticket: Ticket,
        stage: Stage,
        reason: str,
        message: str,
        delay_s: float,
        charged_nanos_usd: int,
    ) -> None:
        """It waits for its budget, by itself."""
        await self._note(
            ticket, stage, State.DEFERRED, reason, message, charged_nanos_usd, delay_s=delay_s
        )

    async def again(
        self,
        ticket: Ticket,
        stage: Stage,
        reason: str,
        message: str,
        charged_nanos_usd: int,
        *,
        fault: bool = False,
        waiting: bool = False,
    ) -> None:
        """It is tried again, and its next paid call is another one."""
        await self._note(
            ticket,
            stage,
            WORKING[stage],
            reason,
            message,
            charged_nanos_usd,
            fault=fault,
            waiting=waiting,
        )

    async def _note(
        self,
        ticket: Ticket,
        stage: Stage,
        state: State,
        reason: str,
        message: str,
        charged_nanos_usd: int,
        *,
        delay_s: float | None = None,
        fault: bool = False,
        waiting: bool = False,
    ) -> None:
        async with self._transaction(ticket.tenant) as connection:
            await connection.execute(
                f"""UPDATE revisions r SET state = $5, reason = $6, message = $7,
                      retry_at = clock_timestamp() + $8::float8 * interval '1 second',
                      tries = tries + 1, faults = faults + $9::int,
                      waiting_since = CASE WHEN $10 THEN coalesce(waiting_since, clock_timestamp())
                                      END,
                      charged_nanos_usd = charged_nanos_usd + $11, {_NOW}
                    WHERE {_LIVE}""",
                *_key(ticket, stage),
                state,
                reason,
                message,
                delay_s,
                int(fault),
                waiting,
                charged_nanos_usd,
            )
        self._changes.tell(ticket.uid)

    # --- searching -------------------------------------------------------------------------------

    async def hits(self, tenant: str, near: Sequence[Near]) -> list[Hit]:
        """The chunks of these vectors, in the same order; those that are gone are left out."""
        async with self._transaction(tenant) as connection:
            rows = await connection.fetch(
                """SELECT d.document_id, r.file_name, r.embedded_by, c.page, c.page_end, c.body,
                     c.headings, near.score
                   FROM unnest($2::uuid[], $3::bigint[], $4::int[], $5::float4[]) WITH ORDINALITY
                     AS near (uid, revision, ordinal, score, place)
                   JOIN chunks c ON c.tenant = $1 AND c.uid = near.uid
                     AND c.revision = near.revision AND c.ordinal = near.ordinal
                   JOIN revisions r ON r.tenant = $1 AND r.uid = near.uid
                     AND r.revision = near.revision
                   JOIN documents d ON d.tenant = $1 AND d.uid = near.uid AND NOT d.deleted
                   ORDER BY near.place""",
                tenant,
                [n.uid for n in near],
                [n.revision for n in near],
                [int(n.id) for n in near],
                [n.score for n in near],
            )
        return [
            Hit(
                document_id=row["document_id"],
                file_name=row["file_name"],
                page=row["page"],
                page_end=row["page_end"],
                score=row["score"],
                text=row["body"],
                headings=tuple(row["headings"]),
                provenance=_provenance(row["embedded_by"]),
            )
            for row in rows
        ]

    # --- deleting --------------------------------------------------------------------------------

    async def mark_deleted(
        self, tenant: str, collection: str, document_id: str, *, sweep_after_s: float
    ) -> Ticket | None:
        """Make a document invisible, and enqueue the job that removes whatever is left of it.

        Answers its ticket, also where it was marked before and is not removed yet.
        """
        async with self._transaction(tenant) as connection:
            row = await connection.fetchrow(
                """SELECT uid::text AS uid, revision, deleted FROM documents
                   WHERE tenant = $1 AND collection = $2 AND document_id = $3
                   ORDER BY deleted, created_at LIMIT 1 FOR UPDATE""",
                tenant,
                collection,
                document_id,
            )
            if row is None:
                return None
            ticket = Ticket(tenant, collection, row["uid"], row["revision"])
            if not row["deleted"]:
                await connection.execute(
                    "UPDATE documents SET deleted = true WHERE tenant = $1 AND uid = $2",
                    tenant,
                    ticket.uid,
                )
                await self._queue.enqueue(connection, CLEAN, ticket, after_s=sweep_after_s)
        self._changes.tell(ticket.uid)
        return ticket

    async def remains(self, ticket: Ticket) -> Remains:
        """What can be removed: all of a deleted document, else revisions before a READY one."""
        async with self._transaction(ticket.tenant) as connection:
            document = await connection.fetchrow(
                """SELECT deleted,
                     (SELECT max(revision) FROM revisions WHERE tenant = $1 AND uid = $2
                      AND state = 'READY') AS served
                   FROM documents WHERE tenant = $1 AND uid = $2""",
                ticket.tenant,
                ticket.uid,
            )
            if document is None:
                return Remains((), (), whole=True)
            rows = await connection.fetch(
                """SELECT revision, bucket, object_name, object_owned FROM revisions
                   WHERE tenant = $1 AND uid = $2 AND ($3 OR revision < $4) ORDER BY revision""",
                ticket.tenant,
                ticket.uid,
                document["deleted"],
                document["served"] or 0,
            )
        return Remains(
            tuple(row["revision"] for row in rows),
            tuple(_source(row) for row in rows),
            whole=document["deleted"],
        )

    async def remove(self, ticket: Ticket, remains: Remains) -> int:
        """Remove the rows of what remained. Answers how many chunks there were."""
        chunks = 0
        async with self._transaction(ticket.tenant) as connection:
            for table in ("pages", "batches", "chunks", "revisions"):
                status = await connection.execute(
                    f"DELETE FROM {table} "
                    "WHERE tenant = $1 AND uid = $2 AND revision = ANY($3::bigint[])",
                    ticket.tenant,
                    ticket.uid,
                    list(remains.revisions),
                )
                if table == "chunks":
                    chunks = int(status.rpartition(" ")[2])
            if remains.whole:
                await connection.execute(
                    "DELETE FROM documents WHERE tenant = $1 AND uid = $2 AND deleted",
                    ticket.tenant,
                    ticket.uid,
                )
        return chunks


def _key(ticket: Ticket, *stage: Stage) -> tuple[Any, ...]:
    return (ticket.tenant, ticket.uid, ticket.revision, *stage)


async def _clear(connection: Connection, ticket: Ticket, table: str) -> None:
    """Remove what an earlier attempt left."""
    await connection.execute(
        f"DELETE FROM {table} WHERE tenant = $1 AND uid = $2 AND revision = $3",
        *_key(ticket),
    )


async def _named(
    connection: Connection, tenant: str, collection: str, document_id: str
) -> Document | None:
    row = await connection.fetchrow(
        f"{_DOCUMENT} AND d.tenant = $1 AND d.collection = $2 AND d.document_id = $3",
        tenant,
        collection,
        document_id,
    )
    return None if row is None else _document(row)


def _json(value: Mapping[str, Any]) -> str:
    return json.dumps(value, ensure_ascii=False)


def _provenance(value: str | None) -> Provenance | None:
    if value is None:
        return None
    read = json.loads(value)
    return Provenance(**{**read, "fell_back_from": tuple(read["fell_back_from"])})


def _source(row: asyncpg.Record) -> Source:
    return Source(row["bucket"], row["object_name"], row["object_owned"])


def _document(row: asyncpg.Record) -> Document:
    return Document(
        uid=str(row["uid"]),
        collection=row["collection"],
        document_id=row["document_id"],
        file_name=row["file_name"],
        media_type=row["media_type"],
        size_bytes=row["size_bytes"],
        sha256=row["sha256"],
        revision=row["revision"],
        state=State(row["state"]),
        reason=row["reason"],
        message=row["message"],
        retry_at=row["retry_at"],
        pages_done=row["pages_done"],
        pages_total=row["pages_total"],
        chunks_done=row["chunks_done"],
        chunks_total=row["chunks_total"],
        charged_nanos_usd=row["charged_nanos_usd"],
        request_id=row["request_id"],
        metadata=json.loads(row["metadata"]),
        created_at=row["created_at"],
        updated_at=row["updated_at"],
        parsed_by=_provenance(row["parsed_by"]),
        embedded_by=_provenance(row["embedded_by"]),
    )


def _work(ticket: Ticket, row: asyncpg.Record) -> Work:
    return Work(
        ticket=ticket,
        stage=Stage(row["stage"]),
        file_name=row["file_name"],
        media_type=row["media_type"],
        sha256=row["sha256"],
        metadata=json.loads(row["metadata"]),
        source=_source(row),
        project=row["project"],
        request_id=row["request_id"],
        traceparent=row["traceparent"],
        tries=row["tries"],
        faults=row["faults"],
        waiting_since=row["waiting_since"],
        space=Space(**json.loads(row["space"])) if row["space"] else None,
    )
