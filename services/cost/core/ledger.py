"""What is decided: counters and orders in, admissions, refusals and charges out.

A `Book` is one batch's view of the counters. Whoever drives it binds every order first, so that all
counters it needs are known, loads what stands on them, then applies the orders (resolutions before
authorizations, so that freed money is usable at once) and writes what changed.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import IntEnum
from operator import add
from typing import NamedTuple, TypeAlias

from chassis.errors import HoldClosed, IdReused, InvalidField, NotFound, Violation
from services.cost.core import windows
from services.cost.core.holds import (
    Action,
    Authorization,
    Denial,
    Hold,
    Refusal,
    Resolution,
    State,
)
from services.cost.core.limits import Limit, LimitSet
from services.cost.core.prices import cost
from services.cost.core.usage import INT64_MAX, NOTHING, Account, Amounts, Usage, amounts
from services.cost.core.windows import Span, Window

CounterKey: TypeAlias = tuple[int, datetime, str]
"""The number of a limit, the start of a window, the name of a counter."""


@dataclass(slots=True)
class Counter:
    """What one limit counts in one window, in the unit of its metric."""

    limit: Limit
    name: str
    window: Span
    held: int = 0
    settled: int = 0
    held_before: int = 0
    settled_before: int = 0
    guarded: bool = False
    """Whether a limit that refuses admitted something on it: then it is within the maximum."""

    def load(self, held: int, settled: int) -> None:
        """Set what stood on the counter before."""
        self.held = self.held_before = held
        self.settled = self.settled_before = settled


class Place(NamedTuple):
    """Where a hold is counted: `metric` is the place of the counter's metric among Amounts."""

    metric: int
    counter: Counter
    refuses: bool


class EntryKind(IntEnum):
    """Why a charge was written."""

    SETTLED = 1
    EXPIRED = 2
    CORRECTED = 3


class Entry(NamedTuple):
    """One line of the ledger: what a charge changed. All of a hold's lines add up to its charge."""

    hold_id: str
    account: Account
    kind: EntryKind
    hold_time: datetime
    """When the hold was made: its windows are where the charge counts."""
    usage: Usage
    charged_nanos_usd: int
    unconfirmed_nanos_usd: int
    overrun_nanos_usd: int
    charges: int


class Book:
    """The counters of one batch, and what the batch does to them."""

    def __init__(self, limits: LimitSet, now: datetime) -> None:
        self.now = now
        self.counters: dict[CounterKey, Counter] = {}
        self.entries: list[Entry] = []
        self.resolved: dict[str, tuple[Hold, Entry | None]] = {}
        """Holds that were resolved, each with its line of the ledger, by id and tenant."""
        self.extended: dict[str, Hold] = {}
        self._limits = limits
        self._places: dict[tuple[Account, datetime], list[Place]] = {}
        self._spans: dict[tuple[Window, str, datetime], Span] = {}

    def places(self, account: Account, at: datetime) -> list[Place]:
        """Where a hold that was made at this instant is counted."""
        key = (account, at)
        found = self._places.get(key)
        if found is None:
            found = self._places[key] = [
                Place(rule.metric, self._counter(rule.limit, rule.counter, at), rule.refuses)
                for rule in self._limits.rules_of(account)
                if at >= rule.limit.counts_from
            ]
        return found

    def admit(self, account: Account, nanos_usd: int, bound: Usage) -> Denial | None:
        """Hold the worst case on every counter, or refuse it and touch none.

        A limit whose metric the call uses nothing of does not refuse it. Raises InvalidField where
        a counter that refuses nothing cannot count that far.
        """
        needed = amounts(nanos_usd, bound)
        places = self.places(account, self.now)
        for metric, counter, refuses in places:
            amount = needed[metric]
            total = counter.held + counter.settled + amount
            if amount and refuses and total > counter.limit.maximum:
                return self._denial(places, needed)
            if total > INT64_MAX:
                raise InvalidField.of("bound", "is more than the ledger can count")
        for metric, counter, refuses in places:
            if amount := needed[metric]:
                counter.held += amount
                counter.guarded |= refuses
        return None

    def resolve(self, hold: Hold, order: Resolution) -> None:
        """Do what is asked with a hold; does nothing where it is done already.

        Raises NotFound for a hold that was refused, HoldClosed where it is resolved otherwise.
        """
        if hold.state is State.DENIED:
            raise hold_not_found(hold.id)
        if order.action is Action.SETTLE:
            self._settle(hold, order.usage)
        elif order.action is Action.RELEASE:
            self._release(hold)
        elif order.action is Action.EXTEND:
            self._extend(hold, order.ttl_ms)
        elif hold.state is State.HELD and hold.expire_time <= self.now:
            self._charge(hold, State.EXPIRED, EntryKind.EXPIRED, None)

    def _settle(self, hold: Hold, usage: Usage) -> None:
        if hold.state is State.SETTLED and hold.usage == usage:
            return
        if hold.state is State.HELD:
            self._charge(hold, State.SETTLED, EntryKind.SETTLED, usage)
        elif hold.state is State.EXPIRED:
            self._charge(hold, State.SETTLED, EntryKind.CORRECTED, usage)
        else:
            raise _closed(hold)

    def _release(self, hold: Hold) -> None:
        if hold.state is State.HELD:
            self._move(hold, amounts(hold.held_nanos_usd, hold.bound), NOTHING, NOTHING)
            hold.state = State.RELEASED
            self.resolved[_key(hold)] = (hold, None)
        elif hold.state is State.EXPIRED:
            self._take_back(hold)
        elif hold.state is not State.RELEASED:
            raise _closed(hold)

    def _extend(self, hold: Hold, ttl_ms: int) -> None:
        if hold.state is not State.HELD:
            raise _closed(hold)
        expire_time = self.now + timedelta(milliseconds=ttl_ms)
        if expire_time > hold.expire_time:
            hold.expire_time = expire_time
            self.extended[_key(hold)] = hold

    def _charge(self, hold: Hold, state: State, kind: EntryKind, usage: Usage | None) -> None:
        """Charge what was used, or what is held where nobody said; from held or from expired."""
        as_held = amounts(hold.held_nanos_usd, hold.bound)
        if usage is None:
            used, charged, unconfirmed = hold.bound, hold.held_nanos_usd, hold.held_nanos_usd
        else:
            used, charged, unconfirmed = usage, cost(hold.rate, usage), 0
        now_charged = amounts(charged, used)
        overrun = max(0, charged - hold.held_nanos_usd)
        if hold.state is State.EXPIRED:
            self._move(hold, NOTHING, as_held, now_charged)
            delta = Usage(*(new - old for new, old in zip(used, hold.bound, strict=True)))
            old, was_unconfirmed, charges = hold.held_nanos_usd, hold.held_nanos_usd, 0
        else:
            self._move(hold, as_held, NOTHING, now_charged)
            delta, old, was_unconfirmed, charges = used, 0, 0, 1
        self._enter(
            hold,
            Entry(
                hold.id,
                hold.account,
                kind,
                hold.create_time,
                delta,
                charged - old,
                unconfirmed - was_unconfirmed,
                overrun,
                charges,
            ),
        )
        hold.state, hold.usage = state, usage
        hold.charged_nanos_usd, hold.overrun_nanos_usd = charged, overrun
        hold.unconfirmed = usage is None

    def _take_back(self, hold: Hold) -> None:
        """Undo the charge of a hold that expired and was not billed after all."""
        self._move(hold, NOTHING, amounts(hold.held_nanos_usd, hold.bound), NOTHING)
        held = hold.held_nanos_usd
        delta = Usage(*(-count for count in hold.bound))
        self._enter(
            hold,
            Entry(
                hold.id,
                hold.account,
                EntryKind.CORRECTED,
                hold.create_time,
                delta,
                -held,
                -held,
                0,
                -1,
            ),
        )
        hold.state, hold.charged_nanos_usd, hold.unconfirmed = State.RELEASED, 0, False

    def _move(self, hold: Hold, freed: Amounts, uncharged: Amounts, charged: Amounts) -> None:
        for metric, counter, _ in self.places(hold.account, hold.create_time):
            counter.held -= freed[metric]
            counter.settled += charged[metric] - uncharged[metric]

    def _enter(self, hold: Hold, entry: Entry) -> None:
        """Write a line; what one batch does to a hold is one line in the end."""
        self.entries.append(entry)
        key = _key(hold)
        if (before := self.resolved.get(key)) is not None and before[1] is not None:
            entry = _sum(before[1], entry)
        self.resolved[key] = (hold, entry)

    def _counter(self, limit: Limit, name: str, at: datetime) -> Counter:
        when = (limit.window, limit.time_zone, at)
        window = self._spans.get(when)
        if window is None:
            window = self._spans[when] = windows.span(*when)
        key = (limit.number, window.start, name)
        counter = self.counters.get(key)
        if counter is None:
            counter = self.counters[key] = Counter(limit, name, window)
        return counter

    def _denial(self, places: list[Place], needed: Amounts) -> Denial:
        refusing = [
            (counter, needed[metric])
            for metric, counter, refuses in places
            if refuses
            and needed[metric]
            and counter.held + counter.settled + needed[metric] > counter.limit.maximum
        ]
        return Denial(
            [
                Refusal(
                    counter.limit.id,
                    counter.limit.display_name,
                    counter.limit.metric,
                    counter.limit.window,
                    counter.limit.maximum,
                    counter.held + counter.settled,
                    amount,
                )
                for counter, amount in refusing
            ],
            retry_time(refusing),
        )


def _key(hold: Hold) -> str:
    return hold.id + hold.account.scope.tenant


def _sum(before: Entry, entry: Entry) -> Entry:
    return entry._replace(
        usage=Usage(*map(add, before.usage, entry.usage)),
        charged_nanos_usd=before.charged_nanos_usd + entry.charged_nanos_usd,
        unconfirmed_nanos_usd=before.unconfirmed_nanos_usd + entry.unconfirmed_nanos_usd,
        charges=before.charges + entry.charges,
    )


def retry_time(refusing: list[tuple[Counter, int]]) -> datetime | None:
    """The latest start of a next window among the limits that refused.

    None where the call can never fit: it is larger than a maximum, or a window never ends.
    """
    latest: datetime | None = None
    for counter, amount in refusing:
        end = counter.window.end
        if end is None or amount > counter.limit.maximum:
            return None
        latest = end if latest is None else max(latest, end)
    return latest


def same_call(hold: Hold, order: Authorization, account: Account) -> Hold:
    """The hold that an id was first used for. Raises IdReused where it was for another call."""
    if hold.account.number == account.number and hold.bound == order.bound:
        return hold
    raise IdReused(
        f"hold {order.hold_id} was made for another call",
        violations=[Violation(f"hold/{order.hold_id}", "was made for another call")],
    )


def hold_not_found(hold_id: str) -> NotFound:
    """The error for an id that no hold has."""
    return NotFound(
        f"there is no hold {hold_id}", violations=[Violation(f"hold/{hold_id}", "is not there")]
    )


def _closed(hold: Hold) -> HoldClosed:
    state = hold.state.name
    return HoldClosed(
        f"hold {hold.id} is {state.lower()} already",
        violations=[Violation(f"hold/{hold.id}", f"is {state} already")],
        metadata={"hold_id": hold.id, "state": state},
    )
