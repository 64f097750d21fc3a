"""Limits: which of them apply to a call, and on which counter each of them counts it.

A limit counts every call in its scope, and that is a function of the limit and the call alone, so
a counter can always be computed anew. Only whether a limit may *refuse* depends on other limits: an
EXACT limit replaces an EACH limit of the same metric and window that differs from it in nothing but
the dimensions it makes exact. SHADOW limits only report and replace nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from datetime import datetime
from enum import IntEnum
from typing import NamedTuple, TypeAlias
from urllib.parse import quote

from chassis.errors import InvalidField, NotFound, Violation
from services.cost.core.usage import INT64_MAX, Account, Metric, Scope, refused
from services.cost.core.windows import EPOCH, Window, checked_zone

DIMENSIONS = ("tenant", "project", "service", "provider", "model", "simulated")
NAME_MAX = 256
_ACCOUNTS_MAX = 50_000
CHANGEABLE = ("display_name", "maximum", "enforcement", "alert_percents")
"""The fields that an update may change."""
_ID = re.compile(r"[a-z0-9-]{1,63}")


class Match(IntEnum):
    """How a limit treats one dimension; the numbers are those of the wire."""

    EXACT = 1
    SHARED = 2
    EACH = 3


class Enforcement(IntEnum):
    """What a limit does when a call does not fit; the numbers are those of the wire."""

    HARD = 1
    SOFT = 2
    SHADOW = 3


class Dimension(NamedTuple):
    """A limit's rule for one dimension; the value where it is exact."""

    match: Match
    value: str = ""


ANY = Dimension(Match.SHARED)
GENUINE = Dimension(Match.EXACT, "false")

LimitScope: TypeAlias = tuple[Dimension, Dimension, Dimension, Dimension, Dimension, Dimension]
"""A rule for each of DIMENSIONS, in that order."""


@dataclass(frozen=True, slots=True)
class Limit:
    """A maximum over a scope, a metric and a window."""

    id: str
    scope: LimitScope
    metric: Metric
    window: Window
    maximum: int
    enforcement: Enforcement = Enforcement.HARD
    time_zone: str = "UTC"
    display_name: str = ""
    alert_percents: tuple[int, ...] = ()
    number: int = 0
    """Its number in the store; a limit that is made again under an old id has a new one."""
    revision: int = 1
    counts_from: datetime = EPOCH
    """The start of the window in which it was made: holds from before are not counted."""
    create_time: datetime = EPOCH
    update_time: datetime = EPOCH

    @property
    def etag(self) -> str:
        """Changes with every update."""
        return f"{self.number}-{self.revision}"

    def content(self) -> tuple[object, ...]:
        """All that the caller gave, to tell a repetition from another limit of the same id."""
        return (
            self.id,
            self.scope,
            self.metric,
            self.window,
            self.maximum,
            self.enforcement,
            self.time_zone,
            self.display_name,
            self.alert_percents,
        )


class Rule(NamedTuple):
    """One limit as it applies to a scope."""

    limit: Limit
    counter: str
    """Which of its counters: `tenant=acme,model=x` of the EACH dimensions, in their order."""
    metric: int
    """The place of its metric among Amounts."""
    refuses: bool
    """Whether a call that does not fit is refused."""


def values(scope: Scope) -> tuple[str, str, str, str, str, str]:
    """What a call has in each of DIMENSIONS."""
    simulated = "true" if scope.simulated else "false"
    return (scope.tenant, scope.project, scope.service, scope.provider, scope.model, simulated)


def applies(limit: Limit, scope: Scope) -> bool:
    """Whether the call is in the limit's scope."""
    return all(
        dimension.match is not Match.EXACT or dimension.value == value
        for dimension, value in zip(limit.scope, values(scope), strict=True)
    )


def counter_name(limit: Limit, scope: Scope) -> str:
    """Which of a limit's counters the call is counted on."""
    return ",".join(
        f"{name}={quote(value, safe='')}"
        for name, dimension, value in zip(DIMENSIONS, limit.scope, values(scope), strict=True)
        if dimension.match is Match.EACH
    )


def replaces(exact: Limit, each: Limit) -> bool:
    """Whether one limit takes the place of another for the calls that are in the scope of both."""
    if (exact.metric, exact.window) != (each.metric, each.window):
        return False
    if exact.enforcement is Enforcement.SHADOW:
        return False
    differing = [(a, b) for a, b in zip(exact.scope, each.scope, strict=True) if a != b]
    return bool(differing) and all(
        a.match is Match.EXACT and b.match is Match.EACH for a, b in differing
    )


class LimitSet:
    """All limits, found by tenant, so that ten thousand of them cost a call nothing."""

    def __init__(self, limits: Iterable[Limit]) -> None:
        self.all: dict[str, Limit] = {limit.id: limit for limit in limits}
        self._of_tenant: dict[str | None, list[Limit]] = {}
        for limit in self.all.values():
            tenant = limit.scope[0]
            key = tenant.value if tenant.match is Match.EXACT else None
            self._of_tenant.setdefault(key, []).append(limit)
        self._rules: dict[Account, tuple[Rule, ...]] = {}

    def for_tenant(self, tenant: str) -> list[Limit]:
        """The limits that a tenant's calls may be in the scope of, replaced ones left out."""
        own, general = self._of_tenant.get(tenant, []), self._of_tenant.get(None, [])
        return [
            limit
            for limit in (*general, *own)
            if not any(_differs_in_tenant(other, limit) for other in own)
        ]

    def rules_of(self, account: Account) -> tuple[Rule, ...]:
        """The rules of an account, remembered."""
        rules = self._rules.get(account)
        if rules is None:
            if len(self._rules) >= _ACCOUNTS_MAX:
                self._rules.clear()
            rules = self._rules[account] = self.rules(account.scope)
        return rules

    def rules(self, scope: Scope) -> tuple[Rule, ...]:
        """Every limit that counts this call, those that may not refuse it included."""
        found = [
            limit
            for limit in (*self._of_tenant.get(None, ()), *self._of_tenant.get(scope.tenant, ()))
            if applies(limit, scope)
        ]
        return tuple(
            Rule(
                limit,
                counter_name(limit, scope),
                limit.metric - 1,
                limit.enforcement is Enforcement.HARD
                and not any(replaces(other, limit) for other in found),
            )
            for limit in found
        )


def _differs_in_tenant(exact: Limit, each: Limit) -> bool:
    return replaces(exact, each) and exact.scope[1:] == each.scope[1:]


def checked(limit: Limit) -> Limit:
    """The limit as it is kept: time zone filled in, simulated use kept apart.

    Raises InvalidField naming every field that is not as it must be.
    """
    faults: list[Violation] = []
    if not _ID.fullmatch(limit.id):
        faults.append(Violation("limit.id", "must be 1 to 63 of a-z, 0-9 and -"))
    time_zone = limit.time_zone
    try:
        time_zone = checked_zone("limit.time_zone", limit.time_zone)
    except InvalidField as error:
        faults += error.violations
    for name, dimension in zip(DIMENSIONS, limit.scope, strict=True):
        faults += _dimension_faults(name, dimension)
    faults += _changeable_faults(limit)
    if faults:
        raise refused(faults)
    return replace(limit, scope=_apart(limit.scope), time_zone=time_zone)


def checked_change(limit: Limit) -> Limit:
    """A limit after an update. Raises InvalidField naming every field that is at fault."""
    if faults := _changeable_faults(limit):
        raise refused(faults)
    return limit


def _changeable_faults(limit: Limit) -> list[Violation]:
    faults: list[Violation] = []
    if not 0 <= limit.maximum <= INT64_MAX:
        faults.append(Violation("limit.maximum", "must be 0 or more"))
    if len(limit.display_name) > NAME_MAX or "\0" in limit.display_name:
        faults.append(Violation("limit.display_name", f"must have at most {NAME_MAX} characters"))
    ascending = list(limit.alert_percents) == sorted(set(limit.alert_percents))
    if not ascending or any(not 1 <= percent <= 100 for percent in limit.alert_percents):
        faults.append(Violation("limit.alert_percents", "must be 1 to 100, ascending"))
    return faults


def _dimension_faults(name: str, dimension: Dimension) -> list[Violation]:
    field = f"limit.scope.{name}.value"
    if dimension.match is not Match.EXACT:
        return [Violation(field, "must be empty unless the match is exact")] * bool(dimension.value)
    if name == "simulated" and dimension.value not in ("true", "false"):
        return [Violation(field, "must be true or false")]
    if not dimension.value and name not in ("project", "model"):
        return [Violation(field, "must be given where the match is exact")]
    if len(dimension.value) > NAME_MAX or "\0" in dimension.value:
        return [Violation(field, f"must have at most {NAME_MAX} characters")]
    return []


def _apart(scope: LimitScope) -> LimitScope:
    """Genuine and simulated use never share a counter: shared means each of the two."""
    *rest, simulated = scope
    if simulated.match is Match.SHARED:
        simulated = Dimension(Match.EACH)
    return (rest[0], rest[1], rest[2], rest[3], rest[4], simulated)


def limit_not_found(limit_id: str) -> NotFound:
    """The error for an id that no limit has."""
    return NotFound(
        f"there is no limit {limit_id}",
        violations=[Violation(f"limit/{limit_id}", "is not there")],
    )
