"""A caller of one tenant, over the wire, who keeps what the last answer said of itself."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from typing import Any

import grpc
from tollgate.cost.v1 import usage_pb2
from tollgate.router.v1 import answer_pb2
from tollgate.storage.v1 import object_pb2 as pb
from tollgate.storage.v1 import object_pb2_grpc, vector_pb2_grpc
from tollgate.storage.v1 import vector_pb2 as vpb

from chassis import call as calls
from chassis.call import Call
from chassis.client import channel
from chassis.identity import sign
from chassis.settings import MeshSettings
from chassis.status import from_rpc_error


class Caller:
    """What a test says to storage. Errors are those of the family, decoded from the wire."""

    def __init__(self, address: str, mesh: MeshSettings, tenant: str, provider: str) -> None:
        self.channel = channel(address, mesh)
        self.objects = object_pb2_grpc.ObjectServiceStub(self.channel)
        self.vectors = vector_pb2_grpc.VectorServiceStub(self.channel)
        self.provider = provider
        identity = sign(Call(tenant=tenant, request_id="request-1"), mesh.secret)
        self.metadata = ((calls.IDENTITY, identity), (calls.PROVIDER, provider))
        self.usage = usage_pb2.Usage()
        self.provenance = answer_pb2.Provenance()

    async def ask(self, method: Any, request: Any) -> Any:
        """One answer, to one request or to a stream of them."""
        call = method(request, metadata=self.metadata, timeout=30)
        try:
            answer = await call
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from None
        await self._read_trailers(call)
        return answer

    async def put(
        self, name: str, *chunks: bytes, bucket: str = "docs", **header: Any
    ) -> pb.Object:
        header = {"max_bytes": sum(map(len, chunks)), **header}
        first = pb.PutObjectRequest(header=pb.PutObjectHeader(bucket=bucket, name=name, **header))
        answer = await self.upload(first, *(pb.PutObjectRequest(data=chunk) for chunk in chunks))
        stored: pb.Object = answer.object
        return stored

    async def upload(self, *requests: pb.PutObjectRequest) -> pb.PutObjectResponse:
        answer: pb.PutObjectResponse = await self.ask(self.objects.PutObject, _each(requests))
        return answer

    async def get(
        self, name: str, *, bucket: str = "docs", **options: Any
    ) -> tuple[pb.Object, list[bytes]]:
        request = pb.GetObjectRequest(bucket=bucket, name=name, **options)
        call = self.objects.GetObject(request, metadata=self.metadata, timeout=30)
        try:
            first, *rest = [message async for message in call]
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from None
        await self._read_trailers(call)
        return first.object, [message.data for message in rest]

    async def read(self, name: str, **options: Any) -> bytes:
        return b"".join((await self.get(name, **options))[1])

    async def bucket(self, name: str = "docs") -> None:
        await self.ask(self.objects.CreateBucket, pb.CreateBucketRequest(bucket=name))

    async def names(self, bucket: str = "docs", **options: Any) -> list[str]:
        request = pb.ListObjectsRequest(bucket=bucket, **options)
        answer = await self.ask(self.objects.ListObjects, request)
        return [found.name for found in answer.objects]

    async def space(self, space_id: str = "s", dimensions: int = 3, **other: Any) -> None:
        space = vpb.Space(
            id=space_id,
            dimensions=dimensions,
            **{"provider": "minilm", "model": "m", **other},
        )
        await self.ask(self.vectors.EnsureSpace, vpb.EnsureSpaceRequest(space=space))

    async def upsert(
        self,
        document: str,
        revision: int,
        vectors: Iterable[vpb.Vector],
        *,
        collection: str = "c",
        space: str = "s",
        simulated: bool = False,
    ) -> int:
        request = vpb.UpsertVectorsRequest(
            space_id=space,
            collection=collection,
            document_id=document,
            revision=revision,
            vectors=vectors,
            simulated=simulated,
        )
        answer: vpb.UpsertVectorsResponse = await self.ask(self.vectors.UpsertVectors, request)
        return answer.upserted

    async def activate(
        self, document: str, revision: int, *, collection: str = "c", space: str = "s"
    ) -> int:
        request = vpb.ActivateRevisionRequest(
            space_id=space, collection=collection, document_id=document, revision=revision
        )
        answer: vpb.ActivateRevisionResponse = await self.ask(
            self.vectors.ActivateRevision, request
        )
        return answer.vectors

    async def search(
        self, values: Iterable[float], *, collection: str = "c", space: str = "s", **other: Any
    ) -> list[vpb.VectorHit]:
        request = vpb.SearchVectorsRequest(
            space_id=space, collection=collection, values=values, **other
        )
        answer: vpb.SearchVectorsResponse = await self.ask(self.vectors.SearchVectors, request)
        return list(answer.hits)

    async def delete_vectors(self, document: str, revision: int = 0, collection: str = "c") -> int:
        request = vpb.DeleteVectorsRequest(
            collection=collection, document_id=document, revision=revision
        )
        answer: vpb.DeleteVectorsResponse = await self.ask(self.vectors.DeleteVectors, request)
        return answer.deleted

    async def _read_trailers(self, call: Any) -> None:
        trailers = dict(await call.trailing_metadata())
        self.usage = usage_pb2.Usage.FromString(trailers[calls.USAGE])
        self.provenance = answer_pb2.Provenance.FromString(trailers[calls.PROVENANCE])


@asynccontextmanager
async def calling_as(
    address: str, mesh: MeshSettings, tenant: str = "acme", provider: str = ""
) -> AsyncIterator[Caller]:
    """A caller whose connection ends with the context."""
    caller = Caller(address, mesh, tenant, provider)
    try:
        yield caller
    finally:
        await caller.channel.close()


def vector(vector_id: str, values: Iterable[float], text: str = "", **metadata: str) -> vpb.Vector:
    """A vector that stands for a text, its id where none is given."""
    digest = hashlib.sha256((text or vector_id).encode()).digest()
    return vpb.Vector(id=vector_id, values=values, text_sha256=digest, metadata=metadata)


async def _each(requests: Iterable[pb.PutObjectRequest]) -> AsyncIterator[pb.PutObjectRequest]:
    for request in requests:
        yield request
