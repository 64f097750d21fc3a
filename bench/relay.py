"""What the gate is measured against: a bare echo, and a relay that only forwards bytes.

python -m bench.relay echo LISTEN
python -m bench.relay relay LISTEN UPSTREAM METHOD METADATA_JSON
"""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from typing import Any

import grpc
import uvloop

ECHO = "bench.Echo/Echo"
_OPTIONS = [("grpc.so_reuseport", 0)]


def echo() -> tuple[str, Any]:
    """Answers what it is sent."""

    async def serve(request: bytes, context: Any) -> bytes:
        return request

    return ECHO, serve


def relay(upstream: str, method: str, metadata: dict[str, str]) -> tuple[str, Any]:
    """Forwards the bytes of one method upstream, and the answer's bytes back."""
    call: Any = grpc.aio.insecure_channel(upstream).unary_unary(f"/{method}")
    pairs = list(metadata.items())

    async def serve(request: bytes, context: Any) -> bytes:
        answer: bytes = await call(request, metadata=pairs, timeout=30)
        return answer

    return method, serve


async def main(kind: str, listen: str, *rest: str) -> None:
    """Serve until told to stop."""
    method, serve = echo() if kind == "echo" else relay(rest[0], rest[1], json.loads(rest[2]))
    service, _, name = method.partition("/")
    server = grpc.aio.server(options=_OPTIONS)
    handler: Any = grpc.unary_unary_rpc_method_handler(serve)
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler(service, {name: handler}),)
    )
    server.add_insecure_port(listen)
    await server.start()
    told = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, told.set)
    await told.wait()
    await server.stop(0)


if __name__ == "__main__":
    uvloop.run(main(*sys.argv[1:]))
