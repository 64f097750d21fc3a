"""A daemon and a peer over real gRPC: manners, identity, errors, deadlines, drain."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2
from grpc_status import rpc_status
from tollgate.embedder.v1 import embedder_pb2, embedder_pb2_grpc
from tollgate.parser.v1 import parser_pb2, parser_pb2_grpc

from chassis import errors
from chassis.call import IDENTITY, Call, calling, current, time_left_s
from chassis.client import Peer
from chassis.identity import sign, verify
from chassis.server import Daemon, StartError
from chassis.settings import MeshSettings

EMBEDDER = "tollgate.embedder.v1.EmbedderService"


class Room(embedder_pb2_grpc.EmbedderServiceServicer, parser_pb2_grpc.ParserServiceServicer):
    """A room whose answers are made of what the chassis says of the call."""

    def __init__(self) -> None:
        self.began = asyncio.Event()
        self.cancelled = asyncio.Event()

    async def Embed(self, request: Any, context: Any) -> Any:
        match request.model:
            case "broken":
                raise RuntimeError("postgresql://user:password@host/database")
            case "over":
                raise errors.BudgetExhausted(
                    "the budget is used up",
                    violations=[errors.Violation("daily", "1 over")],
                    retry_after_s=90.0,
                )
            case "slow":
                self.began.set()
                try:
                    await asyncio.sleep(30)
                except asyncio.CancelledError:
                    self.cancelled.set()
                    raise
            case "brief":
                self.began.set()
                await asyncio.sleep(0.3)
        left = time_left_s()
        return embedder_pb2.EmbedResponse(
            model=current().tenant, space_id=f"{current().request_id} {left is not None}"
        )

    async def Parse(self, request: Any, context: Any) -> AsyncIterator[Any]:
        yield parser_pb2.ParseResponse(progress=parser_pb2.Progress(pages_done=1))
        if request.max_pages:
            raise errors.InvalidField.of("max_pages", "must be 0 here")
        context.set_trailing_metadata((("tollgate-usage-bin", b"used"),))


@asynccontextmanager
async def serving(mesh: MeshSettings) -> AsyncIterator[tuple[Daemon, Room, Peer]]:
    daemon, room = Daemon("embedder", mesh, listen="127.0.0.1:0"), Room()
    embedder_pb2_grpc.add_EmbedderServiceServicer_to_server(room, daemon.server)
    parser_pb2_grpc.add_ParserServiceServicer_to_server(room, daemon.server)
    daemon.serves(EMBEDDER, providers=["mock"])
    async with daemon.serving():
        peer = Peer(daemon.address, mesh)
        try:
            yield daemon, room, peer
        finally:
            await peer.close()


def embed(peer: Peer, model: str = "", timeout_s: float = 5.0) -> Any:
    stub = embedder_pb2_grpc.EmbedderServiceStub(peer.channel)
    return peer.unary(stub.Embed, embedder_pb2.EmbedRequest(model=model), timeout_s=timeout_s)


async def test_identity_and_deadline_travel(mesh_without_database: MeshSettings) -> None:
    """The served side knows the tenant, the request and that there is a deadline."""
    async with serving(mesh_without_database) as (_, _, peer):
        with calling(Call(tenant="acme", request_id="r-1")):
            answer = await embed(peer)
    assert (answer.model, answer.space_id) == ("acme", "r-1 True")


async def test_no_identity_is_refused(mesh_without_database: MeshSettings) -> None:
    """A daemon behind the router refuses a call that no daemon signed."""
    async with serving(mesh_without_database) as (daemon, _, _):
        forged = sign(Call(tenant="acme"), b"another secret")
        async with grpc.aio.insecure_channel(daemon.address) as channel:
            stub = embedder_pb2_grpc.EmbedderServiceStub(channel)
            for metadata in ((), ((IDENTITY, forged),), ((IDENTITY, "é.x".encode().hex()),)):
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await stub.Embed(embedder_pb2.EmbedRequest(), metadata=metadata)
                assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED


async def test_errors_travel_whole(mesh_without_database: MeshSettings, as_tenant: Call) -> None:
    """An error arrives with its reason, violations and delay, and as details that anybody reads."""
    async with serving(mesh_without_database) as (daemon, _, peer):
        with pytest.raises(errors.BudgetExhausted) as typed:
            await embed(peer, "over")
        async with grpc.aio.insecure_channel(daemon.address) as channel:
            identity = sign(as_tenant, mesh_without_database.secret)
            with pytest.raises(grpc.aio.AioRpcError) as raw:
                await embedder_pb2_grpc.EmbedderServiceStub(channel).Embed(
                    embedder_pb2.EmbedRequest(model="over"), metadata=((IDENTITY, identity),)
                )
    assert typed.value.retry_after_s == 90.0
    assert typed.value.violations == (errors.Violation("daily", "1 over"),)
    status = rpc_status.from_call(raw.value)
    kinds = [detail.TypeName() for detail in status.details]
    assert kinds == ["google.rpc.ErrorInfo", "google.rpc.QuotaFailure", "google.rpc.RetryInfo"]
    info = error_details_pb2.ErrorInfo()
    status.details[0].Unpack(info)
    assert (info.domain, info.reason) == ("tollgate", "BUDGET_EXHAUSTED")


@pytest.mark.parametrize("reason", sorted(errors.BY_REASON))
async def test_every_reason_survives_the_wire(reason: str) -> None:
    """Each reason is a real status code, and comes back as the class that it was."""
    from chassis.status import from_rpc_error, rebuilt, to_grpc

    kind = errors.BY_REASON[reason]
    sent = rebuilt(kind, "text", [errors.Violation("a/b", "c")], 1.5, {"k": "v"}, kind.billed)
    status = to_grpc(sent)
    metadata = grpc.aio.Metadata(*status.trailing_metadata)
    back = from_rpc_error(
        grpc.aio.AioRpcError(status.code, grpc.aio.Metadata(), metadata, status.details)
    )
    assert type(back) is kind
    assert (back.message, back.retry_after_s, back.billed) == ("text", 1.5, kind.billed)
    assert back.metadata == {"k": "v"}


async def test_the_unexpected_says_nothing(
    mesh_without_database: MeshSettings, as_tenant: Call, caplog: pytest.LogCaptureFixture
) -> None:
    """A fault in our code is INTERNAL to the caller, whatever its text was."""
    async with serving(mesh_without_database) as (_, _, peer):
        with pytest.raises(errors.Internal) as caught:
            await embed(peer, "broken")
        assert (await embed(peer)).model == "acme"
    assert caught.value.message == "internal error"
    assert "call failed unexpectedly" in caplog.text


async def test_streams_give_trailers(mesh_without_database: MeshSettings, as_tenant: Call) -> None:
    """A stream's trailers are there at its end, and its error is typed."""
    async with serving(mesh_without_database) as (_, _, peer):
        stub = parser_pb2_grpc.ParserServiceStub(peer.channel)
        stream = peer.stream(stub.Parse, parser_pb2.ParseRequest(), timeout_s=5)
        assert [m.progress.pages_done async for m in stream] == [1]
        assert stream.trailers["tollgate-usage-bin"] == b"used"
        failing = peer.stream(stub.Parse, parser_pb2.ParseRequest(max_pages=1), timeout_s=5)
        with pytest.raises(errors.InvalidField) as caught:
            _ = [m async for m in failing]
    assert caught.value.violations[0].subject == "max_pages"


async def test_cancellation_reaches_the_work(
    mesh_without_database: MeshSettings, as_tenant: Call
) -> None:
    """A caller that goes away, or whose deadline passes, ends the work."""
    async with serving(mesh_without_database) as (_, room, peer):
        with pytest.raises(errors.DeadlineExceeded):
            await embed(peer, "slow", timeout_s=0.2)
        await asyncio.wait_for(room.cancelled.wait(), 5)


async def test_drain_finishes_what_is_under_way(
    mesh_without_database: MeshSettings, as_tenant: Call
) -> None:
    """A daemon that stops still answers the call that it has taken."""
    daemon, room = Daemon("embedder", mesh_without_database, listen="127.0.0.1:0"), Room()
    embedder_pb2_grpc.add_EmbedderServiceServicer_to_server(room, daemon.server)
    async with daemon.serving():
        peer = Peer(daemon.address, mesh_without_database)
        call = asyncio.create_task(embed(peer, "brief"))
        await asyncio.wait_for(room.began.wait(), 5)
    assert (await call).model == "acme"
    with pytest.raises(errors.ProviderUnavailable):
        await embed(peer, timeout_s=2)
    await peer.close()


async def test_a_taken_port_is_one_clear_line(mesh_without_database: MeshSettings) -> None:
    """A second daemon on the same port does not share it: it says so and what to do."""
    async with serving(mesh_without_database) as (daemon, _, _):
        second = Daemon("embedder", mesh_without_database, listen=daemon.address)
        with pytest.raises(StartError, match="TOLLGATE_EMBEDDER_LISTEN"):
            async with second.serving():
                pass


async def test_health_names_services_and_providers(
    mesh_without_database: MeshSettings,
) -> None:
    """Health answers for the daemon, its services and their providers, with no identity."""
    async with serving(mesh_without_database) as (daemon, _, _):
        await daemon.set_health(f"{EMBEDDER}/mock", serving=False)
        async with grpc.aio.insecure_channel(daemon.address) as channel:
            check = health_pb2_grpc.HealthStub(channel).Check
            found = {
                name: (await check(health_pb2.HealthCheckRequest(service=name))).status
                for name in ("", EMBEDDER, f"{EMBEDDER}/mock")
            }
    assert list(found.values()) == [1, 1, 2]


@pytest.mark.parametrize("version", ["v1", "v1alpha"])
async def test_reflection_lists_services(mesh_without_database: MeshSettings, version: str) -> None:
    """Reflection answers under both of its names, and gives files by symbol."""
    async with serving(mesh_without_database) as (daemon, _, _):
        async with grpc.aio.insecure_channel(daemon.address) as channel:
            method = channel.stream_stream(
                f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo",
                request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
                response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
            )
            asked = [
                reflection_pb2.ServerReflectionRequest(list_services=""),
                reflection_pb2.ServerReflectionRequest(
                    file_containing_symbol=f"grpc.reflection.{version}.ServerReflection"
                ),
            ]
            answers = [answer async for answer in method(iter(asked))]
    names = {service.name for service in answers[0].list_services_response.service}
    assert {EMBEDDER, "grpc.health.v1.Health", f"grpc.reflection.{version}.ServerReflection"} <= (
        names
    )
    assert answers[1].file_descriptor_response.file_descriptor_proto


def test_identity_is_signed_and_short_lived() -> None:
    """An identity says whom it is for, and neither a changed nor an old one is taken."""
    call = Call(tenant="acme", project="p", request_id="r", hold_id="h")
    signed = sign(call, b"secret")
    assert verify(signed, b"secret") == Call("acme", "p", "r", "", "h", internal=True)
    payload, signature = signed.split(".")
    for bad in ("", ".", payload, f"{payload}.", f"x{signed}", f"{payload[:-4]}AAAA.{signature}"):
        with pytest.raises(errors.Unauthenticated):
            verify(bad, b"secret")
    with pytest.raises(errors.Unauthenticated):
        verify(sign(call, b"secret", lifetime_s=-2), b"secret")


async def test_who_watches_its_health_does_not_hold_up_a_daemon(
    mesh_without_database: MeshSettings,
) -> None:
    """A watcher is told NOT_SERVING, then its watch ends, long before the grace is over."""
    mesh = mesh_without_database.model_copy(update={"grace_s": 600.0})
    told: list[int] = []

    async def watch(address: str, began: asyncio.Event) -> None:
        async with grpc.aio.insecure_channel(address) as dialled:
            request = health_pb2.HealthCheckRequest(service="")
            async for answer in health_pb2_grpc.HealthStub(dialled).Watch(request):
                told.append(answer.status)
                began.set()

    async with asyncio.timeout(20):
        began = asyncio.Event()
        daemon = Daemon("embedder", mesh, listen="127.0.0.1:0")
        async with daemon.serving():
            watching = asyncio.create_task(watch(daemon.address, began))
            await began.wait()
        await watching
    response = health_pb2.HealthCheckResponse
    assert told == [response.SERVING, response.NOT_SERVING]
