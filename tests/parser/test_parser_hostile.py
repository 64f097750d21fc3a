"""Documents that mean harm or are broken: each its typed error, and the next one parses."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncGenerator
from typing import cast

import pytest
from tollgate.parser.v1 import parser_pb2 as pb

from chassis.errors import (
    DeadlineExceeded,
    DocumentEncrypted,
    DocumentTooLarge,
    DocumentUnreadable,
    InvalidField,
    Overloaded,
    TollgateError,
    UnsupportedMediaType,
)
from tests.parser import documents
from tests.parser.conftest import Caller, StartParser, gone, runs, worker_pids

GOOD = documents.pdf([["The next document parses."]])
PDF = "application/pdf"
DOCX = "application/vnd.openxmlformats-officedocument.wordprocessingml.document"


async def under_way(parser: Caller) -> AsyncGenerator[pb.ParseResponse, None]:
    """A parse of a document so long that it goes on after the page that has come."""
    content = documents.pdf([["word " * 15] * 40] * 1000)
    request = pb.ParseRequest(document=pb.Document(content=content))
    stream = parser.peer.stream(parser.stub.Parse, request, timeout_s=60)
    events = cast("AsyncGenerator[pb.ParseResponse, None]", aiter(stream))
    async for event in events:
        if event.HasField("page"):
            break
    return events


async def parses_the_next(parser: Caller) -> None:
    """The daemon is alive and well."""
    (page,) = (await parser.parse(GOOD)).pages
    assert page.text == "The next document parses."


@pytest.mark.parametrize(
    ("content", "media_type", "error"),
    [
        (b"", "", DocumentUnreadable),
        (b"", PDF, DocumentUnreadable),
        (documents.encrypted_pdf(), "", DocumentEncrypted),
        (documents.encrypted_office(), DOCX, DocumentEncrypted),
        (documents.old_doc(), "application/msword", UnsupportedMediaType),
        (GOOD[: len(GOOD) // 2], PDF, DocumentUnreadable),
        (b"%PDF-1.7\n" + os.urandom(10_000), "", DocumentUnreadable),
        (documents.pdf([]), "", DocumentUnreadable),
        (documents.docx(["x"])[:400], DOCX, DocumentUnreadable),
        (documents.archive({"word/document.xml": "<a/>"}), "", DocumentUnreadable),
        (documents.archive({"notes.txt": "hello"}), "", UnsupportedMediaType),
        (b"not a PDF at all", PDF, DocumentUnreadable),
        (b"\x89PNG\r\n\x1a\n" + b"\0" * 100, "", UnsupportedMediaType),
        (bytes(range(256)) * 20, "", UnsupportedMediaType),
        (b"text", "video/mp4", UnsupportedMediaType),
        ("größe".encode("latin-1"), "text/plain", DocumentUnreadable),
        ("größe".encode("latin-1"), "text/markdown", DocumentUnreadable),
        (b"\xff\xfe\x00", "text/plain", DocumentUnreadable),
        (documents.bomb_docx(300), DOCX, DocumentTooLarge),
        (
            documents.docx_of("<w:sdt><w:sdtContent>" * 5000 + "</w:sdtContent></w:sdt>" * 5000),
            DOCX,
            DocumentUnreadable,
        ),
    ],
    ids=[
        "empty",
        "empty pdf",
        "encrypted pdf",
        "encrypted docx",
        "old doc",
        "truncated pdf",
        "garbage pdf",
        "pdf without pages",
        "truncated docx",
        "hollow docx",
        "plain zip",
        "text as pdf",
        "png",
        "binary",
        "video",
        "latin-1 text",
        "latin-1 markdown",
        "odd utf-16",
        "zip bomb",
        "deep docx",
    ],
)
async def test_broken_documents_get_their_typed_error(
    parser: Caller, content: bytes, media_type: str, error: type[TollgateError]
) -> None:
    """What cannot be read is refused with its reason, naming the document, and costs no worker."""
    before = worker_pids()
    with pytest.raises(error) as refused:
        await parser.parse(content, media_type)
    assert type(refused.value) is error
    assert refused.value.violations[0].subject == "document"
    assert os.getcwd() not in refused.value.message
    await parses_the_next(parser)
    assert worker_pids() == before


@pytest.mark.parametrize(
    ("content", "media_type", "file_name", "found"),
    [
        (GOOD, "text/html", "a.html", PDF),
        (b"\n\n" + GOOD, "", "a.docx", PDF),
        (documents.docx(["Hi"]), PDF, "a.pdf", DOCX),
        (b"<!doctype html><p>Hi", PDF, "a.pdf", "text/html"),
        (b"see %PDF-1.7 headers", "text/plain", "", "text/plain"),
        (b"# Hi", "application/octet-stream", "a.md", "text/markdown"),
        (b"a,b", "text/csv", "", "text/plain"),
        ("\ufeffhi".encode(), "", "", "text/plain"),
        ("hi".encode("utf-16"), "", "", "text/plain"),
    ],
)
async def test_mislabelled_documents_are_parsed_as_what_they_are(
    parser: Caller, content: bytes, media_type: str, file_name: str, found: str
) -> None:
    """The bytes decide where they are unambiguous, then the media type, then the file's name."""
    answer = await parser.parse(content, media_type, file_name)
    assert answer.events[-1].summary.media_type == found
    assert answer.pages[0].text


async def test_deeply_nested_html_keeps_its_text(parser: Caller) -> None:
    """Twenty thousand nested elements neither kill a worker nor hide the text inside."""
    before = worker_pids()
    (page,) = (await parser.parse(documents.deep_html(20_000))).pages
    assert page.text == "the bottom"
    assert worker_pids() == before


@pytest.mark.parametrize(
    "link", ["javascript:steal()", " java\tscript:steal()", "JAVASCRIPT:steal()", "vbscript:x"]
)
async def test_scripts_do_not_pass(parser: Caller, link: str) -> None:
    """Neither script elements nor links that run scripts come through in pages."""
    html = f"<html><script>evil()</script><style>p{{}}</style><a href='{link}'>click</a></html>"
    (page,) = (await parser.parse(html.encode())).pages
    assert "click" in page.markdown
    assert "script" not in page.markdown.lower()
    assert "evil" not in page.markdown


async def test_control_characters_do_not_pass(parser: Caller) -> None:
    """Pages hold no NUL and no other control character, so that any store takes them."""
    content = ("word " * 1000 + "a\0b\x07c").encode()
    (page,) = (await parser.parse(content, "text/plain")).pages
    assert page.text.endswith("abc")


async def test_oversized_documents_are_refused(start_parser: StartParser) -> None:
    """A document above the bound is DOCUMENT_TOO_LARGE, whatever it is."""
    async with start_parser(document_bytes_max=2048) as parser:
        with pytest.raises(DocumentTooLarge):
            await parser.parse(b"x" * 2049, "text/plain")
        await parses_the_next(parser)


async def test_inline_documents_stop_at_32_mib(parser: Caller) -> None:
    """An inline document of more than 32 MiB is refused, and told to be stored first."""
    with pytest.raises(DocumentTooLarge, match="store"):
        await parser.parse(b"x" * (32 * documents.MIB + 1), "text/plain")
    await parses_the_next(parser)


async def test_documents_held_together_are_bounded(start_parser: StartParser) -> None:
    """Documents that do not fit in memory beside others are OVERLOADED, before any work."""
    async with start_parser(documents_held_bytes_max=4096) as parser:
        with pytest.raises(Overloaded):
            await parser.parse(b"x" * 5000, "text/plain")
        await parses_the_next(parser)


async def test_memory_bomb_takes_only_itself(start_parser: StartParser) -> None:
    """A small PDF that unpacks without end runs into its own limit; the pool recovers."""
    async with start_parser(local_memory_bytes=160 * documents.MIB) as parser:
        (before,) = worker_pids()
        with pytest.raises(DocumentUnreadable) as refused:
            await parser.parse(documents.bomb_pdf(16))
        assert refused.value.metadata["cause"] == "memory"
        await parses_the_next(parser)
        assert worker_pids() != [before]


async def test_document_that_takes_too_long_is_given_up(start_parser: StartParser) -> None:
    """A worker that exceeds the wall clock is killed, and its document says timeout."""
    async with start_parser(local_document_timeout_s=2.0) as parser:
        (worker,) = worker_pids()
        os.kill(worker, signal.SIGSTOP)
        with pytest.raises(DocumentUnreadable) as refused:
            await parser.parse(GOOD)
        assert refused.value.metadata["cause"] == "timeout"
        await parses_the_next(parser)
        assert not runs(worker)


async def test_killed_worker_takes_only_its_document(start_parser: StartParser) -> None:
    """A worker killed under a document fails that one as a crash; the next has a new worker."""
    async with start_parser() as parser:
        (worker,) = worker_pids()
        events = await under_way(parser)
        os.kill(worker, signal.SIGKILL)
        with pytest.raises(DocumentUnreadable) as refused:
            async for _ in events:
                pass
        assert refused.value.metadata["cause"] == "crash"
        await parses_the_next(parser)
        assert worker not in worker_pids()


async def test_worker_killed_while_idle_harms_nothing(start_parser: StartParser) -> None:
    """A worker that died between documents is replaced before the next one."""
    async with start_parser() as parser:
        (worker,) = worker_pids()
        os.kill(worker, signal.SIGKILL)
        await gone(worker)
        await parses_the_next(parser)


async def test_hanging_worker_holds_up_no_other_document(start_parser: StartParser) -> None:
    """Of many documents in parallel one hangs and times out; all others complete."""
    async with start_parser(local_workers=2, local_document_timeout_s=3.0) as parser:
        hung = worker_pids()[0]
        os.kill(hung, signal.SIGSTOP)
        # Long enough to keep one worker busy while the others arrive.
        body = [["word " * 15] * 40] * 20
        parses = [parser.parse(documents.pdf([[f"Number {n}"], *body])) for n in range(12)]
        answers = await asyncio.gather(*parses, return_exceptions=True)
        failed = [answer for answer in answers if isinstance(answer, BaseException)]
        assert len(failed) == 1
        assert isinstance(failed[0], DocumentUnreadable)
        assert failed[0].metadata["cause"] == "timeout"
        for number, answer in enumerate(answers):
            if not isinstance(answer, BaseException):
                assert answer.pages[0].text == f"Number {number}"
                assert len(answer.pages) == 21
        await parses_the_next(parser)
        await gone(hung)


async def test_cancelling_a_call_ends_its_worker(start_parser: StartParser) -> None:
    """A caller that goes away takes the work with it: the worker is killed and replaced."""
    async with start_parser() as parser:
        (worker,) = worker_pids()
        events = await under_way(parser)
        await events.aclose()
        await gone(worker)
        await parses_the_next(parser)


async def test_deadline_ends_the_work(start_parser: StartParser) -> None:
    """A call whose deadline passes is DEADLINE_EXCEEDED and frees its worker's slot."""
    async with start_parser() as parser:
        (worker,) = worker_pids()
        os.kill(worker, signal.SIGSTOP)
        with pytest.raises(DeadlineExceeded):
            await parser.parse(GOOD, timeout_s=0.5)
        await parses_the_next(parser)


async def test_waiting_documents_are_bounded(start_parser: StartParser) -> None:
    """Documents that wait beyond the bound are OVERLOADED at once, not queued without end."""
    async with start_parser(local_waiting_max=1, local_document_timeout_s=5.0) as parser:
        (worker,) = worker_pids()
        os.kill(worker, signal.SIGSTOP)
        parses = (parser.parse(GOOD) for _ in range(6))
        answers = await asyncio.gather(*parses, return_exceptions=True)
        assert sum(isinstance(answer, Overloaded) for answer in answers) >= 4
        await parses_the_next(parser)


async def test_reader_that_stalls_loses_its_worker(start_parser: StartParser) -> None:
    """A caller that takes no pages does not keep a worker from others for ever."""
    async with start_parser(local_stall_timeout_s=0.3) as parser:
        page = "word " * 40_000
        content = "\f".join(page for _ in range(150)).encode()
        document = pb.Document(content=content, media_type="text/plain")
        request = pb.ParseRequest(document=document)
        stalled = aiter(parser.peer.stream(parser.stub.Parse, request, timeout_s=60))
        await anext(stalled)
        await parses_the_next(parser)
        with pytest.raises(DeadlineExceeded):
            async for _ in stalled:
                pass


async def test_workers_are_replaced_in_time(start_parser: StartParser) -> None:
    """A worker is replaced after its share of documents."""
    async with start_parser(local_documents_per_worker=2) as parser:
        (first,) = worker_pids()
        for _ in range(3):
            await parses_the_next(parser)
        assert first not in worker_pids()


async def test_worker_that_keeps_memory_is_replaced(start_parser: StartParser) -> None:
    """A worker whose resident memory passes the bound is replaced after its document."""
    async with start_parser(local_resident_bytes_max=64 * documents.MIB) as parser:
        (first,) = worker_pids()
        await parser.parse(b"<html>" + b"<p>on <b>and</b> on</p>" * 100_000)
        await parses_the_next(parser)
        assert first not in worker_pids()


async def test_max_pages_holds_for_the_largest_document(parser: Caller) -> None:
    """A document of a thousand pages is refused by its bound without parsing it."""
    with pytest.raises(InvalidField, match="max_pages"):
        await parser.parse(documents.pdf([["x"]] * 1000), max_pages=999)
    await parses_the_next(parser)
