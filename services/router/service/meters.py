"""Meters: the most that a call may use, from its request, before it is forwarded.

Every RPC that the gate serves has a line in `METERS`; one without is not served. A meter decodes
the request once, says what the call needs of a backend, and bounds it for the backend chosen, since
another backend may count otherwise. Bytes appended to a request are a merge (the last value of a
scalar wins): so the provider is bound by what was held.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

from google.protobuf import message_factory
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from google.protobuf.message import DecodeError, Message
from tollgate.corpus.v1 import corpus_pb2
from tollgate.embedder.v1 import embedder_pb2
from tollgate.parser.v1 import parser_pb2
from tollgate.storage.v1 import object_pb2, vector_pb2

from chassis.errors import DocumentEncrypted, InvalidField
from chassis.tokens import counted_tokens
from services.router.core.holds import UNITS_MAX, Units
from services.router.core.routes import NOTHING, Backend, Need

Request = TypeVar("Request", bound=Message)
Answer = TypeVar("Answer", bound=Message)

_ONE = Units(requests=1)


class Bound(NamedTuple):
    """The most that a call may use at a backend, and what to append to its request."""

    units: Units
    model: str = ""
    appended: bytes = b""


class Ask(Protocol):
    """Asks a backend itself, free and without a hold; `answer` is the class of its answer."""

    async def __call__(
        self, backend: Backend, method: str, request: Message, answer: type[Answer]
    ) -> Answer: ...


def _no_need(request: Any) -> Need:
    del request
    return NOTHING


@dataclass(frozen=True, slots=True)
class Meter(Generic[Request]):
    """How one RPC is bounded. `timeout_s` is the most time that a call of it is given."""

    bound: Callable[[Request, Backend, Ask], Awaitable[Bound]]
    need: Callable[[Request], Need] = _no_need
    timeout_s: float = 60.0


@dataclass(frozen=True, slots=True)
class Metered:
    """An RPC that the gate serves: its kinds from its descriptor, and its meter."""

    service: str
    """The room whose mode and limits apply."""
    grpc_service: str
    name: str
    operation: str
    """The full name: `package.Service/Method`."""
    request: type[Message]
    client_streaming: bool
    server_streaming: bool
    meter: Meter[Any]

    def decode(self, data: bytes) -> Message:
        """The request, or InvalidField where the bytes are none."""
        try:
            return self.request.FromString(data)
        except DecodeError:
            raise InvalidField.of("request", f"is no {self.request.DESCRIPTOR.name}") from None


async def _one_request(request: Message, backend: Backend, ask: Ask) -> Bound:
    """Free and short: counted as a request."""
    del request, backend, ask
    return Bound(_ONE)


# --- embedder --------------------------------------------------------------------------------


def _embedding_need(request: embedder_pb2.EmbedRequest) -> Need:
    if not request.model:
        raise InvalidField.of("model", "must name a model; ListModels has them")
    return Need(request.model, request.space_id)


async def _embedding(request: embedder_pb2.EmbedRequest, backend: Backend, ask: Ask) -> Bound:
    """Tokens by the model's own tokenizer; a text that may be cut counts as much as is left."""
    del ask
    model = (backend.models or {})[request.model]
    counts = await counted_tokens(model.tokenizer, request.inputs)
    if request.truncate:
        counts = [min(count, model.tokens_max) for count in counts]
    return Bound(Units(tokens=sum(counts), requests=1), request.model)


def _counting_need(request: embedder_pb2.CountTokensRequest) -> Need:
    if not request.model:
        raise InvalidField.of("model", "must name a model; ListModels has them")
    return Need(request.model)


async def _counting(request: embedder_pb2.CountTokensRequest, backend: Backend, ask: Ask) -> Bound:
    del backend, ask
    return Bound(_ONE, request.model)


# --- parser ----------------------------------------------------------------------------------


async def _parsing(request: parser_pb2.ParseRequest, backend: Backend, ask: Ask) -> Bound:
    """Pages: as many as the caller allows, else as many as there are.

    Bytes: those of an inline document; a stored one's are counted where the parser reads it.
    """
    if request.max_pages < 0:
        raise InvalidField.of("max_pages", "must not be negative")
    size_bytes = len(request.document.content)
    if request.max_pages:
        return Bound(Units(pages=request.max_pages, bytes=size_bytes, requests=1))
    inspect = parser_pb2.InspectRequest(document=request.document)
    found = await ask(backend, "Inspect", inspect, parser_pb2.InspectResponse)
    if found.encrypted:
        raise DocumentEncrypted("the document needs a password")
    if not found.HasField("page_count"):
        raise InvalidField.of("max_pages", "must be set: the document's format has no page count")
    # At least one: 0 would say that there is no bound.
    pages = max(found.page_count, 1)
    appended = parser_pb2.ParseRequest(max_pages=pages).SerializeToString()
    return Bound(Units(pages=pages, bytes=size_bytes, requests=1), appended=appended)


# --- objects ---------------------------------------------------------------------------------


async def _upload(request: object_pb2.PutObjectRequest, backend: Backend, ask: Ask) -> Bound:
    """Bytes: what the header declares. The gate refuses what goes beyond it."""
    del backend, ask
    if request.WhichOneof("part") != "header":
        raise InvalidField.of("header", "must be the first message")
    if request.header.max_bytes < 0:
        raise InvalidField.of("header.max_bytes", "must not be negative")
    return Bound(Units(bytes=request.header.max_bytes, requests=1))


async def _download(request: object_pb2.GetObjectRequest, backend: Backend, ask: Ask) -> Bound:
    """Bytes: the range asked for, else what the object has; the backend is held to it."""
    for name in ("offset", "limit"):
        if getattr(request, name) < 0:
            raise InvalidField.of(name, "must not be negative")
    if request.limit:
        return Bound(Units(bytes=request.limit, requests=1))
    stat = object_pb2.StatObjectRequest(bucket=request.bucket, name=request.name)
    found = await ask(backend, "StatObject", stat, object_pb2.StatObjectResponse)
    left = max(found.object.size_bytes - request.offset, 0)
    # An empty range has no limit to name: 0 would say that there is none.
    limit = object_pb2.GetObjectRequest(limit=left).SerializeToString() if left else b""
    return Bound(Units(bytes=left, requests=1), appended=limit)


def data_bytes(message: Message) -> int:
    """How many bytes of an object one message of an upload carries."""
    return len(message.data) if isinstance(message, object_pb2.PutObjectRequest) else 0


# --- the table -------------------------------------------------------------------------------

_FREE: Meter[Any] = Meter(_one_request)
_STREAM_S = 3_600.0

METERS: Mapping[str, Meter[Any]] = {
    "tollgate.embedder.v1.EmbedderService/Embed": Meter(_embedding, _embedding_need),
    "tollgate.embedder.v1.EmbedderService/CountTokens": Meter(_counting, _counting_need),
    "tollgate.embedder.v1.EmbedderService/ListModels": _FREE,
    "tollgate.parser.v1.ParserService/Parse": Meter(_parsing, timeout_s=900.0),
    "tollgate.parser.v1.ParserService/Inspect": _FREE,
    "tollgate.parser.v1.ParserService/ListProviders": _FREE,
    "tollgate.storage.v1.ObjectService/PutObject": Meter(_upload, timeout_s=_STREAM_S),
    "tollgate.storage.v1.ObjectService/GetObject": Meter(_download, timeout_s=_STREAM_S),
    "tollgate.storage.v1.ObjectService/CreateBucket": _FREE,
    "tollgate.storage.v1.ObjectService/ListBuckets": _FREE,
    "tollgate.storage.v1.ObjectService/DeleteBucket": _FREE,
    "tollgate.storage.v1.ObjectService/StatObject": _FREE,
    "tollgate.storage.v1.ObjectService/ListObjects": _FREE,
    "tollgate.storage.v1.ObjectService/CopyObject": _FREE,
    "tollgate.storage.v1.ObjectService/MoveObject": _FREE,
    "tollgate.storage.v1.ObjectService/DeleteObjects": _FREE,
    "tollgate.storage.v1.VectorService/EnsureSpace": _FREE,
    "tollgate.storage.v1.VectorService/UpsertVectors": _FREE,
    "tollgate.storage.v1.VectorService/ActivateRevision": _FREE,
    "tollgate.storage.v1.VectorService/SearchVectors": _FREE,
    "tollgate.storage.v1.VectorService/LookupVectors": _FREE,
    "tollgate.storage.v1.VectorService/DeleteVectors": _FREE,
    "tollgate.corpus.v1.CorpusService/AddDocument": _FREE,
    "tollgate.corpus.v1.CorpusService/GetDocument": _FREE,
    "tollgate.corpus.v1.CorpusService/ListDocuments": _FREE,
    "tollgate.corpus.v1.CorpusService/WatchDocument": Meter(_one_request, timeout_s=_STREAM_S),
    "tollgate.corpus.v1.CorpusService/DeleteDocument": _FREE,
    "tollgate.corpus.v1.CorpusService/Search": _FREE,
}

# Which room a fronted gRPC service belongs to.
FRONTED: Mapping[ServiceDescriptor, str] = {
    parser_pb2.DESCRIPTOR.services_by_name["ParserService"]: "parser",
    embedder_pb2.DESCRIPTOR.services_by_name["EmbedderService"]: "embedder",
    object_pb2.DESCRIPTOR.services_by_name["ObjectService"]: "storage",
    vector_pb2.DESCRIPTOR.services_by_name["VectorService"]: "storage",
    corpus_pb2.DESCRIPTOR.services_by_name["CorpusService"]: "corpus",
}


def metered(
    fronted: Mapping[ServiceDescriptor, str] = FRONTED, meters: Mapping[str, Meter[Any]] = METERS
) -> list[Metered]:
    """Every RPC of the fronted services that has a meter; the others are not served."""
    return [
        _metered(room, method, meters[operation])
        for service, room in fronted.items()
        for method in service.methods
        if (operation := f"{service.full_name}/{method.name}") in meters
    ]


def _metered(room: str, method: MethodDescriptor, meter: Meter[Any]) -> Metered:
    service: str = method.containing_service.full_name
    return Metered(
        service=room,
        grpc_service=service,
        name=method.name,
        operation=f"{service}/{method.name}",
        request=message_factory.GetMessageClass(method.input_type),
        client_streaming=method.client_streaming,
        server_streaming=method.server_streaming,
        meter=meter,
    )


def in_range(units: Units) -> bool:
    """Whether every unit is one that the ledger can hold."""
    return all(0 <= unit <= UNITS_MAX for unit in units)
