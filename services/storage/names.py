"""What names, metadata and page tokens may be; a refusal is an InvalidField naming its field."""

from __future__ import annotations

import hashlib
import hmac
import re
import unicodedata
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Mapping
from dataclasses import dataclass

from chassis.errors import InvalidField

OBJECT_NAME_BYTES_MAX = 1_024
PAIRS_MAX = 64
PAIR_BYTES_MAX = 2_048
PAGE_SIZE_MAX, PAGE_SIZE_DEFAULT = 1_000, 100
CONTENT_TYPE_DEFAULT = "application/octet-stream"

_BUCKET = re.compile(r"[a-z0-9-]{3,63}")
# type "/" subtype, each a token of RFC 9110, then parameters of printable ASCII.
_TOKEN = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"  # noqa: S105  # a pattern, no password
_CONTENT_TYPE = re.compile(rf"{_TOKEN}/{_TOKEN}( *;[ -~]*)?")
_CONTENT_TYPE_MAX = 255
_PAGE_TOKEN_MAX = 4_096
_MAC_BYTES = 16


def checked_bucket(field: str, name: str) -> str:
    """A bucket's name: 3 to 63 lower-case letters, digits and hyphens."""
    if not _BUCKET.fullmatch(name):
        raise InvalidField.of(field, "must be 3 to 63 lower-case letters, digits and hyphens")
    return name


def checked_object_name(field: str, name: str) -> str:
    """An object's name: 1 to 1,024 bytes, no control characters, no way up or out."""
    checked_text(field, name, OBJECT_NAME_BYTES_MAX)
    if name.startswith("/") or name.endswith("/"):
        raise InvalidField.of(field, "must neither start nor end with a slash")
    if any(part in (".", "..") for part in name.split("/")):
        raise InvalidField.of(field, "must have no part that is `.` or `..`")
    return name


def checked_text(field: str, text: str, bytes_max: int, *, empty: bool = False) -> str:
    """Text of at most so many bytes of UTF-8 without control characters."""
    if not text and not empty:
        raise InvalidField.of(field, "must not be empty")
    # The count of characters first, which costs nothing: a character is at least a byte.
    if len(text) > bytes_max or len(text.encode(errors="replace")) > bytes_max:
        raise InvalidField.of(field, f"must be at most {bytes_max:,} bytes of UTF-8")
    # Category C is control, format, surrogate, private and unassigned: Cc and Cs have no place.
    if not text.isprintable() and any(unicodedata.category(c) in ("Cc", "Cs") for c in text):
        raise InvalidField.of(field, "must have no control characters")
    return text


def checked_content_type(field: str, content_type: str) -> str:
    """A media type as in RFC 9110; application/octet-stream for an empty one."""
    if not content_type:
        return CONTENT_TYPE_DEFAULT
    if len(content_type) > _CONTENT_TYPE_MAX or not _CONTENT_TYPE.fullmatch(content_type):
        raise InvalidField.of(field, f"must be type/subtype, {_CONTENT_TYPE_MAX} bytes at the most")
    return content_type


def checked_pairs(field: str, pairs: Mapping[str, str]) -> dict[str, str]:
    """Metadata: at most 64 pairs, each with a key and of at most 2 KiB together with its value."""
    if len(pairs) > PAIRS_MAX:
        raise InvalidField.of(field, f"must have at most {PAIRS_MAX} pairs")
    for key, value in pairs.items():
        if not key:
            raise InvalidField.of(field, "must have no empty key")
        if len(key.encode()) + len(value.encode()) > PAIR_BYTES_MAX:
            raise InvalidField.of(field, f"must have pairs of at most {PAIR_BYTES_MAX:,} bytes")
        # The one character that PostgreSQL's text cannot hold.
        if "\0" in key or "\0" in value:
            raise InvalidField.of(field, "must have no NUL character")
    return dict(pairs)


def checked_page_size(size: int) -> int:
    """How many entries a page has at the most."""
    if size == 0:
        return PAGE_SIZE_DEFAULT
    if not 1 <= size <= PAGE_SIZE_MAX:
        raise InvalidField.of("page_size", f"must be 1 to {PAGE_SIZE_MAX:,}")
    return size


def past_prefix(prefix: str) -> str | None:
    """The first text, by code point, after all that begin with the prefix; None when there is none.

    UTF-8 sorts by code point, so this bounds an index scan over names in the C collation.
    """
    stem = prefix.rstrip("\U0010ffff")
    if not stem:
        return None
    following = ord(stem[-1]) + 1
    # Surrogates are no characters of their own.
    return stem[:-1] + chr(0xE000 if following == 0xD800 else following)


@dataclass(frozen=True, slots=True)
class PageTokens:
    """Opaque page tokens: where the last page ended, bound by a MAC to the list that it is of.

    `scope` says which list that is: its kind, tenant and parameters. A token of another list, of
    another tenant or of one's own making is refused.
    """

    secret: bytes

    def made(self, scope: tuple[str, ...], last: str) -> str:
        """The token of the page that begins after `last`."""
        text = last.encode()
        return self._encoded(self._mac(scope, text), text)

    def read(self, scope: tuple[str, ...], token: str) -> str:
        """What was last on the page before; empty for no token."""
        if not token:
            return ""
        fault = InvalidField.of("page_token", "must be a token that this list answered with")
        if len(token) > _PAGE_TOKEN_MAX:
            raise fault
        try:
            raw = urlsafe_b64decode(token.encode("ascii"))
        except ValueError:
            raise fault from None
        mac, text = raw[:_MAC_BYTES], raw[_MAC_BYTES:]
        # Decoding skips what is no base64, so one page would have many tokens.
        if self._encoded(mac, text) != token:
            raise fault
        if not hmac.compare_digest(mac, self._mac(scope, text)):
            raise fault
        return text.decode()

    @staticmethod
    def _encoded(mac: bytes, text: bytes) -> str:
        return urlsafe_b64encode(mac + text).decode()

    def _mac(self, scope: tuple[str, ...], text: bytes) -> bytes:
        parts = [part.encode() for part in scope] + [text]
        # Lengths first, so that no two scopes read the same.
        message = b"".join(len(part).to_bytes(4, "big") + part for part in parts)
        return hmac.digest(self.secret, b"storage.page" + message, hashlib.sha256)[:_MAC_BYTES]
