"""The embedder on the wire: `tollgate.embedder.v1.EmbedderService` over `core.Embedder`."""

from __future__ import annotations

from collections.abc import Awaitable
from functools import lru_cache
from typing import Any

import grpc
from tollgate.cost.v1 import usage_pb2
from tollgate.embedder.v1 import embedder_pb2 as pb
from tollgate.embedder.v1 import embedder_pb2_grpc
from tollgate.router.v1 import answer_pb2

from chassis.answer import stamp
from chassis.call import current
from chassis.varint import varint
from services.embedder.core import Embedder, Model, Provider, Request, Vectors

# The tag of a length-delimited field 1: both of EmbedResponse.vectors and of Vector.values.
_FIELD_1 = b"\x0a"


class EmbedderService(embedder_pb2_grpc.EmbedderServiceServicer):
    """Texts into vectors. The provider is the one that the call names, or the first that can."""

    def __init__(self, embedder: Embedder) -> None:
        self._embedder = embedder

    async def Embed(
        self,
        request: pb.EmbedRequest,
        context: grpc.aio.ServicerContext[pb.EmbedRequest, Awaitable[pb.EmbedResponse]],
    ) -> pb.EmbedResponse:
        embedding = await self._embedder.embed(
            Request(
                model=request.model,
                texts=list(request.inputs),
                provider=current().provider,
                space_id=request.space_id,
                dimensions=request.dimensions,
                truncate=request.truncate,
            )
        )
        _stamp(
            context,
            usage_pb2.Usage(tokens=embedding.tokens, requests=1),
            embedding.provider,
            embedding.model,
        )
        answer = pb.EmbedResponse.FromString(packed(embedding.vectors))
        answer.model = embedding.model.name
        answer.space_id = embedding.model.space_id
        return answer

    async def ListModels(
        self,
        request: pb.ListModelsRequest,
        context: grpc.aio.ServicerContext[pb.ListModelsRequest, Awaitable[pb.ListModelsResponse]],
    ) -> pb.ListModelsResponse:
        found = self._embedder.models(current().provider)
        providers = {provider.name: provider for provider, _ in found}
        # Of several providers no one is where the answer came from.
        only = next(iter(providers.values())) if len(providers) == 1 else None
        _stamp(context, usage_pb2.Usage(requests=1), only)
        return pb.ListModelsResponse(models=[_model(*one) for one in found])

    async def CountTokens(
        self,
        request: pb.CountTokensRequest,
        context: grpc.aio.ServicerContext[pb.CountTokensRequest, Awaitable[pb.CountTokensResponse]],
    ) -> pb.CountTokensResponse:
        provider, model, tokens = await self._embedder.count(
            current().provider, request.model, request.inputs
        )
        _stamp(context, usage_pb2.Usage(requests=1), provider, model)
        return pb.CountTokensResponse(tokens=tokens)


def packed(vectors: Vectors) -> bytes:
    """Vectors as the serialized field `vectors` of EmbedResponse.

    Packed floats are little-endian float32, which is what the array holds: copying it is twenty
    times as fast as setting every component.
    """
    header = _header(vectors.shape[1])
    rows = vectors.astype("<f4", copy=False)
    return b"".join([part for row in rows for part in (header, row.tobytes())])


@lru_cache(maxsize=64)
def _header(dimensions: int) -> bytes:
    """What stands before the components of each vector: the tags and lengths of both fields."""
    values = dimensions * 4
    inner = _FIELD_1 + varint(values)
    return _FIELD_1 + varint(len(inner) + values) + inner


def _model(provider: Provider, model: Model) -> pb.Model:
    return pb.Model(
        name=model.name,
        dimensions=model.dimensions,
        tokens_max=model.tokens_max,
        tokenizer=model.tokenizer,
        space_id=model.space_id,
        provider=provider.name,
        simulated=provider.simulated,
    )


def _stamp(
    context: grpc.aio.ServicerContext[Any, Any],
    usage: usage_pb2.Usage,
    provider: Provider | None,
    model: Model | None = None,
) -> None:
    provenance = answer_pb2.Provenance()
    if provider is not None:
        provenance.provider = provider.name
        provenance.simulated = provider.simulated
    if model is not None:
        provenance.model = model.name
        provenance.space_id = model.space_id
    stamp(context, usage=usage, provenance=provenance)
