"""What the corpus keeps: whole or not at all, each tenant apart, and only while it is its turn."""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any
from uuid import uuid4

import asyncpg
import pytest

from chassis.errors import ProviderUnavailable
from chassis.postgres import Pool, transaction
from services.corpus.chunking import Chunk
from services.corpus.core import (
    Changes,
    Document,
    Near,
    NewDocument,
    ParsedPage,
    Provenance,
    Source,
    Space,
    Stage,
    State,
    Ticket,
    page_token,
    read_page_token,
)
from services.corpus.jobs import SCHEMA, JobQueue
from services.corpus.store import ROLE, Store

BY = Provenance("minilm", "all-MiniLM-L6-v2", "space", fell_back_from=("openai",))
SPACE = Space("space", 3, False, "minilm", "all-MiniLM-L6-v2")
CHUNKS = [
    Chunk(0, 1, 1, 0, 3, (), "", "one"),
    Chunk(1, 1, 2, 5, 8, ("Head", "Sub"), "Head > Sub", "two"),
]


def new(document_id: str = "d", content: bytes = b"1", **fields: Any) -> NewDocument:
    made = NewDocument(
        collection="default",
        document_id=document_id,
        file_name="d.pdf",
        media_type="application/pdf",
        size_bytes=len(content),
        sha256=hashlib.sha256(content).digest(),
        metadata={"team": "Zölle"},
        source=Source("corpus", str(uuid4()), owned=True),
        project="p",
        request_id="r",
        traceparent="t",
    )
    return replace(made, **fields)


def ticket_of(document: Document, tenant: str = "acme") -> Ticket:
    return Ticket(tenant, document.collection, document.uid, document.revision)


async def jobs(pool: Pool) -> list[str]:
    async with transaction(pool) as connection:
        rows = await connection.fetch(f"SELECT entrypoint FROM {SCHEMA}.pgqueuer ORDER BY id")
    return [row["entrypoint"] for row in rows]


async def advance(store: Store, ticket: Ticket, *, to: Stage | None = None) -> None:
    """Take a revision through its stages up to the one given, or to READY."""
    if to is Stage.PARSE:
        return
    pages = [ParsedPage(1, "one"), ParsedPage(2, "two")]
    assert await store.parsed(
        ticket, pages, media_type="text/plain", provenance=BY, charged_nanos_usd=7
    )
    if to is Stage.CHUNK:
        return
    assert await store.chunked(ticket, CHUNKS)
    if to is Stage.EMBED:
        return
    await store.pin(ticket, SPACE)
    assert await store.embedded(ticket, provenance=BY, charged_nanos_usd=5)
    if to is Stage.INDEX:
        return
    assert await store.ready(ticket, charged_nanos_usd=1)


async def latest(store: Store, document_id: str = "d") -> Document:
    document = await store.get("acme", "default", document_id)
    assert document is not None
    return document


async def test_a_document_is_read_as_it_was_added(store: Store, pool: Pool) -> None:
    """Adding keeps every field and enqueues the first job in the same transaction."""
    given = new()
    added = await store.add("acme", given)
    assert added.unused == ()
    assert added.document == await latest(store)
    assert added.document.state is State.STORED
    assert (added.document.revision, added.document.sha256) == (1, given.sha256)
    assert added.document.metadata == {"team": "Zölle"}
    assert await jobs(pool) == ["parse"]


async def test_an_add_that_fails_leaves_nothing(pool: Pool) -> None:
    """Where the job cannot be enqueued, there is no document either."""

    class Broken(JobQueue):
        async def enqueue(self, *args: Any, **options: Any) -> None:
            raise ValueError("no")

    store = Store(pool, Broken(), Changes())
    with pytest.raises(ValueError, match="no"):
        await store.add("acme", new())
    assert await store.get("acme", "default", "d") is None


async def test_each_tenant_is_apart(store: Store, pool: Pool) -> None:
    """The same name is another document to another tenant, and a wrong ticket finds nothing."""
    mine = (await store.add("acme", new())).document
    theirs = (await store.add("globex", new())).document
    assert mine.uid != theirs.uid
    assert await store.take(ticket_of(mine, "globex"), Stage.PARSE) is None
    found = await store.newest("globex", collection="", state=None, after=None, limit=9)
    assert [d.uid for d in found] == [theirs.uid]


async def test_row_level_security_holds_for_the_role(store: Store, pool: Pool) -> None:
    """The daemon's role can bypass nothing, sees no rows without a tenant, writes no other's."""
    await store.add("acme", new())
    async with transaction(pool) as connection:
        role = await connection.fetchrow(
            "SELECT rolname, rolsuper, rolbypassrls FROM pg_roles WHERE rolname = current_user"
        )
        assert role is not None
        assert tuple(role) == (ROLE, False, False)
        for table in ("documents", "revisions", "pages", "chunks", "batches"):
            assert await connection.fetchval(f"SELECT count(*) FROM {table}") == 0
            forced = await connection.fetchval(
                "SELECT relforcerowsecurity FROM pg_class WHERE oid = $1::regclass", table
            )
            assert forced
    with pytest.raises(asyncpg.InsufficientPrivilegeError):
        async with transaction(pool, tenant="globex") as connection:
            await connection.execute(
                "INSERT INTO batches (tenant, uid, revision, batch) VALUES ('acme', $1, 1, 1)",
                str(uuid4()),
            )


async def test_the_same_bytes_change_nothing(store: Store, pool: Pool) -> None:
    """Adding what is there answers it, starts no job, and gives the new object back."""
    first = await store.add("acme", new())
    again = new(request_id="other")
    second = await store.add("acme", again)
    assert second.document == first.document
    assert second.unused == (again.source,)
    assert await jobs(pool) == ["parse"]


async def test_what_failed_is_tried_again_where_it_failed(store: Store, pool: Pool) -> None:
    """Re-adding the bytes of a failed revision goes on at its stage, with another call id."""
    given = new()
    document = (await store.add("acme", given)).document
    ticket = ticket_of(document)
    await advance(store, ticket, to=Stage.EMBED)
    before = await store.take(ticket, Stage.EMBED)
    assert before is not None
    await store.fail(ticket, Stage.EMBED, "PRICE_UNKNOWN", "no price", 0)
    assert (await latest(store)).reason == "PRICE_UNKNOWN"
    again = await store.add("acme", new(request_id="again"))
    assert again.document.revision == 1
    assert again.document.state is State.STORED
    assert again.document.request_id == "again"
    assert again.unused == (given.source,)
    assert (await jobs(pool))[-1] == "embed"
    work = await store.take(ticket, Stage.EMBED)
    assert work is not None
    assert work.tries > before.tries


async def test_other_bytes_are_a_new_revision(store: Store) -> None:
    """A revision under way is dropped once another is added: its job finds nothing to do."""
    old = ticket_of((await store.add("acme", new())).document)
    await advance(store, old, to=Stage.EMBED)
    added = (await store.add("acme", new(content=b"2"))).document
    assert (added.revision, added.state) == (2, State.STORED)
    assert await store.take(old, Stage.EMBED) is None
    assert not await store.embedded(old, provenance=None, charged_nanos_usd=0)
    await store.fail(old, Stage.EMBED, "INTERNAL", "too late", 0)
    assert (await latest(store)).state is State.STORED


async def test_each_stage_ends_once_and_enqueues_the_next(store: Store, pool: Pool) -> None:
    """A stage's end commits with the next job, and a second run of the same job changes nothing."""
    ticket = ticket_of((await store.add("acme", new())).document)
    await advance(store, ticket)
    assert await jobs(pool) == ["parse", "chunk", "embed", "index"]
    assert not await store.chunked(ticket, [])
    assert not await store.ready(ticket, charged_nanos_usd=1_000)
    document = await latest(store)
    assert document.state is State.READY
    assert document.charged_nanos_usd == 13
    assert (document.pages_done, document.chunks_done, document.chunks_total) == (2, 2, 2)
    assert document.parsed_by == document.embedded_by == BY
    assert await jobs(pool) == ["parse", "chunk", "embed", "index"]
    assert (await store.chunks(ticket))[0] == CHUNKS


async def test_a_batch_counts_once(store: Store) -> None:
    """Marking a batch twice counts its chunks once, and its charge as often as it was paid."""
    ticket = ticket_of((await store.add("acme", new())).document)
    await advance(store, ticket, to=Stage.EMBED)
    for _ in range(2):
        await store.batch_done(ticket, 3, chunks=2, provenance=BY, charged_nanos_usd=10)
    assert (await store.chunks(ticket))[1] == {3}
    document = await latest(store)
    assert (document.chunks_done, document.charged_nanos_usd) == (2, 7 + 20)


async def test_a_deferral_is_no_failure(store: Store) -> None:
    """A deferred document says why and until when, and goes on where it stood."""
    ticket = ticket_of((await store.add("acme", new())).document)
    await store.defer(ticket, Stage.PARSE, "BUDGET_EXHAUSTED", "5 USD an hour", 60.0, 0)
    document = await latest(store)
    assert (document.state, document.reason) == (State.DEFERRED, "BUDGET_EXHAUSTED")
    assert document.retry_at is not None
    assert document.retry_at > document.updated_at
    work = await store.take(ticket, Stage.PARSE)
    assert work is not None
    assert (work.tries, work.faults) == (1, 0)
    document = await latest(store)
    assert (document.state, document.retry_at) == (State.PARSING, None)


async def test_waiting_is_remembered_until_something_works(store: Store) -> None:
    """Waiting begins once, counts no fault, and is forgotten when the stage ends."""
    ticket = ticket_of((await store.add("acme", new())).document)
    await store.again(ticket, Stage.PARSE, "NO_BACKEND", "none", 0, waiting=True)
    first = await store.take(ticket, Stage.PARSE)
    await store.again(ticket, Stage.PARSE, "NO_BACKEND", "none", 0, waiting=True)
    second = await store.take(ticket, Stage.PARSE)
    assert first is not None
    assert second is not None
    assert first.waiting_since == second.waiting_since is not None
    assert (second.tries, second.faults) == (2, 0)
    await advance(store, ticket, to=Stage.CHUNK)
    third = await store.take(ticket, Stage.CHUNK)
    assert third is not None
    assert third.waiting_since is None
    assert (await latest(store)).reason == ""


async def test_lists_go_on_where_they_ended(store: Store) -> None:
    """Pages of a list have every document once, the newest first, within collection and state."""
    for n in range(5):
        await store.add("acme", new(f"d{n}"))
    await store.add("acme", new("elsewhere", collection="other"))
    seen: list[str] = []
    after = None
    while page := await store.newest(
        "acme", collection="default", state=State.STORED, after=after, limit=2
    ):
        seen += [d.document_id for d in page]
        after = read_page_token(page_token(page[-1]))
    assert seen == ["d4", "d3", "d2", "d1", "d0"]
    assert not await store.newest(
        "acme", collection="default", state=State.READY, after=None, limit=2
    )


async def test_hits_keep_their_order_and_leave_out_what_is_gone(store: Store) -> None:
    """Hits come as the vectors came; a vector without a chunk is no hit."""
    ticket = ticket_of((await store.add("acme", new())).document)
    await advance(store, ticket)
    near = [
        Near("1", ticket.uid, 1, 0.9),
        Near("7", ticket.uid, 1, 0.8),
        Near("0", ticket.uid, 1, 0.7),
        Near("0", str(uuid4()), 1, 0.6),
    ]
    hits = await store.hits("acme", near)
    assert [(h.text, h.page, h.page_end, h.headings) for h in hits] == [
        ("two", 1, 2, ("Head", "Sub")),
        ("one", 1, 1, ()),
    ]
    assert hits[0].provenance == BY
    assert await store.hits("globex", near) == []


async def test_deleting_leaves_nothing(store: Store, pool: Pool) -> None:
    """A deleted document is gone at once, and its rows when they are removed; the name is free."""
    document = (await store.add("acme", new())).document
    await advance(store, ticket_of(document))
    ticket = await store.mark_deleted("acme", "default", "d", sweep_after_s=60.0)
    assert ticket is not None
    assert ticket.uid == document.uid
    assert await store.get("acme", "default", "d") is None
    assert await store.hits("acme", [Near("0", ticket.uid, 1, 1.0)]) == []
    assert (await jobs(pool))[-1] == "clean"
    remains = await store.remains(ticket)
    assert remains.whole
    assert len(remains.sources) == 1
    assert await store.remove(ticket, remains) == 2
    async with transaction(pool, tenant="acme") as connection:
        for table in ("documents", "revisions", "pages", "chunks", "batches"):
            assert await connection.fetchval(f"SELECT count(*) FROM {table}") == 0
    assert await store.mark_deleted("acme", "default", "d", sweep_after_s=60.0) is None
    assert (await store.add("acme", new())).document.uid != document.uid


async def test_only_revisions_before_a_ready_one_are_removed(store: Store) -> None:
    """While a new revision is being made the old one stays; once it is READY it can go."""
    first = ticket_of((await store.add("acme", new())).document)
    await advance(store, first)
    second = ticket_of((await store.add("acme", new(content=b"2"))).document)
    assert (await store.remains(second)).revisions == ()
    await advance(store, second)
    remains = await store.remains(second)
    assert (remains.revisions, remains.whole) == ((1,), False)
    assert await store.remove(second, remains) == 2
    assert (await store.chunks(second))[0] == CHUNKS
    assert (await latest(store)).revision == 2


async def test_a_database_that_is_away_is_unavailable(
    store: Store, cut_all: Callable[[], Awaitable[None]]
) -> None:
    """A lost connection is the caller's UNAVAILABLE, and the next call finds the database again."""
    await store.add("acme", new())

    async def cut_off() -> None:
        async with store._transaction("acme") as connection:
            await cut_all()
            await connection.execute("SELECT 1")

    with pytest.raises(ProviderUnavailable):
        await cut_off()
    assert (await latest(store)).document_id == "d"
