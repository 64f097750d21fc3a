"""Watching a document: every change once, until there will be no more."""

from __future__ import annotations

import asyncio
import hashlib

import pytest

from chassis.errors import NotFound, ProviderUnavailable
from chassis.postgres import Pool
from services.corpus.core import Changes, NewDocument, Source, Stage, State, Ticket
from services.corpus.jobs import JobQueue
from services.corpus.library import Library
from services.corpus.store import Store

DOCUMENT = NewDocument(
    collection="default",
    document_id="d",
    file_name="d",
    media_type="",
    size_bytes=1,
    sha256=hashlib.sha256(b"1").digest(),
    metadata={},
    source=Source("corpus", "d", owned=True),
)


def library_of(store: Store, changes: Changes) -> Library:
    """A library whose callers only read: it has nobody to ask."""

    def nobody() -> None:
        raise AssertionError("reading asks no other room")

    return Library(store, nobody, changes, "")  # type: ignore[arg-type]  # never asked


@pytest.mark.parametrize("same_process", [True, False])
async def test_every_change_is_seen_until_the_last(pool: Pool, same_process: bool) -> None:
    """A watch shows the document as it is and each change, whoever made it, and ends with it."""
    changes = Changes()
    writing = Store(pool, JobQueue(), changes if same_process else Changes())
    library = library_of(Store(pool, JobQueue(), changes), changes)
    added = (await writing.add("acme", DOCUMENT)).document
    ticket = Ticket("acme", "default", added.uid, 1)
    seen: list[State] = []
    async with asyncio.timeout(20):
        async for document in library.watch("acme", "default", "d"):
            seen.append(document.state)
            if document.state is State.STORED:
                await writing.take(ticket, Stage.PARSE)
            elif document.state is State.PARSING:
                await writing.fail(ticket, Stage.PARSE, "DOCUMENT_UNREADABLE", "no text", 0)
    assert seen == [State.STORED, State.PARSING, State.FAILED]


async def test_a_watch_ends_when_its_document_is_deleted(store: Store) -> None:
    """Who watches what is deleted is told NOT_FOUND."""
    await store.add("acme", DOCUMENT)
    watch = aiter(library_of(store, Changes()).watch("acme", "default", "d"))
    await anext(watch)
    await store.mark_deleted("acme", "default", "d", sweep_after_s=60.0)
    with pytest.raises(NotFound):
        await asyncio.wait_for(anext(watch), 20)


async def test_a_stopping_corpus_sends_its_watchers_elsewhere(pool: Pool) -> None:
    """A watch ends with UNAVAILABLE when the process is about to end, and does not hold it up."""
    changes = Changes()
    store = Store(pool, JobQueue(), changes)
    await store.add("acme", DOCUMENT)
    watch = aiter(library_of(store, changes).watch("acme", "default", "d"))
    await anext(watch)
    changes.close()
    with pytest.raises(ProviderUnavailable):
        await asyncio.wait_for(anext(watch), 20)
