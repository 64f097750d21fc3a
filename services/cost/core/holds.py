"""Holds: what is set aside for one attempt at one call, and how it is resolved.

    HELD -- settle --> SETTLED
      |---- release -> RELEASED                    (not billed)
      `---- expiry --> EXPIRED, charged as held    (until a late settle or release corrects it)

A hold that was refused is remembered as DENIED, so that its id keeps its first outcome.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from enum import IntEnum
from typing import NamedTuple, TypeAlias

from chassis.errors import TollgateError
from services.cost.core.prices import Rate
from services.cost.core.usage import Account, Metric, Scope, Usage
from services.cost.core.windows import Window

TTL_MIN_S = 1
TTL_MAX_S = 7 * 24 * 3600


class State(IntEnum):
    """Where a hold stands; the numbers up to EXPIRED are those of the wire."""

    HELD = 1
    SETTLED = 2
    RELEASED = 3
    EXPIRED = 4
    DENIED = 5


@dataclass(slots=True)
class Refusal:
    """One limit that a call did not fit, in the metric's unit."""

    limit_id: str
    display_name: str
    metric: Metric
    window: Window
    maximum: int
    consumed: int
    requested: int

    @property
    def over(self) -> int:
        """By how much the call would exceed the maximum."""
        return self.consumed + self.requested - self.maximum


@dataclass(slots=True)
class Denial:
    """Every limit that refused, and when the call may fit again: None where it never can."""

    refusals: list[Refusal]
    retry_time: datetime | None


@dataclass(slots=True)
class Hold:
    """A hold as it stands. `usage` is what was used, once settled."""

    id: str
    account: Account
    request_id: str
    bound: Usage
    held_nanos_usd: int
    price_version: int
    rate: Rate
    state: State
    create_time: datetime
    expire_time: datetime
    usage: Usage | None = None
    charged_nanos_usd: int = 0
    overrun_nanos_usd: int = 0
    unconfirmed: bool = False
    denial: Denial | None = None


class Action(IntEnum):
    """What is to be done with a hold."""

    SETTLE = 1
    RELEASE = 2
    EXTEND = 3
    EXPIRE = 4


@dataclass(slots=True)
class Authorization:
    """A call that asks for a hold."""

    hold_id: str
    """A UUID in lower case with hyphens."""
    scope: Scope
    bound: Usage
    ttl_ms: int
    request_id: str = ""
    traceparent: str = ""
    ends: float | None = None
    """When its caller gives up, on this process's monotonic clock."""


@dataclass(slots=True)
class Resolution:
    """Something to be done with a hold that is there."""

    action: Action
    tenant: str
    hold_id: str
    usage: Usage = Usage()  # noqa: RUF009  # immutable
    ttl_ms: int = 0
    traceparent: str = ""


class Decision(NamedTuple):
    """The answer to an authorization: an open hold, or one that is DENIED and says why."""

    hold: Hold
    replayed: bool


Order: TypeAlias = Authorization | Resolution
Outcome: TypeAlias = Decision | Hold
Result: TypeAlias = Outcome | TollgateError
