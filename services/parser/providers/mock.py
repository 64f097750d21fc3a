"""The provider `mock`: the same pages for the same bytes, made without reading the document.

Text shows in its pages, so that a search over mock pages finds what it should; of other formats
the pages have words chosen by the document's SHA-256. Knobs make it slow or fail.
"""

from __future__ import annotations

import asyncio
import random
import re
from collections.abc import AsyncGenerator, Sequence

from pydantic import BaseModel, Field

from chassis.errors import BY_REASON, DocumentUnreadable, TollgateError, Violation
from services.parser.core import Accepted, Document, Inspection, Page, too_many_pages
from services.parser.media import READABLE, TEXTUAL, hinted, sniff

WORDS_PER_PAGE = 120
PAGES_DERIVED_MAX = 5
TEXT_BYTES_READ = 1024 * 1024

_LEXICON = """
account amount annual appendix balance budget capital chapter clause contract customer date
delivery figure forecast goods growth income invoice item ledger market method model month network
note order page part payment period plan policy price product project quarter rate record report
result risk sample schedule section service signal source state summary supply system table target
term total transfer trend unit value volume week year
"""


class Settings(BaseModel):
    """How slow it is, how often it fails and with what, how many pages it makes."""

    mock_latency_s: float = Field(0.0, ge=0, le=3600, description="Wait before the first page.")
    mock_failure_rate: float = Field(
        0.0, ge=0, le=1, description="The share of documents that fail, chosen by their SHA-256."
    )
    mock_failure_reason: str = Field(
        "PROVIDER_UNAVAILABLE", description="The error reason of those failures."
    )
    mock_pages: int = Field(
        0, ge=0, le=100_000, description="Pages of every document; derived from its bytes when 0."
    )


def create(settings: Settings) -> Mock:
    """The provider. Raises ValueError for a reason that does not exist."""
    if settings.mock_failure_reason not in BY_REASON.keys() - {"INTERNAL"}:
        raise ValueError(
            f"TOLLGATE_PARSER_MOCK_FAILURE_REASON: no such reason: {settings.mock_failure_reason}"
        )
    return Mock(settings)


class Mock:
    """Pages without parsing. Peer of the genuine providers: same events, same errors."""

    name = "mock"
    simulated = True
    healthy = True
    media_types: Sequence[str] = READABLE

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    async def start(self) -> None:
        """Nothing to start."""

    async def stop(self) -> None:
        """Nothing to stop."""

    async def inspect(self, document: Document) -> Inspection:
        """What the document seems to be by its first bytes."""
        return Inspection(_media_type(document), self._pages(document, 0), encrypted=False)

    async def parse(
        self, document: Document, max_pages: int
    ) -> AsyncGenerator[Accepted | Page, None]:
        """The document's made-up pages; the derived number of pages keeps within `max_pages`."""
        media_type = _media_type(document)
        pages = self._pages(document, max_pages)
        if 0 < max_pages < pages:
            raise too_many_pages(pages, max_pages)
        await asyncio.sleep(self._settings.mock_latency_s)
        if random.Random(document.sha256).random() < self._settings.mock_failure_rate:
            raise _failure(self._settings.mock_failure_reason)
        yield Accepted(media_type, pages)
        words = _words(document, media_type, pages)
        share = -(-len(words) // pages)
        for number in range(1, pages + 1):
            body = " ".join(words[(number - 1) * share : number * share])
            title = f"Page {number} of {pages}"
            yield Page(number, f"# {title}\n\n{body}".strip(), f"{title}\n\n{body}".strip())

    def _pages(self, document: Document, max_pages: int) -> int:
        if self._settings.mock_pages:
            return self._settings.mock_pages
        derived = 1 + document.sha256[0] % PAGES_DERIVED_MAX
        return min(derived, max_pages) if max_pages else derived


def _media_type(document: Document) -> str:
    if not document.content:
        words = "the document is empty"
        raise DocumentUnreadable(words, violations=[Violation("document", words)])
    hint = hinted(document.media_type, document.file_name)
    found = sniff(document.content, hint)
    return hint if found == "application/zip" and hint in READABLE else found


def _words(document: Document, media_type: str, pages: int) -> list[str]:
    """The document's own words where it is text, else words that its bytes choose."""
    if media_type in TEXTUAL:
        text = document.content[:TEXT_BYTES_READ].decode("utf-8", "replace")
        return re.sub(r"<[^<>]*>|[\0\ufffd]", " ", text).split()
    chosen = random.Random(document.sha256)
    return chosen.choices(_LEXICON.split(), k=pages * WORDS_PER_PAGE)


def _failure(reason: str) -> TollgateError:
    words = "the mock fails, as it was told to"
    return BY_REASON[reason](words)
