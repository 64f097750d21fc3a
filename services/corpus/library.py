"""What callers may do with documents: add, read, watch, delete and search them."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol
from uuid import uuid4

from chassis.errors import NotFound, ProviderUnavailable, TollgateError, Unavailable
from services.corpus.core import (
    Added,
    Changes,
    Document,
    Found,
    Gate,
    Hit,
    Near,
    NewDocument,
    Remains,
    Source,
    State,
    Ticket,
    page_token,
    read_page_token,
)

BUCKET = "corpus"
"""The bucket, of each tenant, for documents that were given inline."""

# How soon a watch sees a change that another process made, and how often it looks all the same
# while it is this one that works on the document.
_POLL_S = 0.25
_POLL_TOLD_S = 1.0
# How long a watch outlives the database.
_AWAY_MAX_S = 30.0
# When whatever a deletion could not reach is looked for again.
_SWEEP_AFTER_S = 10.0


class Documents(Protocol):
    """Where documents are kept. See `store`."""

    async def get(self, tenant: str, collection: str, document_id: str) -> Document | None: ...

    async def newest(
        self,
        tenant: str,
        *,
        collection: str,
        state: State | None,
        after: tuple[datetime, str] | None,
        limit: int,
    ) -> list[Document]: ...

    async def add(self, tenant: str, new: NewDocument) -> Added: ...

    async def mark_deleted(
        self, tenant: str, collection: str, document_id: str, *, sweep_after_s: float
    ) -> Ticket | None: ...

    async def remains(self, ticket: Ticket) -> Remains: ...

    async def remove(self, ticket: Ticket, remains: Remains) -> int: ...

    async def hits(self, tenant: str, near: Sequence[Near]) -> list[Hit]: ...


@dataclass(frozen=True, slots=True)
class Offer:
    """A document as a caller offers it: its bytes, or the stored object that has them."""

    collection: str
    document_id: str
    file_name: str
    media_type: str
    metadata: Mapping[str, str]
    content: bytes | None
    source: Source | None


class Library:
    """The documents of all tenants."""

    def __init__(
        self, documents: Documents, gate: Callable[[], Gate], changes: Changes, model: str
    ) -> None:
        self._documents = documents
        self._gate = gate
        self._changes = changes
        self._model = model

    async def add(
        self, tenant: str, offer: Offer, *, project: str, request_id: str, traceparent: str
    ) -> Document:
        """Add a document; its first job is enqueued when this returns."""
        gate = self._gate()
        if offer.content is not None:
            sha256, size_bytes = hashlib.sha256(offer.content).digest(), len(offer.content)
            known = await self._documents.get(tenant, offer.collection, offer.document_id)
            if known and known.sha256 == sha256 and known.state is not State.FAILED:
                return known
            source = Source(BUCKET, f"{offer.document_id}/{uuid4()}", owned=True)
            await gate.put(source, offer.content, offer.media_type)
        else:
            assert offer.source is not None
            source = offer.source
            stored = await gate.stat(source)
            sha256, size_bytes = stored.sha256, stored.size_bytes
        added = await self._documents.add(
            tenant,
            NewDocument(
                collection=offer.collection,
                document_id=offer.document_id,
                file_name=offer.file_name,
                media_type=offer.media_type,
                size_bytes=size_bytes,
                sha256=sha256,
                metadata=offer.metadata,
                source=source,
                project=project,
                request_id=request_id,
                traceparent=traceparent,
                charged_nanos_usd=gate.take_charge(),
            ),
        )
        await self._discard(gate, added.unused)
        return added.document

    async def _discard(self, gate: Gate, sources: Sequence[Source]) -> None:
        """Remove objects that nothing needs. One that stays costs space, and nobody their call."""
        try:
            await gate.delete_objects([source for source in sources if source.owned])
        except TollgateError:
            return

    async def get(self, tenant: str, collection: str, document_id: str) -> Document:
        """A document. Raises NotFound."""
        document = await self._documents.get(tenant, collection, document_id)
        if document is None:
            raise _no_document(document_id)
        return document

    async def newest(
        self, tenant: str, *, collection: str, state: State | None, token: str, page_size: int
    ) -> tuple[list[Document], str]:
        """A page of documents, the newest first, and the token of the next; empty on the last."""
        found = await self._documents.newest(
            tenant,
            collection=collection,
            state=state,
            after=read_page_token(token),
            limit=page_size + 1,
        )
        page = found[:page_size]
        return page, page_token(page[-1]) if len(found) > page_size else ""

    async def watch(
        self, tenant: str, collection: str, document_id: str
    ) -> AsyncIterator[Document]:
        """The document as it is, then whenever it changed, until it is ready or has failed."""
        last = await self.get(tenant, collection, document_id)
        yield last
        with self._changes.watch(last.uid) as changed:
            seen_at, poll_s = time.monotonic(), _POLL_S
            while not last.state.is_final:
                try:
                    document = await self.get(tenant, collection, document_id)
                    seen_at = time.monotonic()
                except Unavailable:
                    if time.monotonic() - seen_at > _AWAY_MAX_S:
                        raise
                    document = last
                if document != last:
                    yield document
                    last = document
                elif self._changes.closed:
                    raise ProviderUnavailable("the corpus is being stopped; watch again")
                else:
                    told = await _set_within(changed, poll_s)
                    changed.clear()
                    poll_s = _POLL_TOLD_S if told else _POLL_S

    async def delete(self, tenant: str, collection: str, document_id: str) -> tuple[int, int]:
        """Delete a document. Answers how many chunks and vectors there were. Raises NotFound."""
        ticket = await self._documents.mark_deleted(
            tenant, collection, document_id, sweep_after_s=_SWEEP_AFTER_S
        )
        if ticket is None:
            raise _no_document(document_id)
        gate, remains = self._gate(), await self._documents.remains(ticket)
        vectors = await gate.delete_vectors(ticket, 0)
        await gate.delete_objects([source for source in remains.sources if source.owned])
        return await self._documents.remove(ticket, remains), vectors

    async def search(
        self, tenant: str, *, query: str, collection: str, limit: int, only: Mapping[str, str]
    ) -> Found:
        """The chunks nearest in meaning to a text, the nearest first."""
        gate = self._gate()
        space = await gate.space(self._model)
        embedded = await gate.embed(space, [query], query=True)
        try:
            near = await gate.near(space, collection, embedded.vectors[0], limit=limit, only=only)
        except NotFound:
            # The space is made with the first document: before it there is nothing to find.
            near = []
        return Found(await self._documents.hits(tenant, near), embedded.provenance)


async def _set_within(event: asyncio.Event, timeout_s: float) -> bool:
    try:
        async with asyncio.timeout(timeout_s):
            return await event.wait()
    except TimeoutError:
        return False


def _no_document(document_id: str) -> NotFound:
    return NotFound(f"there is no document {document_id!r} in the collection")
