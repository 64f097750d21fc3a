"""Numbers as protobuf reads them."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from tollgate.storage.v1 import object_pb2

from chassis.varint import varint


@given(st.integers(0, 1 << 40))
def test_varints_are_protobuf_s(value: int) -> None:
    """Lengths are written as protobuf reads them."""
    written = object_pb2.GetObjectRequest.FromString(b"\x18" + varint(value))
    assert written.offset == value
