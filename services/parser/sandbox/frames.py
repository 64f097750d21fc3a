"""Frames between the pool and its workers: plain, length-prefixed, bounded; nothing is unpickled.

A frame is a head (kind, number, the lengths of two texts) and two texts in UTF-8. The parent
trusts nothing of it: whatever bytes come, decoding ends in a Frame or in a FrameError.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum

HEAD = struct.Struct(">BIII")
SIZE = struct.Struct(">Q")

PAGE_BYTES_MAX = 3 * 1024 * 1024 + 512 * 1024
"""Markdown and text of one page together: with less, an event fits gRPC's usual 4 MiB."""


class Kind(IntEnum):
    """What a frame says; in brackets what its number and texts are."""

    READY = 1
    PARSE = 2  # to the worker (max pages; media type, file name); SIZE and the document follow
    INSPECT = 3  # to the worker, as PARSE
    OPENED = 4  # (pages; media type)
    LOCKED = 5  # the document needs a password (; media type)
    PAGE = 6  # (number; markdown, text)
    DONE = 7
    FAILED = 8  # (a count; a Fault, the media type)


class Fault:
    """Why a document gave no pages; the parent owns the words for each."""

    EMPTY = "empty"
    MALFORMED = "malformed"
    NOT_UTF8 = "not_utf8"
    UNSUPPORTED = "unsupported"
    EXPANDS = "expands"
    NESTED = "nested"
    MEMORY = "memory"
    TOO_MANY_PAGES = "too_many_pages"
    PAGE_TOO_LARGE = "page_too_large"


class FrameError(ValueError):
    """The bytes are no frame."""


@dataclass(frozen=True, slots=True)
class Head:
    """The head of a frame: what follows it."""

    kind: Kind
    number: int
    first_bytes: int
    second_bytes: int

    @property
    def body_bytes(self) -> int:
        """How many bytes follow the head."""
        return self.first_bytes + self.second_bytes


@dataclass(frozen=True, slots=True)
class Frame:
    """One message between parent and worker."""

    kind: Kind
    number: int = 0
    first: str = ""
    second: str = ""


def encode(frame: Frame) -> bytes:
    """The frame's bytes. Raises FrameError where it is larger than a page may be."""
    first, second = frame.first.encode(), frame.second.encode()
    if len(first) + len(second) > PAGE_BYTES_MAX:
        raise FrameError("frame too large")
    return HEAD.pack(frame.kind, frame.number, len(first), len(second)) + first + second


def decode_head(head: bytes) -> Head:
    """The head of a frame. Raises FrameError for anything else, over-long bodies included."""
    if len(head) != HEAD.size:
        raise FrameError("short head")
    kind, number, first_bytes, second_bytes = HEAD.unpack(head)
    if first_bytes + second_bytes > PAGE_BYTES_MAX:
        raise FrameError("frame too large")
    try:
        return Head(Kind(kind), number, first_bytes, second_bytes)
    except ValueError:
        raise FrameError("unknown kind") from None


def decode_body(head: Head, body: bytes) -> Frame:
    """The frame of a head and the bytes after it. Raises FrameError where they do not fit."""
    if len(body) != head.body_bytes:
        raise FrameError("short body")
    try:
        first = body[: head.first_bytes].decode()
        second = body[head.first_bytes :].decode()
    except UnicodeDecodeError:
        raise FrameError("not UTF-8") from None
    return Frame(head.kind, head.number, first, second)
