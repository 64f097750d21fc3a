"""The corpus's words and rules: documents and their states, ids, and what an error means for a job.

A document is an id in a collection of a tenant; each change of its bytes is a revision. A revision
passes the stages in order. Its `state` is what people see; its `stage` is where its job stands,
also while it is deferred or after it failed.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import random
import re
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import Enum, StrEnum
from typing import Protocol, TypeAlias
from uuid import UUID, uuid5

from chassis.errors import (
    BudgetExhausted,
    CallReplayed,
    Cancelled,
    DeadlineExceeded,
    DocumentTooLarge,
    IdReused,
    Internal,
    InvalidField,
    OutcomeUnknown,
    RateLimited,
    TollgateError,
    Unauthenticated,
    Unavailable,
)

CONTENT_BYTES_MAX = 32 << 20
QUERY_BYTES_MAX = 8 << 10
METADATA_PAIRS_MAX = 64
METADATA_VALUE_BYTES_MAX = 2 << 10
NAME_BYTES_MAX = 1 << 10
PAGE_SIZE_MAX = 1_000
PAGE_SIZE = 100
HITS_MAX = 100
HITS = 10
COLLECTION = "default"

# Names this room's calls; any fixed UUID would do.
_CALLS = UUID("6f0a2b1e-6c0b-4f0e-9d3c-2f8a52d0c7b1")
_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")


class Stage(StrEnum):
    """What a job does for a revision, in order."""

    PARSE = "parse"
    CHUNK = "chunk"
    EMBED = "embed"
    INDEX = "index"


CLEAN = "clean"
"""The job that removes what no revision needs any more; no stage of a document."""


class State(StrEnum):
    """Where a revision stands, for people."""

    STORED = "STORED"
    PARSING = "PARSING"
    CHUNKING = "CHUNKING"
    EMBEDDING = "EMBEDDING"
    INDEXING = "INDEXING"
    READY = "READY"
    FAILED = "FAILED"
    DEFERRED = "DEFERRED"

    @property
    def is_final(self) -> bool:
        """Whether no job works on it any more."""
        return self in (State.READY, State.FAILED)


WORKING = {
    Stage.PARSE: State.PARSING,
    Stage.CHUNK: State.CHUNKING,
    Stage.EMBED: State.EMBEDDING,
    Stage.INDEX: State.INDEXING,
}


# --- what there is -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Source:
    """The stored object with a revision's bytes; `owned` when the corpus stored it itself."""

    bucket: str
    name: str
    owned: bool


@dataclass(frozen=True, slots=True)
class Provenance:
    """Where an answer came from, as the router said."""

    provider: str = ""
    model: str = ""
    space_id: str = ""
    simulated: bool = False
    attempt: int = 0
    fell_back_from: tuple[str, ...] = ()
    cached: bool = False


@dataclass(frozen=True, slots=True)
class Space:
    """An embedding space: vectors in it can be compared with one another and with no others."""

    id: str
    dimensions: int
    simulated: bool
    provider: str
    model: str


@dataclass(frozen=True, slots=True)
class NewDocument:
    """A document as a caller gives it, its bytes already stored."""

    collection: str
    document_id: str
    file_name: str
    media_type: str
    size_bytes: int
    sha256: bytes
    metadata: Mapping[str, str]
    source: Source
    project: str = ""
    request_id: str = ""
    traceparent: str = ""
    charged_nanos_usd: int = 0


@dataclass(frozen=True, slots=True)
class Document:
    """A document as callers see it: its latest revision."""

    uid: str
    collection: str
    document_id: str
    file_name: str
    media_type: str
    size_bytes: int
    sha256: bytes
    revision: int
    state: State
    reason: str
    message: str
    retry_at: datetime | None
    pages_done: int
    pages_total: int
    chunks_done: int
    chunks_total: int
    charged_nanos_usd: int
    request_id: str
    metadata: Mapping[str, str]
    created_at: datetime
    updated_at: datetime
    parsed_by: Provenance | None
    embedded_by: Provenance | None


@dataclass(frozen=True, slots=True)
class Ticket:
    """What a job carries: which revision of which document of which tenant."""

    tenant: str
    collection: str
    uid: str
    revision: int


@dataclass(frozen=True, slots=True)
class Work:
    """A revision as its job needs it."""

    ticket: Ticket
    stage: Stage
    file_name: str
    media_type: str
    sha256: bytes
    metadata: Mapping[str, str]
    source: Source
    project: str
    request_id: str
    traceparent: str
    tries: int
    """Raised before a paid call may be authorized anew; part of the ids of calls."""
    faults: int
    waiting_since: datetime | None
    space: Space | None
    """Pinned once, so that no revision has vectors of two spaces."""


@dataclass(frozen=True, slots=True)
class Added:
    """A document as it is after it was added, and the stored objects that it does not need."""

    document: Document
    unused: tuple[Source, ...] = ()


@dataclass(frozen=True, slots=True)
class Remains:
    """What is left of revisions that nothing needs any more."""

    revisions: tuple[int, ...]
    sources: tuple[Source, ...]
    whole: bool
    """Whether the document itself is gone, and not just revisions of it."""


@dataclass(frozen=True, slots=True)
class Hit:
    """A chunk that a search found."""

    document_id: str
    file_name: str
    page: int
    page_end: int
    score: float
    text: str
    headings: tuple[str, ...]
    provenance: Provenance | None


@dataclass(frozen=True, slots=True)
class Found:
    """What a search answers: chunks, and where the question's vector came from."""

    hits: Sequence[Hit]
    embedded_by: Provenance


# --- what the parser and the embedder answer -----------------------------------------------------


@dataclass(frozen=True, slots=True)
class Inspected:
    """What a document is, before it is parsed."""

    media_type: str
    pages: int | None
    encrypted: bool


@dataclass(frozen=True, slots=True)
class ParsedPage:
    """A page as parsed. `markdown` is empty where the page has no text."""

    number: int
    markdown: str


@dataclass(frozen=True, slots=True)
class ParseProgress:
    """How far a parse is; `total` is 0 while unknown."""

    done: int
    total: int


@dataclass(frozen=True, slots=True)
class Parsed:
    """The end of a parse."""

    media_type: str
    sha256: bytes
    provenance: Provenance


ParseEvent: TypeAlias = ParsedPage | ParseProgress | Parsed
Components: TypeAlias = Sequence[float]


@dataclass(frozen=True, slots=True)
class Embedded:
    """One vector a text, in order."""

    vectors: Sequence[Components]
    provenance: Provenance


@dataclass(frozen=True, slots=True)
class StoredVector:
    """A vector as it is written: `id` is unique within its revision."""

    id: str
    components: Components
    text_sha256: bytes


@dataclass(frozen=True, slots=True)
class Near:
    """A vector near the one searched for."""

    id: str
    uid: str
    revision: int
    score: float


@dataclass(frozen=True, slots=True)
class Stored:
    """What storage says of an object."""

    size_bytes: int
    sha256: bytes
    media_type: str


class Gate(Protocol):
    """The other rooms as one job or call sees them, through the router. It remembers its charges.

    Every method raises the TollgateError that the router answered.
    """

    def take_charge(self) -> int:
        """The nano-dollars that the receipts said since this was last asked."""

    async def put(self, source: Source, content: bytes, media_type: str) -> None: ...

    async def stat(self, source: Source) -> Stored: ...

    async def delete_objects(self, sources: Sequence[Source]) -> None: ...

    async def inspect(self, source: Source, file_name: str, media_type: str) -> Inspected: ...

    def parse(
        self, source: Source, file_name: str, media_type: str, *, pages_max: int, call_id: str
    ) -> AsyncIterator[ParseEvent]: ...

    async def space(self, model: str) -> Space:
        """The model's space at the backend that would serve it now. Raises NotFound."""

    async def ensure_space(self, space: Space) -> None: ...

    async def lookup(self, space: Space, sha256s: Sequence[bytes]) -> dict[bytes, Components]: ...

    async def embed(
        self, space: Space, texts: Sequence[str], *, call_id: str = "", query: bool = False
    ) -> Embedded: ...

    async def upsert(
        self,
        space: Space,
        ticket: Ticket,
        vectors: Sequence[StoredVector],
        metadata: Mapping[str, str],
    ) -> None: ...

    async def activate(self, space: Space, ticket: Ticket) -> None: ...

    async def near(
        self,
        space: Space,
        collection: str,
        components: Components,
        *,
        limit: int,
        only: Mapping[str, str],
    ) -> list[Near]: ...

    async def delete_vectors(self, ticket: Ticket, revision: int) -> int:
        """Delete the vectors of one revision, of every one where it is 0. Answers how many."""


# --- ids -----------------------------------------------------------------------------------------


def call_id(ticket: Ticket, stage: Stage, batch: int, tries: int) -> str:
    """The id of a paid call: the same for the same piece of work, until `tries` is raised.

    A job that runs twice so makes the same call twice, and the ledger forwards it once.
    """
    return str(uuid5(_CALLS, f"{ticket.uid}/{ticket.revision}/{stage}/{batch}/{tries}"))


def page_token(document: Document) -> str:
    """Where a list goes on after this document."""
    micros = int(document.created_at.timestamp() * 1_000_000)
    return base64.urlsafe_b64encode(f"{micros}/{document.uid}".encode()).decode()


def read_page_token(token: str) -> tuple[datetime, str] | None:
    """The creation time and uid of the last document listed; None for the first page."""
    if not token:
        return None
    try:
        micros, uid = base64.urlsafe_b64decode(token.encode()).decode().split("/")
        seconds, rest = divmod(int(micros), 1_000_000)
        return datetime.fromtimestamp(seconds, UTC).replace(microsecond=rest), str(UUID(uid))
    except (ValueError, OverflowError, OSError, binascii.Error):
        raise InvalidField.of("page_token", "is not one that a list answered") from None


# --- what a caller may ask -----------------------------------------------------------------------


def checked_id(field_name: str, value: str) -> str:
    """An id of a document or collection. Raises InvalidField."""
    if not _ID.fullmatch(value):
        raise InvalidField.of(
            field_name, "must be 1 to 128 letters, digits, dots, underscores and hyphens"
        )
    return value


def checked_collection(value: str) -> str:
    """The collection named, or the default one. Raises InvalidField."""
    return checked_id("collection", value or COLLECTION)


def checked_name(field_name: str, value: str) -> str:
    """A file name or media type: kept and shown, never opened. Raises InvalidField."""
    if len(value.encode()) > NAME_BYTES_MAX or not value.isprintable():
        raise InvalidField.of(field_name, "must be at most 1 KiB of printable characters")
    return value


def checked_metadata(field_name: str, pairs: Mapping[str, str]) -> dict[str, str]:
    """What a caller says of a document, or filters by. Raises InvalidField."""
    if len(pairs) > METADATA_PAIRS_MAX:
        raise InvalidField.of(field_name, f"must be at most {METADATA_PAIRS_MAX} pairs")
    for key, value in pairs.items():
        size = len(key.encode()) + len(value.encode())
        if not key or size > METADATA_VALUE_BYTES_MAX or "\0" in key + value:
            raise InvalidField.of(field_name, "each pair must be named, at most 2 KiB, without NUL")
    return dict(pairs)


def checked_content(content: bytes) -> bytes:
    """Bytes given inline. Raises InvalidField or DocumentTooLarge."""
    if not content:
        raise InvalidField.of("content", "must not be empty")
    if len(content) > CONTENT_BYTES_MAX:
        raise DocumentTooLarge("more than 32 MiB inline: store the object and name it instead")
    return content


def checked_query(text: str) -> str:
    """A text to search for. Raises InvalidField."""
    if not text.strip():
        raise InvalidField.of("query", "must not be empty")
    if len(text.encode()) > QUERY_BYTES_MAX:
        raise InvalidField.of("query", "must be at most 8 KiB")
    return text


def checked_count(field_name: str, value: int, *, default: int, most: int) -> int:
    """How many to answer; the default for 0. Raises InvalidField."""
    if not 0 <= value <= most:
        raise InvalidField.of(field_name, f"must be 1 to {most}, or 0 for {default}")
    return value or default


# --- what an error means -------------------------------------------------------------------------


class Next(Enum):
    """What happens to a revision whose stage met an error."""

    FAIL = "fail"
    """It will fail again however often it is tried."""
    DEFER = "defer"
    """It waits for its budget."""
    WAIT = "wait"
    """Something is away; nothing was spent. It is tried again without being counted."""
    ANEW = "anew"
    """The call was made before and its answer was lost: it is made anew, as another."""
    COUNT = "count"
    """It may have been done and paid for. It is tried again, a bounded number of times."""


_MEANINGS: tuple[tuple[tuple[type[TollgateError], ...], Next], ...] = (
    ((CallReplayed, IdReused), Next.ANEW),
    ((RateLimited, Unavailable), Next.WAIT),
    ((OutcomeUnknown, DeadlineExceeded, Cancelled, Internal, Unauthenticated), Next.COUNT),
)


def meaning(error: TollgateError) -> Next:
    """What to do about an error of a stage; what is not known to pass is final."""
    if isinstance(error, BudgetExhausted):
        return Next.FAIL if error.retry_after_s is None else Next.DEFER
    return next((what for kinds, what in _MEANINGS if isinstance(error, kinds)), Next.FAIL)


def backoff_s(attempt: int, *, asked_s: float | None = None, most_s: float = 10.0) -> float:
    """How long to wait before trying again: doubling from 0.2 s, with jitter, never below asked.

    `attempt` counts from 0.
    """
    wait_s: float = min(0.2 * 2.0 ** min(attempt, 16), most_s) * random.uniform(0.5, 1.0)
    return max(wait_s, asked_s or 0.0)


def deferral_s(retry_after_s: float) -> float:
    """How long to wait for a budget: until it is there, and up to 2 s more, not to stampede."""
    return retry_after_s + random.uniform(0.05, min(2.0, 0.1 + retry_after_s * 0.05))


# --- who wants to know ---------------------------------------------------------------------------


@dataclass(slots=True)
class Changes:
    """Wakes those of this process who watch a document that this process changed."""

    _watching: dict[str, set[asyncio.Event]] = field(default_factory=dict)
    closed: bool = False
    """Whether this process is about to end, and with it all watching."""

    def close(self) -> None:
        """Wake everybody to say so."""
        self.closed = True
        for uid in self._watching:
            self.tell(uid)

    def tell(self, uid: str) -> None:
        """The document changed."""
        for event in self._watching.get(uid, ()):
            event.set()

    @contextmanager
    def watch(self, uid: str) -> Iterator[asyncio.Event]:
        """An event that is set at each change; whoever waits for it clears it."""
        event = asyncio.Event()
        watching = self._watching.setdefault(uid, set())
        watching.add(event)
        try:
            yield event
        finally:
            watching.discard(event)
            if not watching:
                self._watching.pop(uid, None)
