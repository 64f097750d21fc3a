"""The ledger over gRPC, on a real daemon: what it answers, and how it refuses."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import grpc
import pytest
import pytest_asyncio
from google.protobuf.duration_pb2 import Duration
from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.timestamp_pb2 import Timestamp
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from tollgate.cost.v1 import cost_pb2 as pb
from tollgate.cost.v1 import limit_pb2, price_pb2, usage_pb2
from tollgate.cost.v1.cost_pb2_grpc import CostServiceStub
from tollgate.cost.v1.limit_pb2_grpc import LimitServiceStub
from tollgate.cost.v1.price_pb2_grpc import PriceServiceStub
from tollgate.cost.v1.usage_pb2_grpc import UsageServiceStub

from chassis.call import Call
from chassis.client import Peer
from chassis.errors import (
    AlreadyExists,
    Conflict,
    HoldClosed,
    IdReused,
    InvalidField,
    NotFound,
    PriceUnknown,
    TollgateError,
)
from chassis.server import StartError
from chassis.settings import MeshSettings
from services.cost.core.prices import Origin
from services.cost.main import PRICES, Settings, rate_card, wire

EMBED = "tollgate.embedder.v1.EmbedderService/Embed"
INT64_MAX = (1 << 63) - 1


@dataclass
class Client:
    """The four services of a daemon."""

    peer: Peer

    def __post_init__(self) -> None:
        channel = self.peer.channel
        self.cost = CostServiceStub(channel)
        self.limits = LimitServiceStub(channel)
        self.prices = PriceServiceStub(channel)
        self.usage = UsageServiceStub(channel)

    async def ask(self, method: Any, request: Any) -> Any:
        return await self.peer.unary(method, request, timeout_s=10)


@pytest_asyncio.fixture
async def client(mesh: MeshSettings, as_tenant: Call) -> AsyncIterator[Client]:
    async with wire(mesh, Settings(listen="127.0.0.1:0")) as daemon:
        peer = Peer(daemon.address, mesh)
        try:
            yield Client(peer)
        finally:
            await peer.close()


def scope(**changes: Any) -> usage_pb2.Scope:
    values = {"tenant": "acme", "service": "embedder", "provider": "mock", "model": "small"}
    return usage_pb2.Scope(**(values | changes))


def ask(hold_id: str = "", *, tokens: int = 1_000_000, **changes: Any) -> pb.AuthorizeRequest:
    request = pb.AuthorizeRequest(
        hold_id=hold_id or str(uuid4()),
        scope=scope(),
        operation=EMBED,
        bound=usage_pb2.Usage(tokens=tokens),
        request_id="request-1",
    )
    request.MergeFrom(pb.AuthorizeRequest(**changes))
    return request


def settle(hold_id: str, tokens: int) -> pb.SettleRequest:
    return pb.SettleRequest(tenant="acme", hold_id=hold_id, usage=usage_pb2.Usage(tokens=tokens))


def limit(**changes: Any) -> limit_pb2.Limit:
    values: dict[str, Any] = {
        "id": "mine",
        "metric": limit_pb2.METRIC_COST,
        "window": limit_pb2.WINDOW_MONTH,
        "enforcement": limit_pb2.ENFORCEMENT_HARD,
        "maximum": 30_000_000,
        "scope": limit_pb2.LimitScope(tenant={"match": limit_pb2.MATCH_EACH}),
    }
    return limit_pb2.Limit(**(values | changes))


async def test_a_call_is_held_and_settled(client: Client) -> None:
    """Authorize answers the hold with its price, Settle the charge, GetHold both."""
    request = ask()
    hold = (await client.ask(client.cost.Authorize, request)).hold
    assert (hold.id, hold.held_nanos_usd, hold.state) == (
        request.hold_id,
        20_000_000,
        pb.HOLD_STATE_HELD,
    )
    assert (hold.scope, hold.operation, hold.request_id) == (scope(), EMBED, "request-1")
    assert [p.nanos_usd_per_million for p in hold.unit_prices] == [20_000_000]
    assert 119 <= hold.expire_time.seconds - hold.create_time.seconds <= 121
    settled = (await client.ask(client.cost.Settle, settle(hold.id, 400_000))).hold
    assert (settled.state, settled.charged_nanos_usd) == (pb.HOLD_STATE_SETTLED, 8_000_000)
    assert settled.usage == usage_pb2.Usage(tokens=400_000, requests=1)
    get = pb.GetHoldRequest(tenant="acme", hold_id=hold.id.upper())
    assert (await client.ask(client.cost.GetHold, get)).hold == settled
    answer = await client.ask(client.usage.QueryUsage, usage_pb2.QueryUsageRequest())
    assert [row.charged_nanos_usd for row in answer.rows] == [8_000_000]


async def test_it_works_through_a_pooler(mesh: MeshSettings, as_tenant: Call) -> None:
    """With nothing set on a session, as a transaction-mode pooler wants it, all works the same."""
    pooled = mesh.model_copy(update={"database_pooled": True})
    settings = Settings(listen="127.0.0.1:0", parity_interval_s=0.05)
    async with wire(pooled, settings) as daemon:
        peer = Peer(daemon.address, mesh)
        client = Client(peer)
        request = ask()
        await client.ask(client.cost.Authorize, request)
        settled = await client.ask(client.cost.Settle, settle(request.hold_id, 5))
        assert settled.hold.charged_nanos_usd == 100
        await client.ask(client.limits.CreateLimit, limit_pb2.CreateLimitRequest(limit=limit()))
        got = await client.ask(client.limits.GetLimit, limit_pb2.GetLimitRequest(limit_id="mine"))
        assert [used.settled for used in got.consumption] == [100]
        await peer.close()


async def test_a_denial_is_an_answer(client: Client) -> None:
    """A refusal names the limit, how far over, and when to retry; repeated, it is replayed."""
    await client.ask(client.limits.CreateLimit, limit_pb2.CreateLimitRequest(limit=limit()))
    await client.ask(client.cost.Authorize, ask())
    request = ask()
    answer = await client.ask(client.cost.Authorize, request)
    (refusal,) = answer.denial.refusals
    assert (refusal.limit_id, refusal.maximum, refusal.consumed) == ("mine", 30_000_000, 20_000_000)
    assert (refusal.requested, refusal.over) == (20_000_000, 10_000_000)
    assert answer.denial.HasField("retry_time")
    again = await client.ask(client.cost.Authorize, request)
    assert (again.denial, again.replayed, answer.replayed) == (answer.denial, True, False)


@pytest.mark.parametrize(
    ("fields", "change"),
    [
        ({"hold_id"}, lambda r: setattr(r, "hold_id", "")),
        ({"hold_id"}, lambda r: setattr(r, "hold_id", "{" + str(uuid4()) + "}")),
        ({"scope"}, lambda r: r.ClearField("scope")),
        ({"bound"}, lambda r: r.ClearField("bound")),
        ({"scope.tenant"}, lambda r: setattr(r.scope, "tenant", "")),
        ({"scope.tenant"}, lambda r: setattr(r.scope, "tenant", "a\0b")),
        (
            {"scope.service", "scope.provider", "operation"},
            lambda r: (
                setattr(r.scope, "service", ""),
                setattr(r.scope, "provider", ""),
                setattr(r, "operation", ""),
            ),
        ),
        ({"scope.model"}, lambda r: setattr(r.scope, "model", "m" * 300)),
        ({"bound.tokens"}, lambda r: setattr(r.bound, "tokens", -1)),
        ({"bound.requests"}, lambda r: setattr(r.bound, "requests", -(1 << 63))),
        ({"usage"}, lambda r: setattr(r.bound, "tokens", INT64_MAX)),
        ({"request_id"}, lambda r: setattr(r, "request_id", "x" * 129)),
        ({"request_id"}, lambda r: setattr(r, "request_id", "a\nb")),
        ({"ttl"}, lambda r: r.ttl.CopyFrom(Duration(seconds=0))),
        ({"ttl"}, lambda r: r.ttl.CopyFrom(Duration(seconds=-5))),
        ({"ttl"}, lambda r: r.ttl.CopyFrom(Duration(seconds=604_801))),
        ({"ttl"}, lambda r: r.ttl.CopyFrom(Duration(seconds=10, nanos=2_000_000_000))),
    ],
)
async def test_bad_authorizations_name_their_fields(
    client: Client, fields: set[str], change: Any
) -> None:
    """Missing, malformed, negative and overflowing fields are INVALID_FIELD; nothing is held."""
    request = ask()
    if fields == {"usage"}:
        request.scope.provider, request.scope.model = "openai", "text-embedding-3-large"
    change(request)
    with pytest.raises(InvalidField) as caught:
        await client.ask(client.cost.Authorize, request)
    assert {violation.subject for violation in caught.value.violations} == fields
    answer = await client.ask(client.cost.BatchAuthorize, _batch(request, ask()))
    assert [result.WhichOneof("outcome") for result in answer.results] == ["error", "response"]
    assert answer.results[0].error.reason == "INVALID_FIELD"
    listed = await client.ask(client.cost.ListHolds, pb.ListHoldsRequest(tenant="acme"))
    assert len(listed.holds) == 1


def _batch(*requests: pb.AuthorizeRequest) -> pb.BatchAuthorizeRequest:
    return pb.BatchAuthorizeRequest(
        items=[pb.BatchAuthorizeItem(request=request) for request in requests]
    )


async def test_every_refusal_has_its_reason(client: Client) -> None:
    """Unknown price, reused id, closed and unknown hold are told apart, alone and in batches."""
    request = ask()
    await client.ask(client.cost.Authorize, request)
    reused = ask(request.hold_id, tokens=5)
    unknown = ask(scope=scope(provider="nobody"))
    for bad, kind in ((reused, IdReused), (unknown, PriceUnknown)):
        with pytest.raises(kind):
            await client.ask(client.cost.Authorize, bad)
    answer = await client.ask(client.cost.BatchAuthorize, _batch(reused, request, unknown))
    assert [r.error.reason for r in answer.results] == ["ID_REUSED", "", "PRICE_UNKNOWN"]
    assert answer.results[1].response.replayed
    await client.ask(client.cost.Settle, settle(request.hold_id, 5))
    release = pb.ReleaseRequest(tenant="acme", hold_id=request.hold_id)
    extend = pb.ExtendHoldRequest(tenant="acme", hold_id=request.hold_id, ttl=Duration(seconds=600))
    for method, bad in (
        (client.cost.Settle, settle(request.hold_id, 6)),
        (client.cost.Release, release),
        (client.cost.ExtendHold, extend),
    ):
        with pytest.raises(HoldClosed):
            await client.ask(method, bad)
        bad.hold_id = str(uuid4())
        with pytest.raises(NotFound):
            await client.ask(method, bad)
    other = pb.GetHoldRequest(tenant="other", hold_id=request.hold_id)
    with pytest.raises(NotFound):
        await client.ask(client.cost.GetHold, other)


async def test_a_batch_is_answered_item_by_item(client: Client) -> None:
    """Settles and releases of one batch each have their own result, bad ones too."""
    holds = [ask() for _ in range(3)]
    await client.ask(client.cost.BatchAuthorize, _batch(*holds))
    items = [
        pb.BatchSettleItem(settle=settle(holds[0].hold_id, 5)),
        pb.BatchSettleItem(),
        pb.BatchSettleItem(release=pb.ReleaseRequest(tenant="acme", hold_id=holds[1].hold_id)),
        pb.BatchSettleItem(settle=settle(holds[2].hold_id, -5)),
        pb.BatchSettleItem(settle=settle("no", 5)),
        pb.BatchSettleItem(settle=settle(str(uuid4()), 5)),
        pb.BatchSettleItem(settle=pb.SettleRequest(hold_id=holds[2].hold_id)),
    ]
    answer = await client.ask(client.cost.BatchSettle, pb.BatchSettleRequest(items=items))
    assert [r.error.reason or r.hold.state for r in answer.results] == [
        pb.HOLD_STATE_SETTLED,
        "INVALID_FIELD",
        pb.HOLD_STATE_RELEASED,
        "INVALID_FIELD",
        "INVALID_FIELD",
        "NOT_FOUND",
        "INVALID_FIELD",
    ]


async def test_a_thousand_items_and_no_more(client: Client) -> None:
    """A batch of 1,000 is decided, one of 1,001 refused whole, an empty one answered empty."""
    thousand = _batch(*(ask(tokens=1) for _ in range(1_000)))
    answer = await client.ask(client.cost.BatchAuthorize, thousand)
    assert all(r.response.HasField("hold") for r in answer.results)
    assert len(answer.results) == 1_000
    thousand.items.add().request.CopyFrom(ask())
    with pytest.raises(InvalidField):
        await client.ask(client.cost.BatchAuthorize, thousand)
    settles = pb.BatchSettleRequest(items=[pb.BatchSettleItem()] * 1_001)
    with pytest.raises(InvalidField):
        await client.ask(client.cost.BatchSettle, settles)
    assert not (await client.ask(client.cost.BatchSettle, pb.BatchSettleRequest())).results


async def test_an_item_without_time_is_not_decided(client: Client) -> None:
    """An item whose call has no time left fails with DEADLINE_EXCEEDED, and its id stays unused."""
    request = ask()
    item = pb.BatchAuthorizeItem(request=request, timeout=Duration(seconds=0))
    answer = await client.ask(client.cost.BatchAuthorize, pb.BatchAuthorizeRequest(items=[item]))
    assert answer.results[0].error.reason == "DEADLINE_EXCEEDED"
    assert not (await client.ask(client.cost.Authorize, request)).replayed


async def test_holds_expire_by_themselves(mesh: MeshSettings, as_tenant: Call) -> None:
    """The daemon charges a hold whose time passed, and a late settle still corrects it."""
    settings = Settings(listen="127.0.0.1:0", sweep_interval_s=0.05, hold_ttl_s=1)
    async with wire(mesh, settings) as daemon:
        peer = Peer(daemon.address, mesh)
        client = Client(peer)
        request = ask()
        await client.ask(client.cost.Authorize, request)
        get = pb.GetHoldRequest(tenant="acme", hold_id=request.hold_id)
        async with asyncio.timeout(10):
            hold = pb.Hold(state=pb.HOLD_STATE_HELD)
            while hold.state == pb.HOLD_STATE_HELD:
                hold = (await client.ask(client.cost.GetHold, get)).hold
        assert (hold.state, hold.unconfirmed) == (pb.HOLD_STATE_EXPIRED, True)
        assert hold.charged_nanos_usd == hold.held_nanos_usd
        settled = (await client.ask(client.cost.Settle, settle(hold.id, 1))).hold
        assert (settled.unconfirmed, settled.charged_nanos_usd) == (False, 20)
        await peer.close()


async def test_limits_live(client: Client) -> None:
    """Create, get, list, update and delete; with what is consumed of each counter."""
    await client.ask(client.cost.Authorize, ask())
    made = await client.ask(client.limits.CreateLimit, limit_pb2.CreateLimitRequest(limit=limit()))
    again = await client.ask(client.limits.CreateLimit, limit_pb2.CreateLimitRequest(limit=limit()))
    assert made.limit == again.limit
    got = await client.ask(client.limits.GetLimit, limit_pb2.GetLimitRequest(limit_id="mine"))
    (used,) = got.consumption
    assert (used.counter, used.held, used.settled) == ("tenant=acme", 20_000_000, 0)
    first = await client.ask(client.limits.ListLimits, limit_pb2.ListLimitsRequest(page_size=2))
    rest = limit_pb2.ListLimitsRequest(page_size=2, page_token=first.next_page_token)
    second = await client.ask(client.limits.ListLimits, rest)
    assert [one.id for one in [*first.limits, *second.limits]] == [
        "default-day",
        "default-hour",
        "mine",
    ]
    assert not second.next_page_token
    change = limit_pb2.UpdateLimitRequest(
        limit=limit(maximum=7, etag=made.limit.etag, window=limit_pb2.WINDOW_DAY),
        update_mask=FieldMask(paths=["maximum"]),
    )
    changed = (await client.ask(client.limits.UpdateLimit, change)).limit
    assert (changed.maximum, changed.window) == (7, limit_pb2.WINDOW_MONTH)
    with pytest.raises(Conflict):
        await client.ask(client.limits.UpdateLimit, change)
    gone = limit_pb2.DeleteLimitRequest(limit_id="mine", etag=changed.etag)
    await client.ask(client.limits.DeleteLimit, gone)
    with pytest.raises(NotFound):
        await client.ask(client.limits.GetLimit, limit_pb2.GetLimitRequest(limit_id="mine"))


@pytest.mark.parametrize(
    "bad",
    [
        limit(id=""),
        limit(id="../etc"),
        limit(maximum=-1),
        limit(metric=0),
        limit(metric=99),
        limit(window=0),
        limit(enforcement=77),
        limit(time_zone="Mars/Base"),
        limit(alert_percents=[0]),
        limit(alert_percents=[50, 50]),
        limit(display_name="x" * 300),
        limit(scope=limit_pb2.LimitScope(tenant={"match": limit_pb2.MATCH_EXACT})),
        limit(scope=limit_pb2.LimitScope(tenant={"match": 9})),
        limit(scope=limit_pb2.LimitScope(tenant={"match": 3, "value": "x"})),
        limit(scope=limit_pb2.LimitScope(simulated={"match": 1, "value": "maybe"})),
    ],
)
async def test_bad_limits_are_refused(client: Client, bad: limit_pb2.Limit) -> None:
    """Bad ids, amounts, enums, zones and scopes are INVALID_FIELD."""
    with pytest.raises(InvalidField) as caught:
        await client.ask(client.limits.CreateLimit, limit_pb2.CreateLimitRequest(limit=bad))
    assert caught.value.violations
    different = limit_pb2.CreateLimitRequest(limit=limit(id="default-day"))
    with pytest.raises(AlreadyExists):
        await client.ask(client.limits.CreateLimit, different)


async def test_bad_questions_are_refused(client: Client) -> None:
    """Page sizes, tokens, masks, ranges, zones and enums that make no sense are INVALID_FIELD."""
    cost, limits, prices, usage = client.cost, client.limits, client.prices, client.usage
    later, sooner = Timestamp(seconds=2_000_000_000), Timestamp(seconds=1_000_000_000)
    query = usage_pb2.QueryUsageRequest
    bad: list[tuple[Any, Any]] = [
        (cost.ListHolds, pb.ListHoldsRequest()),
        (cost.ListHolds, pb.ListHoldsRequest(tenant="acme", page_size=-1)),
        (cost.ListHolds, pb.ListHoldsRequest(tenant="acme", page_size=1_001)),
        (cost.ListHolds, pb.ListHoldsRequest(tenant="acme", page_token="x")),
        (cost.ListHolds, pb.ListHoldsRequest(tenant="acme", state=42)),
        (cost.GetHold, pb.GetHoldRequest(tenant="acme", hold_id="1")),
        (cost.Release, pb.ReleaseRequest(hold_id=str(uuid4()))),
        (cost.ExtendHold, pb.ExtendHoldRequest(tenant="acme", hold_id=str(uuid4()))),
        (limits.ListLimits, limit_pb2.ListLimitsRequest(page_size=5_000)),
        (limits.ListLimits, limit_pb2.ListLimitsRequest(page_token="bm9uZQ==")),
        (limits.UpdateLimit, limit_pb2.UpdateLimitRequest(limit=limit(id="default-day"))),
        (
            limits.UpdateLimit,
            limit_pb2.UpdateLimitRequest(
                limit=limit(id="default-day"), update_mask=FieldMask(paths=["window"])
            ),
        ),
        (
            limits.UpdateLimit,
            limit_pb2.UpdateLimitRequest(
                limit=limit(id="default-day", maximum=-1), update_mask=FieldMask(paths=["maximum"])
            ),
        ),
        (prices.ListPrices, price_pb2.ListPricesRequest(page_size=-5)),
        (prices.SetPrice, price_pb2.SetPriceRequest()),
        (prices.SetPrice, price_pb2.SetPriceRequest(price=price(amount=-1))),
        (prices.SetPrice, price_pb2.SetPriceRequest(price=price(unit=9))),
        (
            prices.SetPrice,
            price_pb2.SetPriceRequest(price=price(at=Timestamp(seconds=-62_135_596_800))),
        ),
        (prices.SetPrice, price_pb2.SetPriceRequest(price=price(at=Timestamp(seconds=1 << 60)))),
        (usage.QueryUsage, query(start_time=later, end_time=sooner)),
        (usage.QueryUsage, query(start_time=later, end_time=later)),
        (usage.QueryUsage, query(end_time=Timestamp(nanos=-5))),
        (usage.QueryUsage, query(time_zone="../x")),
        (usage.QueryUsage, query(group_by=[0])),
        (usage.QueryUsage, query(group_by=[8])),
        (usage.QueryUsage, query(bucket=9)),
        (usage.QueryUsage, query(page_token="e30=")),
        (usage.QueryUsage, query(start_time=sooner, end_time=later, bucket=1)),
    ]
    for method, request in bad:
        with pytest.raises(InvalidField):
            await client.ask(method, request)
    await client.ask(client.cost.Authorize, ask())


def price(
    *, amount: int = 5, unit: int = 1, at: Timestamp | None = None, provider: str = "openai"
) -> price_pb2.Price:
    return price_pb2.Price(
        provider=provider,
        model="new",
        operation="*",
        unit_price={"unit": unit, "nanos_usd_per_million": amount},
        effective_time=at,
        source="a test",
    )


async def test_prices_are_listed_and_added(client: Client) -> None:
    """Carried prices are there with their source; a new one holds at once and never changes."""
    listed: list[price_pb2.Price] = []
    token = ""
    while token or not listed:
        request = price_pb2.ListPricesRequest(page_size=4, page_token=token)
        page = await client.ask(client.prices.ListPrices, request)
        listed += page.prices
        token = page.next_page_token
    assert len(listed) == len(rate_card(PRICES, Origin.CARRIED))
    assert all(line.source and line.HasField("effective_time") for line in listed)
    llama = [p.unit_price.nanos_usd_per_million for p in listed if p.provider == "llamaparse"]
    assert sorted(llama) == [n * 1_250_000 * 1_000_000 for n in (1, 3, 10, 45)]
    unpriced = ask(scope=scope(provider="openai", model="new"))
    with pytest.raises(PriceUnknown):
        await client.ask(client.cost.Authorize, unpriced)
    now = Timestamp(seconds=1_700_000_000)
    made = await client.ask(client.prices.SetPrice, price_pb2.SetPriceRequest(price=price(at=now)))
    again = await client.ask(client.prices.SetPrice, price_pb2.SetPriceRequest(price=price(at=now)))
    assert made == again
    other = price_pb2.SetPriceRequest(price=price(at=now, amount=6))
    with pytest.raises(AlreadyExists):
        await client.ask(client.prices.SetPrice, other)
    assert (await client.ask(client.cost.Authorize, unpriced)).hold.held_nanos_usd == 5


async def test_usage_is_paged(client: Client) -> None:
    """Pages of a report add up to the whole, and a token is good for its own question only."""
    for model in ("a", "b", "c"):
        request = ask(scope=scope(model=model))
        await client.ask(client.cost.Authorize, request)
        await client.ask(client.cost.Settle, settle(request.hold_id, 500_000))
    query = usage_pb2.QueryUsageRequest(
        group_by=[usage_pb2.USAGE_DIMENSION_MODEL, usage_pb2.USAGE_DIMENSION_OPERATION],
        bucket=usage_pb2.USAGE_BUCKET_DAY,
        page_size=2,
    )
    first = await client.ask(client.usage.QueryUsage, query)
    query.page_token = first.next_page_token
    second = await client.ask(client.usage.QueryUsage, query)
    rows = [*first.rows, *second.rows]
    assert [(row.scope.model, row.charged_nanos_usd, row.charges) for row in rows] == [
        ("a", 10_000_000, 1),
        ("b", 10_000_000, 1),
        ("c", 10_000_000, 1),
    ]
    assert {(row.operation, row.scope.tenant) for row in rows} == {(EMBED, "")}
    query.time_zone = "Asia/Tokyo"
    with pytest.raises(InvalidField):
        await client.ask(client.usage.QueryUsage, query)


async def test_nobody_gets_in_without_an_identity(client: Client) -> None:
    """A call that does not carry the mesh's identity is UNAUTHENTICATED."""
    async with grpc.aio.insecure_channel(client.peer.address) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await CostServiceStub(channel).Authorize(ask(), timeout=5)
    assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED


async def test_an_operators_rate_card_wins(
    mesh: MeshSettings, as_tenant: Call, tmp_path: Path
) -> None:
    """A rate card of one's own precedes the carried prices, also on a ledger that ran before."""
    card = tmp_path / "prices.json"
    line = (
        '{"provider": "mock", "model": "*", "operation": "%s", "unit": "tokens", '
        '"nanos_usd_per_million": 3000000, "effective": "2019-01-01", "source": "a contract"}'
    )
    card.write_text(f'{{"prices": [{line % EMBED}]}}')
    for prices_file, held in ((None, 20_000_000), (card, 3_000_000)):
        settings = Settings(listen="127.0.0.1:0", prices_file=prices_file)
        async with wire(mesh, settings) as daemon:
            peer = Peer(daemon.address, mesh)
            client = Client(peer)
            answer = await client.ask(client.cost.Authorize, ask())
            assert answer.hold.held_nanos_usd == held
            await peer.close()
    card.write_text('{"prices": [{"provider": "x"}]}')
    with pytest.raises(StartError, match="price 1"):
        async with wire(mesh, Settings(listen="127.0.0.1:0", prices_file=card)):
            raise AssertionError("it must not start")


@pytest.fixture
def spans() -> Iterator[InMemorySpanExporter]:
    """The spans that this test makes."""
    exporter = InMemorySpanExporter()
    processor = SimpleSpanProcessor(exporter)
    provider = trace.get_tracer_provider()
    if not isinstance(provider, TracerProvider):
        provider = TracerProvider()
        trace.set_tracer_provider(provider)
    provider.add_span_processor(processor)
    yield exporter
    processor.shutdown()


async def test_an_items_trace_goes_on(client: Client, spans: InMemorySpanExporter) -> None:
    """A sampled item has a span in its own trace; an unsampled or malformed one has none."""
    trace_id, span_id = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
    requests = [ask(), ask(), ask()]
    flags = [f"00-{trace_id}-{span_id}-01", f"00-{trace_id}-{span_id}-00", "nonsense-1"]
    items = [
        pb.BatchAuthorizeItem(request=request, traceparent=value)
        for request, value in zip(requests, flags, strict=True)
    ]
    await client.ask(client.cost.BatchAuthorize, pb.BatchAuthorizeRequest(items=items))
    settles = [
        pb.BatchSettleItem(settle=settle(request.hold_id, 1), traceparent=value)
        for request, value in zip(requests, flags, strict=True)
    ]
    await client.ask(client.cost.BatchSettle, pb.BatchSettleRequest(items=settles))
    found = [span for span in spans.get_finished_spans() if span.name.startswith("ledger.")]
    assert [span.name for span in found] == ["ledger.authorize", "ledger.settle"]
    for span in found:
        assert span.context is not None
        assert span.parent is not None
        assert f"{span.context.trace_id:032x}" == trace_id
        assert f"{span.parent.span_id:016x}" == span_id
        assert dict(span.attributes or {})["tollgate.hold_id"] == requests[0].hold_id


async def test_errors_tell_nothing_of_the_house(client: Client) -> None:
    """No refusal carries SQL, a table's name or a stack."""
    for bad in (ask(tokens=-1), ask(scope=scope(provider="nobody"))):
        with pytest.raises(TollgateError) as caught:
            await client.ask(client.cost.Authorize, bad)
        assert not {"select", "insert", "holds.", "traceback"} & set(
            caught.value.message.lower().split()
        )
