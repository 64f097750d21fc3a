"""The provider `local`: documents parsed on this machine, in the sandbox, for nothing."""

from __future__ import annotations

import os
import re
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

from pydantic import BaseModel, Field

from chassis.errors import (
    DocumentEncrypted,
    DocumentTooLarge,
    DocumentUnreadable,
    TollgateError,
    UnsupportedMediaType,
    Violation,
)
from services.parser.core import Accepted, Document, Inspection, Page, too_many_pages
from services.parser.media import READABLE
from services.parser.sandbox.frames import Fault, Frame, Kind
from services.parser.sandbox.pool import Pool, PoolBounds, Request, died

MIB = 1024 * 1024


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class Settings(BaseModel):
    """How many workers there are and what a document may take."""

    local_workers: int = Field(
        default_factory=_cores, ge=1, le=256, description="Worker processes; all cores when unset."
    )
    local_waiting_max: int = Field(
        256, ge=1, description="Documents that may wait for a worker before calls are refused."
    )
    local_document_timeout_s: float = Field(
        60.0, gt=0, le=3600, description="How long a worker may take over one document."
    )
    local_stall_timeout_s: float = Field(
        30.0, gt=0, le=3600, description="How long a page waits for a reader that takes no more."
    )
    local_memory_bytes: int = Field(
        512 * MIB,
        ge=96 * MIB,
        description="Address space of a worker, beside three times its document's size.",
    )
    local_resident_bytes_max: int = Field(
        256 * MIB, ge=32 * MIB, description="Resident memory above which a worker is replaced."
    )
    local_documents_per_worker: int = Field(
        200, ge=1, description="Documents after which a worker is replaced."
    )
    local_answer_bytes_max: int = Field(
        512 * MIB, ge=MIB, description="The most that the pages of one document may hold."
    )
    document_bytes_max: int = Field(
        256 * MIB, ge=1024, description="The largest document that is read."
    )


def create(settings: Settings) -> Local:
    """The provider; it needs no configuration."""
    return Local(settings)


class Local:
    """Documents into pages by workers of the sandbox."""

    name = "local"
    simulated = False
    media_types: Sequence[str] = READABLE

    def __init__(self, settings: Settings) -> None:
        self.pool = Pool(
            PoolBounds(
                workers=settings.local_workers,
                waiting_max=settings.local_waiting_max,
                document_timeout_s=settings.local_document_timeout_s,
                stall_timeout_s=settings.local_stall_timeout_s,
                memory_bytes=settings.local_memory_bytes,
                resident_bytes_max=settings.local_resident_bytes_max,
                documents_per_worker=settings.local_documents_per_worker,
                document_bytes_max=settings.document_bytes_max,
                answer_bytes_max=settings.local_answer_bytes_max,
            )
        )

    @property
    def healthy(self) -> bool:
        """Whether there are workers."""
        return self.pool.healthy

    async def start(self) -> None:
        """Start the workers. Raises ProviderUnavailable where none can be."""
        await self.pool.start()

    async def stop(self) -> None:
        """End the workers."""
        await self.pool.stop()

    async def inspect(self, document: Document) -> Inspection:
        """What the document is. A PDF is only opened; other formats are converted to count."""
        request = Request(Kind.INSPECT, document.content, document.media_type, document.file_name)
        async with aclosing(self.pool.answers(request)) as frames:
            async for frame in frames:
                if frame.kind is Kind.FAILED:
                    raise _refusal(frame, 0)
                if frame.kind is Kind.LOCKED:
                    return Inspection(_media_type(frame.first), None, encrypted=True)
                if frame.kind is Kind.OPENED:
                    found = Inspection(_media_type(frame.first), frame.number, encrypted=False)
        return found

    async def parse(
        self, document: Document, max_pages: int
    ) -> AsyncGenerator[Accepted | Page, None]:
        """The document's pages as the worker gives them."""
        request = Request(
            Kind.PARSE, document.content, document.media_type, document.file_name, max_pages
        )
        async with aclosing(self.pool.answers(request)) as frames:
            async for frame in frames:
                if frame.kind is Kind.PAGE:
                    yield Page(frame.number, frame.first, frame.second)
                elif frame.kind is Kind.OPENED:
                    yield Accepted(_media_type(frame.first), frame.number)
                elif frame.kind is not Kind.DONE:
                    raise _refusal(frame, max_pages)


_MEDIA_TYPE = re.compile(r"[a-z]+/[\w.+-]{1,100}")


def _media_type(words: str) -> str:
    """The worker's word for a type, where it is one."""
    return words if _MEDIA_TYPE.fullmatch(words) else "application/octet-stream"


def _refusal(frame: Frame, max_pages: int) -> TollgateError:
    """The error for a document that gave no pages, in words for people."""
    if frame.kind is Kind.LOCKED:
        return _about(DocumentEncrypted, "the document needs a password")
    match frame.first:
        case Fault.TOO_MANY_PAGES:
            return too_many_pages(frame.number, max_pages)
        case Fault.UNSUPPORTED:
            found = _media_type(frame.second)
            return _about(UnsupportedMediaType, f"documents of type {found} are not read")
        case Fault.PAGE_TOO_LARGE:
            words = f"page {frame.number} holds more text than an answer can"
            return _about(DocumentTooLarge, words)
        case Fault.EXPANDS:
            return _about(DocumentTooLarge, "the document unpacks to more than is read")
        case Fault.MEMORY:
            return died("memory")
    return _about(DocumentUnreadable, _UNREADABLE.get(frame.first, _UNREADABLE[Fault.MALFORMED]))


_UNREADABLE = {
    Fault.EMPTY: "the document is empty",
    Fault.MALFORMED: "the document is damaged, incomplete or not of the type it is said to be",
    Fault.NOT_UTF8: "the text is neither UTF-8 nor UTF-16 with a byte order mark",
    Fault.NESTED: "the document is nested too deeply",
}


def _about(kind: type[TollgateError], words: str) -> TollgateError:
    return kind(words, violations=[Violation("document", words)])
