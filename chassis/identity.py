"""The signed identity that every call inside the mesh carries.

It is `base64url(payload).base64url(HMAC-SHA256(secret, payload))`, the payload being JSON with the
tenant, project, request id, hold id and the second at which it ends. It is short-lived: a copied
one is of no use for long.
"""

from __future__ import annotations

import hmac
import json
import time
from base64 import urlsafe_b64decode, urlsafe_b64encode

from chassis.call import Call
from chassis.errors import Unauthenticated

LIFETIME_S = 300


def sign(call: Call, secret: bytes, *, lifetime_s: float = LIFETIME_S) -> str:
    """The identity of a call, as the value of the metadata key `tollgate-identity`."""
    ends = int(time.time() + lifetime_s)
    payload = json.dumps(
        [call.tenant, call.project, call.request_id, call.hold_id, ends], separators=(",", ":")
    ).encode()
    signature = hmac.digest(secret, payload, "sha256")
    return f"{urlsafe_b64encode(payload).decode()}.{urlsafe_b64encode(signature).decode()}"


def verify(identity: str, secret: bytes) -> Call:
    """The call whose identity this is. Raises Unauthenticated."""
    try:
        payload64, _, signature64 = identity.partition(".")
        payload = urlsafe_b64decode(payload64)
        genuine = hmac.compare_digest(
            hmac.digest(secret, payload, "sha256"), urlsafe_b64decode(signature64)
        )
        if not genuine:
            raise ValueError
        tenant, project, request_id, hold_id, ends = json.loads(payload)
    except ValueError:
        raise Unauthenticated("the identity is not one of this mesh") from None
    if time.time() > ends:
        raise Unauthenticated("the identity has expired")
    return Call(
        tenant=tenant, project=project, request_id=request_id, hold_id=hold_id, internal=True
    )
