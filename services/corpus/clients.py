"""The other rooms as the corpus sees them: all through the router, at whose gate it pays."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Mapping, Sequence
from contextlib import aclosing
from typing import Any, TypeVar, cast

from google.protobuf.message import DecodeError
from tollgate.embedder.v1 import embedder_pb2, embedder_pb2_grpc
from tollgate.parser.v1 import parser_pb2, parser_pb2_grpc
from tollgate.router.v1 import answer_pb2
from tollgate.storage.v1 import object_pb2, object_pb2_grpc, vector_pb2, vector_pb2_grpc

from chassis.call import PROVENANCE, RECEIPT, current
from chassis.client import Peer, Stream
from chassis.errors import (
    Internal,
    NotFound,
    OutcomeUnknown,
    ProviderUnavailable,
    SpaceMismatch,
)
from services.corpus.core import (
    Components,
    Embedded,
    Inspected,
    Near,
    Parsed,
    ParsedPage,
    ParseEvent,
    ParseProgress,
    Provenance,
    Source,
    Space,
    Stored,
    StoredVector,
    Ticket,
)

log = logging.getLogger(__name__)

PUT_BYTES = 512 << 10
OBJECTS_MAX = 1_000

_FREE_S = 30.0
_OBJECT_S = 300.0
_PARSE_S = 900.0
_EMBED_S = 120.0

T = TypeVar("T")


class Router:
    """The router, and what is known of it for longer than one job."""

    def __init__(self, peer: Peer) -> None:
        self.peer = peer
        self.parser = parser_pb2_grpc.ParserServiceStub(peer.channel)
        self.embedder = embedder_pb2_grpc.EmbedderServiceStub(peer.channel)
        self.objects = object_pb2_grpc.ObjectServiceStub(peer.channel)
        self.vectors = vector_pb2_grpc.VectorServiceStub(peer.channel)
        self.buckets: set[tuple[str, str]] = set()
        self.spaces: set[tuple[str, str]] = set()

    def gate(self) -> RouterGate:
        """The router for one job or call, whose charges it adds up."""
        return RouterGate(self)


class RouterGate:
    """Implements `core.Gate`."""

    def __init__(self, router: Router) -> None:
        self._router = router
        self._peer = router.peer
        self._charged_nanos_usd = 0

    def take_charge(self) -> int:
        """The nano-dollars that the receipts said since this was last asked."""
        charged, self._charged_nanos_usd = self._charged_nanos_usd, 0
        return charged

    # --- objects -------------------------------------------------------------------------------

    async def put(self, source: Source, content: bytes, media_type: str) -> None:
        """Store bytes under a name; the bucket is made where it is missing."""
        await self._ensure_bucket(source.bucket)
        try:
            await self._put(source, content, media_type)
        except NotFound:
            self._router.buckets.clear()
            await self._ensure_bucket(source.bucket)
            await self._put(source, content, media_type)

    async def _put(self, source: Source, content: bytes, media_type: str) -> None:
        async def parts() -> AsyncIterator[object_pb2.PutObjectRequest]:
            yield object_pb2.PutObjectRequest(
                header=object_pb2.PutObjectHeader(
                    bucket=source.bucket,
                    name=source.name,
                    max_bytes=len(content),
                    content_type=media_type,
                )
            )
            for at in range(0, len(content), PUT_BYTES):
                yield object_pb2.PutObjectRequest(data=content[at : at + PUT_BYTES])

        self._bill(
            await _free(
                self._peer.upload(self._router.objects.PutObject, parts(), timeout_s=_OBJECT_S)
            )
        )

    async def _ensure_bucket(self, bucket: str) -> None:
        key = current().tenant, bucket
        if key not in self._router.buckets:
            request = object_pb2.CreateBucketRequest(bucket=bucket)
            await self._free(self._router.objects.CreateBucket, request)
            self._router.buckets.add(key)

    async def stat(self, source: Source) -> Stored:
        """What a caller's own object is. Raises NotFound."""
        answer = await self._free(
            self._router.objects.StatObject,
            object_pb2.StatObjectRequest(bucket=source.bucket, name=source.name),
        )
        stored = answer.object
        return Stored(stored.size_bytes, stored.sha256, stored.content_type)

    async def delete_objects(self, sources: Sequence[Source]) -> None:
        """Delete objects; those that are gone already are no fault."""
        for bucket in sorted({source.bucket for source in sources}):
            names = [source.name for source in sources if source.bucket == bucket]
            for at in range(0, len(names), OBJECTS_MAX):
                request = object_pb2.DeleteObjectsRequest(
                    bucket=bucket, names=names[at : at + OBJECTS_MAX]
                )
                try:
                    await self._free(self._router.objects.DeleteObjects, request)
                except NotFound:
                    break

    # --- parsing -------------------------------------------------------------------------------

    async def inspect(self, source: Source, file_name: str, media_type: str) -> Inspected:
        """Look at a document without parsing it."""
        answer = await self._free(
            self._router.parser.Inspect,
            parser_pb2.InspectRequest(document=_document(source, file_name, media_type)),
        )
        pages = answer.page_count if answer.HasField("page_count") else None
        return Inspected(answer.media_type, pages, answer.encrypted)

    async def parse(
        self, source: Source, file_name: str, media_type: str, *, pages_max: int, call_id: str
    ) -> AsyncIterator[ParseEvent]:
        """Parse a document; the last event is Parsed."""
        stream = self._peer.stream(
            self._router.parser.Parse,
            parser_pb2.ParseRequest(
                document=_document(source, file_name, media_type), max_pages=pages_max
            ),
            timeout_s=_PARSE_S,
            call_id=call_id,
        )
        summary: parser_pb2.Summary | None = None
        try:
            async with aclosing(cast(Any, aiter(stream))) as events:
                async for event in events:
                    if event.HasField("page"):
                        yield _page(event.page)
                    elif event.HasField("progress"):
                        yield ParseProgress(event.progress.pages_done, event.progress.pages_total)
                    elif event.HasField("summary"):
                        summary = event.summary
        finally:
            self._charged_nanos_usd += _trailer(
                stream, RECEIPT, answer_pb2.Receipt()
            ).expected_nanos_usd
        if summary is not None:
            provenance = _trailer(stream, PROVENANCE, answer_pb2.Provenance())
            yield Parsed(summary.media_type, summary.sha256, _provenance(provenance))

    # --- embedding -----------------------------------------------------------------------------

    async def space(self, model: str) -> Space:
        """The model's space at the backend that would serve it now. Raises NotFound.

        A mock that only stands in for a genuine backend is no answer: UNAVAILABLE.
        """
        answer = await self._free(
            self._router.embedder.ListModels, embedder_pb2.ListModelsRequest()
        )
        if answer.provenance.simulated and answer.provenance.fell_back_from:
            # Documents and questions in the mock's space would never meet those of the genuine one.
            raise ProviderUnavailable("no genuine embedder can serve now; its space is waited for")
        for found in answer.models:
            if found.name == model:
                return Space(
                    found.space_id, found.dimensions, found.simulated, found.provider, found.name
                )
        raise NotFound(f"no embedder in use has the model {model!r}")

    async def embed(
        self, space: Space, texts: Sequence[str], *, call_id: str = "", query: bool = False
    ) -> Embedded:
        """Embed texts in this space and no other."""
        answer = await self._peer.unary(
            self._router.embedder.Embed,
            embedder_pb2.EmbedRequest(
                model=space.model,
                space_id=space.id,
                inputs=texts,
                input_type=embedder_pb2.INPUT_TYPE_QUERY
                if query
                else embedder_pb2.INPUT_TYPE_PASSAGE,
                # A chunk is within the limit as its own tokenizer counts; another model of the
                # same name, a mock for one, may count otherwise, and that is no reason to fail.
                truncate=True,
            ),
            timeout_s=_EMBED_S,
            call_id=call_id,
        )
        self._bill(answer)
        if answer.space_id != space.id:
            raise SpaceMismatch("the embedder answered vectors of another space")
        if len(answer.vectors) != len(texts):
            raise Internal()
        return Embedded([v.values for v in answer.vectors], _provenance(answer.provenance))

    # --- vectors -------------------------------------------------------------------------------

    async def ensure_space(self, space: Space) -> None:
        """Make sure that storage has the space."""
        key = current().tenant, space.id
        if key in self._router.spaces:
            return
        await self._free(
            self._router.vectors.EnsureSpace,
            vector_pb2.EnsureSpaceRequest(
                space=vector_pb2.Space(
                    id=space.id,
                    dimensions=space.dimensions,
                    simulated=space.simulated,
                    provider=space.provider,
                    model=space.model,
                )
            ),
        )
        self._router.spaces.add(key)

    async def lookup(self, space: Space, sha256s: Sequence[bytes]) -> dict[bytes, Components]:
        """The vectors of texts that were embedded in this space before, by hash."""
        answer = await self._in_space(
            self._free(
                self._router.vectors.LookupVectors,
                vector_pb2.LookupVectorsRequest(space_id=space.id, text_sha256s=sha256s),
            )
        )
        return {vector.text_sha256: vector.values for vector in answer.vectors}

    async def upsert(
        self,
        space: Space,
        ticket: Ticket,
        vectors: Sequence[StoredVector],
        metadata: Mapping[str, str],
    ) -> None:
        """Write vectors of a revision that no search sees yet."""
        request = vector_pb2.UpsertVectorsRequest(
            space_id=space.id,
            collection=ticket.collection,
            document_id=ticket.uid,
            revision=ticket.revision,
            simulated=space.simulated,
            vectors=[
                vector_pb2.Vector(
                    id=vector.id,
                    values=vector.components,
                    text_sha256=vector.text_sha256,
                    metadata=metadata,
                )
                for vector in vectors
            ],
        )
        await self._in_space(self._free(self._router.vectors.UpsertVectors, request))

    async def activate(self, space: Space, ticket: Ticket) -> None:
        """Make a revision the one that searches see."""
        await self._in_space(
            self._free(
                self._router.vectors.ActivateRevision,
                vector_pb2.ActivateRevisionRequest(
                    space_id=space.id,
                    collection=ticket.collection,
                    document_id=ticket.uid,
                    revision=ticket.revision,
                ),
            )
        )

    async def near(
        self,
        space: Space,
        collection: str,
        components: Components,
        *,
        limit: int,
        only: Mapping[str, str],
    ) -> list[Near]:
        """The nearest vectors. Raises NotFound where the space is not there yet."""
        answer = await self._free(
            self._router.vectors.SearchVectors,
            vector_pb2.SearchVectorsRequest(
                space_id=space.id,
                collection=collection,
                values=components,
                limit=limit,
                filter=only,
                simulated=space.simulated,
            ),
        )
        return [Near(hit.id, hit.document_id, hit.revision, hit.score) for hit in answer.hits]

    async def delete_vectors(self, ticket: Ticket, revision: int) -> int:
        """Delete the vectors of one revision, of every one where it is 0. Answers how many."""
        answer = await self._free(
            self._router.vectors.DeleteVectors,
            vector_pb2.DeleteVectorsRequest(
                collection=ticket.collection, document_id=ticket.uid, revision=revision
            ),
        )
        deleted: int = answer.deleted
        return deleted

    # --- how -----------------------------------------------------------------------------------

    async def _free(self, method: Any, request: Any) -> Any:
        """A call that may be repeated at will."""
        answer = await _free(self._peer.unary(method, request, timeout_s=_FREE_S))
        self._bill(answer)
        return answer

    async def _in_space(self, answer: Awaitable[T]) -> T:
        """Forget that a space is there when storage says that it is not, and try again later."""
        try:
            return await answer
        except NotFound:
            self._router.spaces.clear()
            raise ProviderUnavailable("storage does not have the space yet") from None

    def _bill(self, answer: Any) -> None:
        self._charged_nanos_usd += answer.receipt.expected_nanos_usd


async def _free(answer: Awaitable[T]) -> T:
    """The answer of a call that is safe to repeat: not to know its outcome costs nothing."""
    try:
        return await answer
    except OutcomeUnknown:
        raise ProviderUnavailable("the connection broke before the answer came") from None


def _document(source: Source, file_name: str, media_type: str) -> parser_pb2.Document:
    return parser_pb2.Document(
        object=parser_pb2.ObjectName(bucket=source.bucket, name=source.name),
        media_type=media_type,
        file_name=file_name,
    )


def _page(page: parser_pb2.Page) -> ParsedPage:
    """A page, empty where it has no text: its Markdown may then still have marks in it.

    PostgreSQL keeps no NUL.
    """
    return ParsedPage(page.number, page.markdown.replace("\0", "") if page.text.strip() else "")


Message = TypeVar("Message", answer_pb2.Receipt, answer_pb2.Provenance)


def _trailer(stream: Stream[Any], key: str, message: Message) -> Message:
    packed = stream.trailers.get(key, b"")
    try:
        message.ParseFromString(packed if isinstance(packed, bytes) else packed.encode())
    except DecodeError:
        log.warning("a trailer cannot be read", extra={"fields": {"key": key}})
    return message


def _provenance(provenance: answer_pb2.Provenance) -> Provenance:
    return Provenance(
        provider=provenance.provider,
        model=provenance.model,
        space_id=provenance.space_id,
        simulated=provenance.simulated,
        attempt=provenance.attempt,
        fell_back_from=tuple(provenance.fell_back_from),
        cached=provenance.cached,
    )
