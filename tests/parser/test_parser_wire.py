"""What the parser promises on the wire, with documents that are as they should be."""

from __future__ import annotations

import hashlib

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tollgate.parser.v1 import parser_pb2 as pb

from chassis.call import Call, calling
from chassis.errors import InvalidField, NotFound
from tests.parser import documents
from tests.parser.conftest import Caller, StartParser

DOCX = "application/vnd.openxmlformats-officedocument.wordprocessingml.document"
PPTX = "application/vnd.openxmlformats-officedocument.presentationml.presentation"
XLSX = "application/vnd.openxmlformats-officedocument.spreadsheetml.sheet"


async def test_events_come_in_order(parser: Caller) -> None:
    """A parse is accepted, then progress and pages in order, and a summary last."""
    content = documents.pdf([["One"], ["Two"], ["Three"]])
    answer = await parser.parse(content)
    assert answer.kinds == ["accepted", "progress", "page", "page", "page", "summary"]
    assert [page.number for page in answer.pages] == [1, 2, 3]
    assert [page.text for page in answer.pages] == ["One", "Two", "Three"]
    assert answer.events[1].progress == pb.Progress(pages_done=0, pages_total=3)
    summary = answer.events[-1].summary
    assert summary.pages == 3
    assert summary.media_type == "application/pdf"
    assert summary.sha256 == hashlib.sha256(content).digest()


async def test_progress_is_told_along_long_documents(parser: Caller) -> None:
    """A long parse reports its progress between pages."""
    answer = await parser.parse(documents.pdf([[f"Page {n}"] for n in range(40)]))
    told = [event.progress.pages_done for event in answer.events if event.HasField("progress")]
    assert told == [0, 16, 32]
    assert len(answer.pages) == 40


async def test_accepted_carries_the_hold_that_pays(parser: Caller) -> None:
    """The first event names the call's hold, as its identity has it."""
    with calling(Call(tenant="acme", request_id="r", hold_id="hold-7")):
        answer = await parser.parse(documents.pdf([["One"]]))
    assert answer.events[0].accepted == pb.Accepted(job_id="", hold_id="hold-7")


async def test_answers_say_what_they_used_and_who_made_them(parser: Caller) -> None:
    """Usage and provenance travel in trailing metadata of every answer."""
    content = documents.pdf([["One"], ["Two"]])
    answer = await parser.parse(content)
    assert answer.usage.pages == 2
    assert answer.usage.bytes == len(content)
    assert answer.provenance.provider == "local"
    assert not answer.provenance.simulated
    mocked = await parser.parse(content, provider="mock")
    assert mocked.provenance.provider == "mock"
    assert mocked.provenance.simulated


async def test_headings_become_markdown(parser: Caller) -> None:
    """A large line of a PDF is a heading in its Markdown and plain in its text."""
    lines = ["# Annual Report", *(f"Line {n} of the report's ordinary words." for n in range(20))]
    (page,) = (await parser.parse(documents.pdf([lines]))).pages
    assert page.markdown.startswith("# Annual Report")
    assert page.text.startswith("Annual Report")


@pytest.mark.parametrize(
    ("content", "file_name", "media_type", "markdowns"),
    [
        (documents.docx(["# Plan", "Do it."]), "", DOCX, ["# Plan\n\nDo it."]),
        (
            documents.pptx([("First", "alpha"), ("Second", "beta")]),
            "",
            PPTX,
            ["## First\n\nalpha", "## Second\n\nbeta"],
        ),
        (
            documents.xlsx({"Money": [["a", "b"], ["1", "2"]], "People": [["c"], ["d"]]}),
            "",
            XLSX,
            [
                "## Money\n\n| a | b |\n| --- | --- |\n| 1 | 2 |",
                "## People\n\n| c |\n| --- |\n| d |",
            ],
        ),
        (
            b"<!DOCTYPE html><h1>Hi</h1><script>steal()</script><p>a <b>b</b></p>",
            "",
            "text/html",
            ["# Hi\n\na **b**"],
        ),
        (b"# Hi\n\nthere", "a.md", "text/markdown", ["# Hi\n\nthere"]),
        ("größe".encode(), "a.txt", "text/plain", ["größe"]),
        (b"one\ftwo", "a.txt", "text/plain", ["one", "two"]),
    ],
    ids=["docx", "pptx", "xlsx", "html", "markdown", "text", "form feed"],
)
async def test_every_format_gives_pages(
    parser: Caller, content: bytes, file_name: str, media_type: str, markdowns: list[str]
) -> None:
    """Each format is told from its bytes or name and gives its slides, sheets or text as pages."""
    answer = await parser.parse(content, file_name=file_name)
    assert answer.events[-1].summary.media_type == media_type
    assert [page.markdown for page in answer.pages] == markdowns
    inspected = await parser.inspect(content, file_name=file_name)
    assert inspected.media_type == media_type
    assert inspected.page_count == len(markdowns)


async def test_text_loses_the_marks_of_markdown(parser: Caller) -> None:
    """A page's text has the words of its Markdown without headings, emphasis, links and tables."""
    markdown = b"# T\n\n**bold** [link](http://x.y) a_b\n\n| c | d |\n|---|---|\n| 1 | 2 |\n"
    (page,) = (await parser.parse(markdown, "text/markdown")).pages
    assert page.text == "T\n\nbold link a_b\n\nc\td\n1\t2"


async def test_image_only_page_is_an_empty_page(parser: Caller) -> None:
    """A page without text is a page with nothing in it, not one with an empty fence."""
    (page,) = (await parser.parse(documents.image_pdf())).pages
    assert (page.number, page.markdown, page.text) == (1, "", "")


async def test_long_text_is_cut_into_pages_that_fit_messages(parser: Caller) -> None:
    """A text of many MiB comes whole, in pages that every client can receive."""
    line = "so it goes on and on, line by line\n"
    content = (line * 150_000).encode()
    answer = await parser.parse(content, "text/plain")
    assert len(answer.pages) > 10
    assert "\n".join(page.text for page in answer.pages) == content.decode().strip()
    assert all(event.ByteSize() < 4 * documents.MIB for event in answer.events)
    inspected = await parser.inspect(content, "text/plain")
    assert inspected.page_count == len(answer.pages)


async def test_inspect_is_an_answer_without_pages(parser: Caller) -> None:
    """Inspect tells type, pages, hash and size."""
    content = documents.pdf([["One"], ["Two"]])
    assert await parser.inspect(content) == pb.InspectResponse(
        media_type="application/pdf",
        page_count=2,
        encrypted=False,
        sha256=hashlib.sha256(content).digest(),
        size_bytes=len(content),
    )


async def test_inspect_tells_encrypted_documents(parser: Caller) -> None:
    """A document that needs a password is an answer of Inspect, without a page count."""
    for content in (documents.encrypted_pdf(), documents.encrypted_office()):
        found = await parser.inspect(content)
        assert found.encrypted
        assert not found.HasField("page_count")


@pytest.mark.parametrize("provider", ["local", "mock"])
async def test_max_pages_refuses_before_parsing(start_parser: StartParser, provider: str) -> None:
    """A document of more pages than max_pages is refused, so that the bound always holds."""
    async with start_parser(mock_pages=3) as parser:
        content = documents.pdf([["One"], ["Two"], ["Three"]])
        with pytest.raises(InvalidField) as refused:
            await parser.parse(content, max_pages=2, provider=provider)
        assert refused.value.violations[0].subject == "max_pages"
        answer = await parser.parse(content, max_pages=3, provider=provider)
        assert len(answer.pages) == 3


async def test_fields_that_cannot_be_are_named(parser: Caller) -> None:
    """A negative bound, a document without source, and an object without name are INVALID_FIELD."""
    with pytest.raises(InvalidField) as refused:
        await parser.parse(b"text", max_pages=-1)
    assert refused.value.violations[0].subject == "max_pages"
    with pytest.raises(InvalidField) as refused:
        await parser.parse_document(pb.Document())
    assert refused.value.violations[0].subject == "document"
    with pytest.raises(InvalidField) as refused:
        await parser.parse_document(pb.Document(object=pb.ObjectName(bucket="b")))
    assert refused.value.violations[0].subject == "document.object.name"


async def test_unknown_provider_is_not_found(parser: Caller) -> None:
    """A provider that the parser does not have is NOT_FOUND and names those that it has."""
    with pytest.raises(NotFound):
        await parser.parse(b"text", provider="nobody")


async def test_providers_are_listed_default_first(start_parser: StartParser) -> None:
    """ListProviders names every provider, the default first, and which only simulate."""
    async with start_parser(default_provider="mock") as parser:
        listed = await parser.peer.unary(
            parser.stub.ListProviders, pb.ListProvidersRequest(), timeout_s=5
        )
        assert [(each.name, each.simulated) for each in listed.providers] == [
            ("mock", True),
            ("local", False),
        ]
        assert (await parser.parse(b"text")).provenance.provider == "mock"


async def test_calls_without_identity_are_refused(parser: Caller) -> None:
    """A call that carries no signed identity is UNAUTHENTICATED."""
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await parser.stub.ListProviders(pb.ListProvidersRequest())
    assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED


async def test_health_is_told_per_provider(parser: Caller) -> None:
    """Health answers for the service and for each of its providers."""
    health = health_pb2_grpc.HealthStub(parser.peer.channel)
    service = "tollgate.parser.v1.ParserService"
    for name in ("", service, f"{service}/local", f"{service}/mock"):
        request = health_pb2.HealthCheckRequest(service=name)
        answer = await health.Check(request)  # type: ignore[attr-defined]  # its stubs omit it
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
