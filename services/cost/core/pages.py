"""Page tokens: where a list goes on, good for the same question only."""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
from collections.abc import Sequence

from chassis.errors import InvalidField

PAGE_DEFAULT = 100
PAGE_MAX = 1_000


def page_size(asked: int) -> int:
    """How many a page has; 100 where 0 was asked. Raises InvalidField."""
    if not 0 <= asked <= PAGE_MAX:
        raise InvalidField.of("page_size", f"must be 0 to {PAGE_MAX}")
    return asked or PAGE_DEFAULT


def page_token(question: Sequence[object], last: Sequence[str]) -> str:
    """The token of the page after the one that ended with `last`."""
    text = json.dumps([_mark(question), *last], separators=(",", ":"))
    return base64.urlsafe_b64encode(text.encode()).decode()


def last_of(question: Sequence[object], token: str, count: int) -> list[str] | None:
    """What the page before ended with, `count` strings; None for the first page.

    Raises InvalidField for a token that is not of this question.
    """
    if not token:
        return None
    try:
        found = json.loads(base64.b64decode(token.encode("ascii"), b"-_", validate=True))
    except (binascii.Error, UnicodeError, ValueError):
        found = None
    if (
        not isinstance(found, list)
        or len(found) != count + 1
        or not all(isinstance(part, str) for part in found)
        or found[0] != _mark(question)
    ):
        raise InvalidField.of("page_token", "must be the token of the page before")
    return found[1:]


def _mark(question: Sequence[object]) -> str:
    return hashlib.blake2s(repr(tuple(question)).encode(), digest_size=6).hexdigest()
