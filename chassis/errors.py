"""The one family of errors, as raised anywhere in the mesh; `chassis.status` puts it on the wire.

Every error has a `reason` in UPPER_SNAKE, which is what callers branch on, and a `code`, the name
of the gRPC status code that carries it. Messages are written for the caller: they name fields and
limits, never a vendor's body, a key, a DSN or a path of the host.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import ClassVar


class Billed(StrEnum):
    """Whether a failed call may have cost money at the provider."""

    NO = "no"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Violation:
    """A field, limit or precondition that was not met: `subject` names it, `description` why."""

    subject: str
    description: str


class TollgateError(Exception):
    """An error with a reason. Raise a subclass; catch this to catch them all.

    `metadata` travels in the ErrorInfo; `violations` become field, quota or precondition
    violations, whichever the reason calls for; `retry_after_s` becomes a RetryInfo.
    """

    reason: ClassVar[str] = "INTERNAL"
    code: ClassVar[str] = "INTERNAL"
    billed: Billed = Billed.UNKNOWN

    def __init__(
        self,
        message: str,
        *,
        violations: Sequence[Violation] = (),
        retry_after_s: float | None = None,
        metadata: Mapping[str, str] | None = None,
        billed: Billed | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.violations = tuple(violations)
        self.retry_after_s = retry_after_s
        self.metadata = dict(metadata or {})
        if billed is not None:
            self.billed = billed


class NotBilled(TollgateError):
    """An error that is certain to have cost nothing."""

    billed = Billed.NO


# Refused by the ledger. `violations` name each limit that refused and how far over the call was.
class BudgetExhausted(NotBilled):
    reason, code = "BUDGET_EXHAUSTED", "RESOURCE_EXHAUSTED"


class RateLimited(NotBilled):
    reason, code = "RATE_LIMITED", "RESOURCE_EXHAUSTED"


# Not billed and safe to retry: all of UNAVAILABLE is.
class Unavailable(NotBilled):
    """Nothing was spent; the same call may be sent again after `retry_after_s`, in seconds."""

    code = "UNAVAILABLE"

    def __init__(
        self,
        message: str,
        *,
        retry_after_s: float | None = 1.0,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message, retry_after_s=retry_after_s, metadata=metadata)


class Overloaded(Unavailable):
    reason = "OVERLOADED"


class LedgerUnavailable(Unavailable):
    reason = "LEDGER_UNAVAILABLE"


class NoBackend(Unavailable):
    reason = "NO_BACKEND"


class ProviderUnavailable(Unavailable):
    reason = "PROVIDER_UNAVAILABLE"


class OutcomeUnknown(TollgateError):
    """The provider may have done the work. `metadata` carries the hold id."""

    reason, code = "OUTCOME_UNKNOWN", "UNKNOWN"


class CallReplayed(NotBilled):
    """This call id was forwarded before. `metadata` carries the hold id and its state."""

    reason, code = "CALL_REPLAYED", "ABORTED"


# Preconditions.
class PriceUnknown(NotBilled):
    reason, code = "PRICE_UNKNOWN", "FAILED_PRECONDITION"


class HoldClosed(NotBilled):
    reason, code = "HOLD_CLOSED", "FAILED_PRECONDITION"


class SpaceMismatch(NotBilled):
    reason, code = "SPACE_MISMATCH", "FAILED_PRECONDITION"


class ProviderRejected(NotBilled):
    """The provider looked at the call and refused it. `metadata` may carry the vendor's code."""

    reason, code = "PROVIDER_REJECTED", "FAILED_PRECONDITION"


# Resources. `violations` name the resource (its kind and name) as the subject.
class IdReused(NotBilled):
    reason, code = "ID_REUSED", "ALREADY_EXISTS"


class AlreadyExists(NotBilled):
    reason, code = "ALREADY_EXISTS", "ALREADY_EXISTS"


class Conflict(NotBilled):
    """The etag given is not the resource's: read it again, then decide."""

    reason, code = "CONFLICT", "ABORTED"


class NotFound(NotBilled):
    reason, code = "NOT_FOUND", "NOT_FOUND"


# The caller's input. `violations` name the fields.
class DocumentUnreadable(NotBilled):
    reason, code = "DOCUMENT_UNREADABLE", "INVALID_ARGUMENT"


class DocumentEncrypted(NotBilled):
    reason, code = "DOCUMENT_ENCRYPTED", "INVALID_ARGUMENT"


class DocumentTooLarge(NotBilled):
    reason, code = "DOCUMENT_TOO_LARGE", "INVALID_ARGUMENT"


class UnsupportedMediaType(NotBilled):
    reason, code = "UNSUPPORTED_MEDIA_TYPE", "INVALID_ARGUMENT"


class InvalidField(NotBilled):
    """One or more fields of the request are not as they must be."""

    reason, code = "INVALID_FIELD", "INVALID_ARGUMENT"

    @classmethod
    def of(cls, field: str, description: str) -> InvalidField:
        """The error for one field: its path in the request, and what it must be."""
        return cls(f"{field}: {description}", violations=[Violation(field, description)])


# Who is calling.
class Unauthenticated(NotBilled):
    reason, code = "UNAUTHENTICATED", "UNAUTHENTICATED"


class Forbidden(NotBilled):
    reason, code = "FORBIDDEN", "PERMISSION_DENIED"


class ModeForbidden(NotBilled):
    reason, code = "MODE_FORBIDDEN", "PERMISSION_DENIED"


# The call itself ended.
class DeadlineExceeded(TollgateError):
    reason, code = "DEADLINE_EXCEEDED", "DEADLINE_EXCEEDED"


class Cancelled(TollgateError):
    reason, code = "CANCELLED", "CANCELLED"


class Internal(TollgateError):
    """Something unexpected. Its message is always `internal error`; the log has the rest."""

    def __init__(self) -> None:
        super().__init__("internal error")


def _leaves(kind: type[TollgateError]) -> list[type[TollgateError]]:
    return [leaf for sub in kind.__subclasses__() for leaf in (sub, *_leaves(sub))]


BY_REASON: dict[str, type[TollgateError]] = {
    kind.reason: kind for kind in _leaves(TollgateError) if "reason" in vars(kind)
} | {"INTERNAL": Internal}
