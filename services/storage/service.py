"""Storage on the wire: ObjectService over `core.Objects`, VectorService over `vectors.Vectors`.

The provider of a call is the one that its metadata names, else the service's default.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Sequence
from typing import Any, TypeVar

import grpc
import numpy as np
from google.protobuf.timestamp_pb2 import Timestamp
from tollgate.cost.v1 import usage_pb2
from tollgate.router.v1 import answer_pb2
from tollgate.storage.v1 import object_pb2 as pb
from tollgate.storage.v1 import object_pb2_grpc, vector_pb2_grpc
from tollgate.storage.v1 import vector_pb2 as vpb

from chassis.answer import stamp
from chassis.call import PROVIDER, current
from chassis.errors import InvalidField
from services.storage import core, vectors
from services.storage.provider import Provider

Context = grpc.aio.ServicerContext[Any, Any]
Rules = TypeVar("Rules")


class ObjectService(object_pb2_grpc.ObjectServiceServicer):
    """Objects in buckets."""

    def __init__(self, providers: Sequence[Provider]) -> None:
        """The first of the providers is the default."""
        self._providers = [(p, p.objects) for p in providers if p.objects is not None]

    async def CreateBucket(
        self, request: pb.CreateBucketRequest, context: Context
    ) -> pb.CreateBucketResponse:
        objects = self._chosen(context)
        bucket = await objects.create_bucket(current().tenant, request.bucket)
        return pb.CreateBucketResponse(bucket=_bucket(bucket))

    async def ListBuckets(
        self, request: pb.ListBucketsRequest, context: Context
    ) -> pb.ListBucketsResponse:
        objects = self._chosen(context)
        found, token = await objects.list_buckets(
            current().tenant, request.page_size, request.page_token
        )
        return pb.ListBucketsResponse(buckets=map(_bucket, found), next_page_token=token)

    async def DeleteBucket(
        self, request: pb.DeleteBucketRequest, context: Context
    ) -> pb.DeleteBucketResponse:
        objects = self._chosen(context)
        await objects.delete_bucket(current().tenant, request.bucket)
        return pb.DeleteBucketResponse()

    async def PutObject(
        self, request_iterator: AsyncIterator[pb.PutObjectRequest], context: Context
    ) -> pb.PutObjectResponse:
        provider, objects = _choose(self._providers)
        header = await _header(request_iterator)
        stored = await objects.put(current().tenant, header, _data(request_iterator))
        _stamp(context, provider, transferred=stored.size_bytes)
        return pb.PutObjectResponse(object=_object(stored))

    async def GetObject(
        self, request: pb.GetObjectRequest, context: Context
    ) -> AsyncIterator[pb.GetObjectResponse]:
        provider, objects = _choose(self._providers)
        download = await objects.get(
            current().tenant,
            core.Place(request.bucket, request.name),
            offset=request.offset,
            limit=request.limit,
            if_etag=request.if_etag,
        )
        yield pb.GetObjectResponse(object=_object(download.object))
        async for chunk in download.chunks:
            yield pb.GetObjectResponse(data=chunk)
        _stamp(context, provider, transferred=download.size_bytes)

    async def StatObject(
        self, request: pb.StatObjectRequest, context: Context
    ) -> pb.StatObjectResponse:
        objects = self._chosen(context)
        found = await objects.stat(current().tenant, core.Place(request.bucket, request.name))
        return pb.StatObjectResponse(object=_object(found))

    async def ListObjects(
        self, request: pb.ListObjectsRequest, context: Context
    ) -> pb.ListObjectsResponse:
        objects = self._chosen(context)
        found, token = await objects.list_objects(
            current().tenant, request.bucket, request.prefix, request.page_size, request.page_token
        )
        return pb.ListObjectsResponse(objects=map(_object, found), next_page_token=token)

    async def CopyObject(
        self, request: pb.CopyObjectRequest, context: Context
    ) -> pb.CopyObjectResponse:
        objects = self._chosen(context)
        copied = await objects.copy(current().tenant, *_places(request))
        return pb.CopyObjectResponse(object=_object(copied))

    async def MoveObject(
        self, request: pb.MoveObjectRequest, context: Context
    ) -> pb.MoveObjectResponse:
        objects = self._chosen(context)
        moved = await objects.move(current().tenant, *_places(request))
        return pb.MoveObjectResponse(object=_object(moved))

    async def DeleteObjects(
        self, request: pb.DeleteObjectsRequest, context: Context
    ) -> pb.DeleteObjectsResponse:
        objects = self._chosen(context)
        deleted, missing = await objects.delete(current().tenant, request.bucket, request.names)
        return pb.DeleteObjectsResponse(deleted=deleted, missing=missing)

    def _chosen(self, context: Context) -> core.Objects:
        """The rules that serve this call, which moves no bytes; its answer is stamped with them."""
        provider, objects = _choose(self._providers)
        _stamp(context, provider)
        return objects


class VectorService(vector_pb2_grpc.VectorServiceServicer):
    """Vectors in spaces."""

    def __init__(self, providers: Sequence[Provider]) -> None:
        """The first of the providers is the default."""
        self._providers = [(p, p.vectors) for p in providers if p.vectors is not None]

    async def EnsureSpace(
        self, request: vpb.EnsureSpaceRequest, context: Context
    ) -> vpb.EnsureSpaceResponse:
        given = request.space
        rules = self._chosen(context, given.id)
        space = await rules.ensure_space(
            vectors.Space(given.id, given.dimensions, given.simulated, given.provider, given.model)
        )
        return vpb.EnsureSpaceResponse(
            space=vpb.Space(
                id=space.id,
                dimensions=space.dimensions,
                simulated=space.simulated,
                provider=space.provider,
                model=space.model,
            )
        )

    async def UpsertVectors(
        self, request: vpb.UpsertVectorsRequest, context: Context
    ) -> vpb.UpsertVectorsResponse:
        upserted = await self._chosen(context, request.space_id).upsert(
            current().tenant,
            request.space_id,
            vectors.Document(request.collection, request.document_id),
            request.revision,
            [
                vectors.Vector(v.id, _floats(v.values), v.text_sha256, dict(v.metadata))
                for v in request.vectors
            ],
            simulated=request.simulated,
        )
        return vpb.UpsertVectorsResponse(upserted=upserted)

    async def ActivateRevision(
        self, request: vpb.ActivateRevisionRequest, context: Context
    ) -> vpb.ActivateRevisionResponse:
        seen = await self._chosen(context, request.space_id).activate(
            current().tenant,
            request.space_id,
            vectors.Document(request.collection, request.document_id),
            request.revision,
        )
        return vpb.ActivateRevisionResponse(vectors=seen)

    async def SearchVectors(
        self, request: vpb.SearchVectorsRequest, context: Context
    ) -> vpb.SearchVectorsResponse:
        hits = await self._chosen(context, request.space_id).search(
            current().tenant,
            request.space_id,
            request.collection,
            _floats(request.values),
            limit=request.limit,
            filter=dict(request.filter),
            simulated=request.simulated,
        )
        return vpb.SearchVectorsResponse(
            hits=[
                vpb.VectorHit(
                    id=hit.id,
                    document_id=hit.document_id,
                    revision=hit.revision,
                    score=hit.score,
                    metadata=hit.metadata,
                )
                for hit in hits
            ]
        )

    async def LookupVectors(
        self, request: vpb.LookupVectorsRequest, context: Context
    ) -> vpb.LookupVectorsResponse:
        found = await self._chosen(context, request.space_id).lookup(
            current().tenant, request.space_id, request.text_sha256s
        )
        return vpb.LookupVectorsResponse(
            vectors=[vpb.Vector(text_sha256=key, values=half.tolist()) for key, half in found]
        )

    async def DeleteVectors(
        self, request: vpb.DeleteVectorsRequest, context: Context
    ) -> vpb.DeleteVectorsResponse:
        deleted = await self._chosen(context).delete(
            current().tenant,
            vectors.Document(request.collection, request.document_id),
            request.revision,
        )
        return vpb.DeleteVectorsResponse(deleted=deleted)

    def _chosen(self, context: Context, space_id: str = "") -> vectors.Vectors:
        """The rules that serve this call; its answer is stamped with their provider."""
        provider, rules = _choose(self._providers)
        _stamp(context, provider, space_id=space_id)
        return rules


def _choose(providers: Sequence[tuple[Provider, Rules]]) -> tuple[Provider, Rules]:
    """The provider that the call names, or the default."""
    named = current().provider
    for provider, rules in providers:
        if named in ("", provider.name):
            return provider, rules
    raise InvalidField.of(PROVIDER, f"must be {' or '.join(p.name for p, _ in providers)}")


def _stamp(
    context: Context, provider: Provider, *, transferred: int = 0, space_id: str = ""
) -> None:
    stamp(
        context,
        usage=usage_pb2.Usage(bytes=transferred, requests=1),
        provenance=answer_pb2.Provenance(
            provider=provider.name, simulated=provider.simulated, space_id=space_id
        ),
    )


async def _header(requests: AsyncIterator[pb.PutObjectRequest]) -> core.Header:
    """The first message of an upload."""
    async for request in requests:
        if request.WhichOneof("part") != "header":
            break
        header = request.header
        return core.Header(
            core.Place(header.bucket, header.name),
            header.max_bytes,
            header.content_type,
            dict(header.metadata),
            core.Condition(header.if_etag, header.if_absent),
        )
    raise InvalidField.of("header", "must come first")


async def _data(requests: AsyncIterator[pb.PutObjectRequest]) -> AsyncIterator[bytes]:
    """The bytes of an upload, after its header."""
    async for request in requests:
        if request.WhichOneof("part") != "data":
            raise InvalidField.of("data", "must be all that follows the header")
        yield request.data


def _places(
    request: pb.CopyObjectRequest | pb.MoveObjectRequest,
) -> tuple[core.Place, core.Place]:
    return (
        core.Place(request.bucket, request.name),
        core.Place(request.to_bucket or request.bucket, request.to_name),
    )


def _bucket(bucket: core.Bucket) -> pb.Bucket:
    created = Timestamp()
    created.FromDatetime(bucket.created_at)
    return pb.Bucket(name=bucket.name, create_time=created)


def _object(stored: core.Object) -> pb.Object:
    updated = Timestamp()
    updated.FromDatetime(stored.updated_at)
    return pb.Object(
        bucket=stored.place.bucket,
        name=stored.place.name,
        size_bytes=stored.size_bytes,
        content_type=stored.content_type,
        sha256=stored.sha256,
        metadata=stored.metadata,
        etag=stored.etag,
        update_time=updated,
    )


def _floats(values: Iterable[float]) -> Sequence[float]:
    array: Sequence[float] = np.fromiter(values, dtype=np.float32)  # type: ignore[assignment]  # an array is one in all that is asked of it
    return array
