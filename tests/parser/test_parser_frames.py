"""Frames between pool and worker: whatever bytes come, the pool gets a frame or an error."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as some

from services.parser.sandbox.frames import (
    HEAD,
    PAGE_BYTES_MAX,
    Frame,
    FrameError,
    Kind,
    decode_body,
    decode_head,
    encode,
)

TEXT = some.text(some.characters(exclude_categories=["Cs"]), max_size=300)


def _decode(sent: bytes) -> Frame:
    return decode_body(decode_head(sent[: HEAD.size]), sent[HEAD.size :])


@given(some.sampled_from(Kind), some.integers(0, 2**32 - 1), TEXT, TEXT)
def test_frames_come_back_as_they_went(kind: Kind, number: int, first: str, second: str) -> None:
    """Every frame that can be made decodes to itself."""
    frame = Frame(kind, number, first, second)
    assert _decode(encode(frame)) == frame


@given(some.binary(max_size=400))
def test_arbitrary_bytes_are_a_frame_or_an_error(sent: bytes) -> None:
    """No bytes raise anything but FrameError, and what decodes is what the bytes say."""
    try:
        frame = _decode(sent)
    except FrameError:
        return
    assert encode(frame) == sent


@given(some.sampled_from(Kind), TEXT, TEXT, some.data())
def test_damaged_frames_are_a_frame_or_an_error(
    kind: Kind, first: str, second: str, data: some.DataObject
) -> None:
    """A frame with a byte changed or its end cut decodes to a frame or to FrameError."""
    sent = bytearray(encode(Frame(kind, 1, first, second)))
    sent[data.draw(some.integers(0, len(sent) - 1))] = data.draw(some.integers(0, 255))
    kept = bytes(sent[: data.draw(some.integers(0, len(sent)))])
    try:
        frame = _decode(kept)
    except FrameError:
        return
    assert encode(frame) == kept


def test_bodies_are_bounded_before_they_are_read() -> None:
    """A head that promises more than a page may hold is refused, so nothing is allocated for it."""
    with pytest.raises(FrameError):
        decode_head(HEAD.pack(Kind.PAGE, 1, PAGE_BYTES_MAX, 1))
    with pytest.raises(FrameError):
        encode(Frame(Kind.PAGE, 1, "x" * PAGE_BYTES_MAX, "x"))
