"""Errors to gRPC statuses with `google.rpc` details, and back."""

from __future__ import annotations

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import DecodeError
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

from chassis.errors import (
    BY_REASON,
    Billed,
    Cancelled,
    DeadlineExceeded,
    Internal,
    OutcomeUnknown,
    ProviderUnavailable,
    TollgateError,
    Violation,
)

DOMAIN = "tollgate"
_DETAILS_KEY = "grpc-status-details-bin"

# Which detail carries the violations of an error, by the status code that it has.
_QUOTA, _PRECONDITION, _RESOURCE, _FIELD = "quota", "precondition", "resource", "field"
_KIND_OF_CODE = {
    "RESOURCE_EXHAUSTED": _QUOTA,
    "FAILED_PRECONDITION": _PRECONDITION,
    "ALREADY_EXISTS": _RESOURCE,
    "NOT_FOUND": _RESOURCE,
    "ABORTED": _RESOURCE,
    "INVALID_ARGUMENT": _FIELD,
}


def to_status(error: TollgateError) -> status_pb2.Status:
    """The status of an error: its code, its message and its details."""
    status = status_pb2.Status(code=code_pb2.Code.Value(error.code), message=error.message)
    metadata = dict(error.metadata)
    if error.billed is Billed.UNKNOWN:
        metadata["billed"] = Billed.UNKNOWN.value
    info = error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=metadata)
    status.details.add().Pack(info)
    _pack_violations(status, error)
    if error.retry_after_s is not None:
        delay = Duration()
        delay.FromMilliseconds(max(0, round(error.retry_after_s * 1000)))
        status.details.add().Pack(error_details_pb2.RetryInfo(retry_delay=delay))
    return status


def _pack_violations(status: status_pb2.Status, error: TollgateError) -> None:
    violations, kind = error.violations, _KIND_OF_CODE.get(error.code)
    if not violations or kind is None:
        return
    pack = status.details.add().Pack
    if kind == _QUOTA:
        quota = error_details_pb2.QuotaFailure()
        for v in violations:
            quota.violations.add(subject=v.subject, description=v.description)
        pack(quota)
    elif kind == _PRECONDITION:
        precondition = error_details_pb2.PreconditionFailure()
        for v in violations:
            precondition.violations.add(
                type=error.reason, subject=v.subject, description=v.description
            )
        pack(precondition)
    elif kind == _FIELD:
        request = error_details_pb2.BadRequest()
        for v in violations:
            request.field_violations.add(field=v.subject, description=v.description)
        pack(request)
    else:
        first = violations[0]
        resource_type, _, name = first.subject.partition("/")
        pack(
            error_details_pb2.ResourceInfo(
                resource_type=resource_type, resource_name=name, description=first.description
            )
        )


def to_grpc(error: TollgateError) -> grpc.Status:
    """The status as `context.abort_with_status` takes it."""
    status: grpc.Status = rpc_status.to_status(to_status(error))
    return status


def from_rpc_error(error: grpc.aio.AioRpcError) -> TollgateError:
    """The error that a peer meant; its text is kept only where the peer is one of ours."""
    for key, value in error.trailing_metadata() or ():
        if key == _DETAILS_KEY and isinstance(value, bytes):
            decoded = _decode(value)
            if decoded is not None:
                return decoded
    return _foreign(error)


def _foreign(error: grpc.aio.AioRpcError) -> TollgateError:
    """An error that gRPC itself made, or a peer that is not one of ours."""
    code = error.code()
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return DeadlineExceeded("the deadline passed while waiting for a peer")
    if code is grpc.StatusCode.CANCELLED:
        return Cancelled("the call was cancelled")
    if code is grpc.StatusCode.UNAVAILABLE and not_sent(error):
        return ProviderUnavailable("a peer cannot be reached")
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED:
        # gRPC's own refusals: too many calls, or a message over the peer's limit.
        return ProviderUnavailable("a peer refused the call before reading it")
    if code is grpc.StatusCode.UNAVAILABLE:
        return OutcomeUnknown("the connection to a peer was lost while it was at work")
    return Internal()


def not_sent(error: grpc.aio.AioRpcError) -> bool:
    """Whether an UNAVAILABLE of gRPC's own is certain to have reached nobody."""
    text = f"{error.details()} {error.debug_error_string()}".lower()
    return any(
        sign in text
        for sign in (
            "failed to connect",
            "connection refused",
            "no such file or directory",
            "dns resolution failed",
            "name resolution",
            "too_many_pings",
            "graceful_stop",
        )
    )


def _decode(packed: bytes) -> TollgateError | None:
    try:
        status = status_pb2.Status.FromString(packed)
    except DecodeError:
        return None
    info = error_details_pb2.ErrorInfo()
    violations: list[Violation] = []
    retry_after_s: float | None = None
    for detail in status.details:
        if detail.Is(error_details_pb2.ErrorInfo.DESCRIPTOR):
            detail.Unpack(info)
        elif detail.Is(error_details_pb2.RetryInfo.DESCRIPTOR):
            retry = error_details_pb2.RetryInfo()
            detail.Unpack(retry)
            retry_after_s = retry.retry_delay.ToMilliseconds() / 1000
        else:
            violations += _violations(detail)
    if info.domain != DOMAIN or info.reason not in BY_REASON:
        return None
    metadata = dict(info.metadata)
    billed = Billed(metadata.pop("billed", Billed.NO.value))
    return rebuilt(
        BY_REASON[info.reason], status.message, violations, retry_after_s, metadata, billed
    )


def rebuilt(
    kind: type[TollgateError],
    message: str,
    violations: list[Violation],
    retry_after_s: float | None,
    metadata: dict[str, str],
    billed: Billed,
) -> TollgateError:
    """An error as it was, whatever arguments its class is raised with."""
    error = kind.__new__(kind)
    TollgateError.__init__(
        error,
        message,
        violations=violations,
        retry_after_s=retry_after_s,
        metadata=metadata,
        billed=billed,
    )
    return error


def _violations(detail: AnyMessage) -> list[Violation]:
    if detail.Is(error_details_pb2.QuotaFailure.DESCRIPTOR):
        quota = error_details_pb2.QuotaFailure()
        detail.Unpack(quota)
        return [Violation(v.subject, v.description) for v in quota.violations]
    if detail.Is(error_details_pb2.PreconditionFailure.DESCRIPTOR):
        precondition = error_details_pb2.PreconditionFailure()
        detail.Unpack(precondition)
        return [Violation(v.subject, v.description) for v in precondition.violations]
    if detail.Is(error_details_pb2.BadRequest.DESCRIPTOR):
        request = error_details_pb2.BadRequest()
        detail.Unpack(request)
        return [Violation(v.field, v.description) for v in request.field_violations]
    if detail.Is(error_details_pb2.ResourceInfo.DESCRIPTOR):
        resource = error_details_pb2.ResourceInfo()
        detail.Unpack(resource)
        subject = f"{resource.resource_type}/{resource.resource_name}"
        return [Violation(subject, resource.description)]
    return []
