"""Conversions that the services share. Holds go by the thousand, so their path is short."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import Final, TypeAlias

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp
from tollgate.cost.v1 import cost_pb2 as pb
from tollgate.cost.v1 import price_pb2, usage_pb2

from chassis.errors import InvalidField, Violation
from services.cost.core.holds import TTL_MAX_S, TTL_MIN_S, Denial, Hold, State
from services.cost.core.prices import Rate, Unit
from services.cost.core.usage import Account, Scope, Usage, checked_usage, refused
from services.cost.core.windows import EPOCH

NAME_MAX = 256
REQUEST_ID_MAX = 128
_REMEMBERED_MAX: Final = 4_000
_UUID: Final = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")
_REQUIRED: Final = ("tenant", "service", "provider", "operation")
_MICROSECOND: Final = EPOCH.resolution
_TIME_MIN: Final = datetime(1970, 1, 1, tzinfo=UTC)


def checked_id(field: str, value: str) -> str:
    """A UUID in lower case. Raises InvalidField."""
    if _UUID.fullmatch(value):
        return value
    if _UUID.fullmatch(value.lower()):
        return value.lower()
    raise InvalidField.of(field, "must be a UUID with hyphens")


def checked_tenant(value: str) -> str:
    """A tenant's name. Raises InvalidField."""
    if not _is_name(value):
        raise InvalidField.of("tenant", f"must be 1 to {NAME_MAX} printable characters")
    return value


def checked_request_id(value: str) -> str:
    """A request id, or nothing. Raises InvalidField."""
    if len(value) > REQUEST_ID_MAX or not value.isprintable():
        raise InvalidField.of("request_id", f"must have at most {REQUEST_ID_MAX} characters")
    return value


def _is_name(value: str) -> bool:
    return 0 < len(value) <= NAME_MAX and value.isprintable()


class Scopes:
    """Scopes that were checked before, so that each is checked once."""

    def __init__(self) -> None:
        self._known: dict[tuple[bytes, str], Scope] = {}

    def of(self, request: pb.AuthorizeRequest) -> Scope:
        """The scope of a call. Raises InvalidField naming every field at fault."""
        asked, operation = request.scope, request.operation
        key = (asked.SerializeToString(), operation)
        known = self._known.get(key)
        if known is not None:
            return known
        if not request.HasField("scope"):
            raise InvalidField.of("scope", "must be given")
        scope = Scope(
            asked.tenant,
            asked.project,
            asked.service,
            asked.provider,
            asked.model,
            operation,
            asked.simulated,
        )
        _check_scope(scope)
        if len(self._known) >= _REMEMBERED_MAX:
            self._known.clear()
        self._known[key] = scope
        return scope


def _check_scope(scope: Scope) -> None:
    faults = []
    for name, value in scope._asdict().items():
        if name == "simulated" or _is_name(value) or (not value and name not in _REQUIRED):
            continue
        field = name if name == "operation" else f"scope.{name}"
        faults.append(Violation(field, f"must be 1 to {NAME_MAX} printable characters"))
    if faults:
        raise refused(faults)


def to_usage(field: str, usage: usage_pb2.Usage) -> Usage:
    """A usage from the wire. Raises InvalidField."""
    return checked_usage(field, usage.tokens, usage.pages, usage.bytes, usage.requests)


def to_ttl_ms(ttl: Duration) -> int:
    """A time to live in milliseconds, rounded up. Raises InvalidField."""
    millis = ttl.seconds * 1000 - (-ttl.nanos // 1_000_000)
    if not TTL_MIN_S * 1000 <= millis <= TTL_MAX_S * 1000 or abs(ttl.nanos) >= 1_000_000_000:
        raise InvalidField.of("ttl", "must be one second to seven days")
    return millis


def to_time(field: str, time: Timestamp) -> datetime:
    """A time from the wire, of 1970 or later. Raises InvalidField."""
    try:
        found = time.ToDatetime(UTC)
    except (ValueError, OverflowError):
        found = datetime.min.replace(tzinfo=UTC)
    if found < _TIME_MIN or found.year > 9000:
        raise InvalidField.of(field, "must be a time of the years 1970 to 9000")
    return found


def set_time(message: Timestamp, at: datetime) -> None:
    """Put a time into a message, exactly."""
    micros = (at - EPOCH) // _MICROSECOND
    message.seconds, rest = divmod(micros, 1_000_000)
    message.nanos = rest * 1000


def set_usage(message: usage_pb2.Usage, usage: Usage) -> None:
    """Put a usage into an empty message."""
    tokens, pages, size, requests = usage
    message.requests = requests
    if tokens:
        message.tokens = tokens
    if pages:
        message.pages = pages
    if size:
        message.bytes = size


_Shared: TypeAlias = tuple[Account, Rate, int, datetime, datetime]


class HoldWriter:
    """Writes holds into messages. What the holds of a batch share is made once and copied."""

    def __init__(self) -> None:
        self._made: dict[_Shared, pb.Hold] = {}

    def write(self, message: pb.Hold, hold: Hold) -> None:
        """Fill an empty message."""
        shared = (
            hold.account,
            hold.rate,
            hold.price_version,
            hold.create_time,
            hold.expire_time,
        )
        made = self._made.get(shared)
        if made is None:
            if len(self._made) >= _REMEMBERED_MAX:
                self._made.clear()
            made = self._made[shared] = _shared_part(*shared)
        message.CopyFrom(made)
        message.id = hold.id
        if hold.request_id:
            message.request_id = hold.request_id
        message.held_nanos_usd = hold.held_nanos_usd
        set_usage(message.bound, hold.bound)
        if hold.state is not State.HELD:
            message.state = int(hold.state)  # type: ignore[assignment]  # the numbers are the same
        if hold.usage is not None:
            set_usage(message.usage, hold.usage)
        if hold.charged_nanos_usd:
            message.charged_nanos_usd = hold.charged_nanos_usd
            message.overrun_nanos_usd = hold.overrun_nanos_usd
            message.unconfirmed = hold.unconfirmed


def _shared_part(
    account: Account, rate: Rate, price_version: int, create_time: datetime, expire_time: datetime
) -> pb.Hold:
    scope = account.scope
    message = pb.Hold(
        scope=scope_message(scope),
        operation=scope.operation,
        price_version=price_version,
        state=pb.HOLD_STATE_HELD,
        unit_prices=[
            price_pb2.UnitPrice(
                unit=int(unit),  # type: ignore[arg-type]  # the numbers are the same
                nanos_usd_per_million=nanos,
            )
            for unit, nanos in zip(Unit, rate, strict=True)
            if nanos is not None
        ],
    )
    set_time(message.create_time, create_time)
    set_time(message.expire_time, expire_time)
    return message


def scope_message(scope: Scope) -> usage_pb2.Scope:
    """A scope for the wire."""
    return usage_pb2.Scope(
        tenant=scope.tenant,
        project=scope.project,
        service=scope.service,
        provider=scope.provider,
        model=scope.model,
        simulated=scope.simulated,
    )


def usage_message(usage: Usage) -> usage_pb2.Usage:
    """A usage for the wire."""
    return usage_pb2.Usage(
        tokens=usage.tokens, pages=usage.pages, bytes=usage.bytes, requests=usage.requests
    )


def write_denial(message: pb.Denial, denial: Denial) -> None:
    """Fill an empty message."""
    for refusal in denial.refusals:
        message.refusals.add(
            limit_id=refusal.limit_id,
            display_name=refusal.display_name,
            metric=int(refusal.metric),
            window=int(refusal.window),
            maximum=refusal.maximum,
            consumed=refusal.consumed,
            requested=refusal.requested,
            over=refusal.over,
        )
    if denial.retry_time is not None:
        set_time(message.retry_time, denial.retry_time)
