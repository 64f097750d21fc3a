"""What a backend says of every answer: what it used and where the answer came from.

It travels in trailing metadata, so that the router meters and labels an answer without decoding it.
"""

from __future__ import annotations

import grpc
from tollgate.cost.v1 import usage_pb2
from tollgate.router.v1 import answer_pb2

from chassis.call import PROVENANCE, USAGE


def stamp(
    context: grpc.aio.ServicerContext,  # type: ignore[type-arg]  # any request and response
    *,
    usage: usage_pb2.Usage,
    provenance: answer_pb2.Provenance,
) -> None:
    """Set the usage and provenance of the answer being given, once, before it ends."""
    context.set_trailing_metadata(
        ((USAGE, usage.SerializeToString()), (PROVENANCE, provenance.SerializeToString()))
    )
