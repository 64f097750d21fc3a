"""Numbers as protobuf writes them, for those who write a field without building its message."""

from __future__ import annotations


def varint(value: int) -> bytes:
    """Base 128, the least significant group first; the high bit says that more follow.

    `value` is 0 or more. See https://protobuf.dev/programming-guides/encoding/#varints.
    """
    groups = bytearray()
    while value > 0x7F:
        groups.append(value & 0x7F | 0x80)
        value >>= 7
    groups.append(value)
    return bytes(groups)
