"""A call's way through the gate, over real servers: holds, answers, refusals, faults."""

from __future__ import annotations

import asyncio
from typing import Any

import asyncpg
import grpc
import pytest
from tollgate.cost.v1 import cost_pb2, limit_pb2
from tollgate.embedder.v1 import embedder_pb2
from tollgate.router.v1 import answer_pb2, router_pb2

from chassis.call import (
    CALL_ID,
    IDENTITY,
    MODE,
    PROJECT,
    PROVENANCE,
    PROVIDER,
    RECEIPT,
    REQUEST_ID,
    TENANT,
    USAGE,
)
from chassis.errors import (
    BudgetExhausted,
    CallReplayed,
    DocumentEncrypted,
    IdReused,
    Internal,
    InvalidField,
    ModeForbidden,
    NoBackend,
    NotFound,
    OutcomeUnknown,
    ProviderUnavailable,
    RateLimited,
    SpaceMismatch,
    TollgateError,
    Unauthenticated,
)
from tests.router.router_standing import (
    EMBED,
    MODEL,
    SPACE,
    TOKEN_NANOS,
    Standing,
    failing,
    say,
    well,
)

THREE_WORDS = 3 * TOKEN_NANOS


async def test_every_answer_says_where_it_came_from_and_what_it_cost(standing: Standing) -> None:
    """A unary answer has provenance and receipt in its fields and in its trailers, the same."""
    found = await standing.embed("three short words", metadata=[(REQUEST_ID, "request-7")])
    answer = found.answer
    assert answer.provenance == found.provenance
    assert answer.receipt == found.receipt
    assert found.provenance.provider == "fickle"
    assert found.provenance.space_id == SPACE
    assert not found.provenance.simulated
    assert found.provenance.attempt == 1
    assert found.receipt.held_nanos_usd == THREE_WORDS
    assert found.receipt.expected_nanos_usd == THREE_WORDS
    assert found.receipt.state == cost_pb2.HOLD_STATE_HELD
    assert found.receipt.request_id == "request-7"
    (hold,) = await standing.settled("SETTLED")
    assert hold.id == found.receipt.hold_id
    assert hold.charged_nanos_usd == THREE_WORDS
    assert hold.price_version == found.receipt.price_version
    assert hold.request_id == "request-7"
    assert hold.operation == EMBED
    assert (hold.scope.service, hold.scope.provider, hold.scope.model) == (
        "embedder",
        "fickle",
        MODEL,
    )


async def test_the_backend_gets_a_signed_identity_with_the_hold(standing: Standing) -> None:
    """What the backend knows of the caller is the tenant, project, request id and hold id."""
    metadata = [(PROJECT, "search"), (REQUEST_ID, "request-8")]
    found = await standing.embed(metadata=metadata)
    (asked,) = standing.fickle.asked
    assert (asked.tenant, asked.project, asked.request_id) == ("acme", "search", "request-8")
    assert asked.hold_id == found.receipt.hold_id
    assert asked.provider == "fickle"


async def test_less_than_held_is_charged_as_used(standing: Standing) -> None:
    """The hold is the worst case; the charge is what the backend used."""

    async def thrifty(request: Any, context: Any) -> Any:
        answer = await well(request, context)
        say(context, tokens=1, requests=1)
        return answer

    standing.fickle.behaviour = thrifty
    found = await standing.embed("three short words")
    assert found.receipt.held_nanos_usd == THREE_WORDS
    assert found.receipt.expected_nanos_usd == TOKEN_NANOS
    (hold,) = await standing.settled("SETTLED")
    assert hold.charged_nanos_usd == TOKEN_NANOS


async def test_a_call_that_does_not_fit_is_refused_before_it_is_sent(standing: Standing) -> None:
    """BUDGET_EXHAUSTED names the limit, by how much and when to come again; nothing is held."""
    await standing.limit("small", window=limit_pb2.WINDOW_DAY, maximum=4)
    assert (await standing.embed("three short words")).answer
    found = await standing.embed("three short words")
    assert isinstance(found.error, BudgetExhausted)
    (violation,) = found.error.violations
    assert violation.subject == "limit/small"
    assert violation.description.startswith("2 tokens over")
    assert found.error.retry_after_s is not None
    assert found.error.retry_after_s > 0
    assert found.receipt.hold_id == ""
    assert found.receipt.request_id
    assert RECEIPT in found.trailers
    assert len(standing.fickle.asked) == 1
    await standing.settled("SETTLED")


async def test_a_minute_s_limit_is_a_rate(standing: Standing) -> None:
    """A denial by limits of a minute alone is RATE_LIMITED, with a delay of a minute at most."""
    await standing.limit("rate", window=limit_pb2.WINDOW_MINUTE, maximum=3)
    # A minute may end between any two of them, but not between all.
    found = [await standing.embed("three short words") for _ in range(3)]
    errors = [answered.error for answered in found if answered.error is not None]
    assert errors
    for error in errors:
        assert isinstance(error, RateLimited)
        assert error.retry_after_s is not None
        assert 0 <= error.retry_after_s <= 60


@pytest.mark.parametrize("window", [limit_pb2.WINDOW_LIFETIME, limit_pb2.WINDOW_MINUTE])
async def test_what_can_never_fit_names_no_time(
    standing: Standing, window: limit_pb2.Window.ValueType
) -> None:
    """A call that is larger than a limit is not told to come again, in no minute either."""
    await standing.limit("large", window=window, maximum=1)
    found = await standing.embed("three short words")
    assert isinstance(found.error, BudgetExhausted)
    assert found.error.retry_after_s is None
    assert "larger than the limit the limit large allows at once" in found.error.message


@pytest.mark.parametrize(
    ("metadata", "kind", "named"),
    [
        ([(CALL_ID, "x" * 129), (REQUEST_ID, "request-9")], InvalidField, "request-9"),
        ([(REQUEST_ID, "x" * 129)], InvalidField, ""),
        ([(PROJECT, "")], InvalidField, ""),
        ([(IDENTITY, "forged"), (REQUEST_ID, "request-9")], Unauthenticated, "request-9"),
    ],
)
async def test_a_call_refused_at_the_door_has_a_receipt(
    standing: Standing, metadata: list[tuple[str, str]], kind: type[TollgateError], named: str
) -> None:
    """A refusal before the gate carries a receipt for nothing, under the call's request id."""
    found = await standing.embed(metadata=metadata)
    assert isinstance(found.error, kind)
    assert RECEIPT in found.trailers
    request_id = found.receipt.request_id
    assert request_id == named if named else len(request_id) == 32
    assert found.receipt == answer_pb2.Receipt(request_id=request_id)
    assert await standing.holds() == []


async def test_a_repeated_call_is_not_forwarded(standing: Standing) -> None:
    """The same call id reaches a backend once; later it is CALL_REPLAYED with the hold's state."""
    metadata = [(CALL_ID, "once")]
    first = await standing.embed(metadata=metadata)
    await standing.settled("SETTLED")
    again = await standing.embed(metadata=metadata)
    assert isinstance(again.error, CallReplayed)
    assert again.error.metadata == {"hold_id": first.receipt.hold_id, "state": "SETTLED"}
    assert again.receipt.state == cost_pb2.HOLD_STATE_SETTLED
    assert len(standing.fickle.asked) == 1


async def test_a_call_id_is_of_one_request(standing: Standing) -> None:
    """A call id with another request is ID_REUSED, and the other request is not sent."""
    metadata = [(CALL_ID, "one request")]
    assert (await standing.embed("a b", metadata=metadata)).answer
    again = await standing.embed("a b c d", metadata=metadata)
    assert isinstance(again.error, IdReused)
    (held,) = await standing.settled("SETTLED")
    assert [violation.subject for violation in again.error.violations] == [f"hold/{held.id}"]
    assert len(standing.fickle.asked) == 1


async def test_a_call_that_was_not_billed_may_be_sent_again(standing: Standing) -> None:
    """After UNAVAILABLE the same call id goes through: its released attempt is passed over."""
    metadata = [(CALL_ID, "again")]
    standing.fickle.behaviour = failing(ProviderUnavailable("busy"))
    first = await standing.embed(metadata=metadata)
    assert isinstance(first.error, ProviderUnavailable)
    await standing.settled("RELEASED")
    standing.fickle.behaviour = well
    again = await standing.embed(metadata=metadata)
    assert again.answer.provenance.attempt == 2
    await standing.settled("SETTLED", "RELEASED")


@pytest.mark.parametrize(
    "error",
    [
        InvalidField.of("inputs", "must not be this"),
        NotFound("no such thing"),
        DocumentEncrypted("it needs a password"),
    ],
)
async def test_a_refusal_of_the_backend_s_is_passed_on_and_costs_nothing(
    standing: Standing, error: TollgateError
) -> None:
    """A typed error arrives with its reason and details, and its hold is released."""
    standing.fickle.behaviour = failing(error)
    found = await standing.embed()
    assert type(found.error) is type(error)
    assert found.error.message == error.message
    assert found.error.violations == error.violations
    assert found.receipt.state == cost_pb2.HOLD_STATE_RELEASED
    assert found.provenance.provider == "fickle"
    await standing.settled("RELEASED")


async def _mute(request: Any, context: Any) -> Any:
    return embedder_pb2.EmbedResponse()


async def _garbled(request: Any, context: Any) -> Any:
    context.set_trailing_metadata(((USAGE, b"\xff\xff"), (PROVENANCE, b"")))
    return embedder_pb2.EmbedResponse()


async def _another(request: Any, context: Any) -> Any:
    say(context, provider="somebody else", tokens=1)
    return embedder_pb2.EmbedResponse()


async def _negative(request: Any, context: Any) -> Any:
    say(context, tokens=-1)
    return embedder_pb2.EmbedResponse()


async def _crash(request: Any, context: Any) -> Any:
    raise RuntimeError("a secret of the backend's")


@pytest.mark.parametrize("behaviour", [_mute, _garbled, _another, _negative, _crash])
async def test_an_answer_that_does_not_account_for_itself_is_none(
    standing: Standing, behaviour: Any
) -> None:
    """Garbage is OUTCOME_UNKNOWN with the hold id, and the hold stays to expire, charged."""
    standing.fickle.behaviour = behaviour
    found = await standing.embed("three short words")
    assert isinstance(found.error, OutcomeUnknown)
    assert "secret" not in found.error.message
    (hold,) = await standing.settled("HELD")
    assert found.error.metadata["hold_id"] == hold.id
    assert found.receipt.expected_nanos_usd == THREE_WORDS


async def test_a_lost_outcome_is_not_tried_elsewhere(standing: Standing) -> None:
    """What may have been billed is not sent to another backend, in HYBRID either."""
    await standing.set_mode(router_pb2.MODE_HYBRID)
    standing.fickle.behaviour = failing(OutcomeUnknown("who knows"))
    found = await standing.embed()
    assert isinstance(found.error, OutcomeUnknown)
    await standing.settled("HELD")


async def test_hybrid_falls_back_to_the_mock_and_says_so(standing: Standing) -> None:
    """When no genuine backend can serve, HYBRID answers with a mock's work, labelled as such."""
    await standing.set_mode(router_pb2.MODE_HYBRID)
    standing.fickle.behaviour = failing(ProviderUnavailable("busy"))
    found = await standing.embed()
    assert found.answer.provenance == found.provenance
    assert found.provenance.provider == "mock"
    assert found.provenance.simulated
    assert list(found.provenance.fell_back_from) == ["fickle"]
    assert found.provenance.attempt == 2
    mock, genuine = await standing.settled("SETTLED", "RELEASED")
    assert mock.scope.simulated
    assert not genuine.scope.simulated


async def test_a_mock_of_another_daemon_outlives_a_dead_one(standing: Standing) -> None:
    """HYBRID answers by a mock listed at another address when the genuine daemon is dead."""
    await standing.set_mode(router_pb2.MODE_HYBRID)
    await standing.fickle.daemon.server.stop(0)
    for _ in range(200):
        listed = await standing.router.ListBackends(router_pb2.ListBackendsRequest())
        if listed.backends[0].health != router_pb2.BACKEND_HEALTH_SERVING:
            break
        await asyncio.sleep(0.05)
    found = await standing.embed()
    assert found.answer.provenance.simulated
    assert list(found.provenance.fell_back_from) == ["fickle"]


async def test_real_mode_fails_rather_than_simulate(standing: Standing) -> None:
    """In REAL mode a call fails when no genuine backend can serve it."""
    standing.fickle.behaviour = failing(ProviderUnavailable("busy"))
    found = await standing.embed()
    assert isinstance(found.error, ProviderUnavailable)
    await standing.settled("RELEASED")


async def test_a_pinned_space_is_not_left(standing: Standing) -> None:
    """A call that names a space is never answered from another, whatever the mode."""
    await standing.set_mode(router_pb2.MODE_HYBRID)
    assert (await standing.embed(space_id=SPACE)).provenance.provider == "fickle"
    standing.fickle.behaviour = failing(ProviderUnavailable("busy"))
    assert isinstance((await standing.embed(space_id=SPACE)).error, ProviderUnavailable)
    await standing.set_mode(router_pb2.MODE_MOCK)
    assert isinstance((await standing.embed(space_id=SPACE)).error, NoBackend)
    assert isinstance((await standing.embed(space_id="nobody's")).error, SpaceMismatch)


async def test_a_call_may_choose_the_mock(standing: Standing) -> None:
    """`tollgate-mode: MOCK` needs no grant; REAL, HYBRID and genuine providers do."""
    for metadata in ([(MODE, "MOCK")], [(PROVIDER, "mock")]):
        assert (await standing.embed(metadata=metadata)).provenance.provider == "mock"
    for metadata in ([(MODE, "HYBRID")], [(PROVIDER, "fickle")]):
        assert isinstance((await standing.embed(metadata=metadata)).error, ModeForbidden)
    metadata = [*standing.identity(), (MODE, "HYBRID"), (PROVIDER, "fickle")]
    assert (await standing.embed(metadata=metadata)).provenance.provider == "fickle"


@pytest.mark.parametrize(
    ("fields", "kind"),
    [
        ({"model": ""}, InvalidField),
        ({"model": "nobody's"}, NotFound),
        ({"model": "x" * 100_000}, NotFound),
    ],
)
async def test_what_cannot_be_bounded_is_refused(
    standing: Standing, fields: dict[str, Any], kind: type[TollgateError]
) -> None:
    """A request that no meter can bound has its typed error, and nothing is held or sent."""
    found = await standing.embed(**fields)
    assert type(found.error) is kind
    assert await standing.holds() == []
    assert standing.fickle.asked == []


async def test_bytes_that_are_no_request_are_refused(standing: Standing) -> None:
    """Undecodable bytes are INVALID_FIELD, with nothing held, and the gate goes on."""
    for data in (b"\xff\xff\xff", b"\x0a\x02\xff\xfe"):
        found = await standing.call(EMBED, data, embedder_pb2.EmbedResponse)
        assert isinstance(found.error, InvalidField)
    assert await standing.holds() == []
    assert (await standing.embed()).answer


@pytest.mark.parametrize(
    ("key", "value", "kind"),
    [
        (MODE, "FAKE", InvalidField),
        (PROVIDER, "nobody", NotFound),
        (REQUEST_ID, "x" * 129, InvalidField),
        (CALL_ID, "x" * 129, InvalidField),
        (PROJECT, " " * 129, InvalidField),
        (TENANT, "x" * 129, InvalidField),
    ],
)
async def test_malformed_metadata_is_refused(
    standing: Standing, key: str, value: str, kind: type[TollgateError]
) -> None:
    """A mode, provider, id or name that is none has its typed error, and nothing is held."""
    found = await standing.embed(metadata=[(key, value)])
    assert type(found.error) is kind
    assert await standing.holds() == []
    assert (await standing.embed()).answer


async def test_a_caller_that_leaves_a_priced_call_leaves_its_hold(standing: Standing) -> None:
    """After cancelling a call under way its hold stays to expire; the gate serves on."""
    begun = asyncio.Event()

    async def slow(request: Any, context: Any) -> Any:
        begun.set()
        await asyncio.sleep(60)

    standing.fickle.behaviour = slow
    call = asyncio.create_task(standing.embed())
    await begun.wait()
    call.cancel()
    await asyncio.gather(call, return_exceptions=True)
    standing.fickle.behaviour = well
    assert (await standing.embed()).answer
    await standing.settled("SETTLED", "HELD")
    listed = await standing.router.ListBackends(router_pb2.ListBackendsRequest())
    assert [backend.in_flight for backend in listed.backends] == [0, 0]


async def test_a_deadline_is_passed_on(standing: Standing) -> None:
    """The backend has less time than the caller gave, and the caller is told DEADLINE_EXCEEDED."""
    left: list[float] = []

    async def slow(request: Any, context: Any) -> Any:
        left.append(context.time_remaining())
        await asyncio.sleep(60)

    standing.fickle.behaviour = slow
    request = embedder_pb2.EmbedRequest(model=MODEL, inputs=["a"])
    found = await standing.call(EMBED, request, embedder_pb2.EmbedResponse, timeout=0.5)
    assert found.error is not None
    assert found.error.reason == "DEADLINE_EXCEEDED"
    assert 0 < left[0] < 0.5
    await standing.settled("HELD")


async def test_an_unserved_method_is_unimplemented(standing: Standing) -> None:
    """A method without a meter is not served, and no hold is made for it."""
    call: Any = standing.channel.unary_unary("/tollgate.embedder.v1.EmbedderService/Train")
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await call(b"", metadata=((TENANT, "acme"),))
    assert raised.value.code() is grpc.StatusCode.UNIMPLEMENTED
    assert await standing.holds() == []


async def test_many_at_once_are_each_accounted_for(standing: Standing) -> None:
    """Every one of many concurrent calls has a hold of its own, and all of them settle."""
    found = await asyncio.gather(*(standing.embed(f"text number {n}") for n in range(80)))
    assert len({one.answer.receipt.hold_id for one in found}) == 80
    holds = await standing.settled(*["SETTLED"] * 80)
    assert sum(hold.charged_nanos_usd for hold in holds) == 80 * THREE_WORDS


async def test_an_unexpected_fault_tells_nothing(standing: Standing) -> None:
    """Of a failure inside a backend the caller learns no more than that its outcome is unknown."""
    standing.fickle.behaviour = failing(Internal())
    found = await standing.embed()
    assert isinstance(found.error, OutcomeUnknown)
    assert found.error.message == "the backend may have done the work"


async def test_a_backend_that_dies_at_work_leaves_its_outcome_unknown(standing: Standing) -> None:
    """A connection lost in the middle of a call is OUTCOME_UNKNOWN, and the hold stays."""
    daemon = standing.fickle.daemon

    async def dying(request: Any, context: Any) -> Any:
        task = asyncio.create_task(daemon.server.stop(0))
        await asyncio.sleep(60)
        await task

    standing.fickle.behaviour = dying
    found = await standing.embed()
    assert isinstance(found.error, OutcomeUnknown)
    assert found.error.metadata["hold_id"] == found.receipt.hold_id
    await standing.settled("HELD")


async def test_a_hold_whose_caller_has_gone_is_released(standing: Standing) -> None:
    """A caller that leaves while the ledger decides leaves nothing held, and nothing is sent."""
    assert standing.mesh.database_url is not None
    connection = await asyncpg.connect(standing.mesh.database_url.get_secret_value())
    try:
        async with connection.transaction():
            await connection.execute("LOCK TABLE cost.holds IN ACCESS EXCLUSIVE MODE")
            call = asyncio.create_task(standing.embed())
            await _until_waiting(connection)
            call.cancel()
            await asyncio.gather(call, return_exceptions=True)
            # The gate hears of it on its own connection, a moment later.
            await asyncio.sleep(0.3)
    finally:
        await connection.close()
    await standing.settled("RELEASED")
    assert standing.fickle.asked == []


async def _until_waiting(connection: Any) -> None:
    """Until somebody waits for a lock in this database."""
    for _ in range(200):
        waiting = await connection.fetchval(
            "SELECT count(*) FROM pg_stat_activity "
            "WHERE wait_event_type = 'Lock' AND datname = current_database()"
        )
        if waiting:
            return
        await asyncio.sleep(0.02)
    raise AssertionError("nobody waits for the lock")
