"""The ledger on the real database: a batch a transaction, any number of replicas, no overshoot."""

from __future__ import annotations

import asyncio
import random
import time
from contextlib import AsyncExitStack
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from uuid import uuid4

import asyncpg
import pytest

from chassis import postgres
from chassis.embedded import EmbeddedPostgres
from chassis.errors import (
    AlreadyExists,
    Conflict,
    DeadlineExceeded,
    HoldClosed,
    IdReused,
    InvalidField,
    LedgerUnavailable,
    NotFound,
    PriceUnknown,
)
from services.cost.core.holds import Action, Decision, Hold, Resolution, Result, State
from services.cost.core.limits import ANY, GENUINE, Dimension, Enforcement, Limit, LimitScope, Match
from services.cost.core.prices import NOW, Price, Unit
from services.cost.core.reports import Bucket, Group, UsageQuery
from services.cost.core.usage import INT64_MAX, Metric, Usage
from services.cost.core.windows import Window
from services.cost.main import MIGRATIONS
from services.cost.store.upkeep import Upkeep
from tests.cost.conftest import (
    PRICES,
    SCOPE,
    Replica,
    authorization,
    release,
    replica,
    settle,
)

EACH_TENANT: LimitScope = (Dimension(Match.EACH), ANY, ANY, ANY, ANY, GENUINE)


def a_limit(limit_id: str = "mine", *, maximum: int = 100, **rest: object) -> Limit:
    made = Limit(limit_id, EACH_TENANT, Metric.COST, Window.MONTH, maximum)
    return replace(made, **rest)  # type: ignore[arg-type]  # as the test says


def hold_of(result: Result) -> Hold:
    assert isinstance(result, Decision), result
    return result.hold


async def consumed(ledger: Replica, limit_id: str) -> tuple[int, int]:
    limit = (await ledger.catalog.reload()).limits.all[limit_id]
    (found,) = await ledger.reports.consumption([limit], "acme")
    return found.held, found.settled


async def sweep(ledger: Replica, sweep_max: int = 50) -> None:
    upkeep = Upkeep(ledger.ledger, ledger.reports, sweep_max=sweep_max, on_parity=lambda _: None)
    await upkeep.sweep()


# --- one ledger ------------------------------------------------------------------------------


async def test_a_hold_is_settled_at_its_price(ledger: Replica) -> None:
    """The worst case is held, the truth is charged, the rest is free again."""
    hold = await ledger.held(40)
    assert await consumed(ledger, "default-day") == (40, 0)
    (settled,) = await ledger.decide(settle(hold, 25))
    assert isinstance(settled, Hold)
    assert (settled.state, settled.charged_nanos_usd) == (State.SETTLED, 25)
    assert await consumed(ledger, "default-day") == (0, 25)
    await ledger.adds_up()


async def test_a_fresh_install_has_default_limits(ledger: Replica) -> None:
    """A tenant may spend 5 USD an hour and 10 USD a day; simulated use is not limited."""
    (denied,) = await ledger.decide(authorization(5_000_000_001))
    denial = hold_of(denied).denial
    assert denial is not None
    assert [refusal.limit_id for refusal in denial.refusals] == ["default-hour"]
    await ledger.held(5_000_000_000)
    await ledger.held(10**12, scope=SCOPE._replace(simulated=True))
    await ledger.held(5_000_000_000, scope=SCOPE._replace(tenant="other"))


async def test_an_id_has_one_outcome(ledger: Replica) -> None:
    """The same call again is replayed, admitted or refused; another call is ID_REUSED."""
    order, too_much = authorization(10), authorization(10**11)
    first = await ledger.decide(order, too_much)
    again = await ledger.decide(order, too_much, replace(order, bound=Usage(11, 0, 0, 1)))
    assert [r.replayed for r in first if isinstance(r, Decision)] == [False, False]
    assert [r.replayed for r in again if isinstance(r, Decision)] == [True, True]
    assert hold_of(again[0]) == hold_of(first[0])
    assert hold_of(again[1]).denial == hold_of(first[1]).denial
    assert isinstance(again[2], IdReused)
    other_scope = replace(order, scope=SCOPE._replace(model="large"))
    other_tenant = replace(order, scope=SCOPE._replace(tenant="other"))
    reused, fresh = await ledger.decide(other_scope, other_tenant)
    assert isinstance(reused, IdReused)
    assert isinstance(fresh, Decision)
    assert not fresh.replayed
    assert await consumed(ledger, "default-hour") == (10, 0)
    await ledger.adds_up()


async def test_an_id_twice_in_one_batch_is_one_hold(ledger: Replica) -> None:
    """Two orders of one batch with one id make one hold, the second of them replayed."""
    order = authorization(10)
    results = await ledger.decide(order, order, replace(order, bound=Usage(9, 0, 0, 1)))
    assert [r.replayed for r in results[:2] if isinstance(r, Decision)] == [False, True]
    assert isinstance(results[2], IdReused)
    assert await consumed(ledger, "default-day") == (10, 0)


async def test_a_settlement_is_idempotent(ledger: Replica) -> None:
    """Settled twice with one usage is one charge; other usage and releases are HOLD_CLOSED."""
    hold = await ledger.held(40)
    results = await ledger.decide(settle(hold, 25), settle(hold, 25), settle(hold, 26))
    results += await ledger.decide(settle(hold, 25), settle(hold, 26), release(hold))
    charged = [r.charged_nanos_usd if isinstance(r, Hold) else type(r) for r in results]
    assert charged == [25, 25, HoldClosed, 25, HoldClosed, HoldClosed]
    assert await consumed(ledger, "default-day") == (0, 25)


async def test_freed_money_is_usable_at_once(ledger: Replica) -> None:
    """In one batch settlements come first, whatever the order in which they were sent."""
    await ledger.catalog.create_limit(a_limit(maximum=100))
    hold = await ledger.held(100)
    admitted, settled = await ledger.decide(authorization(60), settle(hold, 40))
    assert hold_of(admitted).denial is None
    assert isinstance(settled, Hold)


async def test_a_denial_consumes_nothing_on_any_axis(ledger: Replica) -> None:
    """A call that one limit refuses is not counted on those that it fits."""
    await ledger.catalog.create_limit(a_limit("tokens", metric=Metric.TOKENS, maximum=5))
    (denied,) = await ledger.decide(authorization(6))
    assert hold_of(denied).state is State.DENIED
    assert await consumed(ledger, "default-day") == (0, 0)
    with pytest.raises(NotFound):
        await ledger.reports.hold("acme", hold_of(denied).id)
    (settled,) = await ledger.decide(settle(hold_of(denied), 1))
    assert isinstance(settled, NotFound)


async def test_expiry_charges_and_late_words_correct(ledger: Replica) -> None:
    """Nobody said: charged as held, unconfirmed; a late settle or release corrects exactly."""
    holds = [await ledger.held(10, ttl_s=0.01) for _ in range(3)]
    open_hold = await ledger.held(10)
    await asyncio.sleep(0.02)
    await sweep(ledger, sweep_max=2)
    found = [await ledger.reports.hold("acme", hold.id) for hold in [*holds, open_hold]]
    assert [hold.state for hold in found] == [State.EXPIRED] * 3 + [State.HELD]
    assert all(hold.unconfirmed and hold.charged_nanos_usd == 10 for hold in found[:3])
    await ledger.adds_up()
    await ledger.decide(settle(holds[0], 4), release(holds[1]))
    assert await consumed(ledger, "default-day") == (10, 14)
    await ledger.adds_up()
    now = await ledger.reports.now()
    query = UsageQuery(now - timedelta(days=1), now + timedelta(hours=1))
    (row,) = await ledger.reports.usage(query, None, 10)
    assert (row.charged_nanos_usd, row.unconfirmed_nanos_usd, row.charges) == (14, 10, 2)


async def test_an_extended_hold_stays_open(ledger: Replica) -> None:
    """An extension keeps a hold from expiring."""
    hold = await ledger.held(10, ttl_s=0.05)
    extension = Resolution(Action.EXTEND, "acme", hold.id, ttl_ms=60_000)
    (extended,) = await ledger.decide(extension)
    assert isinstance(extended, Hold)
    await asyncio.sleep(0.06)
    await sweep(ledger)
    assert (await ledger.reports.hold("acme", hold.id)).state is State.HELD


async def test_an_overrun_is_recorded(ledger: Replica) -> None:
    """A charge above its hold is the truth, also above the limit, and nothing new is admitted."""
    await ledger.catalog.create_limit(a_limit(maximum=100))
    hold = await ledger.held(90)
    (settled,) = await ledger.decide(settle(hold, 130))
    assert isinstance(settled, Hold)
    assert settled.overrun_nanos_usd == 40
    assert await consumed(ledger, "mine") == (0, 130)
    (denied,) = await ledger.decide(authorization(1))
    assert hold_of(denied).state is State.DENIED
    await ledger.adds_up()


async def test_a_bad_item_fails_alone(ledger: Replica) -> None:
    """What cannot be priced, counted, stored or decided in time fails; its neighbours do not."""
    simulated = SCOPE._replace(simulated=True)
    results = await ledger.decide(
        authorization(1),
        authorization(1, scope=SCOPE._replace(provider="nobody")),
        authorization(INT64_MAX, scope=simulated, request_id="a\0b"),
        replace(authorization(1), ends=time.monotonic() - 1),
        Resolution(Action.SETTLE, "acme", str(uuid4()), Usage(1, 0, 0, 1)),
        authorization(2),
    )
    assert [r if isinstance(r, Decision) else type(r) for r in results[1:-1]] == [
        PriceUnknown,
        InvalidField,
        DeadlineExceeded,
        NotFound,
    ]
    assert hold_of(results[0]).held_nanos_usd == 1
    assert hold_of(results[-1]).held_nanos_usd == 2
    await ledger.adds_up()


async def test_sums_past_64_bits_fail_alone(ledger: Replica) -> None:
    """A charge that the counters cannot take is INVALID_FIELD, and changes nothing."""
    scope = SCOPE._replace(simulated=True)
    one, other = await ledger.held(10, scope=scope), await ledger.held(10, scope=scope)
    small = await ledger.held(10, scope=scope)
    results = await ledger.decide(
        settle(one, INT64_MAX - 5), settle(other, INT64_MAX - 5), settle(small, 3)
    )
    assert [type(r) for r in results] == [Hold, InvalidField, Hold]
    await ledger.adds_up()


async def test_a_soft_counter_never_passes_64_bits(ledger: Replica) -> None:
    """An authorization that a counter cannot count is refused alone, and leaves no hold."""
    await ledger.catalog.create_limit(a_limit(enforcement=Enforcement.SOFT, window=Window.DAY))
    await ledger.catalog.delete_limit("default-day", "")
    await ledger.catalog.delete_limit("default-hour", "")
    await ledger.held(INT64_MAX - 5)
    orders = [authorization(1), authorization(INT64_MAX - 5), authorization(2)]
    results = await ledger.decide(*orders)
    assert [type(r) for r in results] == [Decision, InvalidField, Decision]
    with pytest.raises(NotFound):
        await ledger.reports.hold("acme", orders[1].hold_id)
    await ledger.adds_up()


# --- limits and prices -----------------------------------------------------------------------


@pytest.mark.parametrize("window", Window)
@pytest.mark.parametrize("metric", [Metric.COST, Metric.REQUESTS])
async def test_a_new_limit_knows_what_was_spent(
    ledger: Replica, window: Window, metric: Metric
) -> None:
    """A limit made late counts what its window holds and charged already, and follows it on."""
    done, open_hold = await ledger.held(30), await ledger.held(50)
    await ledger.decide(settle(done, 20))
    await ledger.held(1, scope=SCOPE._replace(simulated=True))
    await ledger.catalog.create_limit(a_limit(window=window, metric=metric))
    cost = metric is Metric.COST
    assert await consumed(ledger, "mine") == ((50, 20) if cost else (1, 1))
    await ledger.decide(settle(open_hold, 5))
    assert await consumed(ledger, "mine") == ((0, 25) if cost else (0, 2))
    await ledger.adds_up()


async def test_a_limit_is_made_once_and_changed_by_etag(ledger: Replica) -> None:
    """The same limit again is returned, another under its id refused; a stale etag is CONFLICT."""
    made = await ledger.catalog.create_limit(a_limit())
    assert await ledger.catalog.create_limit(a_limit()) == made
    with pytest.raises(AlreadyExists):
        await ledger.catalog.create_limit(a_limit(maximum=101))
    changed = await ledger.catalog.update_limit("mine", made.etag, {"maximum": 7})
    assert (changed.maximum, changed.scope) == (7, made.scope)
    with pytest.raises(Conflict):
        await ledger.catalog.update_limit("mine", made.etag, {"maximum": 8})
    with pytest.raises(InvalidField):
        await ledger.catalog.update_limit("mine", "", {"maximum": -1})
    with pytest.raises(Conflict):
        await ledger.catalog.delete_limit("mine", made.etag)
    await ledger.catalog.delete_limit("mine", changed.etag)
    with pytest.raises(NotFound):
        await ledger.catalog.delete_limit("mine", "")
    assert (await ledger.catalog.create_limit(a_limit())).etag != made.etag


async def test_a_lowered_maximum_breaks_nothing_old(ledger: Replica) -> None:
    """Below what is held, a maximum admits nothing new, and open holds settle as ever."""
    await ledger.catalog.create_limit(a_limit(maximum=100))
    hold = await ledger.held(80)
    await ledger.catalog.update_limit("mine", "", {"maximum": 10})
    (denied,) = await ledger.decide(authorization(1))
    assert hold_of(denied).state is State.DENIED
    (settled,) = await ledger.decide(settle(hold, 80))
    assert isinstance(settled, Hold)
    await ledger.adds_up()


async def test_another_replica_sees_a_change_at_once(ledger: Replica, ledger_url: str) -> None:
    """A limit or a price that one replica writes decides the next batch of every other."""
    async with replica(ledger_url) as other:
        await other.held(1)
        await ledger.catalog.create_limit(a_limit(maximum=5))
        (denied,) = await other.decide(authorization(10))
        assert hold_of(denied).state is State.DENIED
        scope = SCOPE._replace(provider="new")
        (unknown,) = await other.decide(authorization(1, scope=scope))
        assert isinstance(unknown, PriceUnknown)
        await ledger.catalog.add_prices([replace(PRICES[0], provider="new")])
        await other.held(1, scope=scope)


async def test_a_price_change_reprices_no_open_hold(ledger: Replica) -> None:
    """A hold is settled at the price that it was made at, whatever changed since."""
    hold = await ledger.held(10)
    await ledger.catalog.add_prices([replace(PRICES[0], nanos_usd_per_million=9_000_000)])
    later = await ledger.held(10)
    assert (later.held_nanos_usd, later.price_version) == (90, hold.price_version + 1)
    settled, newer = await ledger.decide(settle(hold, 10), settle(later, 10))
    assert isinstance(settled, Hold)
    assert isinstance(newer, Hold)
    assert (settled.charged_nanos_usd, newer.charged_nanos_usd) == (10, 90)


async def test_a_price_takes_effect_at_its_time(ledger: Replica) -> None:
    """A price of the future holds from its time on, without anybody doing anything."""
    at = await ledger.reports.now() + timedelta(seconds=0.3)
    await ledger.catalog.add_prices(
        [replace(PRICES[0], nanos_usd_per_million=5_000_000, effective_time=at)]
    )
    assert (await ledger.held(10)).held_nanos_usd == 10
    await asyncio.sleep(0.35)
    assert (await ledger.held(10)).held_nanos_usd == 50


async def test_prices_never_change_in_place(ledger: Replica) -> None:
    """Loading the same lines again adds nothing; another amount for one time is refused."""
    at = await ledger.reports.now()
    line = Price("p", "*", "*", Unit.PAGES, 5, at, "here")
    first = await ledger.catalog.add_prices([line])
    assert await ledger.catalog.add_prices([line]) == first
    with pytest.raises(AlreadyExists):
        await ledger.catalog.add_prices([replace(line, nanos_usd_per_million=6)])
    now = replace(line, effective_time=NOW)
    assert await ledger.catalog.add_prices([now]) == first


# --- many at once ----------------------------------------------------------------------------


async def test_replicas_never_overshoot(ledger_url: str) -> None:
    """Three replicas race for one budget: exactly what fits is admitted, and nothing deadlocks."""
    async with AsyncExitStack() as stack:
        replicas = [
            await stack.enter_async_context(replica(ledger_url, orders_max=32)) for _ in range(3)
        ]
        await replicas[0].catalog.create_limit(a_limit(maximum=1_000))

        async def race(one: Replica) -> int:
            results = [await one.decide(*(authorization(7) for _ in range(5))) for _ in range(20)]
            return sum(hold_of(r).denial is None for batch in results for r in batch)

        admitted = await asyncio.gather(*(race(one) for one in replicas for _ in range(4)))
        assert sum(admitted) == 1_000 // 7
        assert await consumed(replicas[0], "mine") == (7 * (1_000 // 7), 0)
        await replicas[0].adds_up()


async def test_one_id_from_everywhere_is_one_hold(ledger_url: str) -> None:
    """Clients that repeat a call on several replicas at once get one hold, fresh exactly once."""
    async with AsyncExitStack() as stack:
        replicas = [await stack.enter_async_context(replica(ledger_url)) for _ in range(3)]
        order = authorization(10)
        results = await asyncio.gather(*(one.decide(order) for one in replicas for _ in range(5)))
        fresh = [r for (r,) in results if isinstance(r, Decision) and not r.replayed]
        assert len(fresh) == 1
        assert len({hold_of(r).create_time for (r,) in results}) == 1
        await replicas[0].adds_up()


async def test_a_storm_adds_up(ledger_url: str) -> None:
    """Random orders of many scopes on several replicas, limits changing meanwhile: parity is zero,
    no hard limit is passed, and no two batches wait for each other."""
    rng = random.Random(7)
    scopes = [
        SCOPE._replace(tenant=tenant, model=model, simulated=simulated)
        for tenant in "abc"
        for model in "xy"
        for simulated in (False, True)
    ]
    holds: list[Hold] = []

    async def client(one: Replica) -> None:
        for _ in range(25):
            orders: list[object] = []
            for _ in range(rng.randint(1, 12)):
                hold = rng.choice(holds) if holds else None
                what = rng.random()
                if hold is None or what < 0.5:
                    ttl_s = rng.choice([0.05, 60])
                    orders.append(
                        authorization(rng.randint(0, 30), scope=rng.choice(scopes), ttl_s=ttl_s)
                    )
                elif what < 0.8:
                    orders.append(settle(hold, rng.randint(0, 40)))
                else:
                    orders.append(release(hold))
            results = await one.ledger.decide(orders)  # type: ignore[arg-type]  # both kinds
            assert not [r for r in results if isinstance(r, LedgerUnavailable)]
            holds.extend(r.hold for r in results if isinstance(r, Decision) and not r.replayed)

    async def operator(one: Replica) -> None:
        for turn in range(10):
            limit = a_limit(f"turn-{turn % 3}", window=rng.choice(list(Window)), maximum=2_000)
            await one.catalog.create_limit(limit)
            await asyncio.sleep(0.01)
            await one.catalog.update_limit(limit.id, "", {"maximum": rng.randint(0, 4_000)})
            await sweep(one)
            await one.catalog.delete_limit(limit.id, "")
        await one.catalog.create_limit(a_limit("last", metric=Metric.TOKENS, maximum=3_000))

    async with AsyncExitStack() as stack:
        replicas = [
            await stack.enter_async_context(replica(ledger_url, orders_max=24)) for _ in range(3)
        ]
        await asyncio.gather(
            *(client(one) for one in replicas for _ in range(3)), operator(replicas[0])
        )
        await sweep(replicas[1])
        await replicas[2].adds_up()


# --- faults ----------------------------------------------------------------------------------


async def test_the_role_may_not_change_what_was_written(ledger: Replica) -> None:
    """The ledger's role cannot change or delete entries, prices or holds' ids."""
    for sql in (
        "UPDATE entries SET tokens = 0",
        "DELETE FROM entries",
        "UPDATE prices SET nanos_usd_per_million = 0",
        "DELETE FROM holds",
        "DELETE FROM rollups",
        "CREATE TABLE mine ()",
    ):
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await ledger.pool.execute(sql)


async def test_entries_are_written_without_a_partition(ledger: Replica, ledger_url: str) -> None:
    """Where no day's partition is there, charges go to the default one, and nothing fails."""
    connection = await asyncpg.connect(ledger_url)
    rows = await connection.fetch(
        "SELECT inhrelid::regclass::text AS part FROM pg_inherits "
        "WHERE inhparent = 'cost.entries'::regclass"
    )
    days = [row["part"] for row in rows if not row["part"].endswith("default")]
    assert len(days) == 8
    for part in days:
        await connection.execute(f"DROP TABLE {part}")
    await connection.close()
    hold = await ledger.held(10)
    (settled,) = await ledger.decide(settle(hold, 10))
    assert isinstance(settled, Hold)
    assert await ledger.ledger.make_partitions() == 7, "today's entries stay in the default one"
    await ledger.adds_up()


async def test_a_lost_connection_is_not_the_callers_matter(
    ledger: Replica, ledger_url: str
) -> None:
    """Connections are cut: each order is decided, or refused as not billed, and it all adds up."""
    connection = await asyncpg.connect(ledger_url)
    running = True

    async def cut() -> None:
        while running:
            await connection.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                "WHERE application_name = 'tollgate-cost' AND datname = current_database()"
            )
            await asyncio.sleep(0.03)

    cutter = asyncio.create_task(cut())
    admitted = 0
    for _ in range(30):
        for result in await ledger.decide(*(authorization(1) for _ in range(10))):
            if isinstance(result, Decision):
                assert not result.replayed, "a new id is never answered as a repeated one"
                admitted += 1
            else:
                assert isinstance(result, LedgerUnavailable)
    running = False
    await cutter
    await connection.close()
    held, _ = await consumed(ledger, "default-day")
    assert held >= admitted > 0
    await ledger.adds_up()


async def test_it_recovers_when_the_database_is_back(tmp_path: Path) -> None:
    """Away, the ledger refuses everything; back, it goes on, and has lost nothing."""
    with EmbeddedPostgres.start(tmp_path / "postgres") as server:
        await postgres.migrate(server.url, room="cost", directory=MIGRATIONS)
        async with replica(server.url) as ledger:
            await ledger.catalog.add_prices(PRICES)
            hold = await ledger.held(10)
            await asyncio.to_thread(server._end)
            results = await ledger.decide(authorization(10), settle(hold, 5))
            assert [type(r) for r in results] == [LedgerUnavailable] * 2
            with pytest.raises(LedgerUnavailable):
                await ledger.reports.now()
            with pytest.raises(LedgerUnavailable):
                await ledger.catalog.create_limit(a_limit())
            await asyncio.to_thread(server.restart)
            (settled,) = await ledger.decide(settle(hold, 5))
            assert isinstance(settled, Hold)
            await ledger.held(10)
            await ledger.adds_up()


async def test_a_killed_database_loses_no_answer(tmp_path: Path) -> None:
    """Every hold and charge that was answered is there after the server crashed and came back."""
    with EmbeddedPostgres.start(tmp_path / "postgres") as server:
        await postgres.migrate(server.url, room="cost", directory=MIGRATIONS)
        async with replica(server.url) as ledger:
            await ledger.catalog.add_prices(PRICES)
            answered: list[Hold] = []

            async def client() -> None:
                for _ in range(40):
                    results = await ledger.decide(*(authorization(1) for _ in range(5)))
                    answered.extend(r.hold for r in results if isinstance(r, Decision))

            clients = asyncio.gather(*(client() for _ in range(3)))
            await asyncio.sleep(0.1)
            assert server._process is not None
            server._process.kill()
            await asyncio.to_thread(server.restart)
            await clients
            for hold in answered:
                assert (await ledger.reports.hold("acme", hold.id)).state is State.HELD
            await ledger.adds_up()


# --- reports ---------------------------------------------------------------------------------


async def test_usage_equals_the_entries(ledger: Replica) -> None:
    """Reports by any grouping add up to the charges, bucket by bucket and page by page."""
    scopes = [SCOPE._replace(model=model, simulated=s) for model in "abc" for s in (False, True)]
    for tokens, scope in enumerate(scopes, 1):
        hold = await ledger.held(tokens, scope=scope)
        await ledger.decide(settle(hold, tokens))
    now = await ledger.reports.now()
    whole = UsageQuery(now - timedelta(days=2), now + timedelta(hours=1))
    (row,) = await ledger.reports.usage(whole, None, 10)
    assert (row.usage, row.charged_nanos_usd) == (Usage(21, 0, 0, 6), 21)
    assert row.bucket_time == whole.start
    query = replace(
        whole, bucket=Bucket.HOUR, group_by=(Group.MODEL, Group.SIMULATED), tenant="acme"
    )
    rows = await ledger.reports.usage(query, None, 10)
    assert [(r.scope.model, r.scope.simulated, r.charged_nanos_usd) for r in rows] == [
        ("a", False, 1),
        ("a", True, 2),
        ("b", False, 3),
        ("b", True, 4),
        ("c", False, 5),
        ("c", True, 6),
    ]
    after = (rows[1].bucket_time, ["a", "true"])
    assert await ledger.reports.usage(query, after, 2) == rows[2:4]
    assert await ledger.reports.usage(replace(whole, tenant="nobody"), None, 10) == []


async def test_holds_are_listed_newest_first(ledger: Replica) -> None:
    """Pages of a tenant's holds, of one request, or in one state, the newest first."""
    made = [await ledger.held(1) for _ in range(5)]
    await ledger.decide(settle(made[0], 1), authorization(1, request_id="r1"))
    await ledger.held(1, scope=SCOPE._replace(tenant="other"))
    listed = await ledger.reports.holds("acme", "", None, None, 4)
    assert [hold.id for hold in listed[1:]] == [hold.id for hold in reversed(made[2:])]
    from uuid import UUID

    after = (listed[-1].create_time, UUID(listed[-1].id))
    rest = await ledger.reports.holds("acme", "", None, after, 4)
    assert [hold.id for hold in rest] == [made[1].id, made[0].id]
    assert [h.id for h in await ledger.reports.holds("acme", "r1", None, None, 4)] == [listed[0].id]
    settled = await ledger.reports.holds("acme", "", State.SETTLED, None, 4)
    assert [hold.id for hold in settled] == [made[0].id]


async def test_parity_sees_a_difference(ledger: Replica, ledger_url: str) -> None:
    """The check is not blind: a counter, a rollup and a hold that were tampered with are found."""
    hold = await ledger.held(10)
    await ledger.decide(settle(hold, 10))
    connection = await asyncpg.connect(ledger_url)
    await connection.execute("UPDATE cost.counters SET settled = settled + 1")
    await connection.execute("UPDATE cost.holds SET charged_nanos_usd = 9")
    await connection.execute("UPDATE cost.rollups SET tokens = 9")
    await connection.close()
    assert [found.settled for found in await ledger.reports.parity()] == [1, 1]
    assert await ledger.reports.faults() == {"rollups": 1, "holds": 1}
