"""Who is calling: an API key, a signed identity of the mesh, or a tenant taken at its word."""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Mapping
from enum import StrEnum

from chassis import call as calls
from chassis.call import Call, checked_name
from chassis.errors import Forbidden, InvalidField, Unauthenticated
from chassis.identity import verify
from chassis.keys import KeyFile

Metadata = Mapping[str, str | bytes]

AUTHORIZATION = "authorization"
_BEARER = "bearer "


class Authentication(StrEnum):
    """How callers from outside the mesh say who they are."""

    NONE = "none"
    KEYS = "keys"


def is_loopback(listen: str) -> bool:
    """Whether only this machine can reach an address (`HOST:PORT` or `unix:PATH`)."""
    if listen.startswith("unix:"):
        return True
    host = listen.rpartition(":")[0].strip("[]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def authenticator(secret: bytes, keys: KeyFile | None) -> Callable[[Metadata], Call]:
    """What makes the call of its metadata; without `keys` a tenant is taken at its word.

    It raises Unauthenticated, Forbidden and InvalidField.
    """

    def authenticate(metadata: Metadata) -> Call:
        identity = metadata.get(calls.IDENTITY)
        if identity:
            return _internal(metadata, str(identity), secret)
        return _trusting(metadata) if keys is None else _by_key(metadata, keys)

    return authenticate


def _internal(metadata: Metadata, identity: str, secret: bytes) -> Call:
    call = verify(identity, secret)
    return Call(
        tenant=call.tenant,
        project=call.project,
        request_id=call.request_id or _request_id(metadata),
        call_id=_name(metadata, calls.CALL_ID),
        mode=_name(metadata, calls.MODE),
        provider=_name(metadata, calls.PROVIDER),
        internal=True,
        operator=True,
    )


def _by_key(metadata: Metadata, keys: KeyFile) -> Call:
    value = str(metadata.get(AUTHORIZATION, ""))
    if value[: len(_BEARER)].lower() != _BEARER:
        raise Unauthenticated("send an API key: `authorization: Bearer tg_...`")
    key = keys.find(value[len(_BEARER) :].strip())
    if key is None:
        raise Unauthenticated("the API key is not known")
    named = _name(metadata, calls.TENANT)
    if named and named != key.tenant:
        raise Forbidden("the API key is another tenant's")
    project = _name(metadata, calls.PROJECT)
    if key.project and project not in ("", key.project):
        raise Forbidden("the API key is another project's")
    return _outside(metadata, key.tenant, key.project or project, operator=key.operator)


def _trusting(metadata: Metadata) -> Call:
    tenant = _name(metadata, calls.TENANT) or "default"
    return _outside(metadata, tenant, _name(metadata, calls.PROJECT), operator=True)


def _outside(metadata: Metadata, tenant: str, project: str, *, operator: bool) -> Call:
    return Call(
        tenant=tenant,
        project=project,
        request_id=_request_id(metadata),
        call_id=_name(metadata, calls.CALL_ID),
        mode=_name(metadata, calls.MODE),
        provider=_name(metadata, calls.PROVIDER),
        operator=operator,
    )


def request_id_of(metadata: Metadata) -> str:
    """By which id to speak of a call, whoever makes it: its own where that is one, else a new."""
    call = calls.current_or_none()
    if call is not None:
        return call.request_id
    try:
        return _request_id(metadata)
    except InvalidField:
        return calls.new_request_id()


def _request_id(metadata: Metadata) -> str:
    return _name(metadata, calls.REQUEST_ID) or calls.new_request_id()


def _name(metadata: Metadata, key: str) -> str:
    """The value of a key, checked; empty where it is absent."""
    value = metadata.get(key)
    return checked_name(key, str(value)) if value is not None else ""
