"""The rules of the ledger, without a database."""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta
from fractions import Fraction
from math import ceil
from zoneinfo import ZoneInfo

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from chassis.errors import HoldClosed, InvalidField, NotFound, PriceUnknown
from services.cost.core import windows
from services.cost.core.holds import Action, Hold, Resolution, State
from services.cost.core.ledger import Book
from services.cost.core.limits import (
    ANY,
    GENUINE,
    Dimension,
    Enforcement,
    Limit,
    LimitScope,
    LimitSet,
    Match,
    applies,
    checked,
    replaces,
)
from services.cost.core.pages import last_of, page_token
from services.cost.core.prices import (
    NOW,
    Origin,
    Price,
    PriceList,
    Rate,
    Unit,
    cost,
    read_rate_card,
)
from services.cost.core.reports import Bucket, UsageQuery, bucket_starts
from services.cost.core.usage import INT64_MAX, Account, Metric, Scope, Usage, amounts
from services.cost.core.windows import Window, first_instant, span

ZONES = [
    "UTC",
    "Europe/Berlin",
    "America/Sao_Paulo",  # clocks went forward at midnight
    "America/St_Johns",  # clocks went back at one minute past midnight
    "Asia/Kolkata",
    "Pacific/Apia",  # left out a date
    "America/Havana",
    "Australia/Lord_Howe",
    "Africa/Cairo",
]
AT = datetime(2026, 11, 21, 12, 30, tzinfo=UTC)
SCOPE = Scope("acme", "web", "embedder", "openai", "small", "pkg.Service/Embed", False)
EACH = Dimension(Match.EACH)

zones = st.sampled_from(ZONES)
times = st.datetimes(datetime(1995, 1, 1), datetime(2037, 1, 1), timezones=st.just(UTC))


def limit(
    number: int = 1,
    *,
    scope: LimitScope = (EACH, ANY, ANY, ANY, ANY, GENUINE),
    metric: Metric = Metric.COST,
    window: Window = Window.DAY,
    maximum: int = 100,
    enforcement: Enforcement = Enforcement.HARD,
    time_zone: str = "UTC",
) -> Limit:
    return Limit(
        f"limit-{number}", scope, metric, window, maximum, enforcement, time_zone, number=number
    )


def exact(value: str) -> Dimension:
    return Dimension(Match.EXACT, value)


# --- windows ---------------------------------------------------------------------------------


@given(st.sampled_from(Window), zones, times)
def test_a_window_holds_its_instant(window: Window, zone: str, at: datetime) -> None:
    """Every instant lies in its own window, and all of that window's instants agree on it."""
    start, end = span(window, zone, at)
    assert start <= at
    assert start.utcoffset() == timedelta(0)
    assert span(window, zone, start) == (start, end)
    if end is not None:
        assert at < end
        assert span(window, zone, end - timedelta(microseconds=1)) == (start, end)
        assert span(window, zone, end).start == end


@given(zones, st.dates(date(1995, 1, 2), date(2036, 12, 30)))
def test_a_day_starts_at_the_first_instant_of_its_date(zone: str, day: date) -> None:
    """No instant before a day's start has its date, or a later one, on local clocks."""
    start = first_instant(ZoneInfo(zone), day)
    assert start.astimezone(ZoneInfo(zone)).date() >= day
    before = [start - timedelta(seconds=n) for n in (1, 60, 1800, 3600, 7200)]
    assert all(at.astimezone(ZoneInfo(zone)).date() < day for at in before)


def test_days_of_a_change_of_clocks_are_shorter_and_longer() -> None:
    """In Berlin the last Sunday of March has 23 hours, the last of October 25."""
    for day, hours in (("2026-03-29", 23), ("2026-10-25", 25), ("2026-06-01", 24)):
        start, end = span(Window.DAY, "Europe/Berlin", datetime.fromisoformat(f"{day}T12:00Z"))
        assert end is not None
        assert end - start == timedelta(hours=hours)


def test_a_day_without_midnight_starts_when_clocks_jump() -> None:
    """Where clocks go forward at midnight, the day starts at one o'clock, which is that instant."""
    start = first_instant(ZoneInfo("America/Sao_Paulo"), date(2018, 11, 4))
    assert start == datetime(2018, 11, 4, 3, tzinfo=UTC)


def test_a_month_of_a_far_zone() -> None:
    """A month starts where its first day does, not where that of UTC does."""
    start, end = span(Window.MONTH, "Pacific/Auckland", datetime(2026, 1, 31, 12, tzinfo=UTC))
    assert start == datetime(2026, 1, 31, 11, tzinfo=UTC)
    assert end == datetime(2026, 2, 28, 11, tzinfo=UTC)


def test_unknown_zones_are_refused() -> None:
    """A time zone that is none, or a path, is INVALID_FIELD."""
    for name in ("Mars/Olympus", "../etc/passwd", "a\0b", "Europe"):
        with pytest.raises(InvalidField):
            windows.checked_zone("time_zone", name)
    assert windows.checked_zone("time_zone", "") == "UTC"


# --- prices ----------------------------------------------------------------------------------

counts = st.integers(0, 10**9)
rates = st.builds(Rate, *([st.none() | st.integers(0, 10**10)] * 4))
usages = st.builds(Usage, counts, counts, counts, counts)


def price(
    model: str = "*",
    operation: str = "*",
    nanos: int = 7,
    *,
    unit: Unit = Unit.TOKENS,
    at: datetime = AT,
    origin: Origin = Origin.CARRIED,
    version: int = 1,
) -> Price:
    return Price("openai", model, operation, unit, nanos, at, "a test", origin, version)


@given(rates, usages)
def test_a_charge_is_rounded_up_once(rate: Rate, usage: Usage) -> None:
    """A cost is the exact sum over priced units, rounded up to a whole nano-dollar."""
    exactly = sum(Fraction((r or 0) * n, 1_000_000) for r, n in zip(rate, usage, strict=True))
    assert cost(rate, usage) == ceil(exactly)


@given(rates, usages, usages)
def test_a_larger_usage_never_costs_less(rate: Rate, used: Usage, more: Usage) -> None:
    """What stays within its bound costs no more than the bound."""
    bound = Usage(*(a + b for a, b in zip(used, more, strict=True)))
    assert cost(rate, used) <= cost(rate, bound)


def test_a_cost_beyond_64_bits_is_refused() -> None:
    """A usage that costs more than 64 bits can count is INVALID_FIELD."""
    with pytest.raises(InvalidField):
        cost(Rate(tokens=10**12), Usage(tokens=INT64_MAX))


def test_the_most_specific_price_decides_alone() -> None:
    """Model comes before operation, `*` comes last, and lines of two pairs never mix."""
    lines = [
        price("*", "*", 1),
        price("*", SCOPE.operation, 2),
        price("small", "*", 3),
        price("small", SCOPE.operation, 4, unit=Unit.PAGES),
    ]
    found = []
    while lines:
        found.append(PriceList(lines).rate(SCOPE, 1, AT))
        lines.pop()
    assert found == [Rate(pages=4), Rate(tokens=3), Rate(tokens=2), Rate(tokens=1)]


def test_an_unknown_price_is_refused_and_free_is_said() -> None:
    """No matching line is PRICE_UNKNOWN; a line of 0 is free."""
    with pytest.raises(PriceUnknown):
        PriceList([price("large")]).rate(SCOPE, 1, AT)
    assert cost(PriceList([price(nanos=0)]).rate(SCOPE, 1, AT), Usage(tokens=10**9)) == 0


def test_prices_change_in_time_and_by_version() -> None:
    """The latest line in effect counts; a hold's version never sees lines that came later."""
    later = AT + timedelta(days=1)
    prices = PriceList([price(nanos=1), price(nanos=2, at=later), price(nanos=3, at=AT, version=2)])
    assert prices.rate(SCOPE, 1, AT).tokens == 1
    assert prices.rate(SCOPE, 1, later).tokens == 2
    assert prices.rate(SCOPE, 2, AT).tokens == 3
    with pytest.raises(PriceUnknown):
        prices.rate(SCOPE, 2, AT - timedelta(seconds=1))
    assert prices.steady(AT) == (AT, later)


def test_an_operators_price_precedes_a_carried_one() -> None:
    """A rate card of one's own wins whatever the dates say."""
    old = AT - timedelta(days=900)
    prices = PriceList([price(nanos=1), price(nanos=2, at=old, origin=Origin.OPERATOR)])
    assert prices.rate(SCOPE, 1, AT).tokens == 2


def test_a_rate_card_says_which_line_is_wrong() -> None:
    """A line that cannot be used is named by its place."""
    good = (
        '{"provider": "p", "model": "*", "operation": "*", "unit": "tokens", '
        '"nanos_usd_per_million": 5, "effective": "2026-01-01", "source": "here"}'
    )
    assert len(read_rate_card(f'{{"prices": [{good}]}}', Origin.OPERATOR)) == 1
    for bad in (good.replace("tokens", "stars"), good.replace("5,", "-5,"), "7", "{}"):
        with pytest.raises((ValueError, InvalidField), match="price 2"):
            read_rate_card(f'{{"prices": [{good}, {bad}]}}', Origin.OPERATOR)
    with pytest.raises(ValueError):
        read_rate_card("[]", Origin.OPERATOR)


# --- limits ----------------------------------------------------------------------------------

names = st.sampled_from(["a", "b", "c,d=e"])
scopes = st.builds(Scope, names, names, names, names, names, st.just("op"), st.booleans())
dimensions = st.one_of(st.just(ANY), st.just(EACH), names.map(exact))
simulated = st.sampled_from([EACH, GENUINE, exact("true")])
limit_scopes = st.tuples(dimensions, dimensions, dimensions, dimensions, dimensions, simulated)


@given(limit_scopes, scopes, scopes)
def test_two_calls_share_a_counter_only_where_the_limit_says_so(
    dims: LimitScope, one: Scope, other: Scope
) -> None:
    """Calls meet on one counter exactly when they agree in every EACH dimension of the limit."""
    it = limit(scope=dims)
    assume(applies(it, one) and applies(it, other))
    (a,), (b,) = LimitSet([it]).rules(one), LimitSet([it]).rules(other)
    each = [place for place, dimension in enumerate(dims) if dimension.match is Match.EACH]
    mine, theirs = (
        [(*scope[:5], scope.simulated)[place] for place in each] for scope in (one, other)
    )
    assert (a.counter == b.counter) == (mine == theirs)


@given(limit_scopes, scopes)
def test_genuine_and_simulated_never_share_a_counter(dims: LimitScope, scope: Scope) -> None:
    """Whatever a limit says, simulated use is counted apart from genuine use, or not at all."""
    limits = LimitSet([checked(limit(scope=(*dims[:5], ANY))), checked(limit(scope=dims))])
    twin = scope._replace(simulated=not scope.simulated)
    mine = {(rule.limit.scope, rule.counter) for rule in limits.rules(scope)}
    theirs = {(rule.limit.scope, rule.counter) for rule in limits.rules(twin)}
    assert not mine & theirs


def test_an_exact_limit_replaces_an_each_limit() -> None:
    """A tenant's own limit takes the place of the default for each tenant, for it alone."""
    default = limit(1)
    own = limit(2, scope=(exact("acme"), ANY, ANY, ANY, ANY, GENUINE), maximum=500)
    limits = LimitSet([default, own])
    assert {r.limit.id: r.refuses for r in limits.rules(SCOPE)} == {
        "limit-1": False,
        "limit-2": True,
    }
    (other,) = limits.rules(SCOPE._replace(tenant="other"))
    assert (other.limit, other.refuses) == (default, True)
    assert limits.for_tenant("acme") == [own]
    assert limits.for_tenant("other") == [default]


@pytest.mark.parametrize(
    "other",
    [
        limit(2, scope=(exact("acme"), ANY, ANY, exact("openai"), ANY, GENUINE)),
        limit(2, scope=(exact("acme"), ANY, ANY, ANY, ANY, exact("true"))),
        limit(2, scope=(exact("acme"), ANY, ANY, ANY, ANY, GENUINE), metric=Metric.TOKENS),
        limit(2, scope=(exact("acme"), ANY, ANY, ANY, ANY, GENUINE), window=Window.HOUR),
        limit(
            2,
            scope=(exact("acme"), ANY, ANY, ANY, ANY, GENUINE),
            enforcement=Enforcement.SHADOW,
        ),
        limit(2),
    ],
)
def test_other_limits_do_not_replace_the_default(other: Limit) -> None:
    """A narrower limit, one of another metric or window, or a shadow replaces nothing."""
    assert not replaces(other, limit(1))


def test_a_bad_limit_names_all_its_faults() -> None:
    """Every field that is not as it must be is named at once."""
    bad = Limit(
        "No Good",
        (exact(""), Dimension(Match.EACH, "x"), ANY, ANY, ANY, exact("perhaps")),
        Metric.COST,
        Window.DAY,
        -1,
        time_zone="Nowhere",
        alert_percents=(90, 80),
    )
    with pytest.raises(InvalidField) as caught:
        checked(bad)
    assert {fault.subject for fault in caught.value.violations} == {
        "limit.id",
        "limit.scope.tenant.value",
        "limit.scope.project.value",
        "limit.scope.simulated.value",
        "limit.maximum",
        "limit.time_zone",
        "limit.alert_percents",
    }


# --- decisions -------------------------------------------------------------------------------

ACCOUNT = Account(1, SCOPE)
RATE = Rate(tokens=1_000_000)


def book(*limits: Limit, at: datetime = AT) -> Book:
    return Book(LimitSet(limits), at)


def held(tokens: int, *, at: datetime = AT, ttl_s: int = 60) -> Hold:
    bound = Usage(tokens, 0, 0, 1)
    return Hold(
        "h",
        ACCOUNT,
        "",
        bound,
        cost(RATE, bound),
        1,
        RATE,
        State.HELD,
        at,
        at + timedelta(seconds=ttl_s),
    )


def resolution(action: Action, tokens: int = 0) -> Resolution:
    return Resolution(action, "acme", "h", Usage(tokens, 0, 0, 1), ttl_ms=60_000)


limit_kinds = st.builds(
    limit,
    st.integers(1, 50),
    metric=st.sampled_from(Metric),
    window=st.sampled_from(Window),
    maximum=st.integers(0, 300),
    enforcement=st.sampled_from(Enforcement),
)
moves = st.lists(
    st.tuples(st.sampled_from(["authorize", *Action]), st.integers(0, 80), st.integers(0, 90)),
    max_size=40,
)


@given(st.lists(limit_kinds, max_size=5, unique_by=lambda it: it.number), moves)
def test_an_admission_fits_every_hard_limit(
    limits: list[Limit], orders: list[tuple[object, int, int]]
) -> None:
    """For any sequence of orders: an admission fitted every HARD limit, a refusal touched nothing,
    and what stands on the counters is what open holds and charges add up to."""
    now, holds = AT, list[Hold]()
    ledger = book(*limits)
    for what, tokens, seconds in orders:
        ledger.now = now = now + timedelta(seconds=seconds)
        if what == "authorize":
            hold = held(tokens, at=now)
            places = ledger.places(ACCOUNT, now)
            before = [(c.held, c.settled) for _, c, _ in places]
            denial = ledger.admit(ACCOUNT, hold.held_nanos_usd, hold.bound)
            needed = amounts(hold.held_nanos_usd, hold.bound)
            too_much = {
                c.limit.id
                for (metric, c, _), stood in zip(places, before, strict=True)
                if c.limit.enforcement is Enforcement.HARD
                and needed[metric]
                and sum(stood) + needed[metric] > c.limit.maximum
            }
            if denial is None:
                assert not too_much
                holds.append(hold)
            else:
                assert {refusal.limit_id for refusal in denial.refusals} == too_much
                assert all(refusal.over > 0 for refusal in denial.refusals)
                assert [(c.held, c.settled) for _, c, _ in places] == before
        elif holds and isinstance(what, Action):
            hold = holds[tokens % len(holds)]
            try:
                ledger.resolve(hold, resolution(what, tokens))
            except HoldClosed:
                assert hold.state in (State.SETTLED, State.RELEASED, State.EXPIRED)
    for counter in ledger.counters.values():
        mine = [h for h in holds if _counts(ledger, h, counter)]
        metric = counter.limit.metric - 1
        assert counter.held == sum(
            amounts(h.held_nanos_usd, h.bound)[metric] for h in mine if h.state is State.HELD
        )
        assert counter.settled == sum(
            amounts(h.charged_nanos_usd, h.usage or h.bound)[metric]
            for h in mine
            if h.state in (State.SETTLED, State.EXPIRED)
        )
    assert sum(entry.charged_nanos_usd for entry in ledger.entries) == sum(
        h.charged_nanos_usd for h in holds
    )
    assert sum(entry.unconfirmed_nanos_usd for entry in ledger.entries) == sum(
        h.charged_nanos_usd for h in holds if h.unconfirmed
    )


def _counts(ledger: Book, hold: Hold, counter: object) -> bool:
    return any(c is counter for _, c, _ in ledger.places(hold.account, hold.create_time))


def test_retry_time_is_the_latest_next_window() -> None:
    """Refused by an hour and by a day, a call may fit tomorrow."""
    ledger = book(limit(1, maximum=10), limit(2, window=Window.HOUR, maximum=10))
    assert ledger.admit(ACCOUNT, 8, Usage(8, 0, 0, 1)) is None
    denial = ledger.admit(ACCOUNT, 8, Usage(8, 0, 0, 1))
    assert denial is not None
    assert [refusal.over for refusal in denial.refusals] == [6, 6]
    assert denial.retry_time == datetime(2026, 11, 22, tzinfo=UTC)


def test_retry_time_is_absent_where_it_can_never_fit() -> None:
    """A call above a maximum, or against a lifetime limit, has no time to retry."""
    denial = book(limit(1, maximum=10)).admit(ACCOUNT, 11, Usage(11, 0, 0, 1))
    assert denial is not None
    assert denial.retry_time is None
    lifetime = book(limit(1, maximum=10), limit(2, window=Window.LIFETIME, maximum=10))
    lifetime.admit(ACCOUNT, 8, Usage(8, 0, 0, 1))
    denial = lifetime.admit(ACCOUNT, 8, Usage(8, 0, 0, 1))
    assert denial is not None
    assert denial.retry_time is None


def test_a_free_call_passes_a_spent_budget() -> None:
    """A limit refuses only calls that use some of what it counts."""
    ledger = book(limit(1, maximum=0))
    assert ledger.admit(ACCOUNT, 0, Usage(9, 0, 0, 1)) is None
    assert ledger.admit(ACCOUNT, 1, Usage(9, 0, 0, 1)) is not None


def test_soft_and_shadow_admit() -> None:
    """Only HARD limits refuse, and the others count all the same."""
    ledger = book(
        limit(1, maximum=1, enforcement=Enforcement.SOFT),
        limit(2, maximum=1, enforcement=Enforcement.SHADOW),
    )
    assert ledger.admit(ACCOUNT, 50, Usage(50, 0, 0, 1)) is None
    assert [counter.held for counter in ledger.counters.values()] == [50, 50]


def test_a_counter_never_counts_past_64_bits() -> None:
    """A call that no limit refuses is refused where its counter cannot count that far."""
    ledger = book(limit(1, enforcement=Enforcement.SOFT))
    ledger.admit(ACCOUNT, INT64_MAX, Usage(1, 0, 0, 1))
    with pytest.raises(InvalidField):
        ledger.admit(ACCOUNT, 1, Usage(1, 0, 0, 1))


def test_settling_above_the_hold_records_the_truth() -> None:
    """A charge above its hold is written whole, with the overrun beside it."""
    ledger, hold = book(limit(1)), held(10)
    ledger.admit(ACCOUNT, 10, hold.bound)
    ledger.resolve(hold, resolution(Action.SETTLE, 15))
    (counter,) = ledger.counters.values()
    assert (counter.held, counter.settled) == (0, 15)
    assert (hold.charged_nanos_usd, hold.overrun_nanos_usd) == (15, 5)
    assert ledger.entries[-1].overrun_nanos_usd == 5


def test_a_settlement_happens_once() -> None:
    """The same usage again changes nothing; another usage, or a release, is HOLD_CLOSED."""
    ledger, hold = book(limit(1)), held(10)
    ledger.admit(ACCOUNT, 10, hold.bound)
    ledger.resolve(hold, resolution(Action.SETTLE, 7))
    ledger.resolve(hold, resolution(Action.SETTLE, 7))
    for order in (
        resolution(Action.SETTLE, 8),
        resolution(Action.RELEASE),
        resolution(Action.EXTEND),
    ):
        with pytest.raises(HoldClosed):
            ledger.resolve(hold, order)
    ledger.resolve(hold, resolution(Action.EXPIRE))
    assert len(ledger.entries) == 1
    assert hold.state is State.SETTLED


def test_a_release_gives_everything_back() -> None:
    """A released hold charges nothing, and settling it is HOLD_CLOSED."""
    ledger, hold = book(limit(1)), held(10)
    ledger.admit(ACCOUNT, 10, hold.bound)
    ledger.resolve(hold, resolution(Action.RELEASE))
    ledger.resolve(hold, resolution(Action.RELEASE))
    (counter,) = ledger.counters.values()
    assert (counter.held, counter.settled, ledger.entries) == (0, 0, [])
    with pytest.raises(HoldClosed):
        ledger.resolve(hold, resolution(Action.SETTLE, 1))


@pytest.mark.parametrize(
    ("action", "tokens", "charged"), [(Action.SETTLE, 4, 4), (Action.RELEASE, 0, 0)]
)
def test_an_expired_hold_is_charged_until_it_is_corrected(
    action: Action, tokens: int, charged: int
) -> None:
    """Expiry charges as held, unconfirmed; a late settle or release corrects it."""
    ledger, hold = book(limit(1)), held(10)
    ledger.admit(ACCOUNT, 10, hold.bound)
    ledger.resolve(hold, resolution(Action.EXPIRE))
    assert hold.state is State.HELD, "its time has not passed"
    ledger.now = hold.expire_time
    ledger.resolve(hold, resolution(Action.EXPIRE))
    assert (hold.state, hold.charged_nanos_usd, hold.unconfirmed) == (State.EXPIRED, 10, True)
    with pytest.raises(HoldClosed):
        ledger.resolve(hold, resolution(Action.EXTEND))
    ledger.resolve(hold, resolution(action, tokens))
    counter = next(iter(ledger.counters.values()))
    assert (counter.held, counter.settled, hold.unconfirmed) == (0, charged, False)
    assert sum(entry.charged_nanos_usd for entry in ledger.entries) == charged
    assert sum(entry.unconfirmed_nanos_usd for entry in ledger.entries) == 0
    assert sum(entry.charges for entry in ledger.entries) == (1 if charged else 0)


def test_an_extension_never_shortens() -> None:
    """An extension moves the expiry later, or not at all."""
    ledger, hold = book(), held(10, ttl_s=600)
    before = hold.expire_time
    ledger.resolve(hold, resolution(Action.EXTEND))
    assert hold.expire_time == before
    ledger.now = AT + timedelta(seconds=590)
    ledger.resolve(hold, resolution(Action.EXTEND))
    assert hold.expire_time == ledger.now + timedelta(seconds=60)


def test_what_was_refused_is_not_there_to_settle() -> None:
    """A refused hold cannot be resolved: there is none."""
    hold = held(10)
    hold.state = State.DENIED
    with pytest.raises(NotFound):
        book().resolve(hold, resolution(Action.SETTLE, 1))


def test_a_charge_counts_in_the_window_of_its_hold() -> None:
    """A hold of yesterday that is settled today is yesterday's charge."""
    ledger, hold = book(limit(1), at=AT), held(10, at=AT - timedelta(days=1))
    ledger.places(ACCOUNT, hold.create_time)[0].counter.load(10, 0)
    ledger.resolve(hold, resolution(Action.SETTLE, 10))
    today = ledger.places(ACCOUNT, AT)[0].counter
    assert (today.held, today.settled) == (0, 0)
    assert ledger.places(ACCOUNT, hold.create_time)[0].counter.settled == 10


# --- lists and reports -----------------------------------------------------------------------


def test_a_page_token_is_good_for_its_own_question() -> None:
    """A token of another list, another filter or nobody is INVALID_FIELD."""
    token = page_token(("limits", "acme"), ["a"])
    assert last_of(("limits", "acme"), token, 1) == ["a"]
    for question, bad in (
        (("limits", "b"), token),
        (("limits", "acme"), token[:-3]),
        (("limits", "acme"), "é"),
        (("limits", "acme"), "bm8="),
    ):
        with pytest.raises(InvalidField):
            last_of(question, bad, 1)


def test_buckets_follow_local_days() -> None:
    """Daily buckets are cut where local days start, and the first is the range's own start."""
    start, end = datetime(2026, 10, 24, 12, tzinfo=UTC), datetime(2026, 10, 27, tzinfo=UTC)
    query = UsageQuery(start, end, bucket=Bucket.DAY, time_zone="Europe/Berlin")
    assert bucket_starts(query) == [
        start,
        datetime(2026, 10, 24, 22, tzinfo=UTC),
        datetime(2026, 10, 25, 23, tzinfo=UTC),
        datetime(2026, 10, 26, 23, tzinfo=UTC),
    ]
    with pytest.raises(InvalidField):
        bucket_starts(UsageQuery(NOW + timedelta(days=9), end, bucket=Bucket.QUARTER_HOUR))
