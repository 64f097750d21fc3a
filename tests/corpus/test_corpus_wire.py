"""Documents through the whole mesh: the corpus, and every other room behind the real router."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import grpc
import pytest
import pytest_asyncio
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from tollgate.corpus.v1 import corpus_pb2 as pb
from tollgate.corpus.v1 import corpus_pb2_grpc
from tollgate.cost.v1 import limit_pb2, limit_pb2_grpc
from tollgate.router.v1 import answer_pb2, router_pb2, router_pb2_grpc
from tollgate.storage.v1 import object_pb2, object_pb2_grpc

from chassis.call import PROVENANCE, Call, calling
from chassis.client import Peer
from chassis.settings import MeshSettings
from services.corpus.main import Settings, wire
from tests.corpus.conftest import Rooms

READY, FAILED, DEFERRED = (
    pb.DOCUMENT_STATE_READY,
    pb.DOCUMENT_STATE_FAILED,
    pb.DOCUMENT_STATE_DEFERRED,
)
ACME = (("tollgate-tenant", "acme"), ("tollgate-request-id", "request-1"))
GLOBEX = (("tollgate-tenant", "globex"),)

HANDBOOK = """# Harbour handbook

## Moorings

Boats longer than twelve metres tie up on the eastern quay and pay the pilot before noon.

## Kitchen

The cook bakes sourdough bread with rye flour every morning before the crew wakes up.

## Library

Old maps and sea charts are kept in flat drawers; wear cotton gloves to handle the paper.
"""


class Caller:
    """A client of the router, as any would be made from the protos."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.corpus = corpus_pb2_grpc.CorpusServiceStub(channel)
        self.objects = object_pb2_grpc.ObjectServiceStub(channel)
        self.router = router_pb2_grpc.RouterServiceStub(channel)

    async def add(
        self, document_id: str, content: bytes, metadata: tuple[tuple[str, str], ...] = ACME
    ) -> pb.Document:
        request = pb.AddDocumentRequest(
            document_id=document_id,
            file_name=document_id,
            content=content,
            metadata={"shelf": document_id[:1]},
        )
        return (await self.corpus.AddDocument(request, metadata=metadata)).document

    async def seen(
        self, document_id: str, metadata: tuple[tuple[str, str], ...] = ACME
    ) -> list[pb.Document]:
        """Every state of a document until it is ready or has failed."""
        request = pb.WatchDocumentRequest(document_id=document_id)
        async with asyncio.timeout(60):
            watch = self.corpus.WatchDocument(request, metadata=metadata)
            return [answer.document async for answer in watch]

    async def added(self, document_id: str, content: bytes) -> pb.Document:
        await self.add(document_id, content)
        return (await self.seen(document_id))[-1]

    async def search(
        self, query: str, metadata: tuple[tuple[str, str], ...] = ACME, **fields: object
    ) -> list[pb.SearchHit]:
        request = pb.SearchRequest(query=query, **fields)  # type: ignore[arg-type]  # a test's own
        return list((await self.corpus.Search(request, metadata=metadata)).hits)


@asynccontextmanager
async def corpus_of(mesh: MeshSettings, **fields: object) -> AsyncIterator[None]:
    """The corpus, with settings of the test's own."""
    settings = Settings(listen=mesh.corpus_address, **fields)  # type: ignore[arg-type]  # likewise
    async with (
        wire(mesh, settings),
        grpc.aio.insecure_channel(mesh.router_address) as channel,
    ):
        await health_of(Caller(channel), "", router_pb2.BACKEND_HEALTH_SERVING)
        yield


async def health_of(caller: Caller, provider: str, health: router_pb2.BackendHealth) -> None:
    """Wait until the router knows this of a provider, or of all where none is named."""
    async with asyncio.timeout(30):
        for _ in itertools.count():
            answer = await caller.router.ListBackends(
                router_pb2.ListBackendsRequest(), metadata=ACME
            )
            named = [b for b in answer.backends if provider in (b.provider, "")]
            if all(b.health == health for b in named):
                return
            await asyncio.sleep(0.02)


@pytest_asyncio.fixture
async def alone(whole_mesh: MeshSettings) -> AsyncIterator[Caller]:
    """A caller of a mesh whose corpus is not there yet."""
    async with grpc.aio.insecure_channel(whole_mesh.router_address) as channel:
        yield Caller(channel)


@pytest_asyncio.fixture
async def caller(whole_mesh: MeshSettings, alone: Caller) -> AsyncIterator[Caller]:
    """A caller of a whole mesh."""
    async with corpus_of(whole_mesh):
        yield alone


def reason_of(error: grpc.aio.AioRpcError) -> str:
    status = rpc_status.from_call(error)  # type: ignore[arg-type]  # aio errors have what it reads
    info = error_details_pb2.ErrorInfo()
    assert any(detail.Unpack(info) for detail in status.details)
    return str(info.reason)


async def test_a_document_becomes_ready_and_is_found(caller: Caller) -> None:
    """Text that was added is found by its meaning, with page, headings, score and provenance."""
    states = await caller.seen((await caller.add("handbook.md", HANDBOOK.encode())).id)
    document = states[-1]
    assert document.state == READY, document
    assert document.media_type == "text/markdown"
    assert document.sha256 == hashlib.sha256(HANDBOOK.encode()).digest()
    assert document.request_id == "request-1"
    assert document.progress.chunks_done == document.progress.chunks_total > 0
    assert (document.parsed_by.provider, document.embedded_by.provider) == ("local", "minilm")
    assert not document.embedded_by.simulated
    first, *_ = await caller.search("who makes the loaves?")
    assert "sourdough" in first.text
    assert (first.document_id, first.file_name) == ("handbook.md", "handbook.md")
    assert (first.page, first.page_end) == (1, 1)
    assert first.headings[0] == "Harbour handbook"
    assert 0 < first.score <= 1
    assert first.provenance.space_id == document.embedded_by.space_id
    assert await caller.search("who makes the loaves?", filter={"shelf": "x"}) == []
    assert await caller.search("who makes the loaves?", collection="other") == []
    assert await caller.search("who makes the loaves?", metadata=GLOBEX) == []


async def test_the_same_bytes_cost_nothing_more(caller: Caller) -> None:
    """Re-adding answers the document as it is; a text of another one is not embedded again."""
    document = await caller.added("a.md", HANDBOOK.encode())
    assert await caller.add("a.md", HANDBOOK.encode()) == document
    copy = await caller.added("b.md", HANDBOOK.encode())
    assert copy.state == READY
    assert copy.embedded_by.cached
    assert copy.embedded_by.space_id == document.embedded_by.space_id
    hits = await caller.search("who makes the loaves?")
    assert {hit.document_id for hit in hits} == {"a.md", "b.md"}


async def test_other_bytes_take_over_once_they_are_ready(caller: Caller) -> None:
    """The old revision is searched until the new one is; then none of it is left."""
    await caller.added("notes.md", b"# Weather\n\nIt rains on the mountains in spring.")
    document = await caller.added("notes.md", b"# Food\n\nSoup is made from leeks and potatoes.")
    assert (document.revision, document.state) == (2, READY)
    hits = await caller.search("rain in the mountains")
    assert [hit.text for hit in hits] == ["# Food\n\nSoup is made from leeks and potatoes."]


async def test_a_failed_revision_leaves_the_old_one_searchable(caller: Caller) -> None:
    """A new revision that cannot be read is FAILED with its reason; the old one still serves."""
    await caller.added("notes.md", b"# Weather\n\nIt rains on the mountains in spring.")
    document = await caller.added("notes.md", b"%PDF-1.7\nthis is not one")
    assert (document.revision, document.state) == (2, FAILED)
    assert document.reason == "DOCUMENT_UNREADABLE"
    assert len(await caller.search("rain")) == 1
    again = await caller.added("notes.md", b"%PDF-1.7\nthis is not one")
    assert (again.revision, again.state) == (2, FAILED)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"   \n\n\t\n", "DOCUMENT_UNREADABLE"),
        (b"\x7fELF\x02\x01\x01\x00" + bytes(64), "UNSUPPORTED_MEDIA_TYPE"),
    ],
)
async def test_what_cannot_be_read_fails_with_its_reason(
    caller: Caller, content: bytes, reason: str
) -> None:
    """A document without text or of no known type is FAILED at once, and says why."""
    document = await caller.added("bad", content)
    assert (document.state, document.reason) == (FAILED, reason)
    assert document.message


async def test_a_stored_object_is_read_and_stays_the_callers(caller: Caller) -> None:
    """A document can be an object of the caller's; deleting the document leaves the object."""
    await caller.objects.CreateBucket(object_pb2.CreateBucketRequest(bucket="mine"), metadata=ACME)

    async def parts() -> AsyncIterator[object_pb2.PutObjectRequest]:
        header = object_pb2.PutObjectHeader(bucket="mine", name="h.md", max_bytes=10_000)
        yield object_pb2.PutObjectRequest(header=header)
        yield object_pb2.PutObjectRequest(data=HANDBOOK.encode())

    await caller.objects.PutObject(parts(), metadata=ACME)
    request = pb.AddDocumentRequest(
        document_id="h", file_name="h.md", object=pb.ObjectName(bucket="mine", name="h.md")
    )
    await caller.corpus.AddDocument(request, metadata=ACME)
    assert (await caller.seen("h"))[-1].state == READY
    deleted = await caller.corpus.DeleteDocument(
        pb.DeleteDocumentRequest(document_id="h"), metadata=ACME
    )
    assert deleted.chunks == deleted.vectors > 0
    stat = object_pb2.StatObjectRequest(bucket="mine", name="h.md")
    assert (await caller.objects.StatObject(stat, metadata=ACME)).object.size_bytes > 0


async def test_a_deleted_document_is_gone_with_its_object(caller: Caller) -> None:
    """Deleting takes the object, the chunks and the vectors; a repeat says NOT_FOUND."""
    await caller.added("handbook.md", HANDBOOK.encode())
    request = pb.DeleteDocumentRequest(document_id="handbook.md")
    deleted = await caller.corpus.DeleteDocument(request, metadata=ACME)
    assert deleted.chunks == deleted.vectors > 0
    assert await caller.search("who makes the loaves?") == []
    listing = object_pb2.ListObjectsRequest(bucket="corpus")
    assert not (await caller.objects.ListObjects(listing, metadata=ACME)).objects
    with pytest.raises(grpc.aio.AioRpcError) as gone:
        await caller.corpus.DeleteDocument(request, metadata=ACME)
    assert reason_of(gone.value) == "NOT_FOUND"
    assert (await caller.added("handbook.md", HANDBOOK.encode())).state == READY


BAD = [
    (pb.AddDocumentRequest(document_id="a"), "INVALID_FIELD"),
    (pb.AddDocumentRequest(document_id="a", content=b""), "INVALID_FIELD"),
    (pb.AddDocumentRequest(document_id="../a", content=b"x"), "INVALID_FIELD"),
    (pb.AddDocumentRequest(document_id="a", collection="/", content=b"x"), "INVALID_FIELD"),
    (pb.AddDocumentRequest(document_id="a", file_name="\0", content=b"x"), "INVALID_FIELD"),
    (
        pb.AddDocumentRequest(document_id="a", object=pb.ObjectName(bucket="none", name="none")),
        "NOT_FOUND",
    ),
    (pb.AddDocumentRequest(document_id="a", content=bytes(33 << 20)), "DOCUMENT_TOO_LARGE"),
    (pb.GetDocumentRequest(document_id="a"), "NOT_FOUND"),
    (pb.ListDocumentsRequest(page_size=1_001), "INVALID_FIELD"),
    (pb.ListDocumentsRequest(page_token="made up"), "INVALID_FIELD"),
    (pb.SearchRequest(), "INVALID_FIELD"),
    (pb.SearchRequest(query="x" * 9_000), "INVALID_FIELD"),
    (pb.SearchRequest(query="x", limit=101), "INVALID_FIELD"),
]


async def test_bad_requests_have_their_reasons(caller: Caller) -> None:
    """What the protos forbid is refused with the reason that they name, and nothing is added."""
    for request, reason in BAD:
        method = type(request).__name__.removesuffix("Request")
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await getattr(caller.corpus, method)(request, metadata=ACME)
        assert reason_of(refused.value) == reason, request
    listed = await caller.corpus.ListDocuments(pb.ListDocumentsRequest(), metadata=ACME)
    assert not listed.documents


async def test_watching_what_is_not_there_is_not_found(caller: Caller) -> None:
    """A watch of a document that nobody added ends with NOT_FOUND."""
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await caller.seen("nothing")
    assert reason_of(refused.value) == "NOT_FOUND"


async def test_an_empty_corpus_finds_nothing(caller: Caller) -> None:
    """A search before the first document is an empty answer, not an error."""
    assert await caller.search("anything") == []


async def test_a_corpus_that_dies_goes_on_where_it_was(
    whole_mesh: MeshSettings, alone: Caller
) -> None:
    """Documents that were being added when the corpus stopped become READY with the next one."""
    whole_mesh = whole_mesh.model_copy(update={"grace_s": 0.0})
    async with corpus_of(whole_mesh):
        for number in range(6):
            await alone.add(f"d{number}.md", f"{HANDBOOK}\n\nCopy {number}.".encode())
    async with corpus_of(whole_mesh):
        for number in range(6):
            document = (await alone.seen(f"d{number}.md"))[-1]
            assert document.state == READY, document
            assert document.progress.chunks_done == document.progress.chunks_total


async def test_simulated_vectors_are_searched_only_by_simulated_ones(caller: Caller) -> None:
    """After a switch to mocks, documents and searches are in the mock's space and find no other."""
    await caller.added("real.md", HANDBOOK.encode())
    await caller.router.SetMode(
        router_pb2.SetModeRequest(service="embedder", mode=router_pb2.MODE_MOCK), metadata=ACME
    )
    simulated = await caller.added("mock.md", HANDBOOK.encode())
    assert simulated.state == READY, simulated
    assert simulated.embedded_by.simulated
    hits = await caller.search("sourdough bread")
    assert {hit.document_id for hit in hits} == {"mock.md"}
    assert all(hit.provenance.simulated for hit in hits)


async def test_a_search_says_by_what_embedding_it_was_made(caller: Caller) -> None:
    """A search is labelled as its question's embedding, also where nothing is found."""
    for mode in (router_pb2.MODE_REAL, router_pb2.MODE_MOCK):
        request = router_pb2.SetModeRequest(service="embedder", mode=mode)
        await caller.router.SetMode(request, metadata=ACME)
        for added in (False, True):
            if added:
                await caller.added(f"{mode}.md", HANDBOOK.encode())
            search = caller.corpus.Search(pb.SearchRequest(query="bread"), metadata=ACME)
            answer = await search
            assert bool(answer.hits) is added
            provenance = answer.provenance
            assert provenance.provider == "corpus"
            assert provenance.simulated is (mode == router_pb2.MODE_MOCK)
            assert provenance.model
            assert provenance.space_id
            trailers = dict(await search.trailing_metadata())
            assert answer_pb2.Provenance.FromString(trailers[PROVENANCE]) == provenance


async def test_no_mock_stands_in_for_the_genuine_space(caller: Caller, rooms: Rooms) -> None:
    """In HYBRID without its genuine embedder, documents and searches wait and never mix spaces."""
    assert (await caller.added("real.md", HANDBOOK.encode())).state == READY
    await caller.router.SetMode(
        router_pb2.SetModeRequest(service="embedder", mode=router_pb2.MODE_HYBRID), metadata=ACME
    )
    genuine = "tollgate.embedder.v1.EmbedderService/minilm"
    await rooms.daemons["embedder"].set_health(genuine, serving=False)
    await health_of(caller, "minilm", router_pb2.BACKEND_HEALTH_NOT_SERVING)
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await caller.search("sourdough bread")
    assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
    await caller.add("later.md", b"# Later\n\nThe bakery opens at noon.")
    watch = caller.corpus.WatchDocument(
        pb.WatchDocumentRequest(document_id="later.md"), metadata=ACME, timeout=30
    )
    waiting = await anext(a.document async for a in watch if a.document.reason)
    assert (waiting.state, waiting.reason) == (pb.DOCUMENT_STATE_EMBEDDING, "PROVIDER_UNAVAILABLE")
    watch.cancel()
    await rooms.daemons["embedder"].set_health(genuine, serving=True)
    document = (await caller.seen("later.md"))[-1]
    assert (document.state, document.embedded_by.simulated) == (READY, False)


async def set_limit(mesh: MeshSettings, service: str, **content: Any) -> None:
    """Set a hard limit of one to what a service does for the tenant `acme`."""
    exactly = partial(limit_pb2.Dimension, match=limit_pb2.MATCH_EXACT)
    limit = limit_pb2.Limit(
        scope=limit_pb2.LimitScope(tenant=exactly(value="acme"), service=exactly(value=service)),
        maximum=1,
        enforcement=limit_pb2.ENFORCEMENT_HARD,
        **content,
    )
    with calling(Call("operator")):
        peer = Peer(mesh.cost_address, mesh)
        limits = limit_pb2_grpc.LimitServiceStub(peer.channel)
        request = limit_pb2.CreateLimitRequest(limit=limit)
        await peer.unary(limits.CreateLimit, request, timeout_s=10)
        await peer.close()


async def test_a_document_larger_than_a_limit_fails(
    whole_mesh: MeshSettings, caller: Caller
) -> None:
    """What no minute will ever fit is FAILED at once, and says which limit to raise."""
    await set_limit(
        whole_mesh,
        "embedder",
        id="tokens",
        display_name="Tokens a minute",
        metric=limit_pb2.METRIC_TOKENS,
        window=limit_pb2.WINDOW_MINUTE,
    )
    document = await caller.added("large.md", HANDBOOK.encode())
    assert (document.state, document.reason) == (FAILED, "BUDGET_EXHAUSTED")
    assert "larger than the limit Tokens a minute allows at once; raise it" in document.message


async def test_a_document_waits_for_its_budget(whole_mesh: MeshSettings, caller: Caller) -> None:
    """A document that fits no more this hour is DEFERRED until a later one, and not FAILED."""
    await set_limit(
        whole_mesh,
        "parser",
        id="pages",
        display_name="Pages",
        metric=limit_pb2.METRIC_PAGES,
        window=limit_pb2.WINDOW_HOUR,
    )
    assert (await caller.added("first.md", HANDBOOK.encode())).state == READY
    await caller.add("second.md", b"# Another one")
    watch = caller.corpus.WatchDocument(
        pb.WatchDocumentRequest(document_id="second.md"), metadata=ACME, timeout=30
    )
    document = await anext(a.document async for a in watch if a.document.state == DEFERRED)
    watch.cancel()
    assert document.reason == "BUDGET_EXHAUSTED"
    assert document.retry_time.ToDatetime() > document.update_time.ToDatetime()


async def test_documents_outlive_a_database_that_goes_down(
    caller: Caller, cut_all: Callable[[], Awaitable[None]]
) -> None:
    """The corpus loses its database several times while documents are added; all become READY."""

    async def insist(number: int) -> None:
        async with asyncio.timeout(60):
            for wait_s in itertools.count(0.05, 0.05):
                try:
                    await caller.add(f"d{number}.md", f"{HANDBOOK}\n\nCopy {number}.".encode())
                    return
                except grpc.aio.AioRpcError as error:
                    if error.code() not in (
                        grpc.StatusCode.UNAVAILABLE,
                        grpc.StatusCode.UNKNOWN,
                    ):
                        raise
                    await asyncio.sleep(wait_s)

    adding = asyncio.gather(*(insist(number) for number in range(6)))
    for _ in range(5):
        await asyncio.sleep(0.15)
        await cut_all()
    await adding
    for number in range(6):
        document = (await caller.seen(f"d{number}.md"))[-1]
        assert document.state == READY, document
