"""The stages of a document: what each does, and what becomes of a document whose stage fails.

A stage may run twice, or again after a crash at any point: paid calls have ids that stay the same
until their outcome is known, and what a stage writes is written only while it is still its turn.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, cast

from chassis import telemetry
from chassis.call import Call, calling, new_request_id
from chassis.errors import (
    DocumentEncrypted,
    DocumentTooLarge,
    DocumentUnreadable,
    Internal,
    SpaceMismatch,
    TollgateError,
    Unavailable,
)
from chassis.retry import retrying
from services.corpus.chunking import Chunk, Chunker
from services.corpus.core import (
    CLEAN,
    Components,
    Gate,
    Next,
    Parsed,
    ParsedPage,
    ParseProgress,
    Provenance,
    Space,
    Stage,
    StoredVector,
    Ticket,
    Work,
    backoff_s,
    call_id,
    deferral_s,
    meaning,
)
from services.corpus.store import Store

log = logging.getLogger(__name__)

_PROGRESS_EVERY_S = 0.5
_UPSERT_MAX = 512
_UPSERT_BYTES = 8 << 20
# Vectors that were paid for are kept in hand this long while storage is away.
_UPSERT_PATIENCE_S = 30.0


@dataclass(frozen=True, slots=True)
class Limits:
    """How far the pipeline goes, from the room's settings."""

    pages_max: int
    chunk_timeout_s: float
    batch_texts: int
    batches_in_flight: int
    attempts_max: int
    wait_max_s: float


class Pipeline:
    """Runs the stages of documents; knows nothing of how jobs are kept."""

    def __init__(
        self,
        store: Store,
        gate: Callable[[], Gate],
        chunker: Chunker,
        model: str,
        limits: Limits,
    ) -> None:
        self._store = store
        self._gate = gate
        self._chunker = chunker
        self._model = model
        self._limits = limits
        self._seconds = telemetry.meter().create_histogram(
            "tollgate.corpus.stage.duration",
            unit="s",
            description="How long stages took, by stage and outcome.",
        )

    async def run(self, job: str, ticket: Ticket, attempt: int) -> float | None:
        """Do a job. Answers in how many seconds it is to be tried again, or None when it is done.

        `attempt` counts, from 0, how often this job was tried before. Raises nothing but what the
        database raises.
        """
        if job == CLEAN:
            return await self._clean(ticket, attempt)
        try:
            work = await self._store.take(ticket, Stage(job))
            if work is None:
                return None
            with calling(Call(ticket.tenant, work.project, work.request_id)):
                with telemetry.remote_parent(work.traceparent):
                    return await self._stage(work, attempt)
        except Unavailable:
            # The corpus's own database went away: whatever was to be noted is found out again.
            return backoff_s(attempt)

    async def _stage(self, work: Work, attempt: int) -> float | None:
        gate, began = self._gate(), time.monotonic()
        stages = {
            Stage.PARSE: self._parse,
            Stage.CHUNK: self._chunk,
            Stage.EMBED: self._embed,
            Stage.INDEX: self._index,
        }
        with telemetry.span(f"corpus.{work.stage}") as span:
            span.set_attribute("tollgate.document", work.ticket.uid)
            span.set_attribute("tollgate.revision", work.ticket.revision)
            try:
                await stages[work.stage](work, gate)
            except TollgateError as error:
                failure = error
            except Exception:
                log.exception("stage failed unexpectedly", extra={"fields": _fields(work)})
                failure = Internal()
            else:
                self._record(work, began, "OK")
                return None
            telemetry.fail(span, failure.reason)
            self._record(work, began, failure.reason)
            return await self._failed(work, failure, gate.take_charge(), attempt)

    def _record(self, work: Work, began: float, outcome: str) -> None:
        self._seconds.record(
            time.monotonic() - began,
            {"tollgate.stage": work.stage.value, "tollgate.outcome": outcome},
        )

    # --- the stages ------------------------------------------------------------------------------

    async def _parse(self, work: Work, gate: Gate) -> None:
        found = await gate.inspect(work.source, work.file_name, work.media_type)
        if found.encrypted:
            raise DocumentEncrypted("the document needs a password")
        if found.pages is not None and found.pages > self._limits.pages_max:
            raise DocumentTooLarge(
                f"the document has {found.pages} pages, more than {self._limits.pages_max}"
            )
        pages: list[ParsedPage] = []
        total, told, parsed = found.pages or 0, time.monotonic(), None
        events = gate.parse(
            work.source,
            work.file_name,
            work.media_type,
            pages_max=found.pages or self._limits.pages_max,
            call_id=call_id(work.ticket, Stage.PARSE, 0, work.tries),
        )
        async with aclosing(cast(Any, events)):
            async for event in events:
                if isinstance(event, ParsedPage):
                    pages.append(event)
                elif isinstance(event, ParseProgress):
                    total = event.total or total
                else:
                    parsed = event
                if time.monotonic() - told > _PROGRESS_EVERY_S:
                    told = time.monotonic()
                    await self._store.progress(
                        work.ticket, work.stage, pages_done=len(pages), pages_total=total
                    )
        answer = _checked(work, parsed, pages)
        await self._store.parsed(
            work.ticket,
            sorted(pages, key=lambda page: page.number),
            media_type=answer.media_type or found.media_type,
            provenance=answer.provenance,
            charged_nanos_usd=gate.take_charge(),
        )

    async def _chunk(self, work: Work, gate: Gate) -> None:
        pages = await self._store.pages(work.ticket)
        given_up = threading.Event()
        try:
            async with asyncio.timeout(self._limits.chunk_timeout_s):
                # The splitter releases the interpreter's lock, so other documents go on.
                chunks = await asyncio.to_thread(
                    self._chunker.chunks, pages, is_given_up=given_up.is_set
                )
        except TimeoutError:
            raise DocumentUnreadable("its text takes too long to cut into chunks") from None
        finally:
            given_up.set()
        await self._store.chunked(work.ticket, chunks)

    async def _embed(self, work: Work, gate: Gate) -> None:
        chunks, done = await self._store.chunks(work.ticket)
        space = work.space
        if space is None:
            space = await gate.space(self._model)
            await self._store.pin(work.ticket, space)
        await gate.ensure_space(space)
        batches = batches_of(chunks, self._limits.batch_texts)
        embedding = _Embedding(self._store, gate, work, space)
        if len(batches) == 1 and not done:
            # Its mark and the stage's end are one transaction.
            provenance = await embedding.batch(0, batches[0])
        else:
            await embedding.all(batches, done, self._limits.batches_in_flight)
            provenance = None
        await self._store.embedded(
            work.ticket, provenance=provenance, charged_nanos_usd=gate.take_charge()
        )

    async def _index(self, work: Work, gate: Gate) -> None:
        if work.space is None:
            raise Internal()
        await gate.activate(work.space, work.ticket)
        await self._store.ready(work.ticket, charged_nanos_usd=gate.take_charge())

    # --- when a stage failed ---------------------------------------------------------------------

    async def _failed(
        self, work: Work, error: TollgateError, charged: int, attempt: int
    ) -> float | None:
        """Note what happened. Answers in how many seconds to try again, or None for never."""
        what = self._decided(work, error)
        said = (work.ticket, work.stage, error.reason, error.message)
        log.log(
            logging.INFO if what in (Next.WAIT, Next.DEFER) else logging.WARNING,
            "stage did not end",
            extra={"fields": {**_fields(work), "reason": error.reason, "next": what.value}},
        )
        if what is Next.FAIL:
            await self._store.fail(*said, charged)
            return None
        if what is Next.DEFER:
            delay_s = deferral_s(error.retry_after_s or 0.0)
            await self._store.defer(*said, delay_s, charged)
            return delay_s
        await self._store.again(*said, charged, fault=what is Next.COUNT, waiting=what is Next.WAIT)
        if what is Next.ANEW:
            return 0.0
        return backoff_s(attempt, asked_s=error.retry_after_s)

    def _decided(self, work: Work, error: TollgateError) -> Next:
        what = meaning(error)
        if what is Next.COUNT and work.faults + 1 >= self._limits.attempts_max:
            return Next.FAIL
        if what is Next.WAIT and work.waiting_since is not None:
            waited_s = (datetime.now(UTC) - work.waiting_since).total_seconds()
            return Next.FAIL if waited_s > self._limits.wait_max_s else what
        return what

    # --- cleaning --------------------------------------------------------------------------------

    async def _clean(self, ticket: Ticket, attempt: int) -> float | None:
        """Remove what a deleted document, or one with a new revision, left behind."""
        with calling(Call(ticket.tenant, request_id=new_request_id())):
            try:
                await self.remove(ticket)
            except TollgateError as error:
                if meaning(error) is Next.FAIL or attempt >= 10 * self._limits.attempts_max:
                    log.error("cannot clean up", extra={"fields": {"reason": error.reason}})
                    return None
                return backoff_s(attempt, asked_s=error.retry_after_s, most_s=60.0)
        return None

    async def remove(self, ticket: Ticket) -> None:
        """Remove vectors, then objects, then rows: whatever stops it, a repeat finds the rest."""
        gate, remains = self._gate(), await self._store.remains(ticket)
        for revision in (0,) if remains.whole else remains.revisions:
            await gate.delete_vectors(ticket, revision)
        await gate.delete_objects([source for source in remains.sources if source.owned])
        await self._store.remove(ticket, remains)


Batch = Mapping[bytes, Sequence[Chunk]]


def batches_of(chunks: Sequence[Chunk], texts_max: int) -> list[Batch]:
    """Chunks grouped by the hash of their text, at most `texts_max` different texts a batch.

    The same chunks always make the same batches, so a batch's number names the same work again.
    """
    by_text: dict[bytes, list[Chunk]] = {}
    for chunk in chunks:
        by_text.setdefault(chunk.sha256, []).append(chunk)
    groups = list(by_text.items())
    return [dict(groups[at : at + texts_max]) for at in range(0, len(groups), texts_max)]


class _Embedding:
    """The embedding of one revision, batch by batch."""

    def __init__(self, store: Store, gate: Gate, work: Work, space: Space) -> None:
        self._store, self._gate, self._work, self._space = store, gate, work, space

    async def all(self, batches: Sequence[Batch], done: frozenset[int], in_flight: int) -> None:
        """Every batch that is not done. After an error, those under way are still finished."""
        todo = iter([number for number in range(len(batches)) if number not in done])
        errors: list[BaseException] = []

        async def work_off() -> None:
            for number in todo:
                if errors:
                    return
                try:
                    await self._marked(number, batches[number])
                except Exception as error:
                    errors.append(error)

        async with asyncio.TaskGroup() as group:
            for _ in range(in_flight):
                group.create_task(work_off())
        if errors:
            raise errors[0]

    async def _marked(self, number: int, batch: Batch) -> None:
        provenance = await self.batch(number, batch)
        await self._store.batch_done(
            self._work.ticket,
            number,
            chunks=sum(map(len, batch.values())),
            provenance=provenance,
            charged_nanos_usd=self._gate.take_charge(),
        )

    async def batch(self, number: int, batch: Batch) -> Provenance:
        """Embed the texts that were never embedded in this space, and write all vectors."""
        known = await self._gate.lookup(self._space, list(batch))
        missing = [sha256 for sha256 in batch if sha256 not in known]
        provenance = _known_before(self._space)
        if missing:
            embedded = await self._gate.embed(
                self._space,
                [batch[sha256][0].embedded_text for sha256 in missing],
                call_id=call_id(self._work.ticket, Stage.EMBED, number, self._work.tries),
            )
            provenance = embedded.provenance
            if provenance.simulated != self._space.simulated:
                raise SpaceMismatch("simulated and genuine vectors do not mix")
            known.update(zip(missing, embedded.vectors, strict=True))
        await self._write(batch, known)
        return provenance

    async def _write(self, batch: Batch, vectors: Mapping[bytes, Components]) -> None:
        stored = [
            StoredVector(str(chunk.ordinal), vectors[sha256], sha256)
            for sha256, chunks in batch.items()
            for chunk in chunks
        ]
        step = vectors_at_once(self._space.dimensions, self._work.metadata)
        for at in range(0, len(stored), step):
            async for attempt in retrying(100, for_s=_UPSERT_PATIENCE_S):
                with attempt:
                    await self._gate.upsert(
                        self._space,
                        self._work.ticket,
                        stored[at : at + step],
                        self._work.metadata,
                    )


def vectors_at_once(dimensions: int, metadata: Mapping[str, str]) -> int:
    """How many vectors go into one message, each of them with the document's metadata."""
    said = sum(len(key.encode()) + len(value.encode()) for key, value in metadata.items())
    return max(1, min(_UPSERT_MAX, _UPSERT_BYTES // (4 * dimensions + said + 256)))


def _known_before(space: Space) -> Provenance:
    """Where vectors come from that nobody had to be asked for."""
    return Provenance(space.provider, space.model, space.id, space.simulated, cached=True)


def _checked(work: Work, parsed: Parsed | None, pages: Sequence[ParsedPage]) -> Parsed:
    if parsed is None:
        raise Internal()
    if parsed.sha256 and parsed.sha256 != work.sha256:
        raise DocumentUnreadable("the stored object is no longer the one that was added")
    if not any(page.markdown.strip() for page in pages):
        raise DocumentUnreadable("no text on any page (scanned images need a parser with OCR)")
    return parsed


def _fields(work: Work) -> dict[str, Any]:
    return {
        "document": work.ticket.uid,
        "revision": work.ticket.revision,
        "stage": work.stage.value,
    }
