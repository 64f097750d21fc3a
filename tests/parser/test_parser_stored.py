"""Documents that are stored objects: the parser reads them from a real storage daemon."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

import pytest
from tollgate.parser.v1 import parser_pb2 as pb
from tollgate.storage.v1 import object_pb2, object_pb2_grpc

from chassis.call import Call
from chassis.client import Peer
from chassis.errors import DocumentTooLarge, DocumentUnreadable, NotFound, Unavailable
from chassis.settings import MeshSettings
from services.parser.main import Settings, wire
from services.storage.main import Settings as StorageSettings
from services.storage.main import wire as wire_storage
from tests.parser import documents
from tests.parser.conftest import Caller

BUCKET = "papers"


class Stored:
    """A parser and the storage that it reads from."""

    def __init__(self, caller: Caller, storage: Peer) -> None:
        self.caller = caller
        self._storage = storage
        self._stub = object_pb2_grpc.ObjectServiceStub(storage.channel)

    async def put(self, name: str, content: bytes, content_type: str = "") -> pb.Document:
        """Store the bytes and name them as a document."""
        bucket = object_pb2.CreateBucketRequest(bucket=BUCKET)
        await self._storage.unary(self._stub.CreateBucket, bucket, timeout_s=10)

        async def parts() -> AsyncIterator[object_pb2.PutObjectRequest]:
            yield object_pb2.PutObjectRequest(
                header=object_pb2.PutObjectHeader(
                    bucket=BUCKET, name=name, max_bytes=len(content), content_type=content_type
                )
            )
            for start in range(0, len(content), documents.MIB):
                piece = content[start : start + documents.MIB]
                yield object_pb2.PutObjectRequest(data=piece)

        await self._storage.upload(self._stub.PutObject, parts(), timeout_s=30)
        return named(name)


def named(name: str) -> pb.Document:
    """The stored document of that name."""
    return pb.Document(object=pb.ObjectName(bucket=BUCKET, name=name))


Start = Callable[..., AbstractAsyncContextManager[Stored]]


@pytest.fixture
def start(mesh: MeshSettings, as_tenant: Call, tmp_path: Path) -> Start:
    """Starts storage and a parser with the given settings that reads from it."""

    @asynccontextmanager
    async def start(**settings: object) -> AsyncIterator[Stored]:
        own = StorageSettings(listen=f"unix:{tmp_path}/storage.sock")
        given = {"listen": f"unix:{tmp_path}/parser.sock", "local_workers": 1, **settings}
        async with wire_storage(mesh, own) as storage:
            reached = mesh.model_copy(update={"router_address": storage.address})
            async with wire(reached, Settings.model_validate(given)) as parser:
                to_storage, to_parser = Peer(storage.address, mesh), Peer(parser.address, mesh)
                try:
                    yield Stored(Caller(to_parser), to_storage)
                finally:
                    await to_parser.close()
                    await to_storage.close()

    return start


async def test_stored_documents_are_parsed(start: Start) -> None:
    """A stored document gives the same pages as its bytes, its name and type being hints."""
    async with start() as stored:
        content = documents.pdf([["One"], ["Two"]])
        document = await stored.put("reports/a.pdf", content)
        answer = await stored.caller.parse_document(document)
        assert [page.text for page in answer.pages] == ["One", "Two"]
        assert answer.events[-1].summary.sha256 == hashlib.sha256(content).digest()
        assert answer.usage.bytes == 0  # counted where it was read
        notes = await stored.put("notes.md", b"# Notes\n\nof *today*")
        answer = await stored.caller.parse_document(notes)
        assert answer.events[-1].summary.media_type == "text/markdown"


async def test_stored_documents_may_be_larger_than_inline(start: Start) -> None:
    """A stored document of more than 32 MiB is read, up to the parser's own bound."""
    async with start(document_bytes_max=40 * documents.MIB) as stored:
        large = await stored.put("large.txt", b"line\n" * (7 * documents.MIB))
        inspected = await stored.caller.peer.unary(
            stored.caller.stub.Inspect, pb.InspectRequest(document=large), timeout_s=60
        )
        assert inspected.size_bytes == 35 * documents.MIB
        larger = await stored.put("larger.txt", b"line\n" * (9 * documents.MIB))
        with pytest.raises(DocumentTooLarge):
            await stored.caller.parse_document(larger)


async def test_missing_and_empty_objects_are_named(start: Start) -> None:
    """An object that is not there is NOT_FOUND, one without bytes is DOCUMENT_UNREADABLE."""
    async with start() as stored:
        empty = await stored.put("empty.pdf", b"")
        with pytest.raises(DocumentUnreadable):
            await stored.caller.parse_document(empty)
        with pytest.raises(NotFound):
            await stored.caller.parse_document(named("nothing.pdf"))


async def test_storage_out_of_reach_is_unavailable(
    mesh_without_database: MeshSettings, as_tenant: Call, tmp_path: Path
) -> None:
    """Without storage a stored document is UNAVAILABLE, and inline ones parse."""
    mesh = mesh_without_database.model_copy(
        update={"router_address": f"unix:{tmp_path}/nobody.sock"}
    )
    given = {"listen": f"unix:{tmp_path}/parser.sock", "local_workers": 1}
    async with wire(mesh, Settings.model_validate(given)) as parser:
        peer = Peer(parser.address, mesh)
        with pytest.raises(Unavailable):
            await Caller(peer).parse_document(named("a.pdf"))
        assert (await Caller(peer).parse(b"text")).pages
        await peer.close()
