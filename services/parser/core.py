"""What a parse is: documents, pages, providers, and the order that every parse keeps."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from typing import Protocol

from chassis.errors import DocumentTooLarge, InvalidField, NotFound, Overloaded, Violation

INLINE_BYTES_MAX = 32 * 1024 * 1024
"""The largest document that may travel in the request itself."""

PROGRESS_EVERY_PAGES = 16
"""How many pages pass between two reports of progress."""


@dataclass(frozen=True, slots=True)
class Document:
    """A document's bytes, their SHA-256 (32 bytes), and what the caller said of them."""

    content: bytes
    sha256: bytes
    media_type: str = ""
    file_name: str = ""

    @classmethod
    def of(cls, content: bytes, media_type: str = "", file_name: str = "") -> Document:
        """The document of these bytes. Hashing takes about 1 ms per MiB."""
        return cls(content, hashlib.sha256(content).digest(), media_type, file_name)


@dataclass(frozen=True, slots=True)
class Page:
    """One page: its number from 1, its content as Markdown and as plain text."""

    number: int
    markdown: str
    text: str


@dataclass(frozen=True, slots=True)
class Accepted:
    """The provider took the document: what it found, pages (0: unknown), its job id if any."""

    media_type: str
    pages_total: int
    job_id: str = ""


@dataclass(frozen=True, slots=True)
class Progress:
    """Pages done, of pages in all (0: unknown)."""

    pages_done: int
    pages_total: int


@dataclass(frozen=True, slots=True)
class Usage:
    """What a parse used: pages answered, bytes read."""

    pages: int
    bytes: int


@dataclass(frozen=True, slots=True)
class Summary:
    """The end of a parse: what was found and what it used."""

    media_type: str
    usage: Usage


@dataclass(frozen=True, slots=True)
class Inspection:
    """What a document is. `pages` is None where it cannot be known without its password."""

    media_type: str
    pages: int | None
    encrypted: bool


Event = Accepted | Progress | Page | Summary


class Provider(Protocol):
    """Something that turns documents into pages. Raises the errors of `chassis.errors` only."""

    @property
    def name(self) -> str:
        """The provider's name, which is its file's name."""

    @property
    def simulated(self) -> bool:
        """Whether it only simulates the work."""

    @property
    def media_types(self) -> Sequence[str]:
        """The media types that it reads."""

    @property
    def healthy(self) -> bool:
        """Whether it can serve now."""

    async def inspect(self, document: Document) -> Inspection:
        """Look at a document without charge."""

    def parse(self, document: Document, max_pages: int) -> AsyncGenerator[Accepted | Page, None]:
        """Accepted once, then every page in order from 1. Closing the iterator ends the work.

        A document of more than `max_pages` pages is refused before its first page (0: no bound).
        """

    async def start(self) -> None:
        """Get ready to serve."""

    async def stop(self) -> None:
        """Let go of everything."""


def choose(providers: Mapping[str, Provider], name: str) -> Provider:
    """The provider of that name; the first where the caller named none. Raises NotFound."""
    if not name:
        return next(iter(providers.values()))
    if name not in providers:
        raise NotFound(
            f"the parser has no provider {name!r}",
            violations=[Violation(f"provider/{name}", f"one of {', '.join(providers)}")],
        )
    return providers[name]


def too_many_pages(pages: int, max_pages: int) -> InvalidField:
    """The refusal of a document that has more pages than the caller lets be parsed."""
    return InvalidField.of("max_pages", f"the document has {pages} pages, the bound is {max_pages}")


def require_max_pages(max_pages: int) -> None:
    """Raise InvalidField for a bound that is none."""
    if max_pages < 0:
        raise InvalidField.of("max_pages", "is 0 (no bound) or more")


def too_large(size_bytes: int, bytes_max: int, advice: str) -> DocumentTooLarge:
    """The refusal of a document for its size alone."""
    words = f"the document has {size_bytes} bytes, at most {bytes_max} are read: {advice}"
    return DocumentTooLarge(words, violations=[Violation("document", words)])


class Memory:
    """The bytes of all documents held at once: what does not fit is refused, never queued."""

    def __init__(self, bytes_max: int) -> None:
        self._left = bytes_max

    @contextmanager
    def hold(self, size_bytes: int) -> Iterator[None]:
        """Hold that many bytes within. Raises Overloaded where they do not fit now."""
        if size_bytes > self._left:
            raise Overloaded("too many large documents are being parsed")
        self._left -= size_bytes
        try:
            yield
        finally:
            self._left += size_bytes


async def parse(
    provider: Provider, document: Document, max_pages: int
) -> AsyncGenerator[Event, None]:
    """Every event of a parse in the order of the wire: accepted, progress and pages, summary."""
    require_max_pages(max_pages)
    accepted: Accepted | None = None
    pages = 0
    async with aclosing(provider.parse(document, max_pages)) as events:
        async for event in events:
            yield event
            if isinstance(event, Accepted):
                accepted = event
                yield Progress(0, accepted.pages_total)
                continue
            pages += 1
            if pages % PROGRESS_EVERY_PAGES == 0 and accepted is not None:
                yield Progress(pages, accepted.pages_total)
    media_type = accepted.media_type if accepted is not None else document.media_type
    yield Summary(media_type, Usage(pages=pages, bytes=len(document.content)))
