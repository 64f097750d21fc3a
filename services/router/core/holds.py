"""Holds as the gate knows them: their ids, what they are expected to be charged, refusals."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import NamedTuple, Protocol
from uuid import UUID

from chassis.errors import BudgetExhausted, RateLimited, TollgateError, Violation

# Of our own making, so that nobody else's UUIDv5 is one of ours.
_NAMESPACE = UUID("6f1d2c7e-3f0b-5b57-9a1e-2b7d5a4c8e10")

_VARIANTS = {f"{digit:x}": f"{digit & 3 | 8:x}" for digit in range(16)}

_MILLION = 1_000_000

# What int64 holds; a bound beyond it is no bound.
UNITS_MAX = (1 << 63) - 1


class Units(NamedTuple):
    """What a call used, or may use at the most."""

    tokens: int = 0
    pages: int = 0
    bytes: int = 0
    requests: int = 0


class PriceLine(NamedTuple):
    """The price of one unit, by its name in `Units`, in nano-dollars per million."""

    unit: str
    nanos_usd_per_million: int


@dataclass(frozen=True, slots=True)
class Ask:
    """What the ledger is asked. `timeout_s` is how long the asker waits, None for ever.

    `ttl_s` is how long the hold stays open, None for as long as the ledger's own default.
    """

    hold_id: str
    tenant: str
    project: str
    service: str
    provider: str
    model: str
    simulated: bool
    operation: str
    bound: Units
    ttl_s: float | None
    request_id: str
    traceparent: str
    timeout_s: float | None


@dataclass(slots=True)
class Hold:
    """What the ledger admitted: `state` is HELD unless the id was decided before."""

    id: str
    tenant: str
    held_nanos_usd: int
    price_version: int
    prices: tuple[PriceLine, ...]
    state: str
    replayed: bool
    traceparent: str = ""


class Ledger(Protocol):
    """The ledger, as the gate asks it."""

    async def authorize(self, ask: Ask) -> Hold:
        """A hold for the call. A hold whose asker was cancelled meanwhile is released.

        Raises BudgetExhausted, RateLimited, PriceUnknown, IdReused, LedgerUnavailable, Overloaded.
        """
        ...

    def settle(self, hold: Hold, usage: Units) -> None:
        """Charge what was used, soon; it is tried again until the ledger has it."""
        ...

    def release(self, hold: Hold) -> None:
        """Give the hold back, soon; it is tried again until the ledger has it."""
        ...


class Refusal(NamedTuple):
    """One limit that refused; amounts are in the metric's unit, nano-dollars for COST."""

    limit_id: str
    display_name: str
    metric: str
    window: str
    maximum: int
    consumed: int
    requested: int
    over: int


def hold_id(tenant: str, call_id: str, provider: str, number: int) -> str:
    """The id of one attempt: UUIDv5 of the call id, the provider and the attempt's number."""
    name = f"{tenant}\n{call_id}\n{provider}\n{number}"
    # As uuid.uuid5 has it (RFC 9562, 5.5), without making a UUID to write it down.
    digits = hashlib.sha1(_NAMESPACE.bytes + name.encode(), usedforsecurity=False).hexdigest()
    variant = _VARIANTS[digits[16]]
    return f"{digits[:8]}-{digits[8:12]}-5{digits[13:16]}-{variant}{digits[17:20]}-{digits[20:32]}"


def expected_nanos_usd(usage: Units, prices: Sequence[PriceLine]) -> int:
    """What the ledger will charge for the usage: the units at their prices, then rounded up.

    Units without a line are not charged; whatever was used, it was one request at least.
    """
    counted = usage if usage.requests else usage._replace(requests=1)
    total: int = sum(getattr(counted, line.unit) * line.nanos_usd_per_million for line in prices)
    return -(-total // _MILLION)


def refused(refusals: Sequence[Refusal], retry_at: datetime | None, now: datetime) -> TollgateError:
    """The error for a denial: RATE_LIMITED where a minute's wait is all it takes.

    Without `retry_at` no wait helps, whatever the windows: BUDGET_EXHAUSTED, to be raised.
    """
    minutes = bool(refusals) and all(refusal.window == "MINUTE" for refusal in refusals)
    rate = minutes and retry_at is not None
    kind: Callable[..., TollgateError] = RateLimited if rate else BudgetExhausted
    return kind(
        _not_fitting(refusals, never=retry_at is None),
        violations=[_violation(refusal) for refusal in refusals],
        retry_after_s=None if retry_at is None else max(0.0, (retry_at - now).total_seconds()),
        metadata={} if retry_at is None else {"retry_time": retry_at.astimezone(UTC).isoformat()},
    )


def _not_fitting(refusals: Sequence[Refusal], *, never: bool) -> str:
    """Which limits the call does not fit, and what to do where it `never` will."""
    if too_large := [refusal for refusal in refusals if refusal.requested > refusal.maximum]:
        names = " and the limit ".join(map(_name, too_large))
        return f"the call is larger than the limit {names} allows at once; raise it"
    names = ", ".join(map(_name, refusals)) or "a limit"
    return f"the call does not fit {names}" + ("; waiting does not help, raise it" * never)


def _name(refusal: Refusal) -> str:
    return refusal.display_name or refusal.limit_id


def _violation(refusal: Refusal) -> Violation:
    unit = "nano-dollars" if refusal.metric == "COST" else refusal.metric.lower()
    return Violation(
        f"limit/{refusal.limit_id}",
        f"{refusal.over} {unit} over: {refusal.requested} asked, {refusal.consumed} of "
        f"{refusal.maximum} taken in this {refusal.window.lower()}",
    )
