"""Who is calling: the tenant, project and request that the work at hand is done for.

The server side sets it from the call's metadata, the client side passes it on; work in the
background sets it itself with `calling`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar, Token
from dataclasses import dataclass
from uuid import uuid4

from chassis.errors import InvalidField, Unauthenticated

# The keys of call metadata, on the wire.
REQUEST_ID = "tollgate-request-id"
CALL_ID = "tollgate-call-id"
PROJECT = "tollgate-project"
TENANT = "tollgate-tenant"
MODE = "tollgate-mode"
PROVIDER = "tollgate-provider"
IDENTITY = "tollgate-identity"
TRACEPARENT = "traceparent"
# The keys of trailing metadata: serialized messages.
USAGE = "tollgate-usage-bin"
PROVENANCE = "tollgate-provenance-bin"
RECEIPT = "tollgate-receipt-bin"

NAME_MAX = 128


@dataclass(frozen=True, slots=True)
class Call:
    """Whom a piece of work is done for."""

    tenant: str
    project: str = ""
    request_id: str = ""
    call_id: str = ""
    """The caller's idempotency key; empty where it gave none."""
    hold_id: str = ""
    """The hold that pays for the work; empty where nobody asked the ledger."""
    mode: str = ""
    """The mode that the caller chose for this call; empty where it chose none."""
    provider: str = ""
    """The provider that must do the work; empty where any may."""
    internal: bool = False
    """Whether the caller holds the mesh secret: a daemon or an operator."""
    operator: bool = False
    """Whether the caller may change modes."""


_current: ContextVar[Call] = ContextVar("tollgate_call")
_deadline: ContextVar[float | None] = ContextVar("tollgate_deadline", default=None)


def current() -> Call:
    """The call being served. Raises Unauthenticated where there is none."""
    try:
        return _current.get()
    except LookupError:
        raise Unauthenticated("the call carries no identity") from None


def current_or_none() -> Call | None:
    """The call being served, if any."""
    return _current.get(None)


def enter(call: Call) -> Token[Call]:
    """Set the current call for the rest of this task. `calling` is what most code wants."""
    return _current.set(call)


@contextmanager
def calling(call: Call) -> Iterator[Call]:
    """Do the work within on behalf of `call`."""
    token = _current.set(call)
    try:
        yield call
    finally:
        _current.reset(token)


def set_time_left(seconds: float | None) -> None:
    """Set by when the call being served must end; None where it may take forever."""
    _deadline.set(None if seconds is None else time.monotonic() + seconds)


def time_left_s() -> float | None:
    """How long the call being served may still take, in seconds; None where it may take forever."""
    ends = _deadline.get()
    return None if ends is None else ends - time.monotonic()


def new_request_id() -> str:
    """A request id of our own: 32 hexadecimal digits."""
    return uuid4().hex


def checked_name(key: str, value: str) -> str:
    """The value of a metadata key that must be 1 to 128 printable ASCII characters.

    Raises InvalidField naming the key.
    """
    if not (0 < len(value) <= NAME_MAX and value.isascii() and value.isprintable()):
        raise InvalidField.of(key, "must be 1 to 128 printable ASCII characters")
    return value
