"""CorpusService on the wire."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import datetime
from typing import Any

import grpc
from google.protobuf.timestamp_pb2 import Timestamp
from tollgate.corpus.v1 import corpus_pb2 as pb
from tollgate.corpus.v1 import corpus_pb2_grpc
from tollgate.cost.v1 import usage_pb2
from tollgate.router.v1 import answer_pb2

from chassis import telemetry
from chassis.answer import stamp
from chassis.call import current
from chassis.errors import InvalidField
from services.corpus import core
from services.corpus.core import Source, State
from services.corpus.library import Library, Offer

Context = grpc.aio.ServicerContext[Any, Any]

PROVIDER = "corpus"

_STATES = {state: pb.DocumentState.Value(f"DOCUMENT_STATE_{state}") for state in State}
_BY_NUMBER = {number: state for state, number in _STATES.items()}


class CorpusService(corpus_pb2_grpc.CorpusServiceServicer):
    """Documents that can be searched."""

    def __init__(self, library: Library) -> None:
        self._library = library

    async def AddDocument(
        self, request: pb.AddDocumentRequest, context: Context
    ) -> pb.AddDocumentResponse:
        call = current()
        document = await self._library.add(
            call.tenant,
            _offer(request),
            project=call.project,
            request_id=call.request_id,
            traceparent=telemetry.traceparent(),
        )
        _stamp(context)
        return pb.AddDocumentResponse(document=_document(document))

    async def GetDocument(
        self, request: pb.GetDocumentRequest, context: Context
    ) -> pb.GetDocumentResponse:
        document = await self._library.get(current().tenant, *_name(request))
        _stamp(context)
        return pb.GetDocumentResponse(document=_document(document))

    async def ListDocuments(
        self, request: pb.ListDocumentsRequest, context: Context
    ) -> pb.ListDocumentsResponse:
        if request.state and request.state not in _BY_NUMBER:
            raise InvalidField.of("state", "is not a state of a document")
        documents, token = await self._library.newest(
            current().tenant,
            collection=core.checked_id("collection", request.collection)
            if request.collection
            else "",
            state=_BY_NUMBER.get(request.state),
            token=request.page_token,
            page_size=core.checked_count(
                "page_size",
                request.page_size,
                default=core.PAGE_SIZE,
                most=core.PAGE_SIZE_MAX,
            ),
        )
        _stamp(context)
        return pb.ListDocumentsResponse(documents=map(_document, documents), next_page_token=token)

    async def WatchDocument(
        self, request: pb.WatchDocumentRequest, context: Context
    ) -> AsyncIterator[pb.WatchDocumentResponse]:
        _stamp(context)
        async for document in self._library.watch(current().tenant, *_name(request)):
            yield pb.WatchDocumentResponse(document=_document(document))

    async def DeleteDocument(
        self, request: pb.DeleteDocumentRequest, context: Context
    ) -> pb.DeleteDocumentResponse:
        chunks, vectors = await self._library.delete(current().tenant, *_name(request))
        _stamp(context)
        return pb.DeleteDocumentResponse(chunks=chunks, vectors=vectors)

    async def Search(self, request: pb.SearchRequest, context: Context) -> pb.SearchResponse:
        found = await self._library.search(
            current().tenant,
            query=core.checked_query(request.query),
            collection=core.checked_collection(request.collection),
            limit=core.checked_count("limit", request.limit, default=core.HITS, most=core.HITS_MAX),
            only=core.checked_metadata("filter", request.filter),
        )
        _stamp(context, found.embedded_by)
        return pb.SearchResponse(hits=map(_hit, found.hits))


def _stamp(context: Context, embedded_by: core.Provenance | None = None) -> None:
    """The corpus's own part of a call is one request; what it asks others for they account for.

    An answer is as genuine as the embedding that it was found by.
    """
    by = embedded_by or core.Provenance()
    stamp(
        context,
        usage=usage_pb2.Usage(requests=1),
        provenance=answer_pb2.Provenance(
            provider=PROVIDER, model=by.model, space_id=by.space_id, simulated=by.simulated
        ),
    )


def _name(
    request: pb.GetDocumentRequest | pb.WatchDocumentRequest | pb.DeleteDocumentRequest,
) -> tuple[str, str]:
    return (
        core.checked_collection(request.collection),
        core.checked_id("document_id", request.document_id),
    )


def _offer(request: pb.AddDocumentRequest) -> Offer:
    source = request.WhichOneof("source")
    if source is None:
        raise InvalidField.of("source", "give the bytes, or the object that has them")
    if source == "object" and not (request.object.bucket and request.object.name):
        raise InvalidField.of("object", "must name a bucket and an object in it")
    return Offer(
        collection=core.checked_collection(request.collection),
        document_id=core.checked_id("document_id", request.document_id),
        file_name=core.checked_name("file_name", request.file_name),
        media_type=core.checked_name("media_type", request.media_type),
        metadata=core.checked_metadata("metadata", request.metadata),
        content=core.checked_content(request.content) if source == "content" else None,
        source=Source(request.object.bucket, request.object.name, owned=False)
        if source == "object"
        else None,
    )


def _document(document: core.Document) -> pb.Document:
    return pb.Document(
        id=document.document_id,
        collection=document.collection,
        file_name=document.file_name,
        media_type=document.media_type,
        size_bytes=document.size_bytes,
        sha256=document.sha256,
        revision=document.revision,
        state=_STATES[document.state],
        reason=document.reason,
        message=document.message,
        retry_time=_timestamp(document.retry_at),
        progress=pb.DocumentProgress(
            pages_done=document.pages_done,
            pages_total=document.pages_total,
            chunks_done=document.chunks_done,
            chunks_total=document.chunks_total,
        ),
        charged_nanos_usd=document.charged_nanos_usd,
        request_id=document.request_id,
        metadata=document.metadata,
        create_time=_timestamp(document.created_at),
        update_time=_timestamp(document.updated_at),
        parsed_by=_provenance(document.parsed_by),
        embedded_by=_provenance(document.embedded_by),
    )


def _hit(hit: core.Hit) -> pb.SearchHit:
    return pb.SearchHit(
        document_id=hit.document_id,
        file_name=hit.file_name,
        page=hit.page,
        page_end=hit.page_end,
        score=hit.score,
        text=hit.text,
        headings=hit.headings,
        provenance=_provenance(hit.provenance),
    )


def _provenance(provenance: core.Provenance | None) -> answer_pb2.Provenance | None:
    if provenance is None:
        return None
    return answer_pb2.Provenance(
        provider=provenance.provider,
        model=provenance.model,
        space_id=provenance.space_id,
        simulated=provenance.simulated,
        attempt=provenance.attempt,
        fell_back_from=provenance.fell_back_from,
        cached=provenance.cached,
    )


def _timestamp(at: datetime | None) -> Timestamp | None:
    if at is None:
        return None
    timestamp = Timestamp()
    timestamp.FromDatetime(at)
    return timestamp
