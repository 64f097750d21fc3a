"""One suite that every provider passes, found by listing the folder; and the mock's own knobs."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path

import pytest

from chassis.errors import (
    DocumentTooLarge,
    DocumentUnreadable,
    InvalidField,
    ProviderRejected,
    TollgateError,
)
from chassis.server import StartError
from services.parser import providers
from services.parser.core import Accepted, Document, Page, Provider
from services.parser.main import Settings
from tests.parser import documents
from tests.parser.conftest import StartParser

NAMES = sorted(providers.files())


@pytest.fixture(params=NAMES)
async def provider(request: pytest.FixtureRequest) -> AsyncIterator[Provider]:
    """Each provider in turn, started."""
    settings = Settings.model_validate({"listen": "unix:/unused", "local_workers": 1})
    made = providers.create(settings, request.param)[request.param]
    await made.start()
    try:
        yield made
    finally:
        await made.stop()


def test_the_folder_is_the_register() -> None:
    """Every file of the folder is a provider of that name, and its settings are the room's."""
    folder = Path(providers.__file__).parent
    assert {path.stem for path in folder.glob("[!_]*.py")} == set(NAMES)
    for file in providers.files().values():
        assert file.Settings.model_fields.keys() <= Settings.model_fields.keys()


async def test_name_is_the_file_name(provider: Provider) -> None:
    """A provider is called as its file."""
    assert provider.name in NAMES
    assert provider.healthy
    assert provider.media_types


async def test_accepted_first_then_pages_from_one(provider: Provider) -> None:
    """A parse is Accepted once, then as many pages as it said, numbered from 1."""
    events = await _events(provider, documents.pdf([["One"], ["Two"]]))
    assert isinstance(events[0], Accepted)
    pages = [event for event in events if isinstance(event, Page)]
    assert len(pages) == len(events) - 1 == events[0].pages_total
    assert [page.number for page in pages] == list(range(1, len(pages) + 1))
    assert all(page.text and page.markdown for page in pages)


async def test_same_bytes_give_same_pages(provider: Provider) -> None:
    """Parsing is a function of the bytes."""
    content = documents.docx(["# Plan", "Do it."])
    assert await _events(provider, content) == await _events(provider, content)


async def test_text_shows_in_its_pages(provider: Provider) -> None:
    """The words of a text are in its pages, so that a search for them finds the document."""
    events = await _events(provider, b"the heron waits by the water")
    text = " ".join(event.text for event in events if isinstance(event, Page))
    assert {"heron", "waits", "water"} <= set(text.split())


async def test_inspection_bounds_the_parse(provider: Provider) -> None:
    """A parse with max_pages as inspected passes, and has no more pages than that."""
    document = Document.of(documents.pdf([["One"], ["Two"], ["Three"]]))
    found = await provider.inspect(document)
    assert found.pages is not None
    events = await _events(provider, document.content, max_pages=found.pages)
    assert len(events) - 1 <= found.pages


async def test_empty_documents_are_unreadable(provider: Provider) -> None:
    """No bytes are DOCUMENT_UNREADABLE, for Inspect and Parse alike."""
    with pytest.raises(DocumentUnreadable):
        await provider.inspect(Document.of(b""))
    with pytest.raises(DocumentUnreadable):
        await _events(provider, b"")


async def test_closing_early_is_harmless(provider: Provider) -> None:
    """A parse that is left after its first event leaves the provider able to serve the next."""
    content = documents.pdf([["One"], ["Two"]])
    async with aclosing(provider.parse(Document.of(content), 0)) as events:
        await anext(events)
    assert len(await _events(provider, content)) > 1


async def test_mock_bound_of_its_own_is_kept(start_parser: StartParser) -> None:
    """Where the mock derives its pages it keeps within the caller's bound; a set number is kept."""
    async with start_parser(mock_pages=0) as parser:
        content = next(c for n in range(256) if Document.of(c := bytes([65, n])).sha256[0] % 5 > 1)
        assert len((await parser.parse(content, max_pages=1, provider="mock")).pages) == 1
    async with start_parser(mock_pages=7) as parser:
        assert len((await parser.parse(b"x", provider="mock")).pages) == 7
        with pytest.raises(InvalidField):
            await parser.parse(b"x", max_pages=6, provider="mock")


@pytest.mark.parametrize(
    ("reason", "error"),
    [("PROVIDER_REJECTED", ProviderRejected), ("DOCUMENT_TOO_LARGE", DocumentTooLarge)],
)
async def test_mock_fails_as_told(
    start_parser: StartParser, reason: str, error: type[TollgateError]
) -> None:
    """The mock fails the share of documents that it was told to, with the reason told."""
    async with start_parser(mock_failure_rate=1.0, mock_failure_reason=reason) as parser:
        with pytest.raises(error):
            await parser.parse(b"text", provider="mock")
        assert (await parser.parse(b"text", provider="local")).pages


async def test_start_names_what_is_set_wrong(start_parser: StartParser) -> None:
    """A default provider that is none, or a mock's reason that is none, stops the start."""
    with pytest.raises(StartError, match="DEFAULT_PROVIDER"):
        async with start_parser(default_provider="nobody"):
            pass
    with pytest.raises(StartError, match="NO_SUCH"):
        async with start_parser(mock_failure_reason="NO_SUCH"):
            pass


async def _events(provider: Provider, content: bytes, max_pages: int = 0) -> list[Accepted | Page]:
    return [event async for event in provider.parse(Document.of(content), max_pages)]
