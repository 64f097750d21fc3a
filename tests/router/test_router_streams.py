"""Streams through the gate: parses, uploads and downloads, before the real parser and storage."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from tempfile import TemporaryDirectory
from typing import Any

import grpc
import pytest
from tollgate.cost.v1 import cost_pb2, cost_pb2_grpc
from tollgate.parser.v1 import parser_pb2, parser_pb2_grpc
from tollgate.router.v1 import router_pb2
from tollgate.storage.v1 import object_pb2, object_pb2_grpc, vector_pb2, vector_pb2_grpc

from chassis.call import CALL_ID, MODE, TENANT
from chassis.errors import (
    CallReplayed,
    DocumentEncrypted,
    DocumentUnreadable,
    InvalidField,
    NotFound,
    ProviderUnavailable,
    TollgateError,
)
from chassis.server import Daemon
from chassis.settings import MeshSettings
from services.cost import main as cost
from services.parser import main as parser
from services.router import main as router
from services.storage import main as storage
from tests.router.router_standing import Answered, Fickle, Standing, answered, streamed

ACME = (TENANT, "acme")
PARSE = "tollgate.parser.v1.ParserService/Parse"
TEXT = "\n\n".join(f"# Part {n}\n\nSome words of part {n}." for n in range(40)).encode()


class Mesh(Standing):
    """A client of a gate before the real parser and storage."""

    def __init__(self, mesh: MeshSettings, address: str) -> None:
        super().__init__(mesh, address, Fickle())
        self.parser = parser_pb2_grpc.ParserServiceStub(self.channel)
        self.objects = object_pb2_grpc.ObjectServiceStub(self.channel)
        self.vectors = vector_pb2_grpc.VectorServiceStub(self.channel)

    async def parse(self, *metadata: tuple[str, str], **fields: Any) -> Answered:
        request = parser_pb2.ParseRequest(**fields)
        return await streamed(self.parser.Parse(request, metadata=(ACME, *metadata), timeout=60))

    async def put(self, data: bytes, *metadata: tuple[str, str], **header: Any) -> Answered:
        named: dict[str, Any] = {"bucket": "docs", "name": "a.txt", "max_bytes": len(data)}

        def parts() -> Iterator[object_pb2.PutObjectRequest]:
            described = object_pb2.PutObjectHeader(**(named | header))
            yield object_pb2.PutObjectRequest(header=described)
            for start in range(0, len(data), 1000):
                yield object_pb2.PutObjectRequest(data=data[start : start + 1000])

        call = self.objects.PutObject(parts(), metadata=(ACME, *metadata), timeout=30)
        return await answered(call)

    async def get(self, *metadata: tuple[str, str], **fields: Any) -> Answered:
        request = object_pb2.GetObjectRequest(**({"bucket": "docs", "name": "a.txt"} | fields))
        return await streamed(
            self.objects.GetObject(request, metadata=(ACME, *metadata), timeout=30)
        )

    async def bucket(self, *metadata: tuple[str, str]) -> None:
        request = object_pb2.CreateBucketRequest(bucket="docs")
        await self.objects.CreateBucket(request, metadata=(ACME, *metadata))


def content(found: Answered) -> bytes:
    """The bytes of a download."""
    return b"".join(answer.data for answer in found.answers)


@pytest.fixture
async def whole(mesh: MeshSettings) -> AsyncIterator[Mesh]:
    """Router, ledger, parser and storage."""
    async with AsyncExitStack() as stack:
        # The parser reads stored documents through the router, so it must know where that will be.
        sockets = stack.enter_context(TemporaryDirectory())
        mesh = mesh.model_copy(update={"router_address": f"unix:{sockets}/router"})

        async def start(
            room: Any,
            address: str,
            mesh: MeshSettings,
            listen: str = "127.0.0.1:0",
            **settings: Any,
        ) -> Any:
            own = room.Settings(listen=listen, **settings)
            daemon = await stack.enter_async_context(room.wire(mesh, own))
            return mesh.model_copy(update={address: daemon.address})

        mesh = await start(cost, "cost_address", mesh)
        mesh = await start(storage, "storage_address", mesh)
        mesh = await start(parser, "parser_address", mesh)
        backends = [
            {"service": f"tollgate.{service}", "provider": provider, "kind": kind, "address": at}
            for service, provider, kind, at in (
                ("parser.v1.ParserService", "local", "REAL", mesh.parser_address),
                ("parser.v1.ParserService", "mock", "MOCK", mesh.parser_address),
                ("storage.v1.ObjectService", "filesystem", "REAL", mesh.storage_address),
                ("storage.v1.ObjectService", "mock", "MOCK", mesh.storage_address),
                ("storage.v1.VectorService", "pgvector", "REAL", mesh.storage_address),
                ("storage.v1.VectorService", "mock", "MOCK", mesh.storage_address),
            )
        ]
        mesh = await start(router, "router_address", mesh, mesh.router_address, backends=backends)
        found = Mesh(mesh, mesh.router_address)
        stack.push_async_callback(found.close)
        await found.ready()
        yield found


async def test_a_parse_streams_through_and_is_charged_by_page(whole: Mesh) -> None:
    """Events pass as they come; the trailers tell origin and receipt; the mock's price is held."""
    document = parser_pb2.Document(content=TEXT, media_type="text/markdown", file_name="a.md")
    found = await whole.parse((MODE, "MOCK"), document=document, max_pages=50)
    assert found.error is None
    kinds = [answer.WhichOneof("event") for answer in found.answers]
    assert kinds[0] == "accepted"
    assert kinds[-1] == "summary"
    assert found.answers[0].accepted.hold_id == found.receipt.hold_id
    assert found.provenance.provider == "mock"
    assert found.provenance.simulated
    (hold,) = await whole.settled("SETTLED")
    assert hold.bound.pages == 50
    assert hold.usage.pages == found.answers[-1].summary.pages
    assert hold.charged_nanos_usd == found.receipt.expected_nanos_usd
    assert 0 < found.receipt.expected_nanos_usd < found.receipt.held_nanos_usd


async def test_a_parse_is_bounded_by_the_pages_there_are(whole: Mesh) -> None:
    """Without max_pages the pages are counted first, and the provider may parse no more."""
    pdf = _pdf(3)
    found = await whole.parse(document=parser_pb2.Document(content=pdf))
    assert found.error is None
    (hold,) = await whole.settled("SETTLED")
    assert (hold.bound.pages, hold.bound.bytes) == (3, len(pdf))
    assert hold.usage == hold.bound


@pytest.mark.parametrize(
    ("fields", "kind"),
    [
        ({}, InvalidField),
        ({"max_pages": 3}, InvalidField),
        ({"max_pages": -1, "document": parser_pb2.Document(content=TEXT)}, InvalidField),
        (
            {"max_pages": 3, "document": parser_pb2.Document(content=b"%PDF-1.7 nonsense")},
            DocumentUnreadable,
        ),
        (
            {"document": {"object": {"bucket": "docs", "name": "nothing"}}, "max_pages": 1},
            NotFound,
        ),
    ],
)
async def test_what_cannot_be_parsed_costs_nothing(
    whole: Mesh, fields: dict[str, Any], kind: type[TollgateError]
) -> None:
    """A document that is refused has its typed error, and no hold of it is left or charged."""
    await whole.bucket()
    found = await whole.parse(**fields)
    assert type(found.error) is kind
    for _ in range(100):
        parses = [hold for hold in await whole.holds() if hold.operation == PARSE]
        if all(hold.state == cost_pb2.HOLD_STATE_RELEASED for hold in parses):
            break
    else:
        raise AssertionError("a hold was not released")


async def test_a_stored_document_is_parsed_by_its_name(whole: Mesh) -> None:
    """A document in storage is bounded by its size there, and read through the gate."""
    await whole.bucket()
    assert (await whole.put(_pdf(2))).answer
    document = parser_pb2.Document(object=parser_pb2.ObjectName(bucket="docs", name="a.txt"))
    found = await whole.parse(document=document)
    assert found.error is None, found.error
    holds = await whole.holds()
    assert {hold.operation.rpartition("/")[2] for hold in holds} >= {"Parse", "GetObject"}


async def test_an_object_goes_in_and_comes_out(whole: Mesh) -> None:
    """Uploads and downloads pass whole, and are charged by their bytes."""
    await whole.bucket()
    stored = await whole.put(TEXT, max_bytes=len(TEXT) + 500)
    assert stored.answer.object.size_bytes == len(TEXT)
    assert stored.answer.provenance.provider == "filesystem"
    assert stored.answer.receipt == stored.receipt
    found = await whole.get()
    assert content(found) == TEXT
    assert found.provenance.provider == "filesystem"
    part = await whole.get(offset=10, limit=20)
    assert content(part) == TEXT[10:30]
    ranged, read, written, _ = await whole.settled(*["SETTLED"] * 4)
    assert written.bound.bytes == len(TEXT) + 500
    assert written.usage.bytes == len(TEXT)
    assert read.bound.bytes == read.usage.bytes == len(TEXT)
    assert ranged.bound.bytes == ranged.usage.bytes == 20


@pytest.mark.parametrize("mode", ["REAL", "MOCK"])
async def test_an_empty_object_is_one(whole: Mesh, mode: str) -> None:
    """An upload of 0 declared bytes is stored, and read back as nothing."""
    await whole.bucket((MODE, mode))
    stored = await whole.put(b"", (MODE, mode), max_bytes=0)
    assert stored.answer.object.size_bytes == 0
    found = await whole.get((MODE, mode))
    assert (found.error, content(found)) == (None, b"")


@pytest.mark.parametrize("most", [len(TEXT) - 1, 0])
async def test_an_upload_may_not_exceed_what_it_declared(whole: Mesh, most: int) -> None:
    """More bytes than declared are refused, nothing is stored, and the hold is released."""
    await whole.bucket()
    found = await whole.put(TEXT, max_bytes=most)
    assert isinstance(found.error, InvalidField)
    assert found.error.violations[0].subject == "header.max_bytes"
    assert isinstance((await whole.get()).error, NotFound)
    await whole.settled("RELEASED", "SETTLED")


@pytest.mark.parametrize("max_bytes", [-1, -(1 << 63)])
async def test_an_upload_must_declare_its_bytes(whole: Mesh, max_bytes: int) -> None:
    """With a bound that is none an upload is refused before anything is held."""
    found = await whole.put(TEXT, max_bytes=max_bytes)
    assert isinstance(found.error, InvalidField)
    assert found.error.violations[0].subject == "header.max_bytes"
    assert await whole.holds() == []


async def test_an_upload_needs_a_header(whole: Mesh) -> None:
    """A stream without a header, or without anything, is INVALID_FIELD."""

    def headless() -> Iterator[object_pb2.PutObjectRequest]:
        yield object_pb2.PutObjectRequest(data=b"x")

    def empty() -> Iterator[object_pb2.PutObjectRequest]:
        yield from ()

    for parts in (headless, empty):
        found = await answered(whole.objects.PutObject(parts(), metadata=(ACME,), timeout=20))
        assert isinstance(found.error, InvalidField)
    assert await whole.holds() == []


@pytest.mark.parametrize("fields", [{"offset": -1}, {"limit": -1}, {"offset": -(1 << 63)}])
async def test_a_range_must_be_one(whole: Mesh, fields: dict[str, int]) -> None:
    """A negative range is INVALID_FIELD, and nothing is held."""
    assert isinstance((await whole.get(**fields)).error, InvalidField)
    assert await whole.holds() == []


async def test_a_repeated_parse_is_not_paid_twice(whole: Mesh) -> None:
    """A parse under a call id that was used is CALL_REPLAYED, with no event passed on."""
    document = parser_pb2.Document(content=TEXT, media_type="text/markdown")
    first = await whole.parse((CALL_ID, "p"), (MODE, "MOCK"), document=document, max_pages=50)
    assert first.error is None
    again = await whole.parse((CALL_ID, "p"), (MODE, "MOCK"), document=document, max_pages=50)
    assert isinstance(again.error, CallReplayed)
    assert again.answers == []


async def test_an_encrypted_document_is_told_as_such(whole: Mesh) -> None:
    """DOCUMENT_ENCRYPTED comes before anything is held, where pages must be counted first."""
    found = await whole.parse(document=parser_pb2.Document(content=_encrypted_pdf()))
    assert isinstance(found.error, DocumentEncrypted)
    assert await whole.holds() == []


async def test_leaving_a_parse_is_no_fault(whole: Mesh) -> None:
    """A caller that leaves in the middle of a stream leaves the gate and the parser well."""
    document = parser_pb2.Document(content=_pdf(30))
    call = whole.parser.Parse(
        parser_pb2.ParseRequest(document=document), metadata=(ACME,), timeout=60
    )
    first: Any = await call.read()
    assert first.HasField("accepted")
    call.cancel()
    found = await whole.parse(document=parser_pb2.Document(content=_pdf(1)))
    assert found.error is None
    listed = await whole.router.ListBackends(router_pb2.ListBackendsRequest(service="parser"))
    assert sum(backend.in_flight for backend in listed.backends) == 0


@pytest.mark.parametrize(("timeout_s", "ttl_max_s"), [(30, 100), (None, 120)])
async def test_a_hold_outlives_its_call_by_little(
    whole: Mesh, timeout_s: float | None, ttl_max_s: float
) -> None:
    """A hold is open for a minute beyond the deadline, or as long as the ledger's default."""
    call = whole.parser.Parse(
        parser_pb2.ParseRequest(document=parser_pb2.Document(content=_pdf(1))),
        metadata=(ACME,),
        timeout=timeout_s,
    )
    assert (await streamed(call)).error is None
    (hold,) = await whole.settled("SETTLED")
    ttl_s = (hold.expire_time.ToDatetime() - hold.create_time.ToDatetime()).total_seconds()
    assert 60 < ttl_s <= ttl_max_s


class Broken(parser_pb2_grpc.ParserServiceServicer):
    """A parser whose streams break after their first event, or before it."""

    events = 1

    async def Parse(
        self, request: parser_pb2.ParseRequest, context: Any
    ) -> AsyncIterator[parser_pb2.ParseResponse]:
        for _ in range(self.events):
            yield parser_pb2.ParseResponse(accepted=parser_pb2.Accepted(job_id="job"))
        raise ProviderUnavailable("it broke")

    async def Inspect(
        self, request: parser_pb2.InspectRequest, context: Any
    ) -> parser_pb2.InspectResponse:
        return parser_pb2.InspectResponse(page_count=1)

    async def ListProviders(
        self, request: parser_pb2.ListProvidersRequest, context: Any
    ) -> parser_pb2.ListProvidersResponse:
        return parser_pb2.ListProvidersResponse()


async def test_nothing_is_tried_again_once_an_answer_has_begun(whole: Mesh) -> None:
    """A stream that breaks before its first event falls back; after it, it fails as it is."""
    broken, service = Broken(), "tollgate.parser.v1.ParserService"
    daemon = Daemon("parser", whole.mesh, listen="127.0.0.1:0")
    parser_pb2_grpc.add_ParserServiceServicer_to_server(broken, daemon.server)
    daemon.serves(service, providers=["local"])
    document = parser_pb2.Document(content=TEXT, media_type="text/markdown")
    async with daemon.serving():
        backends = [
            {"service": service, "provider": "local", "kind": "REAL", "address": daemon.address},
            {
                "service": service,
                "provider": "mock",
                "kind": "MOCK",
                "address": whole.mesh.parser_address,
            },
        ]
        own = router.Settings.model_validate(
            {"listen": "127.0.0.1:0", "backends": backends, "mode": "HYBRID"}
        )
        async with router.wire(whole.mesh, own) as gate:
            client = Mesh(whole.mesh, gate.address)
            await client.ready()
            begun = await client.parse(document=document, max_pages=50)
            assert isinstance(begun.error, ProviderUnavailable)
            assert len(begun.answers) == 1
            assert begun.provenance.provider == "local"
            broken.events = 0
            fallen = await client.parse(document=document, max_pages=50)
            assert fallen.error is None
            assert fallen.provenance.provider == "mock"
            assert list(fallen.provenance.fell_back_from) == ["local"]
            await client.close()
    await whole.settled("SETTLED", "RELEASED", "RELEASED")


async def test_vectors_pass_through(whole: Mesh) -> None:
    """Vectors go in and are found, each call metered as a request."""
    space = vector_pb2.Space(id="s", dimensions=3, provider="minilm", model="m")
    meta = (ACME,)
    ensured = await whole.vectors.EnsureSpace(
        vector_pb2.EnsureSpaceRequest(space=space), metadata=meta
    )
    assert ensured.provenance.provider == "pgvector"
    place: dict[str, Any] = {"space_id": "s", "collection": "c", "document_id": "d", "revision": 1}
    vector = vector_pb2.Vector(id="1", values=[1, 0, 0], text_sha256=bytes(32))
    await whole.vectors.UpsertVectors(
        vector_pb2.UpsertVectorsRequest(vectors=[vector], **place), metadata=meta
    )
    await whole.vectors.ActivateRevision(vector_pb2.ActivateRevisionRequest(**place), metadata=meta)
    found = await whole.vectors.SearchVectors(
        vector_pb2.SearchVectorsRequest(space_id="s", collection="c", values=[1, 0, 0]),
        metadata=meta,
    )
    assert [hit.document_id for hit in found.hits] == ["d"]
    assert found.receipt.hold_id
    holds = await whole.settled(*["SETTLED"] * 4)
    assert [hold.usage.requests for hold in holds] == [1] * 4


async def test_other_tenants_see_nothing_of_it(whole: Mesh) -> None:
    """What one tenant stored through the gate another does not find."""
    await whole.bucket()
    assert (await whole.put(TEXT)).answer
    request = object_pb2.GetObjectRequest(bucket="docs", name="a.txt")
    call = whole.objects.GetObject(request, metadata=((TENANT, "other"),), timeout=20)
    assert isinstance((await streamed(call)).error, NotFound)


async def test_holds_can_be_read_by_request(whole: Mesh) -> None:
    """The receipt's request id finds the call's hold in the ledger."""
    found = await answered(
        whole.objects.ListBuckets(object_pb2.ListBucketsRequest(), metadata=(ACME,))
    )
    ledger = cost_pb2_grpc.CostServiceStub(whole.ledger_channel)
    listed = await ledger.ListHolds(
        cost_pb2.ListHoldsRequest(tenant="acme", request_id=found.receipt.request_id),
        metadata=whole.identity(),
    )
    assert [hold.id for hold in listed.holds] == [found.receipt.hold_id]


async def test_an_upload_with_an_undecodable_message_is_refused(whole: Mesh) -> None:
    """An undecodable message in an upload is the caller's fault, and the gate lives on."""
    put: Any = whole.channel.stream_unary("/tollgate.storage.v1.ObjectService/PutObject")

    def parts() -> Iterator[bytes]:
        header = object_pb2.PutObjectHeader(bucket="docs", name="a", max_bytes=10)
        yield object_pb2.PutObjectRequest(header=header).SerializeToString()
        yield b"\xff\xff\xff"

    await whole.bucket()
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await put(parts(), metadata=(ACME,), timeout=20)
    assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    await whole.settled("RELEASED", "SETTLED")


def _pdf(pages: int) -> bytes:
    """A small PDF of so many pages with a line of text each."""
    kids = " ".join(f"{3 + 2 * n} 0 R" for n in range(pages))
    objects = [
        "<< /Type /Catalog /Pages 2 0 R >>",
        f"<< /Type /Pages /Kids [{kids}] /Count {pages} >>",
    ]
    font = 3 + 2 * pages
    for n in range(pages):
        line = f"BT /F1 12 Tf 72 700 Td (Page {n + 1} has words.) Tj ET"
        objects.append(
            "<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] "
            f"/Resources << /Font << /F1 {font} 0 R >> >> /Contents {4 + 2 * n} 0 R >>"
        )
        objects.append(f"<< /Length {len(line)} >>\nstream\n{line}\nendstream")
    objects.append("<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>")
    return _written(objects)


def _encrypted_pdf() -> bytes:
    """A PDF whose trailer says that it needs a password (an all-zero key opens nothing)."""
    whole = _pdf(1).decode("latin-1")
    zero = "00" * 32
    encrypt = (
        f"/Encrypt << /Filter /Standard /V 1 /R 2 /O <{zero}> /U <{zero}> /P -4 >> "
        f"/ID [<{'00' * 16}> <{'00' * 16}>] "
    )
    return whole.replace("/Root", f"{encrypt}/Root").encode("latin-1")


def _written(objects: list[str]) -> bytes:
    out, offsets = "%PDF-1.4\n", []
    for number, body in enumerate(objects, 1):
        offsets.append(len(out))
        out += f"{number} 0 obj\n{body}\nendobj\n"
    start = len(out)
    out += f"xref\n0 {len(objects) + 1}\n0000000000 65535 f \n"
    out += "".join(f"{offset:010d} 00000 n \n" for offset in offsets)
    out += f"trailer\n<< /Size {len(objects) + 1} /Root 1 0 R >>\nstartxref\n{start}\n%%EOF\n"
    return out.encode("latin-1")
