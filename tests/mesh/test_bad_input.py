"""Bad input through the whole gate: a typed error, a mesh that lives on, and nothing held."""

from __future__ import annotations

import asyncio
import io
import zipfile
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from tollgate.corpus.v1 import corpus_pb2 as corpus
from tollgate.cost.v1 import cost_pb2 as cost
from tollgate.cost.v1 import usage_pb2 as usage
from tollgate.embedder.v1 import embedder_pb2 as embedder
from tollgate.parser.v1 import parser_pb2 as parser
from tollgate.router.v1 import router_pb2 as router
from tollgate.storage.v1 import object_pb2 as objects
from tollgate.storage.v1 import vector_pb2 as vectors

from cli.demo.write_handbook import handbook
from tests.mesh.conftest import Client, Mesh

TENANT = "hostile"
METADATA = (("tollgate-tenant", TENANT),)
MODEL = "all-MiniLM-L6-v2"
Act = Callable[[Client], Awaitable[Any]]

ENCRYPTED = handbook().replace(
    b"trailer\n<< ",
    b"trailer\n<< /Encrypt << /Filter /Standard /V 2 /R 3 /Length 128 /P -44 /O <"
    + b"41" * 32
    + b"> /U <"
    + b"42" * 32
    + b"> >> /ID [<00><00>] ",
)
NESTED = b"<html>" + b"<div>" * 20_000 + b"deep" + b"</div>" * 20_000 + b"</html>"


def zip_bomb() -> bytes:
    """A DOCX of a hundred kilobytes whose one part unpacks to a hundred megabytes."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("[Content_Types].xml", "<Types/>")
        file.writestr("word/document.xml", b" " * (100 << 20))
    return packed.getvalue()


def parse(content: bytes, file_name: str = "", media_type: str = "", max_pages: int = 50) -> Act:
    async def act(client: Client) -> Any:
        document = parser.Document(content=content, file_name=file_name, media_type=media_type)
        request = parser.ParseRequest(document=document, max_pages=max_pages)
        return [event async for event in client.parser.Parse(request, metadata=METADATA)]

    return act


def embed(*inputs: str, metadata: Any = METADATA, **fields: Any) -> Act:
    request = embedder.EmbedRequest(**{"model": MODEL, "inputs": inputs} | fields)
    return lambda client: client.embedder.Embed(request, metadata=metadata)


def put(name: str, *, data: bytes = b"x", max_bytes: int = 10, bucket: str = "inbox") -> Act:
    async def parts() -> AsyncIterator[objects.PutObjectRequest]:
        header = objects.PutObjectHeader(bucket=bucket, name=name, max_bytes=max_bytes)
        yield objects.PutObjectRequest(header=header)
        yield objects.PutObjectRequest(data=data)

    return lambda client: client.objects.PutObject(parts(), metadata=METADATA)


def upsert(space_id: str, values: list[float], *, simulated: bool = False) -> Act:
    vector = vectors.Vector(id="v", values=values, text_sha256=b"\0" * 32)
    request = vectors.UpsertVectorsRequest(
        space_id=space_id,
        collection="default",
        document_id="d",
        revision=1,
        vectors=[vector],
        simulated=simulated,
    )
    return lambda client: client.vectors.UpsertVectors(request, metadata=METADATA)


BAD: dict[str, tuple[Act, str]] = {
    # Documents.
    "encrypted": (parse(ENCRYPTED, "a.pdf"), "DOCUMENT_ENCRYPTED"),
    "truncated": (parse(handbook()[:1500], "a.pdf"), "DOCUMENT_UNREADABLE"),
    "empty": (parse(b"", "a.pdf"), "DOCUMENT_UNREADABLE"),
    "huge": (parse(b"a" * ((32 << 20) + 1), "a.txt"), "DOCUMENT_TOO_LARGE"),
    "not what it says": (parse(b"\x7fELF" + b"\0" * 500, "a.pdf"), "UNSUPPORTED_MEDIA_TYPE"),
    "not UTF-8": (parse(b"caf\xe9 \xff\xfe\x81" * 40, "a.txt"), "DOCUMENT_UNREADABLE"),
    "a zip bomb": (parse(zip_bomb(), "a.docx"), "DOCUMENT_UNREADABLE"),
    "more pages than allowed": (parse(handbook(), "a.pdf", max_pages=2), "INVALID_FIELD"),
    "a negative bound": (parse(handbook(), "a.pdf", max_pages=-1), "INVALID_FIELD"),
    "no such object": (
        lambda client: client.parser.Inspect(
            parser.InspectRequest(
                document=parser.Document(object=parser.ObjectName(bucket="inbox", name="none"))
            ),
            metadata=METADATA,
        ),
        "NOT_FOUND",
    ),
    # Texts.
    "unknown model": (embed("text", model="no-such-model"), "NOT_FOUND"),
    "unknown space": (embed("text", space_id="of:another:model"), "SPACE_MISMATCH"),
    "other dimensions": (embed("text", dimensions=7), "INVALID_FIELD"),
    "negative dimensions": (embed("text", dimensions=-1), "INVALID_FIELD"),
    "no text": (embed(), "INVALID_FIELD"),
    "an empty text": (embed("good", ""), "INVALID_FIELD"),
    "an over-long text": (embed("word " * 400), "INVALID_FIELD"),
    "too many texts": (embed(*["a"] * 2_049), "INVALID_FIELD"),
    # Objects.
    "a path upwards": (put("../../etc/passwd"), "INVALID_FIELD"),
    "a path from the root": (put("/etc/passwd"), "INVALID_FIELD"),
    "a name with a NUL": (put("a\0b"), "INVALID_FIELD"),
    "a dotted part": (put("a/./b"), "INVALID_FIELD"),
    "no name": (put(""), "INVALID_FIELD"),
    "no declared size": (put("a", max_bytes=0), "INVALID_FIELD"),
    "a negative size": (put("a", max_bytes=-1), "INVALID_FIELD"),
    "an overflowing size": (put("a", max_bytes=2**63 - 1), "INVALID_FIELD"),
    "more than declared": (put("a", data=b"x" * 11), "INVALID_FIELD"),
    "no such bucket": (put("a", bucket="nowhere"), "NOT_FOUND"),
    "a range beyond the end": (
        lambda client: client.objects.GetObject(
            objects.GetObjectRequest(bucket="inbox", name="here", offset=99), metadata=METADATA
        ).read(),
        "INVALID_FIELD",
    ),
    # Vectors.
    "a space of another dimension": (upsert("space:4", [1.0, 2.0, 3.0]), "SPACE_MISMATCH"),
    "simulated among genuine": (
        upsert("space:4", [1.0, 2.0, 3.0, 4.0], simulated=True),
        "SPACE_MISMATCH",
    ),
    "not a number": (upsert("space:4", [float("nan"), 2.0, 3.0, 4.0]), "INVALID_FIELD"),
    "no such space": (upsert("space:none", [1.0]), "NOT_FOUND"),
    # The corpus.
    "a document id with a slash": (
        lambda client: client.corpus.AddDocument(
            corpus.AddDocumentRequest(document_id="a/../b", content=b"text"), metadata=METADATA
        ),
        "INVALID_FIELD",
    ),
    "a document without bytes": (
        lambda client: client.corpus.AddDocument(
            corpus.AddDocumentRequest(document_id="a"), metadata=METADATA
        ),
        "INVALID_FIELD",
    ),
    "no such document": (
        lambda client: client.corpus.GetDocument(
            corpus.GetDocumentRequest(document_id="none"), metadata=METADATA
        ),
        "NOT_FOUND",
    ),
    "an empty question": (
        lambda client: client.corpus.Search(corpus.SearchRequest(query=" "), metadata=METADATA),
        "INVALID_FIELD",
    ),
    "a page token of nobody's": (
        lambda client: client.corpus.ListDocuments(
            corpus.ListDocumentsRequest(page_token="????"), metadata=METADATA
        ),
        "INVALID_FIELD",
    ),
    # The gate.
    "no mode": (
        lambda client: client.router.SetMode(
            router.SetModeRequest(service="parser"), metadata=METADATA
        ),
        "INVALID_FIELD",
    ),
    "a mode that is none": (
        lambda client: client.router.SetMode(
            router.SetModeRequest(service="parser", mode=77),  # type: ignore[arg-type]
            metadata=METADATA,
        ),
        "INVALID_FIELD",
    ),
    "a mode of no service": (
        lambda client: client.router.SetMode(
            router.SetModeRequest(service="kitchen", mode=router.MODE_MOCK), metadata=METADATA
        ),
        "INVALID_FIELD",
    ),
    "a mode that callers may not choose": (
        embed("text", metadata=(*METADATA, ("tollgate-mode", "HYBRID"))),
        "MODE_FORBIDDEN",
    ),
    "a mode in metadata that is none": (
        embed("text", metadata=(*METADATA, ("tollgate-mode", "WISHFUL"))),
        "INVALID_FIELD",
    ),
    "an empty tenant": (embed("text", metadata=(("tollgate-tenant", ""),)), "INVALID_FIELD"),
    "an over-long request id": (
        embed("text", metadata=(*METADATA, ("tollgate-request-id", "r" * 129))),
        "INVALID_FIELD",
    ),
    "an identity that nobody signed": (
        embed("text", metadata=(*METADATA, ("tollgate-identity", "forged.forged"))),
        "UNAUTHENTICATED",
    ),
}


def reason_of(error: grpc.aio.AioRpcError) -> str:
    """The reason in the ErrorInfo that every error carries."""
    status = rpc_status.from_call(error)
    assert status is not None, error
    info = error_details_pb2.ErrorInfo()
    assert status.details[0].Unpack(info)
    assert info.domain == "tollgate"
    return info.reason


@pytest.fixture
async def ready(client: Client) -> Client:
    """A client for whom there is a bucket with an object, and a space."""
    create = objects.CreateBucketRequest(bucket="inbox")
    await client.objects.CreateBucket(create, metadata=METADATA)
    await put("here")(client)
    space = vectors.Space(id="space:4", dimensions=4, provider="p", model="m")
    await client.vectors.EnsureSpace(vectors.EnsureSpaceRequest(space=space), metadata=METADATA)
    return client


async def test_bad_input_is_a_typed_error_and_holds_nothing(running: Mesh, ready: Client) -> None:
    """Each bad call gets its own reason; after all of them the mesh serves and nothing is held."""
    told: dict[str, str] = {}
    for name, (act, _) in BAD.items():
        try:
            await act(ready)
            told[name] = "nothing"
        except grpc.aio.AioRpcError as error:
            told[name] = reason_of(error)
    assert told == {name: reason for name, (_, reason) in BAD.items()}

    nested = await parse(NESTED, "a.html")(ready)
    assert "deep" in "".join(event.page.text for event in nested)
    assert (await embed("good")(ready)).provenance.provider == "minilm"
    assert await until_nothing_is_held(running, ready, TENANT) == []


async def test_bad_amounts_are_refused_by_the_ledger(running: Mesh, client: Client) -> None:
    """Negative and overflowing amounts, and ids that are none, hold nothing."""
    identity = running.identity(TENANT)
    scope = usage.Scope(tenant=TENANT, service="embedder", provider="mock", model="mock-384")
    bounds = [{"tokens": -1}, {"tokens": 2**63 - 1}, {"pages": -(2**63)}]
    good = {
        "hold_id": "6ba7b810-9dad-11d1-80b4-00c04fd430c8",
        "scope": scope,
        "operation": "tollgate.embedder.v1.EmbedderService/Embed",
    }
    requests = [cost.AuthorizeRequest(**good, bound=usage.Usage(**bound)) for bound in bounds]
    requests.append(cost.AuthorizeRequest(**good | {"hold_id": "one"}))
    requests.append(cost.AuthorizeRequest(**good | {"scope": usage.Scope(tenant=TENANT)}))
    for request in requests:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await client.cost.Authorize(request, metadata=identity)
        assert reason_of(caught.value) == "INVALID_FIELD"
    assert await until_nothing_is_held(running, client, TENANT) == []


async def until_nothing_is_held(mesh: Mesh, client: Client, tenant: str) -> list[Any]:
    """What is still held of a tenant's, after the settlements under way have had their time."""
    request = cost.ListHoldsRequest(tenant=tenant, state=cost.HOLD_STATE_HELD)
    for _ in range(40):
        held = await client.cost.ListHolds(request, metadata=mesh.identity(tenant))
        if not held.holds:
            break
        await asyncio.sleep(0.1)
    return list(held.holds)
