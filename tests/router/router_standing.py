"""What the router's tests call: the gate as a client sees it, its ledger, and a faulty backend."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import grpc
from google.protobuf.message import Message
from tollgate.cost.v1 import (
    cost_pb2,
    cost_pb2_grpc,
    limit_pb2,
    limit_pb2_grpc,
    price_pb2,
    price_pb2_grpc,
    usage_pb2,
)
from tollgate.embedder.v1 import embedder_pb2, embedder_pb2_grpc
from tollgate.router.v1 import answer_pb2, router_pb2, router_pb2_grpc

from chassis.answer import stamp
from chassis.call import IDENTITY, PROVENANCE, RECEIPT, TENANT, Call, current
from chassis.errors import TollgateError
from chassis.identity import sign
from chassis.server import Daemon
from chassis.settings import MeshSettings
from chassis.status import from_rpc_error

EMBED = "tollgate.embedder.v1.EmbedderService/Embed"
MODEL, SPACE = "all-MiniLM-L6-v2", "genuine:fickle:384"
TOKEN_NANOS = 20

Context = grpc.aio.ServicerContext[Any, Any]
Behaviour = Callable[[embedder_pb2.EmbedRequest, Context], Awaitable[embedder_pb2.EmbedResponse]]


class Fickle(embedder_pb2_grpc.EmbedderServiceServicer):
    """A backend of one model that embeds as `behaviour` says, and remembers who asked."""

    daemon: Daemon

    def __init__(self) -> None:
        self.behaviour: Behaviour = well
        self.asked: list[Call] = []

    async def Embed(
        self, request: embedder_pb2.EmbedRequest, context: Context
    ) -> embedder_pb2.EmbedResponse:
        self.asked.append(current())
        return await self.behaviour(request, context)

    async def ListModels(
        self, request: embedder_pb2.ListModelsRequest, context: Context
    ) -> embedder_pb2.ListModelsResponse:
        model = embedder_pb2.Model(
            name=MODEL,
            dimensions=384,
            tokens_max=256,
            tokenizer="words",
            space_id=SPACE,
            provider="fickle",
        )
        say(context, requests=1)
        return embedder_pb2.ListModelsResponse(models=[model])

    async def CountTokens(
        self, request: embedder_pb2.CountTokensRequest, context: Context
    ) -> embedder_pb2.CountTokensResponse:
        say(context, requests=1)
        return embedder_pb2.CountTokensResponse(tokens=[1 for _ in request.inputs])


def say(context: Context, provider: str = "fickle", **used: int) -> None:
    """Stamp an answer as an honest backend does."""
    provenance = answer_pb2.Provenance(provider=provider, model=MODEL, space_id=SPACE)
    stamp(context, usage=usage_pb2.Usage(**used), provenance=provenance)


async def well(request: embedder_pb2.EmbedRequest, context: Context) -> embedder_pb2.EmbedResponse:
    """Answer as one should."""
    say(context, tokens=sum(len(text.split()) for text in request.inputs), requests=1)
    vector = embedder_pb2.Vector(values=[1.0])
    return embedder_pb2.EmbedResponse(vectors=[vector], model=MODEL, space_id=SPACE)


def failing(error: TollgateError) -> Behaviour:
    """Raise an error of the family."""

    async def behave(
        request: embedder_pb2.EmbedRequest, context: Context
    ) -> embedder_pb2.EmbedResponse:
        raise error

    return behave


@asynccontextmanager
async def stand_in(
    mesh: MeshSettings, listen: str = "127.0.0.1:0"
) -> AsyncIterator[tuple[Fickle, str]]:
    """The faulty backend on a real server."""
    fickle = Fickle()
    daemon = fickle.daemon = Daemon("embedder", mesh, listen=listen)
    embedder_pb2_grpc.add_EmbedderServiceServicer_to_server(fickle, daemon.server)
    daemon.serves("tollgate.embedder.v1.EmbedderService", providers=["fickle"])
    async with daemon.serving():
        yield fickle, daemon.address


class Answered:
    """An answer, or an error, with what came in its trailers."""

    def __init__(self, answers: Sequence[Any], error: TollgateError | None, trailers: Any) -> None:
        self.answers, self.error = answers, error
        found = dict(trailers or ())
        self.trailers = found
        self.receipt = answer_pb2.Receipt.FromString(found.get(RECEIPT, b""))
        self.provenance = answer_pb2.Provenance.FromString(found.get(PROVENANCE, b""))

    @property
    def answer(self) -> Any:
        """The one answer; raises the error where there is none."""
        if self.error is not None:
            raise self.error
        (answer,) = self.answers
        return answer


class Standing:
    """A client of the gate, and an operator beside it."""

    def __init__(self, mesh: MeshSettings, address: str, fickle: Fickle) -> None:
        self.mesh, self.address, self.fickle = mesh, address, fickle
        self.channel = grpc.aio.insecure_channel(address)
        self.ledger_channel = grpc.aio.insecure_channel(mesh.cost_address)
        self.router = router_pb2_grpc.RouterServiceStub(self.channel)
        self.ledger = cost_pb2_grpc.CostServiceStub(self.ledger_channel)

    async def close(self) -> None:
        await self.channel.close()
        await self.ledger_channel.close()

    def identity(self, tenant: str = "acme") -> tuple[tuple[str, str], ...]:
        """The metadata of an operator of the mesh."""
        return ((IDENTITY, sign(Call(tenant, request_id="operator"), self.mesh.secret)),)

    async def ready(self) -> None:
        """Wait until every backend is seen."""
        for _ in range(200):
            listed = await self.router.ListBackends(
                router_pb2.ListBackendsRequest(), metadata=self.identity()
            )
            if all(b.health == router_pb2.BACKEND_HEALTH_SERVING for b in listed.backends):
                break
            await asyncio.sleep(0.05)
        else:
            raise AssertionError("a backend is not seen")

    async def price(self, provider: str, nanos_usd_per_million: int) -> None:
        """Set the price of a provider's tokens."""
        prices = price_pb2_grpc.PriceServiceStub(self.ledger_channel)
        unit_price = price_pb2.UnitPrice(
            unit=price_pb2.UNIT_TOKENS, nanos_usd_per_million=nanos_usd_per_million
        )
        price = price_pb2.Price(
            provider=provider, model="*", operation="*", unit_price=unit_price, source="a test"
        )
        await prices.SetPrice(price_pb2.SetPriceRequest(price=price), metadata=self.identity())

    async def limit(self, id_: str, **content: Any) -> None:
        """Set a hard limit on the tenant's tokens, genuine ones unless told."""
        limits = limit_pb2_grpc.LimitServiceStub(self.ledger_channel)
        tenant = limit_pb2.Dimension(match=limit_pb2.MATCH_EXACT, value="acme")
        limit = limit_pb2.Limit(
            id=id_,
            display_name=f"the limit {id_}",
            scope=limit_pb2.LimitScope(tenant=tenant),
            metric=limit_pb2.METRIC_TOKENS,
            enforcement=limit_pb2.ENFORCEMENT_HARD,
            **content,
        )
        await limits.CreateLimit(
            limit_pb2.CreateLimitRequest(limit=limit), metadata=self.identity()
        )

    async def embed(
        self, *inputs: str, metadata: Sequence[tuple[str, str]] = (), **fields: Any
    ) -> Answered:
        """Embed through the gate, as the tenant `acme`."""
        fields = {"model": MODEL, "inputs": inputs or ("a short text",)} | fields
        request = embedder_pb2.EmbedRequest(**fields)
        return await self.call(EMBED, request, embedder_pb2.EmbedResponse, metadata)

    async def call(
        self,
        operation: str,
        request: Message | bytes,
        answer: type[Message],
        metadata: Sequence[tuple[str, str]] = (),
        timeout: float = 20,
    ) -> Answered:
        """One unary call through the gate, as the tenant `acme` unless told."""
        data = request if isinstance(request, bytes) else request.SerializeToString()
        call: Any = self.channel.unary_unary(f"/{operation}", None, answer.FromString)
        pairs = ((TENANT, "acme"), *metadata)
        return await answered(call(data, metadata=pairs, timeout=timeout))

    async def set_mode(self, mode: router_pb2.Mode.ValueType) -> None:
        """Switch the embedder's mode."""
        await self.router.SetMode(router_pb2.SetModeRequest(service="embedder", mode=mode))

    async def holds(self, tenant: str = "acme") -> list[cost_pb2.Hold]:
        """The tenant's holds, the newest first."""
        listed = await self.ledger.ListHolds(
            cost_pb2.ListHoldsRequest(tenant=tenant), metadata=self.identity(tenant)
        )
        return list(listed.holds)

    async def settled(self, *states: str, tenant: str = "acme") -> list[cost_pb2.Hold]:
        """The holds, once their states are these, the newest first: settling is off the path."""
        wanted = [cost_pb2.HoldState.Value(f"HOLD_STATE_{state}") for state in states]
        holds: list[cost_pb2.Hold] = []
        for _ in range(100):
            holds = await self.holds(tenant)
            if [hold.state for hold in holds] == wanted:
                return holds
            await asyncio.sleep(0.05)
        found = [cost_pb2.HoldState.Name(hold.state) for hold in holds]
        raise AssertionError(f"the holds are {found}")


async def answered(call: Any) -> Answered:
    """What became of a unary call."""
    try:
        answer = await call
    except grpc.aio.AioRpcError as error:
        return Answered((), from_rpc_error(error), error.trailing_metadata())
    return Answered((answer,), None, await call.trailing_metadata())


async def streamed(call: Any) -> Answered:
    """What became of a call with many answers."""
    answers = []
    try:
        async for answer in call:
            answers.append(answer)
    except grpc.aio.AioRpcError as error:
        return Answered(answers, from_rpc_error(error), error.trailing_metadata())
    return Answered(answers, None, await call.trailing_metadata())
